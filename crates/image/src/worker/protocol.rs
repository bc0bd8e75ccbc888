//! What the daemon and its unpacking child say to each other: the order as an argument, the report on standard output.

use serde::{Deserialize, Serialize};

use crate::Limits;
use crate::digest::Digest;

/// The hidden argument that makes the program a worker; the order follows it as JSON.
pub(crate) const ARGUMENT: &str = "--image-unpack-worker";

/// What to unpack and how far to go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Order {
    pub(crate) limits: Limits,
}

/// How it went. The daemon takes nothing in it for granted: a worker may have been taken over by what it read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Report {
    Done(Unpacked),
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
