//! Log files in CRI format: bytes of the application to records ([`lines`]), records to a file that rotates ([`file`]).

mod file;
mod lines;

pub(crate) use file::{Health, LogFile};
pub(crate) use lines::{Lines, Stream};
