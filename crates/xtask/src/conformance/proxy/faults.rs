//! What a proxy must survive: its own sudden end, others that touch its rules, and an API server that is away. The other
//! proxy is left alone and says what should be; connections that were there before must go on.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use fuzz::Dice;
use serde_json::{Value, json};
use testkit::control_plane::Part;
use testkit::host;
use testkit::service_lab::{Answer, Answers, Client, Flow, Kept, NODE, Pending, Place, Protocol};
use tokio::sync::Mutex;

use super::contestant::{METRICS, Mode};
use super::history;
use super::known;
use super::stage::{Inquiry, Stage, inquiries, shown};
use super::world::{Service, Slice, World, cluster_ips, end};

/// How long the rules may take to be right again, on a machine that does other things too.
const LIMIT: Duration = Duration::from_secs(60);

/// The one that is disturbed.
const OURS: usize = 1;

/// A name and what happens.
pub(super) type Fault = (&'static str, fn(&mut Stage<'_>, &Doses) -> anyhow::Result<String>);

/// All of them.
pub(super) const ALL: &[Fault] = &[
    ("killed-at-random", killed_at_random),
    ("rules-deleted", rules_deleted),
    ("api-server-killed", api_server_killed),
    ("api-server-hangs", api_server_hangs),
    ("api-server-silent", api_server_silent),
    ("flapping-watches", flapping_watches),
    ("damaged-services", damaged_services),
];

/// Those that take seconds, as a part of all tests.
pub(super) const QUICK: [&str; 2] = ["api-server-hangs", "flapping-watches"];

/// How much of it.
pub(super) struct Doses {
    pub(super) kills: usize,
    /// How often the world changes behind watches that break off.
    pub(super) changes: usize,
    pub(super) seed: u64,
}

/// Connections through a service that does not change, and clients of UDP that keep their ports.
struct Held {
    connections: Vec<(Client, Arc<Mutex<Kept>>)>,
    /// With what they were answered first.
    flows: Vec<(Client, Arc<Flow>, Answer)>,
}

/// The service of the connections that are held.
const HELD: u8 = 50;

fn world() -> World {
    let ports = [("tcp", Protocol::Tcp, 80), ("udp", Protocol::Udp, 80)];
    let service = Service::new(HELD).ports(&ports).with("externalTrafficPolicy", json!("Cluster")).node_ports();
    let slice = Slice::new(HELD, &[end("a"), end("b"), end("r")]);
    let slice = slice.ports(&ports.map(|(name, protocol, _)| (name, protocol, Some(8080))));
    World { services: vec![service], slices: vec![slice] }
}

/// A world that chance made, and the service of those that are held.
fn beside(other: &World) -> World {
    let mut all = world();
    all.services.extend(other.services.clone());
    all.slices.extend(other.slices.clone());
    all
}

impl Held {
    fn open(stage: &mut Stage<'_>) -> anyhow::Result<Self> {
        stage.write(world())?;
        Self::connect(stage)
    }

