//! Which endpoints of a Service take new connections.

use std::fmt;
use std::net::IpAddr;

use crate::Endpoint;
use crate::facts::{Hints, SliceEndpoint};

/// The endpoints for one port and address family, sorted, without duplicates.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Choice {
    /// Of the whole cluster.
    pub(crate) cluster: Vec<Endpoint>,
    /// Of this node.
    pub(crate) local: Vec<Endpoint>,
    /// Whether anybody in the cluster serves, wherever he is.
    pub(crate) any: bool,
}

/// An endpoint with its port.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Candidate<'a> {
    pub(crate) endpoint: &'a SliceEndpoint,
    pub(crate) port: u16,
}

impl Candidate<'_> {
    fn place(&self) -> (IpAddr, u16) {
        (self.endpoint.address, self.port)
    }

    fn is_ready(&self) -> bool {
        self.endpoint.conditions.ready
    }

    /// Better than nothing: it ends, but still serves.
    fn is_last_resort(&self) -> bool {
        let conditions = self.endpoint.conditions;
        conditions.serving && conditions.terminating
    }

    /// 0 is best.
    fn rank(&self) -> u8 {
        match (self.is_ready(), self.is_last_resort()) {
            (true, _) => 0,
            (false, true) => 1,
            (false, false) => 2,
        }
    }

    fn hints(&self) -> Option<&Hints> {
        self.endpoint.hints.as_deref()
    }
}

/// Each place once. While an endpoint moves from one slice to another it may stand in both: the better word counts. But an
/// address that a pod which ends shares with one that does not has been given to the latter.
fn distinct(mut candidates: Vec<Candidate<'_>>) -> Vec<Candidate<'_>> {
    candidates.sort_by_key(|one| (one.place(), one.endpoint.conditions.terminating, one.rank(), !one.endpoint.local));
    candidates.dedup_by_key(|one| one.place());
    candidates
}

/// Decides. `zone` is that of this node.
pub(crate) fn choose(candidates: Vec<Candidate<'_>>, zone: Option<&str>) -> Choice {
    let candidates = distinct(candidates);
    let near = Nearness::of(&candidates, zone);
    let ready = |one: &Candidate<'_>| one.is_ready() && near.admits(one);
    let cluster = first_of(&candidates, ready, |one| one.is_last_resort());
    let local = first_of(
        &candidates,
        |one| one.is_ready() && one.endpoint.local,
        |one| one.is_last_resort() && one.endpoint.local,
    );
    Choice { any: !cluster.is_empty(), cluster, local }
}

/// Why an endpoint gets no new connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeftOut {
    /// It says so.
    NotReady,
    /// It ends, and no longer serves.
    Ended,
    /// It ends, and others do not.
    Ending,
    /// It is for other nodes or zones (topology hints).
    Far,
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LeftOut::NotReady => "not ready",
            LeftOut::Ended => "it has ended",
            LeftOut::Ending => "it is ending, and others serve",
            LeftOut::Far => "its hints name other nodes or zones",
        })
    }
}

/// Each endpoint, and why it is none of those that [`choose`] takes from the whole cluster.
pub(crate) fn left_out<'a>(
    candidates: Vec<Candidate<'a>>,
    zone: Option<&str>,
) -> Vec<(Candidate<'a>, Option<LeftOut>)> {
    let chosen = choose(candidates.clone(), zone).cluster;
    let why = |one: &Candidate<'_>| {
        if chosen.contains(&endpoint(one)) {
            return None;
        }
        Some(match (one.is_ready(), one.is_last_resort(), one.endpoint.conditions.terminating) {
            (true, ..) => LeftOut::Far,
            (false, true, _) => LeftOut::Ending,
            (false, false, true) => LeftOut::Ended,
            (false, false, false) => LeftOut::NotReady,
        })
    };
    distinct(candidates).into_iter().map(|one| (one, why(&one))).collect()
}

