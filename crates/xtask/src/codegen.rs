//! Generates the protobuf messages that are committed, so that no user's build needs `protoc` or a build script.

use std::path::Path;

use anyhow::Context as _;

/// What is generated: the crate, the file in its `proto`, the package that this declares.
const PROTOCOLS: &[(&str, &str, &str)] = &[
    ("cri", "runtime.proto", "runtime.v1"),
    ("plugin", "pluginregistration.proto", "pluginregistration"),
    ("plugin", "csi.proto", "csi.v1"),
    ("plugin", "deviceplugin.proto", "v1beta1"),
    ("plugin", "podresources.proto", "v1"),
];

/// `codegen`: each `crates/<crate>/proto/<file>` becomes `crates/<crate>/src/generated/<package>.rs`.
pub(crate) fn run() -> anyhow::Result<()> {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    PROTOCOLS.iter().try_for_each(|(owner, file, package)| generate(&crates.join(owner), file, package))
}

fn generate(owner: &Path, file: &str, package: &str) -> anyhow::Result<()> {
    let files = protox::compile([file], [owner.join("proto")]).with_context(|| format!("compile {file}"))?;
    let out = owner.join("src/generated");
    std::fs::create_dir_all(&out)?;
    tonic_prost_build::configure().out_dir(&out).compile_fds(files).context("generate code")?;
    let (made, kept) = (format!("{package}.rs"), format!("{}.rs", package.replace('.', "_")));
    std::fs::rename(out.join(made), out.join(kept))?;
    Ok(())
}
