//! Differences that are meant, each with its reason; `docs/conformance.md` lists them, too.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use testkit::service_lab::{Answer, Answers, BACKENDS, Client, GATEWAY, NODE, Protocol, SECOND};

use super::contestant::{Contestant, Make, Mode};
use super::stage::{Difference, Inquiry, endpoint};

/// What the call that sends says when rules refuse the packet.
const EPERM: i32 = rustix::io::Errno::PERM.raw_os_error();
const ECONNRESET: i32 = rustix::io::Errno::CONNRESET.raw_os_error();

/// A difference that is meant.
struct Known {
    reason: &'static str,
    is_it: fn(Contestant, &Inquiry, [&Answers; 2]) -> bool,
}

const ALL: &[Known] = &[
    Known {
        reason: "orlop with nftables or IPVS shows an endpoint on this node who asks; kube-proxy shows it the node's address, \
                 which is needed for endpoints elsewhere only",
        is_it: source_is_kept,
    },
    Known {
        reason: "orlop with IPVS leads clients of the cluster to all endpoints of an address from outside whose policy is Local, \
                 as all other modes do; kube-proxy has one set of servers for everybody there",
        is_it: led_to_all,
    },
    Known {
        reason: "with IPVS the node comes to a Service's address from that address; orlop shows endpoints the node's own, to which \
                 they can answer",
        is_it: node_is_itself,
    },
    Known {
        reason: "with IPVS orlop drops what a load balancer's source ranges do not admit, from the node as from others; kube-proxy's \
                 IPVS refuses it to the node before its rules see it where there are no endpoints",
        is_it: node_is_not_admitted,
    },
    Known {
        reason: "with IPVS orlop drops what goes to cluster addresses whose internal policy is Local and which have no endpoints on \
                 this node, as all other modes do; kube-proxy refuses it or, where the Service has external addresses, leads it \
                 elsewhere",
        is_it: policy_is_kept,
    },
    Known {
        reason: "with IPVS kube-proxy leads who comes from outside to endpoints elsewhere where the policy is Local and no endpoint is \
                 known to be here, and no answer comes back from there; orlop drops it, as all other modes do",
        is_it: outside_is_kept_out,
    },
    Known {
        reason: "orlop refuses at once what goes to the range of Services and is no Service's; kube-proxy lets the client \
                 wait (nftables drops it, iptables routes it away)",
        is_it: refused_instead_of_dropped,
    },
    Known {
        reason: "what orlop with nftables refuses to the node's own UDP and SCTP clients is an error of the call that sends \
                 (EPERM); kube-proxy's refusal for node ports comes back as a packet",
        is_it: told_to_the_sender,
    },
    Known {
        reason: "orlop with userspace makes the connection to the endpoint itself, which sees the node",
        is_it: source_is_ours,
    },
    Known {
        reason: "orlop with userspace refuses or resets what kube-proxy drops, or with iptables has no rule for: addresses of \
                 Services are this host's, and the kernel has shaken hands before anybody is asked",
        is_it: refused_not_dropped,
    },
    Known {
        reason: "orlop with userspace resets a connection to an external address without endpoints once it is made, and drops \
                 UDP, where kube-proxy refuses: the kernel lets no refusal come from an address that is not this host's",
        is_it: dropped_not_refused,
    },
    Known {
        reason: "what orlop with userspace refuses to the node's own clients comes back as a packet, and UDP from sources that are \
                 not admitted is dropped; rules of iptables are an error of the call that sends (EPERM)",
        is_it: told_by_a_packet,
    },
    Known {
        reason: "with userspace the node comes to a load balancer's address from that address, which is admitted if one of the \
                 Node's own is; with kube-proxy it may come from an address that is not",
        is_it: node_is_admitted,
    },
    Known { reason: "orlop with userspace carries no SCTP", is_it: no_sctp },
    Known { reason: "orlop with userspace does not answer at node ports of loopback addresses", is_it: no_loopback },
];

/// Why they differ here, if that is meant.
pub(super) fn reason(difference: &Difference, pair: [Contestant; 2]) -> Option<&'static str> {
    let (inquiry, answers) = difference.found.as_ref()?;
    reason_for(inquiry, answers.each_ref(), pair)
}

