//! What a container says of its devices itself: an annotation, which the runtime keeps as long as the container. It is read
//! when the checkpoint is of no use.

use std::collections::BTreeMap;

use super::table::{Allocation, NodeIds};

/// Its name.
pub(super) const ANNOTATION: &str = "io.orlop.container.devices";

/// The devices of a container, by resource; none if it has none.
pub(super) fn write(resources: &BTreeMap<String, Allocation>) -> Option<String> {
    let ids: BTreeMap<&String, &NodeIds> = resources.iter().map(|(name, one)| (name, &one.devices)).collect();
    (!ids.is_empty()).then(|| serde_json::to_string(&ids).expect("all keys are strings or numbers"))
}

/// What [`write`] wrote; nothing if it is something else.
pub(super) fn read(text: &str) -> BTreeMap<String, NodeIds> {
    serde_json::from_str(text).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let devices = NodeIds::from([(-1, vec!["a".to_owned(), "b".to_owned()]), (1, vec!["c".to_owned()])]);
        let allocation = Allocation { devices: devices.clone(), answer: None, is_confirmed: true };
        let text = write(&[("example.com/gpu".to_owned(), allocation)].into()).unwrap();
        assert_eq!(text, r#"{"example.com/gpu":{"-1":["a","b"],"1":["c"]}}"#);
        assert_eq!(read(&text), [("example.com/gpu".to_owned(), devices)].into());
        assert!(write(&BTreeMap::new()).is_none() && read("[").is_empty());
    }
}
