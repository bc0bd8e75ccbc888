//! What a keeper would do with a daemon that has lost its mind, and a daemon with such a keeper.

use fuzz::Target;

use super::frame::{self, Decoder};
use crate::record;

const fn target(name: &'static str) -> Target {
    Target {
        name,
        root: env!("CARGO_MANIFEST_DIR"),
        words: &["\u{0}\u{0}\u{0}\u{0}", "\u{1}\u{0}\u{0}\u{0}", "c1", "0.log"],
        memory_max: 8 << 20,
        meter: sys::meter::peak_of,
    }
}

/// Whatever was understood is written as it was read, and is understood in any pieces.
#[test]
fn fuzz_keeper() {
    target("keeper").run(|input| {
        let mut seen = Vec::new();
        let mut decoder = Decoder::default();
        decoder.push(input, []);
        let end = loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => {
                    let mut again = Vec::new();
                    frame::encode(frame.number, &frame.message, frame.fds.len(), &mut again).unwrap();
                    let mut reader = Decoder::default();
                    again.chunks(5).for_each(|piece| reader.push(piece, []));
                    assert_eq!(reader.next_frame().unwrap().unwrap().message, frame.message);
                    seen.push(std::mem::discriminant(&frame.message));
                }
                Ok(None) => break None,
                Err(error) => break Some(std::mem::discriminant(&error)),
            }
        };
        (seen, end)
    });
}

/// Records of sandboxes may be half-written, or of another version.
#[test]
fn fuzz_record() {
    target("record")
        .run(|input| record::decode(input).map(|snapshot| (snapshot.containers.len(), snapshot.execs.len())));
}
