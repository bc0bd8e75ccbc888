//! Random histories: worlds that follow from one another by chance, and the shortest that still shows a difference.

use anyhow::Context as _;
use fuzz::Dice;
use serde_json::{Value, json};
use testkit::service_lab::{BACKENDS, Protocol};

use super::known;
use super::stage::{Difference, Stage};
use super::world::{Conditions, Endpoint, NODE, OTHER_NODE, Service, Slice, World, ZONE, end};

/// The services that there can be.
const NUMBERS: [u8; 4] = [41, 42, 43, 44];

/// The next state of a world: one or two things change.
pub(super) fn next(world: &World, dice: &mut Dice) -> World {
    let mut world = world.clone();
    for _ in 0..=dice.below(2) {
        let number = dice.pick(&NUMBERS);
        let before = world.services.iter().position(|service| service.number == number);
        match (before, dice.below(6)) {
            (None, _) => {
                world.services.push(service(number, dice));
                set_slices(&mut world, number, dice);
            }
            (Some(place), 0) => {
                world.services.remove(place);
                // Slices may stay behind for a while, and come before their service.
                if dice.one_in(2) {
                    world.slices.retain(|slice| slice.service != number);
                }
            }
            (Some(place), 1 | 2) => world.services[place] = service(number, dice),
            (Some(_), _) => set_slices(&mut world, number, dice),
        }
    }
    world
}

fn service(number: u8, dice: &mut Dice) -> Service {
    let all = [("tcp", Protocol::Tcp, 80), ("udp", Protocol::Udp, 80), ("more", Protocol::Tcp, 81)];
    let ports: Vec<_> = all.into_iter().filter(|(name, ..)| *name == "tcp" || dice.one_in(3)).collect();
    let mut service = Service::new(number).ports(&ports);
    match dice.below(3) {
        0 => {}
        1 => service = service.node_ports(),
        _ => {
            service = service.balanced(json!({ "ip": format!("198.51.100.{number}"), "ipMode": "VIP" }));
            if dice.one_in(3) {
                service = service.with("loadBalancerSourceRanges", ranges(dice));
            }
        }
    }
    let mut sometimes = |field: &str, value: Value, times| {
        if dice.one_in(times) {
            service.spec.insert(field.to_owned(), value);
        }
    };
    sometimes("externalIPs", json!([format!("198.51.100.2{number}")]), 4);
    sometimes("internalTrafficPolicy", json!("Local"), 4);
    sometimes("trafficDistribution", json!("PreferSameZone"), 3);
    sometimes("sessionAffinity", json!("ClientIP"), 4);
    let is_external = service.spec.contains_key("type") || service.spec.contains_key("externalIPs");
    if is_external && dice.one_in(3) {
        service.spec.insert("externalTrafficPolicy".to_owned(), json!("Local"));
        if service.is("type", "LoadBalancer") {
            service.spec.insert("healthCheckNodePort".to_owned(), json!(32_000 + u16::from(number)));
        }
    }
    service
}

fn ranges(dice: &mut Dice) -> Value {
    let some = ["192.0.2.0/24", "192.0.2.2/32", "10.244.0.0/16", "10.244.0.9/32", "203.0.113.0/24", "2001:db8::/64"];
    (0..=dice.below(2)).map(|_| dice.pick(&some)).collect()
}

fn set_slices(world: &mut World, number: u8, dice: &mut Dice) {
    world.slices.retain(|slice| slice.service != number);
    let hints = dice.one_in(3);
    let mut backends = BACKENDS.to_vec();
    for slice in 0..u8::from(dice.one_in(3)) + u8::from(!dice.one_in(8)) {
        // Upstream leaves to chance what holds for an endpoint of which two slices say different things.
        let chosen = (0..dice.below(4).min(backends.len())).map(|_| backends.remove(dice.below(backends.len())).name);
        let chosen: Vec<&'static str> = chosen.collect();
        let endpoints: Vec<Endpoint> = chosen.into_iter().map(|name| endpoint(name, hints, dice)).collect();
        let ports = [
            ("tcp", Protocol::Tcp, Some(8080)),
            ("udp", Protocol::Udp, Some(8081)),
            ("more", Protocol::Tcp, Some(8081)),
        ];
        world.slices.push(Slice::new(number, &endpoints).ports(&ports).number(slice));
    }
}