    fn connect(stage: &Stage<'_>) -> anyhow::Result<Self> {
        let (own, node_port) = (cluster_ips(HELD), 30_000 + u16::from(HELD) * 10);
        let targets = [
            (Client::Pod, SocketAddr::new(own.v4.into(), 80)),
            (Client::Pod, SocketAddr::new(own.v6.into(), 80)),
            (Client::Endpoint, SocketAddr::new(own.v4.into(), 80)),
            (Client::Node, SocketAddr::new(own.v4.into(), 80)),
            (Client::Outside, SocketAddr::new(NODE.v4.into(), node_port)),
        ];
        let open = |(client, to): (Client, SocketAddr)| {
            let opened = stage.sides[OURS].side.place(client).run(Kept::open(to, LIMIT))?;
            let (kept, _) = opened.with_context(|| format!("{to} from {}", client.name()))?;
            anyhow::Ok((client, Arc::new(Mutex::new(kept))))
        };
        // Several each, so that each endpoint has some.
        let connections = targets.into_iter().flat_map(|target| [target; 4]).map(open);
        let connections = connections.collect::<anyhow::Result<_>>()?;
        let begin = |(client, to): (Client, SocketAddr)| {
            let place = stage.sides[OURS].side.place(client);
            let flow = Arc::new(place.run(Flow::open(to))??);
            let first = ask(place, &flow).wait()?;
            ensure!(first.is_served(), "UDP to {to} from {}: {first}", client.name());
            anyhow::Ok((client, flow, first))
        };
        // The node port of UDP is the next one.
        let of_udp = |(client, to): (Client, SocketAddr)| {
            (client, if client == Client::Outside { SocketAddr::new(to.ip(), node_port + 1) } else { to })
        };
        let flows = targets.map(of_udp).into_iter().map(begin).collect::<anyhow::Result<_>>()?;
        Ok(Self { connections, flows })
    }

    /// How many connections and how many flows have been lost. A flow is when another endpoint answers, or the same one sees
    /// somebody else.
    fn lost(&self, stage: &Stage<'_>) -> anyhow::Result<[usize; 2]> {
        let speak = |(client, kept): &(Client, Arc<Mutex<Kept>>)| {
            let kept = Arc::clone(kept);
            stage.sides[OURS].side.place(*client).start(async move { kept.lock().await.is_alive(LIMIT).await })
        };
        let spoken: Vec<_> = self.connections.iter().map(speak).collect();
        let of_flow =
            |(client, flow, _): &(Client, Arc<Flow>, Answer)| ask(stage.sides[OURS].side.place(*client), flow);
        let asked: Vec<_> = self.flows.iter().map(of_flow).collect();
        let mut lost = [0; 2];
        for alive in spoken {
            lost[0] += usize::from(!alive.wait()?);
        }
        for (answer, (_, _, first)) in asked.into_iter().zip(&self.flows) {
            lost[1] += usize::from(answer.wait()? != *first);
        }
        Ok(lost)
    }

    /// Speaks on all of them: the kernel forgets a flow of UDP after 30 s without a packet.
    fn refresh(&self, stage: &Stage<'_>) -> anyhow::Result<()> {
        self.lost(stage).map(drop)
    }

    fn note(&self, stage: &mut Stage<'_>, step: &str) -> anyhow::Result<()> {
        let [connections, flows] = self.lost(stage)?;
        stage.note(step, "connections lost", ["0".to_owned(), connections.to_string()]);
        // With userspace a client that asks once has no flow for long.
        if stage.sides[OURS].who.mode != Mode::Userspace {
            stage.note(step, "flows of UDP that were led elsewhere", ["0".to_owned(), flows.to_string()]);
        }
        Ok(())
    }

    /// After the proxy's own end: rules go on without it, and what it carries itself ends with it. For that others come.
    fn note_death(&mut self, stage: &mut Stage<'_>, step: &str) -> anyhow::Result<()> {
        if stage.sides[OURS].who.mode != Mode::Userspace {
            return self.note(stage, step);
        }
        // A client of UDP goes on, and may find the same endpoint.
        let ([lost, _], all) = (self.lost(stage)?, self.connections.len());
        stage.note(step, "connections ended with the process", [all.to_string(), lost.to_string()]);
        *self = Self::connect(stage)?;
        Ok(())
    }
}

/// Sends once more from the port of a flow. What is lost on a busy machine is sent again.
fn ask(place: &Place, flow: &Arc<Flow>) -> Pending<Answer> {
    const PATIENCE: Duration = Duration::from_secs(1);
    const TRIES: usize = 10;
    let flow = Arc::clone(flow);
    place.start(async move {
        let mut answer = Answer::Silent;
        for _ in 0..TRIES {
            answer = flow.ask(PATIENCE).await;
            if answer != Answer::Silent {
                break;
            }
        }
        answer
    })
}

