//! Percent-encoding of what stands in a URL (RFC 3986 §2.1).

use std::fmt::Write as _;

/// All but unreserved characters (§2.3) encoded: it can stand in a path and in a query.
#[must_use]
pub fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => encoded.push(char::from(byte)),
            _ => write!(encoded, "%{byte:02X}").expect("a string takes all"),
        }
    }
    encoded
}

/// Undoes it; what is not valid stays as it is.
#[must_use]
pub fn decode(text: &str) -> String {
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, more @ ..] = rest {
        let digits = more.get(..2).filter(|digits| *first == b'%' && digits.iter().all(u8::is_ascii_hexdigit));
        let byte = digits.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok());
        decoded.push(byte.unwrap_or(*first));
        rest = if byte.is_some() { &more[2..] } else { more };
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_is_decoded() {
        assert_eq!(encode("spec.nodeName=a b"), "spec.nodeName%3Da%20b");
        assert_eq!(encode("docker.io/library/busybox:1~2+é"), "docker.io%2Flibrary%2Fbusybox%3A1~2%2B%C3%A9");
        for text in ["", "a-Z_0.~", "/a b%+&=é\0"] {
            assert_eq!(decode(&encode(text)), text);
        }
    }

    #[test]
    fn what_is_not_valid_stays() {
        for text in ["100%", "%", "%2", "a%zz", "%+1", "% 1"] {
            assert_eq!(decode(text), text);
        }
        assert_eq!(decode("a%2fb%2F%zz%41"), "a/b/%zzA");
        assert_eq!(decode("%ff"), "\u{fffd}");
    }
}
