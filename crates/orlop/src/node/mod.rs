//! A running node: its parts, their wiring, and the socket on which it answers.

mod agent;
mod alone;
mod answers;
pub(crate) mod api;
mod base;
pub(crate) mod client_metrics;
mod detach;
mod foreign;
mod format;
mod fsck;
pub(crate) mod join;
mod keychain;
pub(crate) mod layout;
mod listener;
pub(crate) mod lock;
pub(crate) mod logging;
mod member;
mod member_metrics;
mod names;
mod node_status;
mod notices;
mod notify;
pub(crate) mod objects;
pub(crate) mod process;
mod runtime_config;
pub(crate) mod runtime_only;
mod service_proxy;
pub(crate) mod settings;
pub(crate) mod socket;
mod tasks;
pub(crate) mod up;

/// What an earlier node left on this machine, if none runs.
pub(crate) fn fsck_stopped(places: &crate::args::Places) -> anyhow::Result<Vec<String>> {
    fsck::of_stopped(&layout::Layout::new(places))
}
