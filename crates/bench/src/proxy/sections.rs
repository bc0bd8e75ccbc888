//! What is measured of a proxy, in its order.

use std::net::SocketAddr;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use testkit::api::Api;
use testkit::service_lab::{Client, Side};

use crate::arguments::ProxyArguments;
use crate::measure::{Measure, Results};

use super::contestant::{Contestant, Start};
use super::probes;
use super::world::{SINK_PORT, World, first_pod};

/// After a start both give memory back: orlop when nothing has changed for a few seconds, Go's collector by and by.
const SETTLE: Duration = Duration::from_secs(20);
/// Upstream lets a second pass between two syncs; a change that is alone does not wait for it.
const APART: Duration = Duration::from_millis(1200);
/// What takes long is done less often: no more begins after so much time, but the first few.
const ENOUGH: Duration = Duration::from_secs(90);
const AT_LEAST: u32 = 3;

const CONNECTIONS: usize = 2000;
const STREAM: Duration = Duration::from_secs(3);

const CHANGES: u32 = 1000;
/// From one change of endpoints to the next.
const PACE: Duration = Duration::from_millis(10);

/// All that the measuring of one proxy needs.
pub(super) struct Sections<'a> {
    pub(super) world: &'a World,
    pub(super) api: &'a Api,
    pub(super) arguments: &'a ProxyArguments,
    pub(super) results: &'a mut Results,
}

/// A proxy on its node.
struct Stage {
    side: Side,
    proxy: Contestant,
}

impl Sections<'_> {
    /// Measures everything of one proxy; what there is before a fault stays.
    pub(super) fn run(&mut self, start: &Start<'_>) -> anyhow::Result<()> {
        let side = Side::new()?;
        let pod = first_pod();
        side.place(Client::Endpoint).run(probes::open_sink((pod, SINK_PORT).into()))??;
        let direct = (pod, testkit::service_lab::PORTS[0]).into();
        self.path(
            &side,
            vec![direct],
            (pod, SINK_PORT).into(),
            [Measure::FirstPacketDirect, Measure::ThroughputDirect],
        )?;
        let mut stage = self.start(start, side)?;
        std::thread::sleep(SETTLE);
        self.results.add(Measure::ProxyRss, stage.proxy.usage()?.rss_mb());
        let (served, sink) = (self.world.served(), self.world.sink());
        self.path(&stage.side, served, sink, [Measure::FirstPacket, Measure::Throughput])?;
        let count = self.arguments.changes;
        self.world.prepare(self.api, count + 1)?;
        let lived = self.life(&mut stage).and_then(|()| self.changes(&mut stage));
        self.world.clear(self.api, count + 1)?;
        lived?;
        self.results.add(Measure::ProxyPeak, stage.proxy.usage()?.peak_mb());
        stage.proxy.stop()
    }

    fn start(&mut self, start: &Start<'_>, side: Side) -> anyhow::Result<Stage> {
        let begun = Instant::now();
        let mut stage = Stage { proxy: start.on(&side)?, side };
        for to in self.world.served() {
            let took = self.until_served(&mut stage, to, begun)?;
            if to == self.world.served()[0] {
                self.results.add(Measure::ProxyStart, took.as_secs_f64());
            }
        }
        eprintln!("    started, {:.1} s", begun.elapsed().as_secs_f64());
        Ok(stage)
    }

    /// What connections and streams take on the way to `to` and `sink`.
    fn path(
        &mut self,
        side: &Side,
        to: Vec<SocketAddr>,
        sink: SocketAddr,
        as_measures: [Measure; 2],
    ) -> anyhow::Result<()> {
        let [connection, throughput] = as_measures;
        let client = side.place(Client::Pod);
        client.run(probes::connections(to.clone(), to.len()))??;
        for took in client.run(probes::connections(to, CONNECTIONS))?? {
            self.results.add(connection, took.as_secs_f64() * 1e6);
        }
        self.results.add(throughput, client.run(probes::stream(sink, STREAM))??);
        Ok(())
    }

    /// Services come and go. A bare watcher beside shows what of their times is the API server's.
    fn life(&mut self, stage: &mut Stage) -> anyhow::Result<()> {
        let mut session = self.api.session()?;
        let long_since = Instant::now();
        for nth in 0..self.arguments.changes {
            if long_since.elapsed() > ENOUGH && nth >= AT_LEAST {
                break;
            }
            let to = self.world.new_address(nth);
            let seen = self.world.watcher(self.api, nth, "ADDED");
            std::thread::sleep(APART);
            let begun = Instant::now();
            let served = stage.side.place(Client::Pod).start(probes::until_served(to, begun, self.limit()));
            self.world.create(&mut session, nth)?;
            let took =
                served.wait()?.ok_or_else(|| stage.proxy.silent("a Service that was created does not answer"))?;
            self.results.add_ms(Measure::ServiceCreated, took);
            self.results.add_ms(Measure::ServiceSeen, joined(seen)?.duration_since(begun));
            let seen = self.world.watcher(self.api, nth, "DELETED");
            std::thread::sleep(APART);
            let begun = Instant::now();
            // From now on: the API server frees the address before it answers, and tells watchers before that.
            let refused = stage.side.place(Client::Pod).start(probes::until_refused(to, begun, self.limit()));
            self.world.delete(&mut session, nth)?;
            let took = refused.wait()?.ok_or_else(|| stage.proxy.silent("a Service that was deleted answers still"))?;
            self.results.add_ms(Measure::ServiceDeleted, took);
            self.results.add_ms(Measure::DeletionSeen, joined(seen)?.duration_since(begun));
        }
        eprintln!("    Services came and went, {:.0} s", long_since.elapsed().as_secs_f64());
        Ok(())
    }

    /// Endpoints come and go.
    fn changes(&mut self, stage: &mut Stage) -> anyhow::Result<()> {
        let mut session = self.api.session()?;
        let before = stage.proxy.usage()?.cpu_s();
        let begun = Instant::now();
        for nth in 0..CHANGES {
            let due = begun + PACE * nth;
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            self.world.change(&mut session, nth)?;
        }
        // What comes after all of them is seen after all of them.
        let last = self.arguments.changes;
        let begun_last = Instant::now();
        self.world.create(&mut session, last)?;
        self.until_served(stage, self.world.new_address(last), begun_last)?;
        self.results.add(Measure::ProxyCpu, stage.proxy.usage()?.cpu_s() - before);
        eprintln!("    endpoints came and went, {:.0} s", begun.elapsed().as_secs_f64());
        self.world.delete(&mut session, last)
    }

    fn until_served(&self, stage: &mut Stage, to: SocketAddr, begun: Instant) -> anyhow::Result<Duration> {
        let served = stage.side.place(Client::Pod).run(probes::until_served(to, begun, self.limit()))?;
        served.ok_or_else(|| stage.proxy.silent(&format!("{to} does not answer after {} s", self.arguments.limit)))
    }

    fn limit(&self) -> Duration {
        Duration::from_secs(self.arguments.limit)
    }
}

/// What a thread has found.
fn joined<T>(thread: JoinHandle<anyhow::Result<T>>) -> anyhow::Result<T> {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
