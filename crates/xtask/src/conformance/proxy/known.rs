//! Differences that are meant, each with its reason; `docs/conformance.md` lists them, too.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use testkit::service_lab::{Answer, Answers, BACKENDS};

use super::contestant::{Contestant, Make, Mode};
use super::stage::{Difference, Inquiry};

/// A difference that is meant.
struct Known {
    reason: &'static str,
    is_it: fn(Contestant, &Inquiry, [&Answers; 2]) -> bool,
}

const ALL: &[Known] = &[Known {
    reason: "orlop with nftables or IPVS shows an endpoint on this node who asks from outside; kube-proxy shows it the \
             node's address, which is needed for endpoints elsewhere only",
    is_it: source_is_kept,
}];

/// Why they differ here, if that is meant.
pub(super) fn reason(difference: &Difference, [one, other]: [Contestant; 2]) -> Option<&'static str> {
    let (inquiry, [theirs, ours]) = difference.found.as_ref()?;
    let compared = (one.make, other.make) == (Make::Upstream, Make::Orlop);
    ALL.iter().find(|known| compared && (known.is_it)(other, inquiry, [theirs, ours])).map(|known| known.reason)
}

/// The same endpoints answer and nothing else happens; those of this node see more of us.
fn source_is_kept(ours: Contestant, _: &Inquiry, [upstream, own]: [&Answers; 2]) -> bool {
    matches!(ours.mode, Mode::Nftables | Mode::Ipvs)
        && who(upstream) == who(own)
        && own.difference(upstream).all(|answer| matches!(answer, Answer::Served { by, .. } if is_local(by.ip())))
}

/// Endpoints, and what else came.
fn who(answers: &Answers) -> (BTreeSet<SocketAddr>, BTreeSet<Answer>) {
    let by = |answer: &Answer| match answer {
        Answer::Served { by, .. } => Some(*by),
        _ => None,
    };
    (answers.iter().filter_map(by).collect(), answers.iter().filter(|answer| !answer.is_served()).copied().collect())
}

fn is_local(address: IpAddr) -> bool {
    BACKENDS.iter().any(|backend| backend.is_local && backend.address.both().contains(&address))
}