fn endpoint(backend: &'static str, hints: bool, dice: &mut Dice) -> Endpoint {
    use Conditions::{Ended, Ready, Serving, Unknown, Unready};
    let endpoint = end(backend).is(dice.pick(&[Ready, Ready, Ready, Ready, Unknown, Unready, Serving, Serving, Ended]));
    match hints {
        true => endpoint.for_zones(&[dice.pick(&[ZONE, "far"])]).for_nodes(&[dice.pick(&[NODE, OTHER_NODE])]),
        false => endpoint,
    }
}

/// What a history showed.
pub(super) struct Found {
    /// The shortest history that shows it.
    pub(super) worlds: Vec<World>,
    pub(super) differences: Vec<Difference>,
}

/// Plays a history of `steps` worlds and stops at the first difference that is not meant.
pub(super) fn play(stage: &mut Stage<'_>, seed: u64, steps: usize) -> anyhow::Result<Option<Found>> {
    let mut dice = Dice::new(seed);
    let mut worlds = Vec::new();
    let mut world = World::default();
    stage.write(World::default())?;
    for step in 0..steps {
        world = next(&world, &mut dice);
        worlds.push(world.clone());
        stage.see(&format!("seed {seed}, step {step}"), world.clone())?;
        let differences = unexplained(stage);
        if !differences.is_empty() {
            println!("seed {seed}, step {step}: a difference; looking for the shortest history that shows it");
            world.print("the world that showed it")?;
            differences.iter().for_each(|difference| println!("  {}", difference.show(stage.pair())));
            let worlds = shrink(stage, worlds)?;
            return Ok(Some(Found { worlds, differences }));
        }
    }
    Ok(None)
}

fn unexplained(stage: &mut Stage<'_>) -> Vec<Difference> {
    let pair = stage.pair();
    let found = std::mem::take(&mut stage.differences);
    found.into_iter().filter(|difference| known::reason(difference, pair).is_none()).collect()
}

/// Leaves out whatever can be left out.
fn shrink(stage: &mut Stage<'_>, mut worlds: Vec<World>) -> anyhow::Result<Vec<World>> {
    let mut place = 0;
    while place + 1 < worlds.len() {
        let mut fewer = worlds.clone();
        fewer.remove(place);
        match shows(stage, &fewer)? {
            true => worlds = fewer,
            false => place += 1,
        }
    }
    let mut number = 0;
    while let Some(fewer) = without(&worlds, number)? {
        match shows(stage, &fewer)? {
            true => worlds = fewer,
            false => number += 1,
        }
    }
    Ok(worlds)
}

/// Whether a history leads to a difference.
fn shows(stage: &mut Stage<'_>, worlds: &[World]) -> anyhow::Result<bool> {
    stage.write(World::default())?;
    let (last, before) = worlds.split_last().context("a history has an end")?;
    for world in before {
        stage.write(world.clone())?;
    }
    stage.see("once more", last.clone())?;
    Ok(!unexplained(stage).is_empty())
}

/// The history without the thing of this number in its last world: a service with its slices, or an endpoint.
fn without(worlds: &[World], number: usize) -> anyhow::Result<Option<Vec<World>>> {
    let mut worlds = worlds.to_vec();
    let last = worlds.last_mut().context("a history has an end")?;
    let services = last.services.len();
    if number < services {
        let gone = last.services.remove(number).number;
        last.slices.retain(|slice| slice.service != gone);
        return Ok(Some(worlds));
    }
    let mut place = number - services;
    for slice in &mut last.slices {
        if place < slice.endpoints.len() {
            slice.endpoints.remove(place);
            return Ok(Some(worlds));
        }
        place -= slice.endpoints.len();
    }
    Ok(None)
}
