//! The kernel's answers, damaged: parsers answer with less, and come to an end.

use fuzz::Target;

use super::{Attributes, Message, Messages, conntrack, ipvs, nft, route};

/// Attributes may nest; a parser that follows every level does so as deep as they are written.
const DEPTH_MAX: usize = 8;

fn walk(attributes: Attributes<'_>, depth: usize, seen: &mut Vec<(u16, usize)>) {
    for attribute in attributes {
        seen.push((attribute.kind, attribute.value.len()));
        let values = (attribute.text(), attribute.u16(), attribute.u32(), attribute.be16(), attribute.be32());
        assert!(values.0.len() <= 3 * attribute.value.len());
        let _ = attribute.address();
        if depth < DEPTH_MAX && attribute.kind < 8 {
            walk(attribute.nested(), depth + 1, seen);
        }
    }
}

fn parse(message: &Message<'_>) -> (bool, bool, bool, bool) {
    let service = ipvs::Virtual { address: [10, 0, 0, 1].into(), protocol: 6, port: 80 };
    let _ = (route::parse_link(message), ipvs::parse_info(message), ipvs::parse_timeouts(message));
    let _ = message.acknowledgement();
    let _ = nft::parse_elements(message);
    let server = ipvs::parse_server(message, &service);
    let flow = conntrack::parse_flow(message);
    (route::parse_route(message).is_some(), route::parse_address(message).is_some(), server.is_some(), flow.is_some())
}

#[test]
fn fuzz_netlink() {
    let target = Target {
        name: "netlink",
        root: env!("CARGO_MANIFEST_DIR"),
        words: &["\u{0}\u{0}\u{0}\u{0}", "\u{4}\u{0}\u{1}\u{0}", "\u{8}\u{0}\u{1}\u{0}", "eth0\u{0}", "\u{2}\u{0}"],
        memory_max: 8 << 20,
        meter: crate::meter::peak_of,
    };
    target.run(|input| {
        let (mut seen, mut parsed) = (Vec::new(), Vec::new());
        for message in Messages::new(input) {
            for header in [0, 4, 8, 12, 16] {
                walk(message.attributes(header), 0, &mut seen);
            }
            parsed.push((message.kind, parse(&message), ipvs::parse_service(&message).is_some()));
        }
        seen.truncate(8);
        (seen, parsed)
    });
}
