//! What there is to say to systemd (org.freedesktop.systemd1(5)): that it make a unit, change it, end it.

use std::time::{Duration, Instant};

use dbus::{Address, BUS, BUS_PATH, Bus, BusError, Identity, Method, PROPERTIES, Value};

/// Longest time for an answer, and for a unit to come or go.
const PATIENCE: Duration = Duration::from_secs(30);

const SERVICE: &str = "org.freedesktop.systemd1";
const PATH: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
const REMOVED: &str = "JobRemoved";
/// systemd itself, for root alone: for the time when there is no bus.
const PRIVATE: &str = "/run/systemd/private";
const SYSTEM_BUS: &str = "/run/dbus/system_bus_socket";

/// Names of systemd's errors.
mod refusal {
    pub(super) const EXISTS: &str = "org.freedesktop.systemd1.UnitExists";
    pub(super) const NONE: &str = "org.freedesktop.systemd1.NoSuchUnit";
}

/// Why systemd does not do what it is asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SystemdError {
    #[error("systemd: {0}")]
    Bus(#[from] BusError),
    #[error(
        "systemd cannot be asked for a control group: {0}; start it and its message bus, or make control groups without it \
         (no --systemd-cgroup; containerd: SystemdCgroup = false, Docker: native.cgroupdriver=cgroupfs, Podman: \
         --cgroup-manager cgroupfs)"
    )]
    Away(BusError),
    #[error(
        "systemd of the user cannot be found: neither DBUS_SESSION_BUS_ADDRESS is set, nor is there a bus in XDG_RUNTIME_DIR; \
         log in again with the package dbus-user-session installed"
    )]
    NoSession,
    #[error("systemd: unit {unit}: its job ended as {result:?}; see `journalctl -u {unit}`")]
    Job { unit: String, result: String },
    #[error("systemd: unit {unit} has not come or gone within {} s; see `systemctl status {unit}`", PATIENCE.as_secs())]
    Late { unit: String },
}

/// Whose units they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Whose {
    System,
    /// Of the user who runs this.
    User,
}

/// A property of a unit.
pub(crate) type Property = (String, Value);

/// A connection to systemd, which tells of the ends of its jobs.
#[derive(Debug)]
pub(crate) struct Manager {
    bus: Bus,
    pub(crate) version: u32,
}

impl Manager {
    pub(crate) fn connect(whose: Whose) -> Result<Self, SystemdError> {
        let mut bus = match whose {
            Whose::System => system_bus()?,
            Whose::User => user_bus()?,
        };
        let version = listen(&mut bus)?;
        Ok(Self { bus, version })
    }

    /// Makes a unit that goes with its last process. What has its name and failed is forgotten for it.
    pub(crate) fn begin(&mut self, unit: &str, properties: Vec<Property>) -> Result<(), SystemdError> {
        let arguments = [
            unit.into(),
            "replace".into(),
            listed(properties),
            // No units beside it.
            Value::Array("(sa(sv))".to_owned(), Vec::new()),
        ];
        let made = match self.job("StartTransientUnit", unit, &arguments) {
            Err(SystemdError::Bus(error)) if error.is_named(refusal::EXISTS) => {
                self.forget(unit);
                self.job("StartTransientUnit", unit, &arguments)
            }
            other => other,
        };
        made.inspect_err(|_| self.forget(unit))
    }

    /// Changes a unit, until the machine is booted again.
    pub(crate) fn change(&mut self, unit: &str, properties: Vec<Property>) -> Result<(), SystemdError> {
        self.call("SetUnitProperties", &[unit.into(), Value::Bool(true), listed(properties)])
    }

    /// Puts a process into a unit's group, or one below it.
    pub(crate) fn attach(&mut self, unit: &str, below: &str, pid: u32) -> Result<(), SystemdError> {
        let pids = Value::Array("u".to_owned(), vec![Value::U32(pid)]);
        self.call("AttachProcessesToUnit", &[unit.into(), below.into(), pids])
    }

    /// Ends a unit. One that has ended is no error.
    pub(crate) fn end(&mut self, unit: &str) -> Result<(), SystemdError> {
        let ended = match self.job("StopUnit", unit, &[unit.into(), "replace".into()]) {
            Err(SystemdError::Bus(error)) if error.is_named(refusal::NONE) => Ok(()),
            other => other,
        };
        self.forget(unit);
        ended
    }

    /// Lets systemd forget that a unit has failed. Most have not, which is an error for it.
    fn forget(&mut self, unit: &str) {
        let _ = self.call("ResetFailedUnit", &[unit.into()]);
    }

    fn call(&mut self, member: &str, arguments: &[Value]) -> Result<(), SystemdError> {
        Ok(self.bus.call(Method { member, ..ASK }, arguments).map(drop)?)
    }

