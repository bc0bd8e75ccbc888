//! Developer commands: demo, test, check, bench, lab, codegen.

mod codegen;

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    match args.next().as_deref() {
        Some("codegen") => codegen::run(&args.collect::<Vec<_>>()),
        other => anyhow::bail!("unknown command {other:?}; known: codegen"),
    }
}
