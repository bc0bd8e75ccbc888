//! One container by the command line of an OCI runtime, without a daemon: `run` of a program that ends at once.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, ensure};

use crate::arguments::{Common, SideName};
use crate::measure::{Measure, Results};

const RUNS: usize = 100;
const WARM_UP: usize = 3;

/// Measures the runtime of a side: `orlop oci`, or runc.
pub(super) fn run(name: SideName, arguments: &Common, scratch: &Path, results: &mut Results) -> anyhow::Result<()> {
    let bundle = scratch.join("bundle");
    make(name, arguments, &bundle)?;
    eprintln!("  {RUNS} containers without a daemon");
    for number in 0..WARM_UP + RUNS {
        let mut command = runtime(name, arguments)?;
        command.arg("--root").arg(scratch.join("states")).args(["run", "--bundle"]).arg(&bundle);
        command.arg(format!("bench-{number}")).stdin(Stdio::null());
        let begin = Instant::now();
        let status = command.status().context("start the OCI runtime")?;
        ensure!(status.success(), "`true` in a container ended with {status}");
        if number >= WARM_UP {
            results.add_ms(Measure::OciRun, begin.elapsed());
        }
    }
    Ok(())
}

fn runtime(name: SideName, arguments: &Common) -> anyhow::Result<Command> {
    Ok(match name {
        SideName::Orlop => {
            let mut command = Command::new(&arguments.orlop);
            command.arg("oci");
            command
        }
        SideName::Reference => Command::new(arguments.reference()?.join("runc")),
    })
}

/// A busybox with the configuration that the runtime itself proposes; both propose the same namespaces, mounts and masks.
fn make(name: SideName, arguments: &Common, bundle: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(bundle.join("rootfs"))?;
    testkit::image::busybox_root(&bundle.join("rootfs"))?;
    let status = runtime(name, arguments)?.args(["spec", "--bundle"]).arg(bundle).status()?;
    ensure!(status.success(), "`spec` ended with {status}");
    let path = bundle.join("config.json");
    let mut spec: serde_json::Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    spec["process"]["terminal"] = false.into();
    spec["process"]["args"] = serde_json::json!(["/bin/true"]);
    std::fs::write(path, spec.to_string())?;
    Ok(())
}
