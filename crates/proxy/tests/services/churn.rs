//! Many small changes, then a look at the kernel: it must be where a fresh start would have led.

use fuzz::Dice;
use serde_json::json;

use crate::host::{End, Host, Way, ip, on_hosts, ready};
use crate::kernel;

fn change(host: &Host, dice: &mut Dice) {
    let name = dice.number(6);
    let service = format!("s{name}");
    if dice.chance(60) {
        let mut ends = Vec::new();
        for n in 1..10 {
            let node = if n % 3 == 0 { "there" } else { "here" };
            for address in [format!("10.85.0.{n}"), format!("fd00:85::{n:x}")] {
                if dice.chance(50) {
                    let (ready_now, terminating) = (dice.chance(80), dice.chance(20));
                    ends.push(End { node, ready: ready_now, terminating, ..ready(ip(&address)) });
                }
            }
        }
        host.endpoints(&service, &ends);
    } else if dice.chance(20) {
        host.remove_service(&service);
    } else {
        let policy = |local| if local { "Local" } else { "Cluster" };
        let node_port = 30_000 + name * 10;
        // Two services share each address, and now and then a port.
        let address = name / 2;
        let port = 80 + dice.number(2);
        let vips = [format!("10.96.0.{}", address + 1), format!("fd00:96::{:x}", address + 1)];
        let vips = &vips[..if dice.chance(50) { 1 } else { 2 }];
        let ranges: &[&str] = if dice.chance(50) { &["192.0.2.0/24", "2001:db8::/32"] } else { &["198.51.100.0/24"] };
        let spec = json!({
            "type": "LoadBalancer", "clusterIP": vips[0], "clusterIPs": vips,
            "sessionAffinity": if dice.chance(30) { "ClientIP" } else { "None" },
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 100 + dice.number(2)}},
            "internalTrafficPolicy": policy(dice.chance(30)), "externalTrafficPolicy": policy(dice.chance(50)),
            "loadBalancerSourceRanges": if dice.chance(60) { ranges } else { &[] },
            "ports": [{"name": "", "port": port, "nodePort": node_port},
                {"name": "udp", "port": port, "protocol": "UDP", "nodePort": node_port}]});
        host.balancer(&service, spec, &format!("198.51.100.{}", name + 1));
    }
}

#[test]
fn the_kernel_follows_the_rules() {
    on_hosts(async |host| {
        // Programs of iptables take their time, and IPVS is where everything does.
        let seeds = if host.way == Way::Nftables { 3 } else { 1 };
        for seed in 1..=seeds {
            let mut dice = Dice::new(seed);
            let mut proxy = host.proxy().await;
            for round in 0..60 {
                for _ in 0..=dice.number(4) {
                    change(&host, &mut dice);
                }
                proxy.settled().await;
                if round % 12 != 11 {
                    continue;
                }
                println!("seed {seed}, round {round}");
                if host.way == Way::Ipvs {
                    crate::ipvs::check(&host);
                    continue;
                }
                if !host.way.is_iptables() {
                    kernel::check(&host).await;
                    continue;
                }
                let followed = kernel::rules_of_iptables(host.way);
                proxy.stop().await;
                proxy = host.proxy().await;
                assert_eq!(followed, kernel::rules_of_iptables(host.way));
            }
            assert!(!host.event_reasons().iter().any(|reason| reason == "ServiceRulesFailed"));
            proxy.stop().await;
        }
    });
}
