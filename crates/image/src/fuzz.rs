//! Documents and archives of images, damaged: refused or understood, never more.

use std::io::{BufRead, Cursor, Read};
use std::path::Path;

use fuzz::Target;

use crate::digest::Digest;
use crate::manifest::{self, RawManifest};
use crate::reference::Reference;
use crate::registry::{challenge, hosts};
use crate::spec::{ImageConfig, Index, Manifest, Platform, media_type, select_platform};
use crate::worker::{input, listing, path, tar};

const fn target(name: &'static str, words: &'static [&'static str], memory_max: usize) -> Target {
    Target { name, root: env!("CARGO_MANIFEST_DIR"), words, memory_max, meter: sys::meter::peak_of }
}

/// An archive in memory.
struct Memory<'a>(Cursor<&'a [u8]>);

impl Read for Memory<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(buffer)
    }
}

impl BufRead for Memory<'_> {
    fn fill_buf(&mut self) -> std::io::Result<&[u8]> {
        self.0.fill_buf()
    }

    fn consume(&mut self, bytes: usize) {
        self.0.consume(bytes);
    }
}

impl input::Input for Memory<'_> {}

impl input::Positioned for Memory<'_> {
    fn position(&self) -> u64 {
        self.0.position()
    }
}

const BLOCK: usize = 512;
const CHECKSUM: std::ops::Range<usize> = 148..156;

/// The same archive with checksums that are right: a damaged header would be refused for its checksum alone.
fn with_checksums(input: &[u8]) -> Vec<u8> {
    let mut archive = input.to_vec();
    for block in archive.chunks_exact_mut(BLOCK).filter(|block| &block[257..262] == b"ustar") {
        block[CHECKSUM].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[CHECKSUM].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
    archive
}

const TAR_WORDS: &[&str] = &[
    "ustar\u{0}00",
    "ustar  \u{0}",
    "11 path=x\n",
    "22 GNU.sparse.major=1\n",
    "22 GNU.sparse.minor=0\n",
    "27 GNU.sparse.map=0,1,5,1\n",
    "26 GNU.sparse.size=1000000\n",
    "25 GNU.sparse.realsize=9\n",
    "33 SCHILY.xattr.user.overlay.o=y\n",
    "20 size=99999999999\n",
    "30 mtime=-99999999999999.1234\n",
    "14 uid=1000\n",
    "../",
    ".wh.",
    ".wh..wh..opq",
    "\u{0}",
    "77777777777\u{0}",
];

#[test]
fn fuzz_tar() {
    target("tar", TAR_WORDS, 8 << 20).run(|input| {
        let archive = with_checksums(input);
        let mut archive = tar::Archive::new(Memory(Cursor::new(&archive)));
        let mut seen = Vec::new();
        loop {
            let entry = match archive.next() {
                Ok(Some(entry)) => entry,
                Ok(None) => return (seen, String::new()),
                // Numbers in a message make no new outcome.
                Err(error) => return (seen, error.to_string().replace(|one: char| one.is_ascii_digit(), "")),
            };
            let named = path::Relative::parse(&entry.name, 4096);
            if let Ok(named) = &named {
                assert!(named.bytes().split(|byte| *byte == b'/').all(|part| part != b".." && part != b"."));
            }
            let mut data = 0;
            while let Ok(piece @ [_, ..]) = archive.data() {
                let length = piece.len();
                data += length;
                archive.consume(length);
            }
            let sparse = entry.sparse.as_ref().map(Vec::len);
            seen.push((format!("{:?}", entry.kind), named.err(), sparse, entry.xattrs.len(), data.min(3)));
        }
    });
}

#[test]
fn fuzz_archive() {
    target("archive", TAR_WORDS, 16 << 20).run(|input| {
        let archive = with_checksums(input);
        let listed = listing::members(Memory(Cursor::new(&archive)));
        for member in listed.iter().flatten() {
            assert!(member.offset <= archive.len() as u64 && !member.name.is_empty());
        }
        listed.map(|members| members.len()).map_err(|failure| format!("{failure:?}").len())
    });
}

fn raw(media_type: &str, bytes: &[u8]) -> RawManifest {
    RawManifest { media_type: media_type.to_owned(), digest: Digest::of(bytes), bytes: bytes.to_vec().into() }
}

/// The kind of a message, without what it is about.
fn words(error: &impl std::fmt::Display) -> String {
    error.to_string().chars().filter(|one| one.is_ascii_lowercase() || *one == ' ').take(100).collect()
}

#[test]
fn fuzz_manifest() {
    const WORDS: &[&str] = &[
        media_type::OCI_INDEX,
        media_type::OCI_MANIFEST,
        "null",
        "[[[[[[[[",
        "{\"a\":",
        "\\u0000",
        "\"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\"",
        "1e999",
    ];
    target("manifest", WORDS, 16 << 20).run(|input| {
        let outcomes = [media_type::OCI_MANIFEST, media_type::DOCKER_LIST, ""].map(|kind| {
            let raw = raw(kind, input);
            let parsed = manifest::parse_manifest(&raw).map(|manifest: Manifest| manifest.layers.len());
            (manifest::is_index(&raw), parsed.map_err(|error| words(&error)))
        });
        let index: Result<Index, _> = manifest::parse(&raw(media_type::OCI_INDEX, input));
        let chosen = index.as_ref().ok().and_then(|index| select_platform(index, &Platform::host()).cloned());
        (outcomes, chosen.is_some(), index.map_err(|error| words(&error)).err())
    });
}

#[test]
fn fuzz_image_config() {
    let words_of =
        &["null", "{}", "[[[[[[[[", "\"Env\":", "\\ud800", "\"User\":\"4294967296\"", "\"Volumes\":{\"/../..\":{}}"];
    target("image_config", words_of, 16 << 20).run(|input| {
        let manifest: Result<Manifest, _> = serde_json::from_str(
            r#"{"schemaVersion":2,"config":{"mediaType":"c","digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","size":2},"layers":[]}"#,
        );
        let checked = manifest::check_config(&Digest::of(input), input, &manifest.unwrap());
        let platform = checked.as_ref().ok().map(|config: &ImageConfig| {
            manifest::check_platform("fuzz", config, &Platform::host()).map_err(|error| words(&error))
        });
        (checked.map_err(|error| words(&error)).err(), platform)
    });
}

#[test]
fn fuzz_hosts_toml() {
    let words_of = &[
        "[host.\"https://a\"]\n",
        "server = ",
        "capabilities = [\"pull\"]",
        "[[",
        "'''",
        "ca = ",
        "\n",
        "dial_timeout = \"1h\"",
    ];
    target("hosts_toml", words_of, 16 << 20).run(|input| {
        let text = String::from_utf8_lossy(input);
        let parsed = hosts::parse(&text, Path::new("/etc/orlop/certs.d/registry.test"), "registry.test:5000");
        parsed.map(|hosts| hosts.len()).map_err(|error| words(&error))
    });
}

#[test]
fn fuzz_reference() {
    target("reference", &["@sha256:", ":", "/", "localhost", "..", "[::1]:", "_"], 1 << 20).run(|input| {
        let text = String::from_utf8_lossy(input);
        let parsed = text.parse::<Reference>();
        if let Ok(reference) = &parsed {
            assert!(reference.repository().split('/').all(|part| part != ".."), "{reference}");
            let again: Reference = reference.to_string().parse().expect("what is printed can be read");
            assert_eq!(again.to_string(), reference.to_string());
        }
        let challenged = challenge::parse(&text).is_some();
        (parsed.map(|_| ()).map_err(|error| words(&error)), challenged)
    });
}
