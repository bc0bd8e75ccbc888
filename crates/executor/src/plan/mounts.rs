//! Mount options: one list of words in, flags, propagation and data of the file system out.

use sys::mount::{Propagation, attribute};

use super::PlanError;
use super::types::{Below, PropagationPlan};
use crate::oci;

/// What a mount's options say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Options {
    /// `Some(true)` for `rbind`.
    pub(super) bind: Option<bool>,
    pub(super) set: u64,
    pub(super) clear: u64,
    pub(super) below: Below,
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
const WITHOUT_EFFECT: [&str; 9] =
    ["defaults", "relatime", "norelatime", "nostrictatime", "atime", "async", "nomand", "loud", "silent"];

/// Words that let go of a kind of access times on everything below, and the kind that they take back: `relatime` is what is left.
const TIMES_BELOW: [(&str, u64); 4] = [
    ("rrelatime", 0),
    ("rnorelatime", 0),
    ("ratime", attribute::NO_ATIME),
    ("rnostrictatime", attribute::STRICT_ATIME),
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
                (Some((bit, true)), _) => move_to(bit, &mut self.set, &mut self.clear),
                (Some((bit, false)), _) => move_to(bit, &mut self.clear, &mut self.set),
                (None, Some(propagation)) => self.propagation = Some(propagation),
                (None, None) => self.take_rest(word),
            },
        }
        Ok(())
    }

    /// `rro` and the like apply to all mounts below; everything else is the file system's.
    fn take_rest(&mut self, word: &str) {
        let Below { set, clear } = &mut self.below;
        match (word.strip_prefix('r').and_then(attribute_of), times_below(word)) {
            (Some((bit, true)), _) => move_to(bit, set, clear),
            (Some((bit, false)), _) => move_to(bit, clear, set),
            (None, Some(bit)) => {
                *set &= !bit;
                *clear |= attribute::ACCESS_TIME;
            }
            (None, None) => self.data.push(match word.split_once('=') {
                Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
                None => (word.to_owned(), None),
            }),
        }
    }
}

/// The last word about an attribute counts.
fn move_to(bit: u64, to: &mut u64, from: &mut u64) {
    *to |= bit;
    *from &= !bit;
}

fn attribute_of(word: &str) -> Option<(u64, bool)> {
    ATTRIBUTES.iter().find(|(known, ..)| *known == word).map(|(_, bit, set)| (*bit, *set))
}

fn times_below(word: &str) -> Option<u64> {
    TIMES_BELOW.iter().find(|(known, _)| *known == word).map(|(_, bit)| *bit)
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
        assert_eq!(options.below, Below { set: attribute::READ_ONLY, clear: 0 });
        assert_eq!(options.data, [("mode".to_owned(), Some("755".to_owned())), ("newinstance".to_owned(), None)]);
    }

    #[test]
    fn words_that_begin_with_r_are_no_recursion() {
        assert_eq!(parse(&["rw", "relatime"]).below, Below::default());
        assert_eq!(parse(&["rnosuid"]).below, Below { set: attribute::NO_SUID, clear: 0 });
    }

    #[test]
    fn attributes_below_are_cleared() {
        let check = |words: &[&str], set, clear| assert_eq!(parse(words).below, Below { set, clear }, "{words:?}");
        check(&["rrw", "rdev"], 0, attribute::READ_ONLY | attribute::NO_DEV);
        check(&["rro", "rrw"], 0, attribute::READ_ONLY);
        check(&["rexec", "rnoexec"], attribute::NO_EXEC, 0);
        check(&["rrelatime"], 0, attribute::ACCESS_TIME);
        check(&["rnoatime", "ratime"], 0, attribute::ACCESS_TIME);
    }
}
