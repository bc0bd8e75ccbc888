//! Hooks of a configuration, compiled.

use super::PlanError;
use super::process::{c_string, c_strings};
use super::types::HookPlan;
use crate::oci;

/// The hooks of one stage.
///
/// # Errors
/// A path that is not absolute, a zero byte inside.
pub fn hook_plans(hooks: &[oci::Hook]) -> Result<Vec<HookPlan>, PlanError> {
    hooks.iter().map(hook_plan).collect()
}

fn hook_plan(hook: &oci::Hook) -> Result<HookPlan, PlanError> {
    let path = hook.path.to_string_lossy().into_owned();
    if !path.starts_with('/') {
        return Err(PlanError::invalid("hooks.path", path, "is not an absolute path"));
    }
    let program = c_string("hooks.path", path)?;
    let arguments = c_strings("hooks.args", &hook.args)?;
    let arguments = if arguments.is_empty() { vec![program.clone()] } else { arguments };
    Ok(HookPlan { program, arguments, environment: c_strings("hooks.env", &hook.env)?, timeout_s: hook.timeout })
}
