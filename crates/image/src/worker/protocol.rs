//! What the daemon and its confined child say to each other: the order as an argument, the report on standard output.

use serde::{Deserialize, Serialize};

use crate::Limits;
use crate::digest::Digest;

/// The hidden argument that makes the program a worker; the order follows it as JSON.
pub(crate) const ARGUMENT: &str = "--image-unpack-worker";

/// What to do and how far to go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Order {
    pub(crate) job: Job,
    pub(crate) limits: Limits,
}

/// What a worker does with its standard input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Job {
    /// A layer becomes files below the root.
    Unpack,
    /// An image archive: where its files lie in it. If they cannot be read from where they are (a compressed archive, a
    /// pipe), it is written to [`SPOOL`] first.
    List,
}

/// The file below the root that holds the archive, uncompressed.
pub(crate) const SPOOL: &[u8] = b"archive";

/// How it went. The daemon takes nothing in it for granted: a worker may have been taken over by what it read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Report {
    Done(Unpacked),
    Listed(Listing),
    /// An entry that must not be.
    Refused {
        entry: String,
        reason: String,
    },
    /// Bytes that are no layer.
    Corrupt {
        reason: String,
    },
    /// The disk or quota is full.
    DiskFull {
        entry: String,
    },
    /// A step that should have worked.
    Failed {
        reason: String,
    },
}

/// A tree that is there now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Unpacked {
    /// Digest of the uncompressed archive.
    pub(crate) diff_id: Digest,
    /// Bytes the tree takes on disk, in whole blocks.
    pub(crate) bytes: u64,
    /// Inodes it takes.
    pub(crate) inodes: u64,
    /// Directories that hide what lower layers have in them, as hexadecimal paths below the root.
    pub(crate) opaque: Vec<HexPath>,
}

/// The files of an archive, links followed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Listing {
    /// Whether offsets are those of [`SPOOL`]; else of the archive itself.
    pub(crate) spooled: bool,
    pub(crate) members: Vec<Member>,
}

/// A file of an archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Member {
    /// Its path, relative and without `.` and `..`.
    pub(crate) name: String,
    pub(crate) offset: u64,
    pub(crate) size: u64,
}

/// A path as bytes, in JSON as hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct HexPath(pub(crate) Vec<u8>);

impl Serialize for HexPath {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let hex: String = self.0.iter().map(|byte| format!("{byte:02x}")).collect();
        serializer.serialize_str(&hex)
    }
}

impl<'de> Deserialize<'de> for HexPath {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        let bytes = text.as_bytes().chunks(2).map(|pair| match pair {
            [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
            _ => None,
        });
        bytes.collect::<Option<Vec<u8>>>().map(Self).ok_or_else(|| serde::de::Error::custom("not hexadecimal"))
    }
}
