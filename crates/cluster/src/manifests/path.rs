//! Paths of fields inside an object, spelled as the API server spells them: `spec.containers[0].name`.

use std::fmt;

use super::yaml::{Node, Value};

/// One step into an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Segment {
    Field(String),
    Index(usize),
    /// A key of a map whose keys are data: `labels[app]`.
    Key(String),
}

/// Where a field is. Extended by value: `&path.field("spec").index(0)`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FieldPath(Vec<Segment>);

impl FieldPath {
    pub(crate) fn root() -> Self {
        FieldPath::default()
    }

    /// The field `name`; dots separate nested fields.
    pub(crate) fn field(&self, name: &str) -> Self {
        let mut path = self.clone();
        path.0.extend(name.split('.').map(|part| Segment::Field(part.into())));
        path
    }

    pub(crate) fn index(&self, index: usize) -> Self {
        self.with(Segment::Index(index))
    }

    pub(crate) fn key(&self, key: &str) -> Self {
        self.with(Segment::Key(key.into()))
    }

    pub(crate) fn with(&self, segment: Segment) -> Self {
        let mut path = self.clone();
        path.0.push(segment);
        path
    }

    /// The line of this field in `document`, or of the innermost object around it that is written down.
    pub(crate) fn line(&self, document: &Node) -> usize {
        let mut line = document.line;
        let mut node = document;
        for segment in &self.0 {
            match (segment, &node.value) {
                (Segment::Field(name) | Segment::Key(name), Value::Mapping(_)) => {
                    let Some(entry) = node.entry(name) else { return line };
                    (line, node) = (entry.line, &entry.value);
                }
                (Segment::Index(index), Value::Sequence(items)) if *index < items.len() => {
                    (line, node) = (items[*index].line, &items[*index]);
                }
                _ => return line,
            }
        }
        line
    }
}

impl fmt::Display for FieldPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, segment) in self.0.iter().enumerate() {
            match segment {
                Segment::Field(name) if position == 0 => write!(f, "{name}")?,
                Segment::Field(name) => write!(f, ".{name}")?,
                Segment::Index(index) => write!(f, "[{index}]")?,
                Segment::Key(key) => write!(f, "[{key}]")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifests::yaml::parse;

    #[test]
    fn paths_print_as_the_api_server_prints_them() {
        let path = FieldPath::root().field("spec.containers").index(0).field("resources.limits").key("memory");
        assert_eq!(path.to_string(), "spec.containers[0].resources.limits[memory]");
    }

    #[test]
    fn a_missing_field_has_the_line_of_what_is_around_it() {
        let document = parse("kind: Pod\nspec:\n  containers:\n  - image: x\n").remove(0).unwrap();
        let containers = FieldPath::root().field("spec.containers");
        assert_eq!(containers.line(&document), 3);
        assert_eq!(containers.index(0).field("image").line(&document), 4);
        assert_eq!(containers.index(0).field("name").line(&document), 4);
        assert_eq!(FieldPath::root().field("metadata.name").line(&document), 1);
    }
}
