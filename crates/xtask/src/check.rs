//! What must hold before a commit.

use crate::workspace::{cargo, run};

/// Format, lints, and the rules of [`crate::tidy`].
pub(crate) fn run_all() -> anyhow::Result<()> {
    run(&mut cargo(&["fmt", "--all", "--", "--check"]))?;
    crate::tidy::run()?;
    run(&mut cargo(&["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"]))
}

/// The command.
pub(crate) fn run_command() -> anyhow::Result<()> {
    run_all()?;
    println!("check: ok");
    Ok(())
}
