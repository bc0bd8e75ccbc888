//! What there is to say to systemd (org.freedesktop.systemd1(5)): that it make a unit, change it, end it. For who makes control
//! groups by it: one thread, which waits for each answer.

use std::time::{Duration, Instant};

use dbus::{Address, BUS, BUS_PATH, Bus, BusError, Identity, Method, PROPERTIES, Value};
use sys::cgroup::{UnitProperty, UnitValue};

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
pub enum SystemdError {
    /// A call that it refuses.
    #[error("systemd: {0}")]
    Bus(#[from] BusError),
    /// It is not there.
    #[error(
        "systemd cannot be asked for a control group: {0}; start it and its message bus, or make control groups without it \
         (no --systemd-cgroup; containerd: SystemdCgroup = false, Docker: native.cgroupdriver=cgroupfs, Podman: \
         --cgroup-manager cgroupfs)"
    )]
    Away(BusError),
    /// A user has none.
    #[error(
        "systemd of the user cannot be found: neither DBUS_SESSION_BUS_ADDRESS is set, nor is there a bus in XDG_RUNTIME_DIR; \
         log in again with the package dbus-user-session installed"
    )]
    NoSession,
    /// It tried and failed.
    #[error("systemd: unit {unit}: its job ended as {result:?}; see `journalctl -u {unit}`")]
    Job {
        /// Of this unit.
        unit: String,
        /// As it says.
        result: String,
    },
    /// It does not come to an end.
    #[error("systemd: unit {unit} has not come or gone within {} s; see `systemctl status {unit}`", PATIENCE.as_secs())]
    Late {
        /// With this unit.
        unit: String,
    },
}

impl SystemdError {
    /// Whether there is a unit of that name already.
    pub fn is_taken(&self) -> bool {
        matches!(self, Self::Bus(error) if error.is_named(refusal::EXISTS))
    }
}

/// Whose units they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whose {
    /// Of the machine.
    System,
    /// Of the user who runs this.
    User,
}

/// A property of a unit.
pub type Property = (String, Value);

/// A connection to systemd, which tells of the ends of its jobs.
#[derive(Debug)]
pub struct Manager {
    bus: Bus,
    /// systemd's; 0 where that cannot be told.
    pub version: u32,
}

impl Manager {
    /// Connects to the systemd of the machine or of this process's user.
    ///
    /// # Errors
    /// It is not there.
    pub fn connect(whose: Whose) -> Result<Self, SystemdError> {
        let mut bus = match whose {
            Whose::System => system_bus()?,
            Whose::User => user_bus()?,
        };
        let version = listen(&mut bus)?;
        Ok(Self { bus, version })
    }

    /// Makes a unit; a scope goes with its last process. What has its name and failed is forgotten for it.
    ///
    /// # Errors
    /// systemd's, or none of its answers in time.
    pub fn begin(&mut self, unit: &str, properties: Vec<Property>) -> Result<(), SystemdError> {
        let arguments = [
            unit.into(),
            "replace".into(),
            listed(properties),
            // No units beside it.
            Value::Array("(sa(sv))".to_owned(), Vec::new()),
        ];
        let made = match self.job("StartTransientUnit", unit, &arguments) {
            Err(error) if error.is_taken() => {
                self.forget(unit);
                self.job("StartTransientUnit", unit, &arguments)
            }
            other => other,
        };
        made.inspect_err(|_| self.forget(unit))
    }

    /// Changes a unit, until the machine is booted again.
    ///
    /// # Errors
    /// systemd's, or none of its answers in time.
    pub fn change(&mut self, unit: &str, properties: Vec<Property>) -> Result<(), SystemdError> {
        self.call("SetUnitProperties", &[unit.into(), Value::Bool(true), listed(properties)])
    }

    /// Puts a process into a unit's group, or one below it.
    ///
    /// # Errors
    /// systemd's, or none of its answers in time.
    pub fn attach(&mut self, unit: &str, below: &str, pid: u32) -> Result<(), SystemdError> {
        let pids = Value::Array("u".to_owned(), vec![Value::U32(pid)]);
        self.call("AttachProcessesToUnit", &[unit.into(), below.into(), pids])
    }

    /// Ends a unit. One that has ended is no error.
    ///
    /// # Errors
    /// systemd's, or none of its answers in time.
    pub fn end(&mut self, unit: &str) -> Result<(), SystemdError> {
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

/// The property for a limit of a control group.
pub fn property((name, value): UnitProperty) -> Property {
    let value = match value {
        UnitValue::Number(number) => Value::U64(number),
        UnitValue::Text(text) => text.into(),
        UnitValue::Mask(bits) => Value::bytes(&bits),
        UnitValue::Pairs(pairs) => {
            let pair = |(one, other): (String, String)| Value::Struct(vec![Value::Text(one), Value::Text(other)]);
            Value::Array("(ss)".to_owned(), pairs.into_iter().map(pair).collect())
        }
    };
    (name.to_owned(), value)
}

/// Properties of every unit that is made for its control group: not ended by a shutdown but by whoever made it, and with all
/// that systemd counts.
pub fn of_group() -> Vec<Property> {
    let counted = ["MemoryAccounting", "CPUAccounting", "IOAccounting", "TasksAccounting"];
    let counted = counted.map(|name| (name.to_owned(), Value::Bool(true)));
    [("DefaultDependencies".to_owned(), Value::Bool(false))].into_iter().chain(counted).collect()
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