/// Why these answers differ, if that is meant.
pub(super) fn reason_for(
    inquiry: &Inquiry,
    answers: [&Answers; 2],
    [one, other]: [Contestant; 2],
) -> Option<&'static str> {
    let compared = (one.make, other.make) == (Make::Upstream, Make::Orlop);
    ALL.iter().find(|known| compared && (known.is_it)(other, inquiry, answers)).map(|known| known.reason)
}

/// The same endpoints answer and nothing else happens; those of this node see more of us.
fn source_is_kept(ours: Contestant, inquiry: &Inquiry, [upstream, own]: [&Answers; 2]) -> bool {
    // With IPVS the addresses of Services are this node's, and it comes from the one that it goes to.
    let is_to_itself = ours.mode == Mode::Ipvs && inquiry.client == Client::Node;
    let is_client = |address: IpAddr| {
        inquiry.client.addresses().contains(&address) || is_to_itself && address == inquiry.question.to.ip()
    };
    let is_kept =
        |answer: &Answer| matches!(answer, Answer::Served { by, seen } if is_local(by.ip()) && is_client(*seen));
    matches!(ours.mode, Mode::Nftables | Mode::Ipvs)
        && inquiry.likeness.has_same_endpoints([upstream, own])
        && own.difference(upstream).all(is_kept)
}

/// All that kube-proxy led to are endpoints of this node, and we lead to others that are none. Which of this node's are among
/// ours, the policy Cluster says: not those that end while others do not, nor those that are for another zone.
fn led_to_all(ours: Contestant, inquiry: &Inquiry, [upstream, own]: [&Answers; 2]) -> bool {
    let is_of_cluster = !matches!(inquiry.client, Client::Outside | Client::RemoteNode);
    let [theirs, all] = [upstream, own].map(|answers| answers.iter().map(endpoint).collect::<BTreeSet<_>>());
    let is_local = |by: &Option<SocketAddr>| by.is_some_and(|by| is_local(by.ip()));
    let more: Vec<_> = all.difference(&theirs).collect();
    ours.mode == Mode::Ipvs
        && is_of_cluster
        && !is_service_range(inquiry.question.to.ip())
        && theirs.iter().all(is_local)
        && !more.is_empty()
        && more.into_iter().all(|by| by.is_some() && !is_local(by))
}

fn node_is_itself(ours: Contestant, inquiry: &Inquiry, [upstream, own]: [&Answers; 2]) -> bool {
    let to = inquiry.question.to.ip();
    let saw = |answers: &Answers, is: &dyn Fn(IpAddr) -> bool| {
        answers.iter().all(|answer| matches!(answer, Answer::Served { seen, .. } if is(*seen)))
    };
    ours.mode == Mode::Ipvs
        && inquiry.client == Client::Node
        && inquiry.likeness.has_same_endpoints([upstream, own])
        && saw(upstream, &|seen| seen == to || is_node(seen))
        && saw(own, &|seen| seen == to || is_node(seen))
}

fn node_is_not_admitted(ours: Contestant, inquiry: &Inquiry, [upstream, own]: [&Answers; 2]) -> bool {
    let to = inquiry.question.to.ip();
    ours.mode == Mode::Ipvs
        && inquiry.client == Client::Node
        && !is_service_range(to)
        && !is_node(to)
        && only(upstream, Answer::Refused)
        && only(own, Answer::Silent)
}

fn policy_is_kept(ours: Contestant, inquiry: &Inquiry, [upstream, own]: [&Answers; 2]) -> bool {
    let is_here = |answer: &Answer| endpoint(answer).is_some_and(|by| is_local(by.ip()));
    ours.mode == Mode::Ipvs
        && inquiry.local.inside
        && is_service_range(inquiry.question.to.ip())
        && only(own, Answer::Silent)
        && !upstream.iter().any(is_here)
}

fn outside_is_kept_out(ours: Contestant, inquiry: &Inquiry, [upstream, own]: [&Answers; 2]) -> bool {
    ours.mode == Mode::Ipvs
        && inquiry.local.outside
        && !is_service_range(inquiry.question.to.ip())
        && only(own, Answer::Silent)
        && upstream.contains(&Answer::Silent)
}

