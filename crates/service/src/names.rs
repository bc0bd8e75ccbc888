//! Names, held once however often they occur.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

/// Namespace and name of an object.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name {
    /// The namespace.
    pub namespace: Arc<str>,
    /// The name.
    pub name: Arc<str>,
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Below this many texts nobody looks for unused ones.
const PRUNE_LEAST: usize = 1024;

/// Texts in use, one copy of each.
#[derive(Debug, Default)]
pub(crate) struct Interner {
    texts: HashSet<Arc<str>>,
    prune_at: usize,
}

impl Interner {
    /// The one copy of a text.
    pub(crate) fn text(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.texts.get(text) {
            return known.clone();
        }
        self.prune();
        let new: Arc<str> = text.into();
        self.texts.insert(new.clone());
        new
    }

    /// The name made of these texts.
    pub(crate) fn name(&mut self, namespace: &str, name: &str) -> Name {
        Name { namespace: self.text(namespace), name: self.text(name) }
    }

    /// Forgets what nobody else holds whenever the number has doubled, so that names which come and go do not pile up.
    fn prune(&mut self) {
        if self.texts.len() >= self.prune_at.max(PRUNE_LEAST) {
            self.texts.retain(|text| Arc::strong_count(text) > 1);
            self.prune_at = self.texts.len() * 2;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_texts_are_one_and_unused_ones_go() {
        let mut interner = Interner::default();
        let kept = interner.text("kept");
        assert!(Arc::ptr_eq(&kept, &interner.text("kept")));
        for n in 0..10_000 {
            interner.text(&n.to_string());
        }
        assert!(interner.texts.len() <= PRUNE_LEAST);
        assert!(Arc::ptr_eq(&kept, &interner.text("kept")));
    }
}
