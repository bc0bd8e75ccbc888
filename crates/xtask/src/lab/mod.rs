//! Labs: programs built from their published Go modules, a control plane, and machines with another kernel.

mod cluster;
pub(crate) mod vm;

use clap::Subcommand;
use testkit::{go, suite};

/// Which lab, and what to do with it.
#[derive(Subcommand)]
pub(crate) enum Lab {
    /// A virtual machine with Debian's cloud kernel (control groups version 2, IPVS, AppArmor or SELinux)
    Vm(vm::Options),
    /// A control plane (etcd, kube-apiserver, controllers, scheduler) in a network namespace of its own
    Cluster(cluster::Cluster),
    /// Build the images that the suites pull, and print their names
    Images,
    /// Build the reference: containerd, runc, the CNI plugins, kubelet and kube-proxy
    Reference,
}

/// Runs a lab's command.
pub(crate) fn run(lab: &Lab) -> anyhow::Result<()> {
    match lab {
        Lab::Vm(options) => vm::run(options),
        Lab::Cluster(command) => cluster::run(command),
        Lab::Images => {
            suite::build(suite::ALL)?;
            suite::ALL.iter().flat_map(suite::Image::names).for_each(|name| println!("{name}"));
            Ok(())
        }
        Lab::Reference => {
            for program in go::REFERENCE.iter().chain(go::REFERENCE_NODE) {
                println!("{}", go::build(program)?.display());
            }
            Ok(())
        }
    }
}
