//! Calls that carry others: of 32-bit x86 there are two whose first argument says which call is meant. A rule about `socket`
//! is about `socketcall` with 1, too; otherwise whoever is kept from the one would take the other.

use super::{Condition, Test, Width};

/// A call that carries others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Carrier {
    number: u32,
    /// The bits of its first argument that say which.
    mask: u64,
    calls: &'static [(&'static str, u64)],
}

/// `socketcall` (linux/net.h) and `ipc` (linux/ipc.h; above the call there is a version).
pub(super) const OF_X86: &[Carrier] = &[
    Carrier {
        number: 102,
        mask: u64::MAX,
        calls: &[
            ("socket", 1),
            ("bind", 2),
            ("connect", 3),
            ("listen", 4),
            ("accept", 5),
            ("getsockname", 6),
            ("getpeername", 7),
            ("socketpair", 8),
            ("send", 9),
            ("recv", 10),
            ("sendto", 11),
            ("recvfrom", 12),
            ("shutdown", 13),
            ("setsockopt", 14),
            ("getsockopt", 15),
            ("sendmsg", 16),
            ("recvmsg", 17),
            ("accept4", 18),
            ("recvmmsg", 19),
            ("sendmmsg", 20),
        ],
    },
    Carrier {
        number: 117,
        mask: 0xffff,
        calls: &[
            ("semop", 1),
            ("semget", 2),
            ("semctl", 3),
            ("semtimedop", 4),
            ("msgsnd", 11),
            ("msgrcv", 12),
            ("msgget", 13),
            ("msgctl", 14),
            ("shmat", 21),
            ("shmdt", 22),
            ("shmget", 23),
            ("shmctl", 24),
        ],
    },
];

impl Carrier {
    /// What a rule about a call says of this one: its number, and the alternatives. The first argument is another one here, and
    /// the others are not to be seen: as with libseccomp, conditions on them are about this call's own.
    pub(super) fn rule(&self, name: &str, alternatives: &[Vec<Condition>]) -> Option<(u32, Vec<Vec<Condition>>)> {
        let (_, value) = *self.calls.iter().find(|(call, _)| *call == name)?;
        let which = Condition { argument: 0, width: Width::Narrow, test: Test::Masked { mask: self.mask, value } };
        let carried = |conditions: &[Condition]| {
            let others = conditions.iter().filter(|condition| condition.argument > 0).copied();
            std::iter::once(which).chain(others).collect()
        };
        let alternatives = if alternatives.is_empty() {
            vec![carried(&[])]
        } else {
            alternatives.iter().map(|conditions| carried(conditions)).collect()
        };
        Some((self.number, alternatives))
    }
}