/// It is killed while it writes, starts again, and finds what it left by halves.
fn killed_at_random(stage: &mut Stage<'_>, doses: &Doses) -> anyhow::Result<String> {
    const SYNC_MAX: u64 = 120;
    let mut held = Held::open(stage)?;
    let mut dice = Dice::new(doses.seed);
    let mut world = World::default();
    let mut longest = Duration::ZERO;
    for kill in 0..doses.kills {
        world = history::next(&world, &mut dice);
        let marker = stage.lab.write(&beside(&world))?;
        stage.world = beside(&world);
        // The moment is what is tested: from before the change arrives until after its sync.
        let moment = u64::try_from(dice.below(usize::try_from(SYNC_MAX)? * 1000))?;
        std::thread::sleep(Duration::from_micros(moment));
        stage.sides[OURS].daemon.kill()?;
        let begun = Instant::now();
        stage.sides[OURS].daemon.start()?;
        stage.sides[OURS].wait_for(marker)?;
        longest = longest.max(begun.elapsed());
        stage.sides[1 - OURS].wait_for(marker)?;
        let step = format!("kill {kill} after {moment} µs");
        stage.compare(&step, inquiries(&stage.world))?;
        held.note_death(stage, &step)?;
    }
    Ok(format!(
        "{} kills; right again after {} ms at most, start of the program included",
        doses.kills,
        longest.as_millis()
    ))
}

/// Somebody else empties all tables.
fn rules_deleted(stage: &mut Stage<'_>, _: &Doses) -> anyhow::Result<String> {
    let held = Held::open(stage)?;
    flush(stage.sides[OURS].side.node())?;
    let begun = Instant::now();
    let marker = stage.lab.marker;
    stage.sides[OURS].wait_for(marker)?;
    let took = begun.elapsed();
    until_alike(stage)?;
    stage.compare("after a flush", inquiries(&stage.world))?;
    // Nothing was on its way while there were no rules, and connection tracking leads what it knows.
    held.note(stage, "after a flush")?;
    Ok(format!("right again after {} ms", took.as_millis()))
}

/// Everything that the program `nft` sees, and what it does not: tables of the old interface.
fn flush(node: &Place) -> anyhow::Result<()> {
    let flush = || -> anyhow::Result<()> {
        host::run(std::process::Command::new("nft").args(["flush", "ruleset"]))?;
        for (program, names) in [("iptables-legacy", "ip_tables_names"), ("ip6tables-legacy", "ip6_tables_names")] {
            let tables = std::fs::read_to_string(format!("/proc/thread-self/net/{names}")).unwrap_or_default();
            for table in tables.lines() {
                for how in ["-F", "-X"] {
                    host::run(std::process::Command::new(program).args(["-w", "-t", table, how]))?;
                }
            }
        }
        Ok(())
    };
    node.run(async move { flush() })?
}

/// Waits until both sides have answered every question alike again. One that has is not asked any more: on a busy machine
/// there is hardly a moment in which none of hundreds of connections is late.
fn until_alike(stage: &Stage<'_>) -> anyhow::Result<Duration> {
    let begun = Instant::now();
    let differs = |(inquiry, answers): &(Inquiry, [Answers; 2])| {
        known::reason_for(inquiry, answers.each_ref(), stage.pair()).is_none()
    };
    let mut open = inquiries(&stage.world);
    loop {
        let found: Vec<_> = stage.differing(open)?.into_iter().filter(differs).collect();
        let Some((inquiry, answers)) = found.first() else { break };
        let [upstream, own] = answers.each_ref().map(shown);
        let limit = LIMIT.as_secs();
        ensure!(begun.elapsed() < LIMIT, "not right again after {limit} s: {inquiry}: {own} instead of {upstream}");
        open = found.into_iter().map(|(inquiry, _)| inquiry).collect();
    }
    Ok(begun.elapsed())
}

