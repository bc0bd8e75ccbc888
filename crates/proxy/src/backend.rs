//! The modes: what carries rules out, behind one trait. All of it blocks for as long as the kernel works.

mod iptables;
mod ipvs;
mod nftables;
mod userspace;

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use service::{Difference, Frontend, Network, Rules};

use crate::{Config, Owned, RulesError, StartError, Tallies};

/// How rules are carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Mode {
    /// A table of nftables of our own.
    #[default]
    Nftables,
    /// Chains of iptables as upstream's kube-proxy makes them, by the programs `iptables-restore` and `iptables-save`.
    Iptables,
    /// The kernel's load balancer IPVS, with a table of nftables beside it.
    Ipvs,
    /// This process carries the bytes itself, for kernels without a packet filter and for user namespaces.
    Userspace,
}

impl Mode {
    /// All modes.
    pub const ALL: &'static [Mode] = &[Mode::Nftables, Mode::Iptables, Mode::Ipvs, Mode::Userspace];

    /// As `--proxy-mode` spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Mode::Nftables => "nftables",
            Mode::Iptables => "iptables",
            Mode::Ipvs => "ipvs",
            Mode::Userspace => "userspace",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The text names no mode.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is no proxy mode; take one of {names}", names = names())]
pub struct UnknownMode(pub String);

fn names() -> String {
    Mode::ALL.iter().map(|mode| mode.as_str()).collect::<Vec<_>>().join(", ")
}

impl FromStr for Mode {
    type Err = UnknownMode;

    fn from_str(text: &str) -> Result<Mode, UnknownMode> {
        let named = Mode::ALL.iter().copied().find(|mode| mode.as_str() == text);
        named.ok_or_else(|| UnknownMode(text.to_owned()))
    }
}

/// One mode at work, in the network namespace of the thread that opened it.
///
/// It remembers what it has written: a difference leads from the rules that were written last to others. After a write
/// that failed only [`Backend::replace`] helps.
pub(crate) trait Backend: fmt::Debug + Send {
    /// Where the rules are, for messages: `table orlop-proxy`.
    fn place(&self) -> String;

    /// Puts these rules in place of those that are there, and lets this hold for them and for all that come by differences.
    /// Connections that are open stay open.
    fn replace(&mut self, rules: &Rules, network: &Network) -> Result<(), RulesError>;

    /// Carries out a difference. What has failed may have been carried out in part.
    fn update(&mut self, difference: &Difference) -> Result<(), RulesError>;

    /// Whether nobody has removed the rules. Asked every few seconds, so cheap.
    fn is_there(&mut self) -> Result<bool, RulesError>;

    /// UDP frontends of the rules that are there, whoever wrote them: the flows of those that go are looked at.
    fn udp_frontends(&mut self) -> Result<Vec<Frontend>, RulesError>;

    /// Removes everything of this mode; nothing of it being there is no error.
    fn remove(&mut self) -> Result<(), RulesError>;

    /// How long each address family took in the last write, if they are written one after the other; none for one that had
    /// nothing to write.
    fn took(&self) -> Option<[Option<Duration>; 2]> {
        None
    }

    /// What is counted of the rules beside what the model knows.
    fn tallies(&mut self) -> Tallies {
        Tallies::default()
    }

    /// What of ours is there.
    fn owned(&mut self) -> Result<Vec<Owned>, RulesError>;
}

/// Opens the configured mode and checks that this host has all it needs.
pub(crate) fn open(config: &Config) -> Result<Box<dyn Backend>, StartError> {
    match config.mode {
        Mode::Nftables => Ok(Box::new(nftables::Nftables::open(config)?)),
        Mode::Iptables => Ok(Box::new(iptables::Iptables::open(config)?)),
        Mode::Ipvs => Ok(Box::new(ipvs::IpvsBackend::open(config)?)),
        Mode::Userspace => Ok(Box::new(userspace::Userspace::open()?)),
    }
}

/// Removes what the other modes have left, and upstream's kube-proxy in any mode. Where they have left nothing, nothing is done.
pub(crate) fn remove_other_modes(config: &Config) -> Result<(), RulesError> {
    nftables::remove_upstreams()?;
    Mode::ALL.iter().try_for_each(|mode| match mode {
        // The table of nftables is the same one.
        Mode::Nftables if matches!(config.mode, Mode::Nftables | Mode::Ipvs) => Ok(()),
        Mode::Nftables => nftables::remove_leftovers(&config.table),
        Mode::Ipvs if config.mode == Mode::Ipvs => Ok(()),
        Mode::Ipvs => ipvs::remove_leftovers(config),
        Mode::Userspace if config.mode == Mode::Userspace => Ok(()),
        Mode::Userspace => userspace::remove_leftovers(),
        Mode::Iptables => iptables::remove_leftovers((config.mode == Mode::Iptables).then_some(config.iptables.kind)),
    })
}

/// Removes what all modes have left; goes on after a failure and returns them all.
pub(crate) fn remove_all_modes(config: &Config) -> Vec<RulesError> {
    let removed = Mode::ALL.iter().map(|mode| match mode {
        Mode::Nftables => nftables::remove_leftovers(&config.table),
        Mode::Ipvs => ipvs::remove_leftovers(config),
        Mode::Userspace => userspace::remove_leftovers(),
        Mode::Iptables => iptables::remove_leftovers(None),
    });
    removed.chain([nftables::remove_upstreams()]).filter_map(Result::err).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_named_as_the_flag_names_them() {
        for mode in Mode::ALL {
            assert_eq!(mode.to_string().parse(), Ok(*mode));
        }
        assert!("kernelspace".parse::<Mode>().unwrap_err().to_string().contains("nftables"));
    }
}
