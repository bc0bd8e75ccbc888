//! What must hold before a commit.

use crate::workspace::{cargo, run};

/// What of it.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Without lints, which build everything once more
    #[arg(long)]
    quick: bool,
}

/// Format, the rules of [`crate::tidy`], and lints.
pub(crate) fn run_command(options: &Options) -> anyhow::Result<()> {
    run(&mut cargo(&["fmt", "--all", "--", "--check"]))?;
    crate::tidy::run()?;
    if !options.quick {
        run(&mut cargo(&["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"]))?;
    }
    println!("check: ok");
    Ok(())
}
