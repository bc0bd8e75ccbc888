//! Hooks that this process runs, in its own namespaces; those of the container's are the executor's.

use executor::oci::Hook;
use executor::{hook, hook_plans};

use crate::error::Error;

/// Runs the hooks of a stage. `state` is that of [`crate::container::state_json`].
pub(crate) fn run(stage: &'static str, hooks: &[Hook], state: &str, pid: i32, status: &str) -> Result<(), Error> {
    if hooks.is_empty() {
        return Ok(());
    }
    let pid = u32::try_from(pid).unwrap_or(0);
    let state = hook::with_status(state, pid, status).map_err(Error::json("the container's state"))?;
    Ok(hook::run_all(stage, &hook_plans(hooks)?, &state)?)
}
