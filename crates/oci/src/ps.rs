//! `ps`: the processes of a container.

use std::collections::HashSet;
use std::process::ExitCode;

use crate::args::{Format, PsOptions};
use crate::container::Container;
use crate::context::Context;
use crate::error::Error;
use crate::inspect::print;

pub(crate) fn run(context: &Context, options: &PsOptions) -> Result<ExitCode, Error> {
    let container = Container::load(context, &options.id)?;
    let none = || Error::Invalid("the container has no control group to ask".to_owned());
    let found = container.group().ok_or_else(none)?.processes_below();
    let pids: Vec<i32> = found.iter().map(|pid| pid.as_raw_nonzero().get()).collect();
    match options.format {
        Format::Json => {
            let text = serde_json::to_string(&pids).map_err(Error::json("process ids"))?;
            print(&format!("{text}\n"))?;
        }
        Format::Table => {
            let words: Vec<&str> = options.ps.iter().map(String::as_str).collect();
            print(&lines(&listing(if words.is_empty() { &["-ef"] } else { &words })?, &pids)?)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What ps(1) says of all processes: its options are the user's.
#[allow(clippy::disallowed_methods, reason = "a command that is about another program's output")]
fn listing(options: &[&str]) -> Result<String, Error> {
    let output = std::process::Command::new("ps").args(options).output().map_err(Error::file("run", "ps"))?;
    if !output.status.success() {
        return Err(Error::Invalid(format!("ps: {}", String::from_utf8_lossy(&output.stderr).trim())));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The head, and the lines of these processes.
fn lines(listing: &str, pids: &[i32]) -> Result<String, Error> {
    let head = listing.lines().next().unwrap_or_default();
    let column = head.split_whitespace().position(|name| name == "PID");
    let column = column.ok_or_else(|| Error::Invalid("couldn't find PID field in ps output".to_owned()))?;
    let wanted: HashSet<i32> = pids.iter().copied().collect();
    let of_container = |line: &&str| {
        let pid = line.split_whitespace().nth(column).and_then(|word| word.parse().ok());
        pid.is_some_and(|pid: i32| wanted.contains(&pid))
    };
    let lines = listing.lines().skip(1).filter(of_container);
    Ok(std::iter::once(head).chain(lines).map(|line| format!("{line}\n")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_chosen_by_process() {
        let listing = "UID   PID PPID CMD\nroot    1    0 init\nroot   12    1 sh -c 1\n";
        assert_eq!(lines(listing, &[12]).unwrap(), "UID   PID PPID CMD\nroot   12    1 sh -c 1\n");
        assert!(lines("UID CMD\n", &[]).is_err());
    }
}
