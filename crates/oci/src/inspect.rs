//! `state`, `list`: what there is, and what it does.

use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;

use serde::Serialize;

use crate::args::{Format, ListOptions};
use crate::container::{Container, Status};
use crate::context::Context;
use crate::error::Error;

/// A container's state, in runc's fields and their order.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct State<'a> {
    oci_version: &'a str,
    id: &'a str,
    pid: i32,
    status: &'static str,
    bundle: &'a std::path::Path,
    rootfs: &'a std::path::Path,
    created: &'a str,
    #[serde(skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    annotations: &'a std::collections::BTreeMap<String, String>,
    owner: String,
}

impl<'a> State<'a> {
    fn of(container: &'a Container, owner: String) -> Self {
        let (record, status) = (&container.record, container.status());
        Self {
            oci_version: &record.spec.oci_version,
            id: &record.id,
            pid: if status == Status::Stopped { 0 } else { record.pid },
            status: status.word(),
            bundle: &record.bundle,
            rootfs: &record.rootfs,
            created: &record.created,
            annotations: &record.spec.annotations,
            owner,
        }
    }
}

/// Prints to standard output; whoever has closed it does not want to see it.
pub(crate) fn print(text: &str) -> Result<(), Error> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::file("write", "standard output")(error))
        }
        _ => Ok(()),
    }
}

/// `state`.
pub(crate) fn state(context: &Context, id: &str) -> Result<(), Error> {
    let container = Container::load(context, id)?;
    let state = State::of(&container, String::new());
    print(&serde_json::to_string_pretty(&state).map_err(Error::json("the container's state"))?)
}

/// `list`.
pub(crate) fn list(context: &Context, options: &ListOptions) -> Result<(), Error> {
    let found = all(context)?;
    if options.quiet {
        let ids: String = found.iter().map(|(container, _)| format!("{}\n", container.record.id)).collect();
        return print(&ids);
    }
    let states: Vec<State<'_>> = found.iter().map(|(container, owner)| State::of(container, owner.clone())).collect();
    match options.format {
        Format::Table => print(&table(&states)),
        Format::Json if states.is_empty() => print("null\n"),
        Format::Json => {
            let text = serde_json::to_string(&states).map_err(Error::json("the containers' states"))?;
            print(&format!("{text}\n"))
        }
    }
}

/// All containers with their owners.
fn all(context: &Context) -> Result<Vec<(Container, String)>, Error> {
    let entries = match std::fs::read_dir(&context.root) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && !context.root_given => return Ok(Vec::new()),
        other => other.map_err(Error::file("read", &context.root))?,
    };
    let mut found = Vec::new();
    for entry in entries.flatten() {
        let Ok(stat) = entry.metadata() else { continue };
        let id = entry.file_name().to_string_lossy().into_owned();
        if !stat.is_dir() {
            continue;
        }
        match Container::load(context, &id) {
            Ok(container) => found.push((container, owner(stat.uid()))),
            // Another command makes or removes it.
            Err(Error::NotExist) => {}
            Err(error) => context.log.warning(&format!("load container {id}: {error}")),
        }
    }
    found.sort_by(|(one, _), (other, _)| one.record.id.cmp(&other.record.id));
    Ok(found)
}

/// A user's name, or `#` and the number.
fn owner(uid: u32) -> String {
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let name = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let (name, number) = (fields.next()?, fields.nth(1)?);
        (number.parse() == Ok(uid)).then(|| name.to_owned())
    });
    name.unwrap_or_else(|| format!("#{uid}"))
}

fn table(states: &[State<'_>]) -> String {
    let head = ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(str::to_owned);
    let row = |state: &State<'_>| {
        let bundle = state.bundle.display().to_string();
        [state.id.to_owned(), state.pid.to_string(), state.status.to_owned(), bundle, state.created.to_owned(), {
            state.owner.clone()
        }]
    };
    let rows: Vec<[String; 6]> = std::iter::once(head).chain(states.iter().map(row)).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].len() + 3).max().unwrap_or(0).max(12);
    let widths: Vec<usize> = (0..5).map(width).collect();
    let line = |row: &[String; 6]| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        format!("{}{}\n", cells.collect::<String>(), row[5])
    };
    rows.iter().map(line).collect()
}