    /// Calls what makes a job, and waits for its end.
    fn job(&mut self, member: &str, unit: &str, arguments: &[Value]) -> Result<(), SystemdError> {
        let answer = self.bus.call(Method { member, ..ASK }, arguments)?;
        let job = answer.value()?;
        let late = |error: BusError| match error {
            BusError::Io(error) if error.kind() == std::io::ErrorKind::TimedOut => {
                SystemdError::Late { unit: unit.to_owned() }
            }
            other => other.into(),
        };
        let begun = Instant::now();
        loop {
            // Each signal of others would begin the patience of one read anew.
            if begun.elapsed() > PATIENCE {
                return Err(SystemdError::Late { unit: unit.to_owned() });
            }
            let signal = self.bus.signal().map_err(late)?;
            // Anybody on a bus may send us such a signal.
            if signal.interface != MANAGER || signal.member != REMOVED || signal.sender != answer.sender {
                continue;
            }
            // Number, object, unit, result.
            let values = signal.values()?;
            let (Some(which), Some(result)) = (values.get(1), values.get(3)) else { continue };
            if *which == job {
                return match result.text()? {
                    "done" => Ok(()),
                    result => Err(SystemdError::Job { unit: unit.to_owned(), result: result.to_owned() }),
                };
            }
        }
    }
}

const ASK: Method<'_> = Method { destination: SERVICE, path: PATH, interface: MANAGER, member: "" };

fn listed(properties: Vec<Property>) -> Value {
    let one = |(name, value): Property| Value::Struct(vec![Value::Text(name), value.variant()]);
    Value::Array("(sv)".to_owned(), properties.into_iter().map(one).collect())
}

/// Asks for the ends of jobs, and for systemd's version: all in one go.
fn listen(bus: &mut Bus) -> Result<u32, SystemdError> {
    let rule = format!("type='signal',sender='{SERVICE}',path='{PATH}',interface='{MANAGER}',member='{REMOVED}'");
    let matches = Method { destination: BUS, path: BUS_PATH, interface: BUS, member: "AddMatch" };
    let subscribe = Method { member: "Subscribe", ..ASK };
    let get = Method { interface: PROPERTIES, member: "Get", ..ASK };
    // Who is connected to systemd alone hears everything, and gets no answer to the first.
    bus.send(matches, &[rule.as_str().into()])?;
    bus.send(subscribe, &[])?;
    let version = bus.send(get, &[MANAGER.into(), "Version".into()])?;
    let version = bus.answer(version, get).map_err(SystemdError::Away)?.value()?;
    Ok(parse_version(version.text()?))
}

/// `252.39-1~deb12u1`, `v239`; 0 for what is none: it is told nothing that an old one does not know.
fn parse_version(text: &str) -> u32 {
    let digits = text.trim_start_matches('v');
    let end = digits.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(digits.len());
    digits[..end].parse().unwrap_or(0)
}

fn system_bus() -> Result<Bus, SystemdError> {
    let uid = sys::rustix::process::geteuid();
    let identity = Identity::User(uid.as_raw());
    let text = std::env::var("DBUS_SYSTEM_BUS_ADDRESS").unwrap_or_default();
    let mut addresses = Address::parse(&text);
    addresses.push(Address::Path(SYSTEM_BUS.into()));
    first(&addresses, identity).or_else(|error| {
        if !uid.is_root() {
            return Err(SystemdError::Away(error));
        }
        Bus::direct(&Address::Path(PRIVATE.into()), identity, PATIENCE).map_err(|_| SystemdError::Away(error))
    })
}

/// As in every session: the address that the environment has, or the place below the user's directory. In a namespace of
/// users, as Podman makes one, the number that this process has is not the one that the bus knows.
fn user_bus() -> Result<Bus, SystemdError> {
    let address = std::env::var("DBUS_SESSION_BUS_ADDRESS").unwrap_or_default();
    let mut addresses = Address::parse(&address);
    if let Some(dir) = std::env::var_os("XDG_RUNTIME_DIR") {
        let socket = std::path::Path::new(&dir).join("bus");
        addresses.extend(socket.exists().then_some(Address::Path(socket)));
    }
    if addresses.is_empty() {
        return Err(SystemdError::NoSession);
    }
    first(&addresses, Identity::OfSocket).map_err(SystemdError::Away)
}

/// A connection to the first where somebody is.
fn first(addresses: &[Address], identity: Identity) -> Result<Bus, BusError> {
    let mut failure = None;
    for address in addresses {
        match Bus::connect(address, identity, PATIENCE) {
            Ok(bus) => return Ok(bus),
            Err(error) => failure = Some(error),
        }
    }
    Err(failure.unwrap_or(BusError::Malformed("no address")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_numbers_with_something_around() {
        for (text, expect) in [("252.39-1~deb12u1", 252), ("v239", 239), ("258~rc1", 258), ("", 0), ("x", 0)] {
            assert_eq!(parse_version(text), expect, "{text}");
        }
    }
}
