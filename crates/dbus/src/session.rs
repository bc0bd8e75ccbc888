//! A connection's conversation without the connection.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use crate::wire::{self, ERROR, RETURN, SIGNAL};
use crate::{BUS, BUS_PATH, BusError, Message, Method, Value};

/// The longest line of the authentication.
const LINE_MAX: usize = 1024;
/// More messages than can mean anything wait for nobody.
const WAITING_MAX: usize = 1024;

/// Who we say that we are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Identity {
    /// Whom the bus sees at the other end of the socket: in a namespace of users this process does not know its own number.
    OfSocket,
    /// This user.
    User(u32),
}

/// The calls of a connection, and what came over it. What is to be sent is handed out, what was received is handed in.
#[derive(Debug, Default)]
pub struct Session {
    received: Vec<u8>,
    fds: Vec<OwnedFd>,
    serial: u32,
    /// Beginnings of the lines that have to come before there are messages, the last first.
    lines: Vec<&'static str>,
    answers: VecDeque<Message>,
    signals: VecDeque<Message>,
}

impl Session {
    /// A new connection, and what is to be sent over it first. All of it at once: the other side reads line after line.
    pub fn begin(identity: Identity) -> (Self, Vec<u8>) {
        let (who, mut lines) = match identity {
            Identity::OfSocket => ("\r\nDATA".to_owned(), vec!["DATA", "OK ", "AGREE_UNIX_FD"]),
            // The number is written as text, and that in hexadecimal digits.
            Identity::User(uid) => {
                let digits = uid.to_string().bytes().map(|digit| format!("{digit:02x}")).collect::<String>();
                (format!(" {digits}"), vec!["OK ", "AGREE_UNIX_FD"])
            }
        };
        lines.reverse();
        let text = format!("\0AUTH EXTERNAL{who}\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n");
        (Self { lines, ..Self::default() }, text.into_bytes())
    }

    /// The call by which a bus learns of a new connection: its first.
    pub fn hello(&mut self) -> (u32, Vec<u8>) {
        self.call(Method { destination: BUS, path: BUS_PATH, interface: BUS, member: "Hello" }, &[])
    }

    /// A call: the number that its answer is asked for by, and what is to be sent.
    pub fn call(&mut self, method: Method<'_>, arguments: &[Value]) -> (u32, Vec<u8>) {
        self.serial += 1;
        (self.serial, wire::encode(method, self.serial, arguments))
    }

    /// Takes what came.
    pub fn take(&mut self, bytes: &[u8], fds: Vec<OwnedFd>) {
        self.received.extend_from_slice(bytes);
        self.fds.extend(fds);
    }

    /// The answer to the call `serial`; none as long as it has not come.
    ///
    /// # Errors
    /// What came is no message, or an error.
    pub fn answer(&mut self, serial: u32, method: Method<'_>) -> Result<Option<Message>, BusError> {
        self.sort()?;
        let Some(at) = self.answers.iter().position(|answer| answer.reply_serial == serial) else { return Ok(None) };
        let Some(answer) = self.answers.remove(at) else { return Ok(None) };
        if answer.kind == ERROR {
            let call = format!("{}.{}", method.interface, method.member);
            return Err(BusError::Refused { call, message: answer.text(), name: answer.error_name });
        }
        Ok(Some(answer))
    }

    /// The next signal that came; none as long as none has.
    ///
    /// # Errors
    /// What came is no message.
    pub fn signal(&mut self) -> Result<Option<Message>, BusError> {
        self.sort()?;
        Ok(self.signals.pop_front())
    }

    /// Makes messages of what was received.
    fn sort(&mut self) -> Result<(), BusError> {
        while let Some(beginning) = self.lines.last() {
            let Some(end) = self.received.windows(2).position(|pair| pair == b"\r\n") else {
                let endless = self.received.len() > LINE_MAX;
                return if endless { Err(BusError::Malformed("an endless line")) } else { Ok(()) };
            };
            let line: Vec<u8> = self.received.drain(..end + 2).collect();
            if !line.starts_with(beginning.as_bytes()) {
                return Err(BusError::Malformed("it does not let us in"));
            }
            self.lines.pop();
        }
        while let Some((mut message, length)) = wire::decode(&self.received)? {
            self.received.drain(..length);
            if message.fd_count > self.fds.len() {
                return Err(BusError::Malformed("descriptors are missing"));
            }
            message.fds = self.fds.drain(..message.fd_count).collect();
            let queue = match message.kind {
                RETURN | ERROR => &mut self.answers,
                SIGNAL => &mut self.signals,
                _ => continue,
            };
            if queue.len() < WAITING_MAX {
                queue.push_back(message);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASK: Method<'_> = Method { destination: "a.b", path: "/a", interface: "a.b", member: "Ask" };

    /// A message of the other side: a call's bytes with another kind, and a field that says what it answers.
    fn message(kind: u8, reply_to: u32, values: &[Value]) -> Vec<u8> {
        let mut bytes = wire::encode(ASK, 9, values);
        let fields = u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
        let body = bytes.split_off((16 + fields).next_multiple_of(8));
        bytes.resize((16 + fields).next_multiple_of(8), 0);
        bytes.extend([5, 1, b'u', 0]);
        bytes.extend(reply_to.to_le_bytes());
        let fields = u32::try_from(bytes.len() - 16).unwrap();
        bytes[12..16].copy_from_slice(&fields.to_le_bytes());
        bytes[1] = kind;
        [bytes, body].concat()
    }

    #[test]
    fn answers_and_signals_are_told_apart() {
        let (mut session, first) = Session::begin(Identity::User(1000));
        assert_eq!(first, b"\0AUTH EXTERNAL 31303030\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n");
        let ((one, _), (two, _)) = (session.call(ASK, &[]), session.call(ASK, &["x".into()]));
        let came = [
            b"OK 0123\r\nAGREE_UNIX_FD\r\n".to_vec(),
            message(SIGNAL, 0, &["signal".into()]),
            message(RETURN, two, &[Value::U32(2)]),
            message(ERROR, one, &["why".into()]),
        ]
        .concat();
        for byte in came {
            session.take(&[byte], Vec::new());
            session.sort().unwrap();
        }
        assert_eq!(session.answer(two, ASK).unwrap().unwrap().value().unwrap(), Value::U32(2));
        assert!(session.answer(two, ASK).unwrap().is_none());
        assert!(session.answer(one, ASK).unwrap_err().to_string().ends_with("why"));
        assert_eq!(session.signal().unwrap().unwrap().value().unwrap().text().unwrap(), "signal");
        assert!(session.signal().unwrap().is_none());
    }

    #[test]
    fn who_is_not_let_in_hears_it() {
        let (mut session, first) = Session::begin(Identity::OfSocket);
        assert!(first.starts_with(b"\0AUTH EXTERNAL\r\nDATA\r\n"));
        session.take(b"DATA\r\n", Vec::new());
        assert!(session.signal().unwrap().is_none());
        session.take(b"REJECTED EXTERNAL\r\n", Vec::new());
        assert!(session.signal().is_err());
        let (mut session, _) = Session::begin(Identity::OfSocket);
        session.take(&[b'x'; 2000], Vec::new());
        assert!(session.signal().is_err());
    }
}
