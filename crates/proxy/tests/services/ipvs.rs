//! What only the mode `ipvs` has.

use proxy::{Config, Mode, Proxy, StartError};
use sys::netlink::ipvs::Ipvs;

use crate::host::{Way, on_a_host};

/// Whether this kernel has IPVS, which it loads when it is asked for.
pub(crate) fn is_there() -> bool {
    Ipvs::open().is_ok()
}

#[test]
fn a_kernel_that_cannot_is_told_with_the_remedy() {
    on_a_host(Way::Nftables, async |host| {
        let mut config = Config { mode: Mode::Ipvs, ..host.config() };
        config.ipvs.scheduler = "orlop".to_owned();
        let error = Proxy::start(config, host.desired.clone()).unwrap_err();
        match is_there() {
            true => assert!(matches!(&error, StartError::NoScheduler { scheduler, .. } if scheduler == "orlop")),
            false => assert!(matches!(error, StartError::NoIpvs(_))),
        }
        let remedy = if is_there() { "`modprobe ip_vs_orlop`" } else { "`modprobe ip_vs`" };
        assert!(error.to_string().contains(remedy), "{error}");
    });
}
