//! Parameters of a request.

use cluster::percent::decode;

/// The decoded parameters of a query, in order.
#[derive(Debug)]
pub struct Query {
    pairs: Vec<(String, String)>,
}

impl Query {
    /// Of the part of an address behind the question mark.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let pairs = text.split('&').filter(|part| !part.is_empty()).map(|part| {
            let (name, value) = part.split_once('=').unwrap_or((part, ""));
            // In a query, unlike in a path, a plus is a space.
            (decode(&name.replace('+', " ")), decode(&value.replace('+', " ")))
        });
        Self { pairs: pairs.collect() }
    }

    /// The first of this name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.pairs.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    pub(super) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.pairs.iter().filter(move |(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// `1` and `true` are yes.
    pub(super) fn is_set(&self, name: &str) -> bool {
        matches!(self.get(name), Some("1" | "true"))
    }

    /// A number, or a message for the caller.
    pub(super) fn number<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>, String> {
        let Some(text) = self.get(name).filter(|text| !text.is_empty()) else { return Ok(None) };
        text.parse().map(Some).map_err(|_| format!("{name}={text:?} is not a number"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters() {
        let query = Query::parse("command=ls&command=-l%20a&tty=1&n=5&p=a+b&x");
        assert_eq!(query.all("command").collect::<Vec<_>>(), ["ls", "-l a"]);
        assert!(query.is_set("tty") && !query.is_set("x"));
        assert_eq!((query.number("n"), query.number::<u32>("none")), (Ok(Some(5)), Ok(None)));
        assert_eq!(query.get("p"), Some("a b"));
        assert!(query.number::<u32>("p").is_err());
    }
}