fn refused_instead_of_dropped(ours: Contestant, inquiry: &Inquiry, [upstream, own]: [&Answers; 2]) -> bool {
    let refused = if inquiry.client == Client::Node { own.iter().all(is_refusal) } else { only(own, Answer::Refused) };
    ours.mode != Mode::Userspace
        && is_service_range(inquiry.question.to.ip())
        && only(upstream, Answer::Silent)
        && refused
}

fn told_to_the_sender(ours: Contestant, inquiry: &Inquiry, [upstream, own]: [&Answers; 2]) -> bool {
    matches!(ours.mode, Mode::Nftables | Mode::Ipvs)
        && inquiry.client == Client::Node
        && inquiry.question.protocol != Protocol::Tcp
        && only(upstream, Answer::Refused)
        && only(own, Answer::Failed(EPERM))
}

fn source_is_ours(ours: Contestant, inquiry: &Inquiry, [upstream, own]: [&Answers; 2]) -> bool {
    let ours_alone = |answer: &Answer| !matches!(answer, Answer::Served { seen, .. } if !is_node(*seen));
    ours.mode == Mode::Userspace && inquiry.likeness.has_same_endpoints([upstream, own]) && own.iter().all(ours_alone)
}

fn refused_not_dropped(ours: Contestant, _: &Inquiry, [upstream, own]: [&Answers; 2]) -> bool {
    let refused = |answer: &Answer| matches!(answer, Answer::Refused | Answer::Failed(ECONNRESET));
    ours.mode == Mode::Userspace && only(upstream, Answer::Silent) && own.iter().all(refused)
}

fn dropped_not_refused(ours: Contestant, inquiry: &Inquiry, [upstream, own]: [&Answers; 2]) -> bool {
    let to = inquiry.question.to.ip();
    let is_foreign = !is_service_range(to) && !is_node(to) && !to.is_loopback();
    let as_it_can = match inquiry.question.protocol {
        Protocol::Udp => Answer::Silent,
        _ => Answer::Failed(ECONNRESET),
    };
    ours.mode == Mode::Userspace && is_foreign && only(upstream, Answer::Refused) && only(own, as_it_can)
}

fn told_by_a_packet(ours: Contestant, inquiry: &Inquiry, [upstream, own]: [&Answers; 2]) -> bool {
    ours.mode == Mode::Userspace
        && inquiry.client == Client::Node
        && only(upstream, Answer::Failed(EPERM))
        && (only(own, Answer::Refused) || inquiry.question.protocol == Protocol::Udp && only(own, Answer::Silent))
}

fn node_is_admitted(ours: Contestant, inquiry: &Inquiry, [upstream, own]: [&Answers; 2]) -> bool {
    ours.mode == Mode::Userspace
        && inquiry.client == Client::Node
        && only(upstream, Answer::Silent)
        && own.iter().all(|answer| matches!(answer, Answer::Served { seen, .. } if is_node(*seen)))
}

fn no_sctp(ours: Contestant, inquiry: &Inquiry, [_, own]: [&Answers; 2]) -> bool {
    ours.mode == Mode::Userspace && inquiry.question.protocol == Protocol::Sctp && !own.iter().any(Answer::is_served)
}

fn no_loopback(ours: Contestant, inquiry: &Inquiry, [_, own]: [&Answers; 2]) -> bool {
    ours.mode == Mode::Userspace && inquiry.question.to.ip().is_loopback() && only(own, Answer::Refused)
}

fn only(answers: &Answers, one: Answer) -> bool {
    answers.len() == 1 && answers.contains(&one)
}

fn is_refusal(answer: &Answer) -> bool {
    matches!(answer, Answer::Refused | Answer::Failed(EPERM))
}

fn is_service_range(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.octets()[..2] == [10, 96],
        IpAddr::V6(v6) => v6.segments()[..3] == [0xfd00, 0x10, 0x96],
    }
}

fn is_node(address: IpAddr) -> bool {
    [NODE, SECOND, GATEWAY].iter().any(|own| own.both().contains(&address))
}

/// Whether it is an endpoint of this node.
pub(super) fn is_local(address: IpAddr) -> bool {
    BACKENDS.iter().any(|backend| backend.is_local && backend.address.both().contains(&address))
}
