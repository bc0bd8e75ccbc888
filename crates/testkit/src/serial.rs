//! A test program that runs its tests one after the other on the main thread: for code that forks and may have no other
//! thread, and for programs that have to answer as something else first.

use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};

use crate::host;

/// A name and what it tests; a panic is a failure.
pub type Test = (&'static str, fn());

/// What the panics of the present test said.
static SAID: Mutex<String> = Mutex::new(String::new());

/// Panics are printed as they come, and once more at the end with the name of the test that failed.
fn remember_panics() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic: &PanicHookInfo<'_>| {
        usual(panic);
        let mut said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
        // Writing to a string cannot fail.
        let _ = writeln!(said, "{panic}");
    }));
}

/// Runs those of `tests` whose names contain one of the program's arguments, and none that follows a `--skip`; prints what
/// the usual harness would. `missing` names what this machine lacks for all of them. With `--list` it prints their names only.
pub fn main(tests: &[Test], missing: Option<String>) -> ExitCode {
    let (mut filters, mut skipped) = (Vec::new(), Vec::new());
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--skip" => skipped.extend(arguments.next()),
            option if option.starts_with('-') => {}
            _ => filters.push(argument),
        }
    }
    let in_any = |name: &str, words: &[String]| words.iter().any(|word| name.contains(word.as_str()));
    let wanted = |name: &str| (filters.is_empty() || in_any(name, &filters)) && !in_any(name, &skipped);
    let chosen: Vec<&Test> = tests.iter().filter(|(name, _)| wanted(name)).collect();
    if std::env::args().any(|argument| argument == "--list") {
        chosen.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    if let Some(missing) = missing {
        println!("skipped: needs {missing}");
        println!("test result: ok. 0 passed; 0 failed; {} ignored", chosen.len());
        return ExitCode::SUCCESS;
    }
    remember_panics();
    let (mut passed, mut failed) = (0, Vec::new());
    for (name, test) in chosen {
        // Who gives up a machine as late wants to know what it was at.
        if host::is_own_machine() {
            println!("test {name} begins");
        }
        SAID.lock().unwrap_or_else(PoisonError::into_inner).clear();
        let outcome = catch_unwind(AssertUnwindSafe(test));
        println!("test {name} ... {}", if outcome.is_ok() { "ok" } else { "FAILED" });
        match outcome {
            Ok(()) => passed += 1,
            Err(_) => failed.push((*name, SAID.lock().unwrap_or_else(PoisonError::into_inner).clone())),
        }
    }
    tell(passed, &failed)
}

/// Prints how the tests ended, and what those said that failed.
fn tell(passed: usize, failed: &[(&str, String)]) -> ExitCode {
    if failed.is_empty() {
        println!("test result: ok. {passed} passed; 0 failed; 0 ignored");
        return ExitCode::SUCCESS;
    }
    println!("\nfailures:\n");
    for (name, said) in failed {
        println!("---- {name} stdout ----\n{said}");
    }
    println!("failures:");
    failed.iter().for_each(|(name, _)| println!("    {name}"));
    println!("\ntest result: FAILED. {passed} passed; {} failed; 0 ignored", failed.len());
    ExitCode::FAILURE
}
