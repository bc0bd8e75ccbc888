//! `orlop fsck`: what belongs to orlop and has no owner; silence means that all is well.

use std::process::ExitCode;

use super::client::{Client, block_on};
use super::format::{print, print_machine};
use crate::args::{OutputOptions, Places};
use crate::node;

/// Asks the running node; without one, looks for what an earlier one left. Fails when there is anything.
pub(crate) fn run(places: &Places, options: &OutputOptions) -> anyhow::Result<ExitCode> {
    let client = Client::new(places.socket());
    let unowned: Vec<String> = if places.socket().exists() && block_on(client.connect())?.is_ok() {
        block_on(client.get("/orlop/v1/fsck"))??
    } else {
        node::fsck_stopped(places)?
    };
    if !print_machine(options.output, &unowned)? {
        unowned.iter().for_each(|line| print(&format!("{line}\n")));
    }
    Ok(if unowned.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