fn api_server_killed(stage: &mut Stage<'_>, doses: &Doses) -> anyhow::Result<String> {
    away(stage, doses, |stage, _| stage.lab.plane.kill(Part::ApiServer), |stage| stage.lab.plane.run(Part::ApiServer))
}

fn api_server_hangs(stage: &mut Stage<'_>, doses: &Doses) -> anyhow::Result<String> {
    away(
        stage,
        doses,
        |stage, _| stage.lab.plane.pause(Part::ApiServer),
        |stage| stage.lab.plane.resume(Part::ApiServer),
    )
}

/// For longer than anybody waits before he asks for everything anew.
fn api_server_silent(stage: &mut Stage<'_>, doses: &Doses) -> anyhow::Result<String> {
    const SILENCE: Duration = Duration::from_secs(200);
    /// Less than the kernel remembers a flow of UDP.
    const PAUSE: Duration = Duration::from_secs(10);
    let go = |stage: &mut Stage<'_>, held: &Held| {
        stage.lab.plane.pause(Part::ApiServer)?;
        let begun = Instant::now();
        while begun.elapsed() < SILENCE {
            // The passing of time is what is tested.
            std::thread::sleep(PAUSE);
            held.refresh(stage)?;
        }
        Ok(())
    };
    away(stage, doses, go, |stage| stage.lab.plane.resume(Part::ApiServer))
}

