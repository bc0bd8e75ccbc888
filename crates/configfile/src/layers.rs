//! Files and flags, one over the other.

use std::path::Path;

use serde_json::{Map, Value};
use serde_saphyr::UserMessageFormatter;

use crate::{Schema, merge};

/// Everything that is wrong with a configuration, one line for each.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{}", .0.join("\n"))]
pub struct Faults(pub Vec<String>);

/// What has been written so far, and what is wrong with it.
#[derive(Debug)]
pub struct Layers {
    schema: &'static Schema,
    written: Value,
    faults: Vec<String>,
    /// Every file was one.
    is_whole: bool,
}

impl Layers {
    /// Nothing is written yet.
    pub fn new(schema: &'static Schema) -> Layers {
        Layers { schema, written: Value::Object(Map::new()), faults: Vec::new(), is_whole: true }
    }

    /// A document, YAML or JSON, over what is there: a merge patch (RFC 7396). `flag` is the one that led to it.
    pub fn file(&mut self, flag: &str, file: &Path) {
        let read = std::fs::read_to_string(file)
            .map_err(|error| format!("cannot be read: {error}; check that the file is there and readable"));
        match read.and_then(|text| self.document(&text)) {
            Ok(layer) => {
                let faults = &mut self.faults;
                let mut tell = |path: &str, fault: &str| faults.push(format!("{}: {path}: {fault}", file.display()));
                self.schema.check(&layer, "", &mut tell);
                merge::patch(&mut self.written, layer);
            }
            Err(fault) => {
                self.fault(format!("{flag} {}: {fault}", file.display()));
                self.is_whole = false;
            }
        }
    }

    /// The fields of a document, without its `apiVersion` and `kind`.
    fn document(&self, text: &str) -> Result<Value, String> {
        let mut value: Value =
            serde_saphyr::from_str(text).map_err(|error| error.render_with_formatter(&UserMessageFormatter))?;
        let Some(fields) = value.as_object_mut() else { return Err("not a mapping of fields".to_owned()) };
        for (field, expected) in [("apiVersion", self.schema.api_version), ("kind", self.schema.kind)] {
            match fields.remove(field) {
                Some(Value::String(found)) if found == expected => {}
                found => return Err(format!("{field} is {}, expected {expected}", found.unwrap_or_default())),
            }
        }
        Ok(value)
    }

    /// The field of a flag. `featureGates` are merged, all other mappings replaced, as upstream does.
    pub fn flag(&mut self, flag: &str, text: &str) {
        match self.schema.by_flag(flag) {
            Some(leaf) => self.flag_at(flag, leaf.path, text),
            None => self.fault(format!("--{flag} {text:?}: there is no such flag")),
        }
    }

    /// A flag that sets this field and not its own, which is of the same kind.
    pub fn flag_at(&mut self, flag: &str, path: &str, text: &str) {
        let Some(leaf) = self.schema.by_flag(flag) else { return };
        match merge::value_of(leaf.kind, text) {
            Ok(value) => self.set(path, value),
            Err(fault) => self.fault(format!("--{flag} {text:?}: {fault}")),
        }
    }

    /// A field, whatever it was.
    pub fn set(&mut self, path: &str, value: Value) {
        let mut place = &mut self.written;
        for name in path.split('.') {
            if !place.is_object() {
                *place = Value::Object(Map::new());
            }
            let Some(fields) = place.as_object_mut() else { return };
            place = fields.entry(name).or_insert(Value::Null);
        }
        match path {
            "featureGates" => merge::patch(place, value),
            _ => *place = value,
        }
    }

    /// Notes what is wrong.
    pub fn fault(&mut self, fault: String) {
        self.faults.push(fault);
    }

    /// All that was written, merged, each leaf of its kind.
    ///
    /// # Errors
    /// All faults at once.
    pub fn finish(self) -> Result<Value, Faults> {
        if self.faults.is_empty() { Ok(self.written) } else { Err(Faults(self.faults)) }
    }

