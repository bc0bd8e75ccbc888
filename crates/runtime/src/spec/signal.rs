//! Signals by name: what asks a container to end.

use cri::v1;

use super::SpecError;

/// Numbers of x86-64 and arm64 (signal(7)).
const SIGNALS: [(&str, i32); 35] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("IOT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("POLL", 29),
    ("PWR", 30),
    ("SYS", 31),
    ("UNUSED", 31),
];
const TERM: i32 = 15;
/// The first real-time signal that programs may use: C libraries keep two for themselves.
const RTMIN: i32 = 34;
const RTMAX: i32 = 64;

/// The signal that asks a container to end: the request's, else the image's, else SIGTERM.
///
/// # Errors
/// What is no signal.
pub(crate) fn stop_signal(config: &v1::ContainerConfig, image: &str) -> Result<i32, SpecError> {
    let unknown = |value: i32| SpecError::invalid("stop_signal", value, "is no signal of CRI");
    match v1::Signal::try_from(config.stop_signal) {
        Ok(v1::Signal::RuntimeDefault) if image.is_empty() => Ok(TERM),
        Ok(v1::Signal::RuntimeDefault) => {
            number(image).ok_or_else(|| SpecError::invalid("the image's stop signal", image, "is no signal"))
        }
        Ok(signal) => number(&plain(signal)).ok_or_else(|| unknown(config.stop_signal)),
        Err(_) => Err(unknown(config.stop_signal)),
    }
}

/// How CRI names the effective stop signal in a container's status.
pub(crate) fn stop_signal_of_image(config: &v1::ContainerConfig, image: &str) -> v1::Signal {
    match v1::Signal::try_from(config.stop_signal) {
        Ok(v1::Signal::RuntimeDefault) | Err(_) => {
            let name = image.replacen('+', "PLUS", 1).replacen('-', "MINUS", 1);
            v1::Signal::from_str_name(&format!("SIGNAL_{name}")).unwrap_or(v1::Signal::RuntimeDefault)
        }
        Ok(signal) => signal,
    }
}

/// `SIGRTMIN+1` for CRI's `SIGRTMINPLUS1`.
fn plain(signal: v1::Signal) -> String {
    let name = signal.as_str_name();
    let name = name.strip_prefix("SIGNAL_").unwrap_or(name);
    name.replacen("PLUS", "+", 1).replacen("MINUS", "-", 1)
}

/// A number or a name, with or without `SIG`, in any case.
fn number(text: &str) -> Option<i32> {
    if let Ok(number) = text.parse() {
        return Some(number).filter(|number| (1..=RTMAX).contains(number));
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let named = SIGNALS.iter().find(|(known, _)| *known == name).map(|(_, number)| *number);
    named.or_else(|| real_time(name))
}

/// `RTMIN+3`, `RTMAX-2`.
fn real_time(name: &str) -> Option<i32> {
    let offset = |rest: &str, sign: char| match rest {
        "" => Some(0),
        _ => rest.strip_prefix(sign)?.parse::<i32>().ok().filter(|offset| (0..=RTMAX - RTMIN).contains(offset)),
    };
    match (name.strip_prefix("RTMIN"), name.strip_prefix("RTMAX")) {
        (Some(rest), _) => Some(RTMIN + offset(rest, '+')?),
        (_, Some(rest)) => Some(RTMAX - offset(rest, '-')?),
        _ => None,
    }
}
