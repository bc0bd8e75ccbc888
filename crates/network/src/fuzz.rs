//! What plugins answer, what the operator writes, and what clients of the name server send.

use fuzz::Target;
use serde_json::Value;

use crate::cni::{answer, config};
use crate::dns::message::{self, Query, Transport};

const fn target(name: &'static str, words: &'static [&'static str]) -> Target {
    Target { name, root: env!("CARGO_MANIFEST_DIR"), words, memory_max: 16 << 20, meter: sys::meter::peak_of }
}

/// The kind of a message, without what it is about.
fn words(error: &impl std::fmt::Display) -> String {
    error.to_string().chars().filter(|one| one.is_ascii_lowercase() || *one == ' ').take(100).collect()
}

#[test]
fn fuzz_cni_result() {
    let of_results =
        &["null", "\"interface\":18446744073709551615", "\"10.0.0.2/33\"", "\"::ffff:1.2.3.4/96\"", "[[[[[[", "1e999"];
    target("cni_result", of_results).run(|input| {
        let failure = answer::failure("exit status 1", input, input);
        assert!(failure.len() <= 3 * input.len() + 100 && !failure.is_empty());
        let result: Result<Value, _> = serde_json::from_slice(input);
        let found = result.map(|result| answer::addresses(&result, "eth0").map(|found| found.ips.len()));
        found.map(|found| found.map_err(|error| words(&error))).map_err(|error| words(&error))
    });
}

#[test]
fn fuzz_cni_config() {
    let of_lists =
        &["\"plugins\":[]", "\"type\":\"../x\"", "\"name\":\"/\"", "\"cniVersion\":\"9.9.9\"", "null", "true"];
    target("cni_config", of_lists).run(|input| {
        let parsed: Result<serde_json::Map<String, Value>, _> = serde_json::from_slice(input);
        parsed.map_err(|error| words(&error)).map(|object| {
            let single = config::parse_single(object.clone()).map(|list| list.plugins.len());
            let list = config::parse_list(object).map(|(list, _)| list.plugins.len());
            (single.map_err(|error| words(&error)), list.map_err(|error| words(&error)))
        })
    });
}

#[test]
fn fuzz_dns() {
    let sent: &[u8] = b"\0\0\x01\0\0\x01\0\0\0\0\0\0\x01a\x01b\0\0\x01\0\x01";
    target("dns", &["\u{0}", "\u{3}www", "\u{0}\u{1}\u{0}\u{1}", "\u{0}\u{29}"]).run(|input| {
        let read = [Transport::Udp, Transport::Tcp].map(|transport| match Query::read(input, transport) {
            Ok(query) => (Some(query.fail(domain::base::iana::Rcode::SERVFAIL).len() > 512), None),
            Err(reply) => (None, reply.map(|reply| reply.len())),
        });
        (read, message::is_answer(sent, input), message::is_answer(input, input), message::is_failure(input))
    });
}