    /// As [`Layers::finish`], read into something to work with: its faults are told with the others. Of a file that cannot be
    /// read at all nobody knows what is missing, so then nothing is.
    ///
    /// # Errors
    /// All faults at once.
    pub fn read<T>(self, read: impl FnOnce(&Value) -> Result<T, Vec<String>>) -> Result<(Value, T), Faults> {
        let Self { written, mut faults, is_whole, .. } = self;
        match if is_whole { read(&written) } else { Err(Vec::new()) } {
            Ok(value) if faults.is_empty() => Ok((written, value)),
            Ok(_) => Err(Faults(faults)),
            Err(more) => {
                faults.extend(more);
                Err(Faults(faults))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{Kind, Status, leaf};

    const SCHEMA: Schema = Schema {
        api_version: "test/v1",
        kind: "Test",
        reader: "test",
        leaves: &[
            leaf("name", Kind::Text, "", "name", Status::Honoured),
            leaf("count", Kind::Integer, "3", "count", Status::NotYet),
            leaf("deep.er", Kind::Duration, "10s", "deeper", Status::Never("nobody asks")),
            leaf("featureGates", Kind::Map, "", "feature-gates", Status::Honoured),
            leaf("labels", Kind::Map, "", "labels", Status::Honoured),
        ],
    };

    fn with(text: &str, flags: &[(&str, &str)]) -> Result<Value, Faults> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.yaml");
        std::fs::write(&file, format!("apiVersion: test/v1\nkind: Test\n{text}")).unwrap();
        let mut layers = Layers::new(&SCHEMA);
        layers.file("--config", &file);
        flags.iter().for_each(|(flag, text)| layers.flag(flag, text));
        layers.finish()
    }

    #[test]
    fn a_field_written_twice_is_told_with_its_line() {
        let error = with("name: a\ncount: 1\nname: b\n", &[]).unwrap_err().to_string();
        assert!(error.contains("line 5") && error.contains("duplicate mapping key `name`"), "{error}");
        assert!(!error.contains("Options"), "advice for programmers: {error}");
    }

    #[test]
    fn flags_set_their_fields() {
        let file = "featureGates: {A: true}\nlabels: {a: '1'}\n";
        let flags = [("feature-gates", "B=false"), ("labels", "b=2"), ("deeper", "1m"), ("count", "7")];
        let expect =
            json!({"featureGates": {"A": true, "B": false}, "labels": {"b": "2"}, "deep": {"er": "1m"}, "count": 7});
        assert_eq!(with(file, &flags).unwrap(), expect);
    }

    #[test]
    fn all_faults_at_once_by_file_and_field() {
        let Faults(faults) = with("Count: 3\ndeep: 1\nname: [a]\n", &[("count", "x"), ("nope", "1")]).unwrap_err();
        for (fault, needle) in faults.iter().zip([
            "config.yaml: Count: there is no such field; count is one",
            "deep: has fields of its own",
            "name: [\"a\"] is not a text",
            "--count \"x\": not a whole number",
            "--nope \"1\": there is no such flag",
        ]) {
            assert!(fault.contains(needle), "{fault}");
        }
        assert_eq!(faults.len(), 5);
    }

    #[test]
    fn an_unknown_field_hides_no_other_fault() {
        let mut layers = Layers::new(&SCHEMA);
        layers.fault("one".to_owned());
        let error = layers.read::<()>(|_| Err(vec!["two".to_owned()])).unwrap_err();
        assert_eq!(error, Faults(vec!["one".to_owned(), "two".to_owned()]));
        let mut layers = Layers::new(&SCHEMA);
        layers.file("--config", Path::new("/not/there"));
        let Faults(faults) = layers.read::<()>(|_| Err(vec!["two".to_owned()])).unwrap_err();
        let expect = "--config /not/there: cannot be read: No such file or directory (os error 2); check that the file is there and \
            readable";
        assert_eq!(faults, [expect]);
        let mut layers = Layers::new(&SCHEMA);
        layers.flag("count", "7");
        assert_eq!(layers.read(|written| Ok(written["count"].clone())).unwrap().1, json!(7));
    }

    #[test]
    fn what_has_no_effect_is_named() {
        let written = with("count: 4\ndeep: {er: 5s}\n", &[]).unwrap();
        let expect =
            ["count = 4 has no effect on this test yet", "deep.er = \"5s\" has no effect on this test: nobody asks"];
        assert_eq!(SCHEMA.warnings(&written), expect);
        assert!(SCHEMA.warnings(&with("count: 3\ndeep: {er: 0s}\n", &[]).unwrap()).is_empty());
    }

    #[test]
    fn another_kind_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x");
        std::fs::write(&file, "apiVersion: v1\nkind: Pod\n").unwrap();
        let mut layers = Layers::new(&SCHEMA);
        layers.file("--config", &file);
        let error = layers.finish().unwrap_err().to_string();
        assert!(error.contains("apiVersion is \"v1\", expected test/v1"), "{error}");
    }
}
