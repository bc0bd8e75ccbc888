//! Mount options: one list of words in, flags, propagation and data of the file system out.

use sys::mount::{Propagation, attribute};

use super::PlanError;
use super::types::PropagationPlan;
use crate::oci;

/// What a mount's options say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Options {
    /// `Some(true)` for `rbind`.
    pub(super) bind: Option<bool>,
    pub(super) set: u64,
    pub(super) clear: u64,
    pub(super) set_recursive: u64,
    pub(super) propagation: Option<PropagationPlan>,
    /// `Some(true)` for `ridmap`.
    pub(super) id_map: Option<bool>,
    pub(super) copy_up: bool,
    /// What is left for the file system itself.
    pub(super) data: Vec<(String, Option<String>)>,
}

/// A word, the attribute it is about, and whether it sets it.
const ATTRIBUTES: [(&str, u64, bool); 14] = [
    ("ro", attribute::READ_ONLY, true),
    ("rw", attribute::READ_ONLY, false),
    ("nosuid", attribute::NO_SUID, true),
    ("suid", attribute::NO_SUID, false),
    ("nodev", attribute::NO_DEV, true),
    ("dev", attribute::NO_DEV, false),
    ("noexec", attribute::NO_EXEC, true),
    ("exec", attribute::NO_EXEC, false),
    ("noatime", attribute::NO_ATIME, true),
    ("strictatime", attribute::STRICT_ATIME, true),
    ("nodiratime", attribute::NO_DIR_ATIME, true),
    ("diratime", attribute::NO_DIR_ATIME, false),
    ("nosymfollow", attribute::NO_SYMFOLLOW, true),
    ("symfollow", attribute::NO_SYMFOLLOW, false),
];

/// Words that are the kernel's defaults, or mean nothing to the new mount API.
const WITHOUT_EFFECT: [&str; 13] = [
    "defaults",
    "relatime",
    "norelatime",
    "nostrictatime",
    "atime",
    "async",
    "nomand",
    "loud",
    "silent",
    "rrelatime",
    "rnorelatime",
    "rnostrictatime",
    "ratime",
];

impl Options {
    pub(super) fn parse(mount: &oci::Mount) -> Result<Self, PlanError> {
        let mut options = Self { bind: (mount.kind == "bind").then_some(true), ..Self::default() };
        for word in &mount.options {
            options.take(word)?;
        }
        Ok(options)
    }

    fn take(&mut self, word: &str) -> Result<(), PlanError> {
        match word {
            "bind" => self.bind = Some(false),
            "rbind" => self.bind = Some(true),
            "idmap" => self.id_map = Some(false),
            "ridmap" => self.id_map = Some(true),
            "tmpcopyup" => self.copy_up = true,
            "remount" => {
                return Err(PlanError::invalid("mounts.options", word, "is not possible: mounts are made once"));
            }
            _ if WITHOUT_EFFECT.contains(&word) => {}
            _ => match (attribute_of(word), propagation_of(word)) {
                (Some((bit, set)), _) => self.change(bit, set),
                (None, Some(propagation)) => self.propagation = Some(propagation),
                (None, None) => self.take_rest(word),
            },
        }
        Ok(())
    }

    fn change(&mut self, bit: u64, set: bool) {
        let (to, from) = if set { (&mut self.set, &mut self.clear) } else { (&mut self.clear, &mut self.set) };
        *to |= bit;
        *from &= !bit;
    }

    /// `rro` and the like apply to all mounts below; everything else is the file system's.
    fn take_rest(&mut self, word: &str) {
        match word.strip_prefix('r').and_then(attribute_of) {
            Some((bit, true)) => self.set_recursive |= bit,
            Some((_, false)) => {}
            None => self.data.push(match word.split_once('=') {
                Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
                None => (word.to_owned(), None),
            }),
        }
    }
}

fn attribute_of(word: &str) -> Option<(u64, bool)> {
    ATTRIBUTES.iter().find(|(known, ..)| *known == word).map(|(_, bit, set)| (*bit, *set))
}

/// The meaning of `private`, `rslave` and so on; empty for none.
pub(super) fn propagation_of(word: &str) -> Option<PropagationPlan> {
    let plain = word.strip_prefix('r').unwrap_or(word);
    let kind = match plain {
        "private" => Propagation::Private,
        "slave" => Propagation::Slave,
        "shared" => Propagation::Shared,
        "unbindable" => Propagation::Unbindable,
        _ => return None,
    };
    Some(PropagationPlan { kind, recursive: plain != word })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[&str]) -> Options {
        let options = options.iter().map(|word| (*word).to_owned()).collect();
        Options::parse(&oci::Mount { options, ..oci::Mount::default() }).unwrap()
    }

    #[test]
    fn words_are_told_apart() {
        let options = parse(&["rbind", "ro", "nosuid", "rw", "rslave", "rro", "mode=755", "newinstance", "relatime"]);
        assert_eq!(options.bind, Some(true));
        assert_eq!((options.set, options.clear), (attribute::NO_SUID, attribute::READ_ONLY));
        assert_eq!(options.propagation, Some(PropagationPlan { kind: Propagation::Slave, recursive: true }));
        assert_eq!(options.set_recursive, attribute::READ_ONLY);
        assert_eq!(options.data, [("mode".to_owned(), Some("755".to_owned())), ("newinstance".to_owned(), None)]);
    }

    #[test]
    fn words_that_begin_with_r_are_no_recursion() {
        assert_eq!(parse(&["rw", "relatime"]).set_recursive, 0);
        assert_eq!(parse(&["rnosuid"]).set_recursive, attribute::NO_SUID);
    }
}
