//! A Deployment of three is updated while clients ask its Service. No request fails, though no pod has a `preStop` that would
//! let it wait: its endpoint leaves the rules before it is told to end.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, ensure};

use super::{Fleet, SOON, manifests, wait};
use crate::voyage::http_text;

const REPLICAS: usize = 3;
const ROLLOUTS: usize = 2;
const CLIENTS: usize = 4;
/// Between two requests of a client: a busy machine has others to serve.
const PAUSE: Duration = Duration::from_millis(5);

/// What became of a client's requests.
#[derive(Default)]
struct Tally {
    asked: usize,
    failures: Vec<String>,
}

/// The point.
pub(super) fn updates_unnoticed(fleet: &mut Fleet) -> anyhow::Result<String> {
    fleet.apply("ferry.yaml", manifests::FERRY)?;
    fleet.until_ready("ferry", REPLICAS)?;
    let service = fleet.get("service ferry")?;
    let address: IpAddr = service["spec"]["clusterIP"].as_str().context("an address")?.parse()?;
    let to = SocketAddr::new(address, 80);
    wait("the Service answers", SOON, || Ok(http_text("GET", to, "/").ok()))?;
    let ended = AtomicBool::new(false);
    let (updated, tallies) = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(|| ask_until(&ended, to))).collect();
        let updated = update(fleet);
        ended.store(true, Ordering::Relaxed);
        (updated, clients.into_iter().map(|client| client.join()).collect::<Vec<_>>())
    });
    updated?;
    let mut all = Tally::default();
    for tally in tallies {
        let tally = tally.map_err(|_| anyhow::anyhow!("a client panicked"))?;
        all.asked += tally.asked;
        all.failures.extend(tally.failures);
    }
    ensure!(all.failures.is_empty(), "{} of {} requests failed: {:?}", all.failures.len(), all.asked, all.failures);
    fleet.kubectl("delete deployment,service ferry")?;
    wait("its pods are gone", SOON, || Ok(fleet.pods("ferry")?.is_empty().then_some(())))?;
    Ok(format!("{ROLLOUTS} updates, {} requests, none failed", all.asked))
}

fn update(fleet: &Fleet) -> anyhow::Result<()> {
    for number in 1..=ROLLOUTS {
        // `rollout restart` marks the second, and refuses another within the same one.
        fleet.kubectl(&format!("set env deployment/ferry UPDATE={number}"))?;
        fleet.kubectl("rollout status deployment ferry --timeout=300s")?;
        wait("those before have ended", SOON, || Ok((fleet.pods("ferry")?.len() == REPLICAS).then_some(())))?;
    }
    Ok(())
}

fn ask_until(ended: &AtomicBool, to: SocketAddr) -> Tally {
    let mut tally = Tally::default();
    while !ended.load(Ordering::Relaxed) {
        tally.asked += 1;
        match http_text("GET", to, "/") {
            Ok((200, text)) if text == "aboard\n" => {}
            Ok(other) => tally.failures.push(format!("{other:?}")),
            Err(error) => tally.failures.push(format!("{error:#}")),
        }
        std::thread::sleep(PAUSE);
    }
    tally
}
