//! What is asked of the node's logs: services or one file, and which lines of a service.

use jiff::Timestamp;

use super::Query;

/// Most services of one query.
const SERVICES_MAX: usize = 4;
/// The longest name of a service.
const SERVICE_LENGTH_MAX: usize = 256;
/// Most lines that can be asked for by their number.
const TAIL_LINES_MAX: i64 = 100_000;

/// A query, as it was sent.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct LogQuery {
    services: Vec<String>,
    files: Vec<String>,
    pub(super) options: Options,
}

/// Which lines; only journald can tell.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Options {
    pub(super) since: Option<Timestamp>,
    pub(super) until: Option<Timestamp>,
    pub(super) tail_lines: Option<i64>,
    /// 0 is the boot that the node runs in, -1 the one before.
    pub(super) boot: Option<i64>,
    pub(super) pattern: Option<String>,
}

/// A query that can be answered.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Asked {
    File(String),
    Services(Vec<String>),
}

impl LogQuery {
    /// Nothing, if nothing is asked.
    ///
    /// # Errors
    /// What is no time, no number, or empty.
    pub(super) fn parse(query: &Query) -> Result<Option<Self>, String> {
        let named: Vec<&str> = query.all("query").collect();
        let (files, services): (Vec<&str>, Vec<&str>) = named.iter().partition(|name| name.contains(['/', '\\']));
        let services: Vec<&str> = services.into_iter().filter(|name| !name.trim().is_empty()).collect();
        if !named.is_empty() && files.is_empty() && services.is_empty() {
            return Err(invalid("query", &named.join(","), "may not be empty"));
        }
        let text = |name: &str| query.get(name).filter(|text| !text.is_empty());
        let time = |name: &str| {
            let read = text(name).map(|text| text.parse().map_err(|_| invalid(name, text, "invalid time format")));
            read.transpose()
        };
        let number = |name: &str| {
            let read = text(name).map(|text| text.parse().map_err(|_| invalid(name, text, "not a number")));
            read.transpose()
        };
        let owned = |names: Vec<&str>| names.into_iter().map(str::to_owned).collect();
        let options = Options {
            since: time("sinceTime")?,
            until: time("untilTime")?,
            tail_lines: number("tailLines")?,
            boot: number("boot")?,
            pattern: text("pattern").map(str::to_owned),
        };
        let asked = Self { services: owned(services), files: owned(files), options };
        Ok((asked != Self::default()).then_some(asked))
    }

    /// What it comes to.
    ///
    /// # Errors
    /// What goes together with nothing else, or is out of range.
    pub(super) fn checked(&self) -> Result<Asked, String> {
        self.options.check()?;
        let is_safe =
            |name: &&String| name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.:@".contains(&byte));
        if let Some(name) = self.services.iter().find(|name| name.len() > SERVICE_LENGTH_MAX) {
            return Err(invalid("query", name, &format!("length must be less than {SERVICE_LENGTH_MAX}")));
        }
        if let Some(name) = self.services.iter().find(|name| !is_safe(name)) {
            return Err(invalid("query", name, "input contains unsupported characters"));
        }
        match (self.files.as_slice(), self.services.as_slice()) {
            ([], []) => Err("query: Required value: cannot be empty with options".to_owned()),
            ([], services) if services.len() > SERVICES_MAX => {
                Err(format!("query: Too many: {}: must have at most {SERVICES_MAX} items", services.len()))
            }
            ([], services) => Ok(Asked::Services(services.to_vec())),
            ([file], []) if self.options == Options::default() => Ok(Asked::File(file.clone())),
            ([file], []) => Err(invalid("query", file, "cannot specify file with options")),
            (files, []) => Err(invalid("query", &files.join(","), "cannot specify more than one file")),
            (files, _) => Err(invalid("query", &files.join(","), "cannot specify a file and service")),
        }
    }
}

impl Options {
    fn check(&self) -> Result<(), String> {
        if let (Some(since), Some(until)) = (self.since, self.until)
            && since > until
        {
            return Err(invalid("untilTime", &until.to_string(), "must be after `sinceTime`"));
        }
        if let Some(boot) = self.boot.filter(|boot| *boot > 0) {
            return Err(invalid("boot", &boot.to_string(), "must be less than 1"));
        }
        match self.tail_lines.filter(|lines| !(0..=TAIL_LINES_MAX).contains(lines)) {
            Some(lines) => {
                let why = format!("must be between 0 and {TAIL_LINES_MAX}, inclusive");
                Err(invalid("tailLines", &lines.to_string(), &why))
            }
            None => Ok(()),
        }
    }
}

/// As the API's machinery writes it.
fn invalid(field: &str, value: &str, why: &str) -> String {
    format!("{field}: Invalid value: {value:?}: {why}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(text: &str) -> Result<Option<LogQuery>, String> {
        LogQuery::parse(&Query::parse(text))
    }

    #[test]
    fn services_and_files_are_told_apart() {
        assert_eq!(asked("x=1"), Ok(None));
        let checked = |text: &str| asked(text).unwrap().unwrap().checked();
        assert_eq!(checked("query=/messages"), Ok(Asked::File("/messages".into())));
        assert_eq!(checked("query=a&query=b@1.x"), Ok(Asked::Services(vec!["a".into(), "b@1.x".into()])));
        for (text, why) in [
            ("query=/a&query=b", "cannot specify a file and service"),
            ("query=/a&query=/b", "cannot specify more than one file"),
            ("query=/a&boot=0", "cannot specify file with options"),
            ("boot=0", "cannot be empty with options"),
            ("query=a&query=b&query=c&query=d&query=e", "at most 4"),
            ("query=a;b", "unsupported characters"),
            ("query=a&boot=1", "must be less than 1"),
            ("query=a&tailLines=100001", "between 0 and 100000"),
            ("query=a&sinceTime=2026-01-02T00:00:00Z&untilTime=2026-01-01T00:00:00Z", "must be after"),
        ] {
            let told = checked(text).unwrap_err();
            assert!(told.contains(why), "{text}: {told}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_told() {
        for (text, why) in [
            ("query=%20", "may not be empty"),
            ("query=a&sinceTime=now", "invalid time format"),
            ("query=a&boot=x", "not a number"),
            ("query=a&tailLines=x", "not a number"),
        ] {
            let told = asked(text).unwrap_err();
            assert!(told.contains(why), "{text}: {told}");
        }
    }
}
