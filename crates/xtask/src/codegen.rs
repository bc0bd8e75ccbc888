//! Generates the protobuf messages that are committed, so that no user's build needs `protoc` or a build script.

use anyhow::Context as _;

/// `codegen`: `crates/cri/proto/runtime.proto` becomes `crates/cri/src/generated/runtime_v1.rs`.
pub(crate) fn run() -> anyhow::Result<()> {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let proto = root.join("crates/cri/proto");
    let files = protox::compile(["runtime.proto"], [&proto]).context("compile runtime.proto")?;
    let out = root.join("crates/cri/src/generated");
    std::fs::create_dir_all(&out)?;
    tonic_prost_build::configure().out_dir(&out).compile_fds(files).context("generate code")?;
    std::fs::rename(out.join("runtime.v1.rs"), out.join("runtime_v1.rs"))?;
    Ok(())
}