/// Rules stay while the server is away; then both catch up.
fn away(
    stage: &mut Stage<'_>,
    doses: &Doses,
    go: fn(&mut Stage<'_>, &Held) -> anyhow::Result<()>,
    come: fn(&mut Stage<'_>) -> anyhow::Result<()>,
) -> anyhow::Result<String> {
    let held = Held::open(stage)?;
    let mut dice = Dice::new(doses.seed);
    let world = history::next(&World::default(), &mut dice);
    stage.write(beside(&world))?;
    let before = syncs(stage)?;
    go(stage, &held)?;
    let while_away = stage.compare("the server is away", inquiries(&stage.world));
    held.refresh(stage)?;
    come(stage)?;
    while_away?;
    let next = beside(&history::next(&world, &mut dice));
    let begun = Instant::now();
    let marker = stage.lab.write(&next)?;
    stage.world = next;
    stage.sides[OURS].wait_for(marker)?;
    let took = begun.elapsed();
    held.refresh(stage)?;
    stage.sides[1 - OURS].wait_for(marker)?;
    held.refresh(stage)?;
    stage.compare("it is back", inquiries(&stage.world))?;
    held.note(stage, "it is back")?;
    let after = syncs(stage)?;
    let (all, differences) = (after[0] - before[0], after[1] - before[1]);
    stage.note("it is back", "times that all rules were written anew", ["0".to_owned(), all.to_string()]);
    ensure!(differences > 0.0, "the difference was written, and is not counted");
    Ok(format!("caught up after {} ms", took.as_millis()))
}

/// How often ours has written all rules, and how often a difference.
fn syncs(stage: &Stage<'_>) -> anyhow::Result<[f64; 2]> {
    let count = |extent: &str| {
        let sample = format!("kubeproxy_sync_{extent}_proxy_rules_duration_seconds_count{{ip_family=\"IPv4\"}}");
        anyhow::Ok(stage.sides[OURS].metric(METRICS, &sample)?.unwrap_or(0.0))
    };
    Ok([count("full")?, count("partial")?])
}

/// Each watch breaks off after a few events, while Services change.
fn flapping_watches(stage: &mut Stage<'_>, doses: &Doses) -> anyhow::Result<String> {
    const EVENTS: usize = 2;
    let mut held = Held::open(stage)?;
    let (front, way) = stage.lab.plane.proxy_front()?;
    stage.sides[OURS].lead_by(&way)?;
    stage.write(stage.world.clone())?;
    held.note_death(stage, "led by the relay")?;
    front.cut_after(EVENTS);
    let mut dice = Dice::new(doses.seed);
    let mut world = World::default();
    for change in 0..doses.changes {
        world = history::next(&world, &mut dice);
        stage.write(beside(&world))?;
        stage.compare(&format!("change {change}"), inquiries(&stage.world))?;
    }
    held.note(stage, "after all changes")?;
    ensure!(front.cuts() >= doses.changes, "only {} watches broke off", front.cuts());
    let kubeconfig = stage.lab.programs.kubeconfig.clone();
    stage.sides[OURS].lead_by(&kubeconfig)?;
    Ok(format!("{} changes, {} watches broken off", doses.changes, front.cuts()))
}

/// The Service that is not as the API has it.
const DAMAGED: u8 = 49;

/// Where it is damaged, and what it says there: of the wrong type, and of the right one but of no use.
const DAMAGES: [(&str, &str); 7] = [
    ("/spec/ports/0/port", "\"eighty\""),
    ("/spec/ports", "{}"),
    ("/spec/clusterIPs", "7"),
    ("/metadata/creationTimestamp", "\"yesterday\""),
    ("/spec/ports/0/port", "70000"),
    ("/spec/ports/0/protocol", "\"DCCP\""),
    ("/spec/clusterIPs", "[\"300.1.2.3\"]"),
];

/// What an old etcd may hold, and no API server takes any more, costs its own Service alone and is told with its name.
fn damaged_services(stage: &mut Stage<'_>, doses: &Doses) -> anyhow::Result<String> {
    let mut held = Held::open(stage)?;
    let (front, way) = stage.lab.plane.proxy_front()?;
    stage.sides[OURS].lead_by(&way)?;
    let mut dice = Dice::new(doses.seed);
    let mut world = World::default();
    for (number, (place, text)) in (0..).zip(DAMAGES) {
        let (step, value) = (format!("{place}: {text}"), serde_json::from_str::<Value>(text)?);
        front.change(move |object| damage(object, place, &value));
        world = history::next(&world, &mut dice);
        see_others(stage, &step, &world, number)?;
        // Once more in the list that a proxy begins with.
        stage.sides[OURS].lead_by(&way)?;
        see_others(stage, &format!("{step}, from the start"), &world, number)?;
        held.note_death(stage, &step)?;
    }
    front.change(|_| ());
    let mut mended = beside(&world);
    add_damaged(&mut mended, DAMAGES.len());
    stage.see("mended", mended)?;
    let kubeconfig = stage.lab.programs.kubeconfig.clone();
    stage.sides[OURS].lead_by(&kubeconfig)?;
    Ok(format!("{} kinds of damage", DAMAGES.len()))
}

fn damage(object: &mut Value, place: &str, value: &Value) {
    let is_it = object["kind"] == "Service" && object["metadata"]["name"] == Service::new(DAMAGED).name().as_str();
    if let Some(found) = object.pointer_mut(place).filter(|_| is_it) {
        found.clone_from(value);
    }
}

/// Another version of it for each number.
fn add_damaged(world: &mut World, number: usize) {
    world.services.push(Service::new(DAMAGED).label("number", &number.to_string()));
    world.slices.push(Slice::new(DAMAGED, &[end("a"), end("r")]));
}

/// Writes the damaged Service beside others, which must be led as they should be; it must be told of.
fn see_others(stage: &mut Stage<'_>, step: &str, world: &World, number: usize) -> anyhow::Result<()> {
    let logged = stage.sides[OURS].log()?.len();
    let others = beside(world);
    let mut all = others.clone();
    add_damaged(&mut all, number);
    stage.write(all)?;
    stage.compare(step, inquiries(&others))?;
    let name = format!("default/{}", Service::new(DAMAGED).name());
    let is_told = stage.sides[OURS].log()?[logged..].lines().any(|line| line.contains("WARN") && line.contains(&name));
    ensure!(is_told, "{step}: nothing tells of {name}");
    Ok(())
}
