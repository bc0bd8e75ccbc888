//! What earlier versions of this program have left, so that tests can tell whether the present one still understands it.
//!
//! `past/<version>` is written once, by `cargo xtask past` of that version, and stays as it is. Test programs that are run by
//! that command write their part of it; run otherwise, they read all of them.

use std::path::{Path, PathBuf};

/// The variable by which `cargo xtask past` tells a test program where to write.
pub const WANTED: &str = "ORLOP_PAST_DIR";

/// What a version has left.
pub fn dir(version: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("past").join(version)
}

/// Where today's part is wanted, if it is.
pub fn wanted() -> Option<PathBuf> {
    std::env::var_os(WANTED).map(PathBuf::from)
}

/// Named bytes as lines of text: a name, and the bytes in hexadecimal digits.
pub fn format<'a>(named: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> String {
    let line = |(name, bytes): (&str, &[u8])| {
        let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{name} {digits}\n")
    };
    named.into_iter().map(line).collect()
}

/// The opposite of [`format`].
///
/// # Panics
/// It is something else: what is committed was written by that.
pub fn parse(text: &str) -> Vec<(&str, Vec<u8>)> {
    let byte = |pair: &[u8]| {
        let digits = std::str::from_utf8(pair).expect("digits");
        u8::from_str_radix(digits, 16).expect("hexadecimal digits")
    };
    let line = |line| {
        let (name, digits): (&str, &str) = str::split_once(line, ' ').expect("a name and digits");
        (name, digits.as_bytes().chunks(2).map(byte).collect())
    };
    text.lines().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn named_bytes_survive() {
        let text = format([("one", &[0, 255][..]), ("none", &[])]);
        assert_eq!(text, "one 00ff\nnone \n");
        assert_eq!(parse(&text), [("one", vec![0, 255]), ("none", vec![])]);
    }
}
