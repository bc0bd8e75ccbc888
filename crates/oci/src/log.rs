//! The log that callers read: go-runc and conmon take the last error from it.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::Path;

use crate::args::LogFormat;
use crate::error::Error;

/// Where errors and warnings go.
#[derive(Debug)]
pub(crate) struct Log {
    file: Option<File>,
    format: LogFormat,
}

impl Log {
    pub(crate) fn open(path: Option<&Path>, format: LogFormat) -> Result<Self, Error> {
        let open = |path: &Path| {
            let file = OpenOptions::new().create(true).append(true).open(path);
            file.map_err(Error::file("open", path))
        };
        Ok(Self { file: path.map(open).transpose()?, format })
    }

    /// An error that ends the command; on standard error, too.
    pub(crate) fn error(&self, error: &Error) {
        let text = error.to_string();
        self.write("error", &text);
        if self.file.is_some() {
            eprintln!("{text}");
        }
    }

    pub(crate) fn warning(&self, text: &str) {
        self.write("warning", text);
    }

    /// One line in one write: others may append to the same file.
    fn write(&self, level: &str, text: &str) {
        let time = now();
        let line = match self.format {
            LogFormat::Json => format!("{}\n", serde_json::json!({ "level": level, "msg": text, "time": time })),
            LogFormat::Text => format!("time={time:?} level={level} msg={text:?}\n"),
        };
        // Nobody is left to tell that the log cannot be written.
        let _ = match self.file.as_ref() {
            Some(mut file) => file.write_all(line.as_bytes()),
            None => std::io::stderr().write_all(line.as_bytes()),
        };
    }
}

/// RFC 3339, in UTC.
pub(crate) fn now() -> String {
    jiff::Timestamp::now().to_string()
}