fn first_of(
    candidates: &[Candidate<'_>],
    better: impl Fn(&Candidate<'_>) -> bool,
    worse: impl Fn(&Candidate<'_>) -> bool,
) -> Vec<Endpoint> {
    let pick = |wanted: &dyn Fn(&Candidate<'_>) -> bool| -> Vec<Endpoint> {
        candidates.iter().filter(|one| wanted(one)).map(endpoint).collect()
    };
    let chosen = pick(&better);
    if chosen.is_empty() { pick(&worse) } else { chosen }
}

fn endpoint(one: &Candidate<'_>) -> Endpoint {
    Endpoint { address: one.endpoint.address, port: one.port, local: one.endpoint.local }
}

/// Whom the hints name for this node.
enum Nearness<'z> {
    Node,
    Zone(&'z str),
    Anywhere,
}

impl<'z> Nearness<'z> {
    /// Hints count only if every ready endpoint has them and at least one names this node or its zone: otherwise they are
    /// half-written or leave this node with nobody.
    fn of(candidates: &[Candidate<'_>], zone: Option<&'z str>) -> Nearness<'z> {
        let all = |wanted: &dyn Fn(&Hints) -> bool| {
            candidates.iter().filter(|one| one.is_ready()).all(|one| one.hints().is_some_and(wanted))
        };
        let any = |wanted: &dyn Fn(&Hints) -> bool| {
            candidates.iter().any(|one| one.is_ready() && one.hints().is_some_and(wanted))
        };
        if all(&|hints| hints.names_nodes) && any(&|hints| hints.this_node) {
            return Nearness::Node;
        }
        match zone {
            Some(zone) if all(&|hints| !hints.zones.is_empty()) && any(&|hints| hints.names(zone)) => {
                Nearness::Zone(zone)
            }
            _ => Nearness::Anywhere,
        }
    }

    fn admits(&self, one: &Candidate<'_>) -> bool {
        match self {
            Nearness::Node => one.hints().is_some_and(|hints| hints.this_node),
            Nearness::Zone(zone) => one.hints().is_some_and(|hints| hints.names(zone)),
            Nearness::Anywhere => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::Conditions;

    const READY: Conditions = Conditions { ready: true, serving: true, terminating: false };
    const STARTING: Conditions = Conditions { ready: false, serving: false, terminating: false };
    const ENDING: Conditions = Conditions { ready: false, serving: true, terminating: true };
    const GONE: Conditions = Conditions { ready: false, serving: false, terminating: true };

    fn one(n: u8, local: bool, conditions: Conditions) -> SliceEndpoint {
        SliceEndpoint { address: [10, 0, 0, n].into(), local, conditions, hints: None, holder: None }
    }

    fn hinted(n: u8, nodes: Option<bool>, zones: &[&str]) -> SliceEndpoint {
        let zones = zones.iter().map(|zone| (*zone).into()).collect();
        let hints = Hints { names_nodes: nodes.is_some(), this_node: nodes == Some(true), zones };
        SliceEndpoint { hints: Some(Box::new(hints)), ..one(n, false, READY) }
    }

    fn numbers(endpoints: &[Endpoint]) -> Vec<u8> {
        let last = |address| match address {
            IpAddr::V4(v4) => v4.octets()[3],
            IpAddr::V6(v6) => v6.octets()[15],
        };
        endpoints.iter().map(|endpoint| last(endpoint.address)).collect()
    }

    #[track_caller]
    fn check(endpoints: &[SliceEndpoint], cluster: &[u8], local: &[u8]) {
        let candidates = endpoints.iter().map(|endpoint| Candidate { endpoint, port: 80 }).collect();
        let choice = choose(candidates, Some("z"));
        assert_eq!((&*numbers(&choice.cluster), &*numbers(&choice.local)), (cluster, local));
        assert_eq!(choice.any, !cluster.is_empty());
    }

    #[test]
    fn ending_endpoints_are_the_last_resort_for_cluster_and_node_alone() {
        check(&[one(1, true, READY), one(2, false, READY), one(3, true, STARTING)], &[1, 2], &[1]);
        check(&[one(1, true, ENDING), one(2, false, READY), one(3, true, GONE)], &[2], &[1]);
        check(&[one(1, true, ENDING), one(2, false, ENDING), one(3, false, GONE)], &[1, 2], &[1]);
        check(&[one(1, true, STARTING), one(2, false, GONE)], &[], &[]);
        check(&[], &[], &[]);
    }

    #[test]
    fn whoever_is_left_out_is_told_why() {
        let check = |endpoints: &[SliceEndpoint], expect: &[Option<LeftOut>]| {
            let candidates = endpoints.iter().map(|endpoint| Candidate { endpoint, port: 80 }).collect();
            let told: Vec<_> = left_out(candidates, Some("z")).into_iter().map(|(_, why)| why).collect();
            assert_eq!(told, expect);
        };
        let all = [one(1, true, READY), one(2, false, STARTING), one(3, false, ENDING), one(4, true, GONE)];
        check(&all, &[None, Some(LeftOut::NotReady), Some(LeftOut::Ending), Some(LeftOut::Ended)]);
        check(&all[2..], &[None, Some(LeftOut::Ended)]);
        check(&[hinted(1, None, &["z"]), hinted(2, None, &["y"])], &[None, Some(LeftOut::Far)]);
    }

    #[test]
    fn the_better_word_counts() {
        check(&[one(1, true, ENDING), one(1, true, READY), one(1, false, STARTING)], &[1], &[1]);
        check(&[one(1, false, READY), one(1, true, READY)], &[1], &[1]);
    }

    #[test]
    fn an_address_has_passed_from_who_ends_to_who_does_not() {
        check(&[one(1, true, ENDING), one(1, true, STARTING)], &[], &[]);
        check(&[one(1, true, STARTING), one(1, true, ENDING), one(2, false, ENDING)], &[2], &[]);
    }

    #[test]
    fn hints_name_the_near_ones() {
        check(&[hinted(1, None, &["z"]), hinted(2, None, &["y"]), hinted(3, None, &["y", "z"])], &[1, 3], &[]);
        check(&[hinted(1, None, &["x"]), hinted(2, None, &["y"])], &[1, 2], &[]);
        check(&[hinted(1, None, &["z"]), one(2, false, READY)], &[1, 2], &[]);
        check(&[hinted(1, None, &["z"]), one(2, false, ENDING)], &[1], &[]);
        check(&[hinted(1, Some(true), &["y"]), hinted(2, Some(false), &["z"])], &[1], &[]);
        check(&[hinted(1, Some(false), &["y"]), hinted(2, Some(false), &["z"])], &[2], &[]);
        check(&[hinted(1, Some(true), &["y"]), hinted(2, None, &["z"])], &[2], &[]);
    }
}
