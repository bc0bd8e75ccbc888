//! As much of D-Bus as it takes to talk to logind: calls with texts as arguments, their answers with descriptors, signals
//! (D-Bus Specification 0.42, "Message Protocol" and "Authentication Protocol"). A general client would be as large as the
//! rest of the node agent.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use sys::fdpass;
use tokio::io::Interest;
use tokio::net::UnixStream;

/// Longer messages are none that concern us (the specification allows 128 MiB).
const MESSAGE_MAX: usize = 64 << 10;
/// The longest line of the authentication.
const LINE_MAX: usize = 1024;
/// More signals than can mean anything wait for nobody.
const SIGNALS_MAX: usize = 64;

/// Why the bus does not do what it is asked.
#[derive(Debug, thiserror::Error)]
pub(super) enum BusError {
    /// The connection.
    #[error("the system's message bus cannot be talked to")]
    Io(#[from] io::Error),
    /// What came is no message, or none for us.
    #[error("the system's message bus says what cannot be understood: {0}")]
    Malformed(&'static str),
    /// The other side refused.
    #[error("{call}: {name}: {message}")]
    Refused {
        /// What was asked for.
        call: String,
        /// The error's name.
        name: String,
        /// Its text.
        message: String,
    },
}

/// The kinds of messages.
const CALL: u8 = 1;
const RETURN: u8 = 2;
const ERROR: u8 = 3;
const SIGNAL: u8 = 4;

/// The fields of a header.
mod field {
    pub(super) const PATH: u8 = 1;
    pub(super) const INTERFACE: u8 = 2;
    pub(super) const MEMBER: u8 = 3;
    pub(super) const ERROR_NAME: u8 = 4;
    pub(super) const REPLY_SERIAL: u8 = 5;
    pub(super) const DESTINATION: u8 = 6;
    pub(super) const SIGNATURE: u8 = 8;
    pub(super) const UNIX_FDS: u8 = 9;
}

/// Whom to ask for what.
#[derive(Debug, Clone, Copy)]
pub(super) struct Method<'a> {
    pub(super) destination: &'a str,
    pub(super) path: &'a str,
    pub(super) interface: &'a str,
    pub(super) member: &'a str,
}

/// A message that came.
#[derive(Debug, Default)]
pub(super) struct Message {
    kind: u8,
    reply_serial: u32,
    pub(super) interface: String,
    pub(super) member: String,
    error_name: String,
    signature: String,
    fd_count: usize,
    body: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

impl Message {
    /// The value of a body that is one number of 32 bits: `u`, `b` or `h`.
    pub(super) fn number(&self) -> Result<u32, BusError> {
        match self.signature.as_str() {
            "u" | "b" | "h" => Reader::new(&self.body).u32(),
            _ => Err(BusError::Malformed("a number was expected")),
        }
    }

    /// The value of a body that is a variant of a number of 64 bits.
    pub(super) fn variant_u64(&self) -> Result<u64, BusError> {
        let mut reader = Reader::new(&self.body);
        match (self.signature.as_str(), reader.signature()?.as_str()) {
            ("v", "t") => reader.u64(),
            _ => Err(BusError::Malformed("a long number was expected")),
        }
    }

    /// The truth in a variant.
    pub(super) fn variant_bool(&self) -> Result<bool, BusError> {
        let mut reader = Reader::new(&self.body);
        match (self.signature.as_str(), reader.signature()?.as_str()) {
            ("v", "b") => Ok(reader.u32()? != 0),
            _ => Err(BusError::Malformed("a truth was expected")),
        }
    }

    fn text(&self) -> String {
        let begins_with_text = self.signature.starts_with('s');
        if begins_with_text { Reader::new(&self.body).string().unwrap_or_default() } else { String::new() }
    }
}

/// A connection to a bus.
pub(super) struct Bus {
    socket: UnixStream,
    received: Vec<u8>,
    fds: Vec<OwnedFd>,
    serial: u32,
    signals: VecDeque<Message>,
}

impl Bus {
    /// Connects, and says who we are.
    pub(super) async fn connect(socket: &Path) -> Result<Self, BusError> {
        let socket = UnixStream::connect(socket).await?;
        let mut bus = Self { socket, received: Vec::new(), fds: Vec::new(), serial: 0, signals: VecDeque::new() };
        // The bus knows us by the socket; the number is written as text, and that in hexadecimal digits.
        let uid = sys::rustix::process::geteuid().as_raw().to_string();
        let uid: String = uid.bytes().map(|digit| format!("{digit:02x}")).collect();
        bus.send(format!("\0AUTH EXTERNAL {uid}\r\n").as_bytes()).await?;
        bus.expect_line("OK ").await?;
        bus.send(b"NEGOTIATE_UNIX_FD\r\n").await?;
        bus.expect_line("AGREE_UNIX_FD").await?;
        bus.send(b"BEGIN\r\n").await?;
        const DBUS: &str = "org.freedesktop.DBus";
        bus.call(Method { destination: DBUS, path: "/org/freedesktop/DBus", interface: DBUS, member: "Hello" }, &[])
            .await?;
        Ok(bus)
    }

    /// Calls a method with texts.
    pub(super) async fn call(&mut self, method: Method<'_>, arguments: &[&str]) -> Result<Message, BusError> {
        self.serial += 1;
        let serial = self.serial;
        let message = encode(method, serial, arguments);
        self.send(&message).await?;
        loop {
            let message = self.receive().await?;
            match message.kind {
                RETURN if message.reply_serial == serial => return Ok(message),
                ERROR if message.reply_serial == serial => {
                    let call = format!("{}.{}", method.interface, method.member);
                    return Err(BusError::Refused { call, message: message.text(), name: message.error_name });
                }
                SIGNAL if self.signals.len() < SIGNALS_MAX => self.signals.push_back(message),
                _ => {}
            }
        }
    }

    /// The next signal that was asked for. Dropped half-way, it loses nothing.
    pub(super) async fn signal(&mut self) -> Result<Message, BusError> {
        loop {
            if let Some(signal) = self.signals.pop_front() {
                return Ok(signal);
            }
            let message = self.receive().await?;
            if message.kind == SIGNAL {
                return Ok(message);
            }
        }
    }

    async fn send(&self, mut bytes: &[u8]) -> Result<(), BusError> {
        while !bytes.is_empty() {
            self.socket.writable().await?;
            match self.socket.try_write(bytes) {
                Ok(count) => bytes = &bytes[count..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    async fn fill(&mut self) -> Result<(), BusError> {
        let mut buffer = [0; 4096];
        let (socket, fds) = (&self.socket, &mut self.fds);
        let count = socket.async_io(Interest::READABLE, || fdpass::recv(socket.as_fd(), &mut buffer, fds)).await?;
        if count == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        self.received.extend_from_slice(&buffer[..count]);
        Ok(())
    }

    async fn expect_line(&mut self, beginning: &str) -> Result<(), BusError> {
        loop {
            if let Some(end) = self.received.windows(2).position(|pair| pair == b"\r\n") {
                let line: Vec<u8> = self.received.drain(..end + 2).collect();
                let is_expected = line.starts_with(beginning.as_bytes());
                return if is_expected { Ok(()) } else { Err(BusError::Malformed("it does not let us in")) };
            }
            if self.received.len() > LINE_MAX {
                return Err(BusError::Malformed("an endless line"));
            }
            self.fill().await?;
        }
    }

    async fn receive(&mut self) -> Result<Message, BusError> {
        loop {
            if let Some((mut message, length)) = decode(&self.received)? {
                self.received.drain(..length);
                if message.fd_count > self.fds.len() {
                    return Err(BusError::Malformed("descriptors are missing"));
                }
                message.fds = self.fds.drain(..message.fd_count).collect();
                return Ok(message);
            }
            self.fill().await?;
        }
    }
}

/// A call as it goes over the wire, little-endian.
fn encode(method: Method<'_>, serial: u32, arguments: &[&str]) -> Vec<u8> {
    let mut body = Writer::default();
    arguments.iter().for_each(|argument| body.string(argument));
    let mut out = Writer::default();
    out.0.extend([b'l', CALL, 0, 1]);
    out.u32(body.0.len());
    out.u32(serial as usize);
    let mut fields = Writer(vec![0; 16]); // The array's elements are aligned as they will lie.
    for (code, kind, value) in [
        (field::PATH, "o", method.path),
        (field::INTERFACE, "s", method.interface),
        (field::MEMBER, "s", method.member),
        (field::DESTINATION, "s", method.destination),
    ] {
        fields.begin_field(code, kind);
        fields.string(value);
    }
    if !arguments.is_empty() {
        fields.begin_field(field::SIGNATURE, "g");
        fields.signature(&"s".repeat(arguments.len()));
    }
    out.u32(fields.0.len() - 16);
    out.0.extend(&fields.0[16..]);
    out.align(8);
    out.0.extend(body.0);
    out.0
}

/// A message at the beginning of what was received, and its length; none while it is not complete.
fn decode(received: &[u8]) -> Result<Option<(Message, usize)>, BusError> {
    if received.len() < 16 {
        return Ok(None);
    }
    if received[0] != b'l' {
        return Err(BusError::Malformed("a message in the order of bytes of another machine"));
    }
    let number = |at: usize| Reader { bytes: received, at }.u32().map(|number| number as usize);
    let (body, fields) = (number(4)?, number(12)?);
    let begin = (16 + fields).next_multiple_of(8);
    if fields > MESSAGE_MAX || body > MESSAGE_MAX {
        return Err(BusError::Malformed("a message that is far too long"));
    }
    if received.len() < begin + body {
        return Ok(None);
    }
    let mut message = Message { kind: received[1], ..Message::default() };
    let mut reader = Reader { bytes: &received[..16 + fields], at: 16 };
    while reader.at < 16 + fields {
        read_field(&mut reader, &mut message)?;
    }
    message.body = received[begin..begin + body].to_vec();
    Ok(Some((message, begin + body)))
}

fn read_field(reader: &mut Reader<'_>, message: &mut Message) -> Result<(), BusError> {
    reader.align(8);
    let code = reader.byte()?;
    match reader.signature()?.as_str() {
        "o" | "s" => {
            let text = reader.string()?;
            match code {
                field::INTERFACE => message.interface = text,
                field::MEMBER => message.member = text,
                field::ERROR_NAME => message.error_name = text,
                _ => {}
            }
        }
        "g" => {
            let signature = reader.signature()?;
            if code == field::SIGNATURE {
                message.signature = signature;
            }
        }
        "u" => {
            let number = reader.u32()?;
            match code {
                field::REPLY_SERIAL => message.reply_serial = number,
                field::UNIX_FDS => message.fd_count = number as usize,
                _ => {}
            }
        }
        _ => return Err(BusError::Malformed("a header's field of a kind that there is not")),
    }
    Ok(())
}

/// Writes values, each at a multiple of its size.
#[derive(Default)]
struct Writer(Vec<u8>);

impl Writer {
    fn align(&mut self, to: usize) {
        self.0.resize(self.0.len().next_multiple_of(to), 0);
    }

    fn u32(&mut self, value: usize) {
        self.align(4);
        // Our own messages are far shorter.
        self.0.extend(u32::try_from(value).unwrap_or(u32::MAX).to_le_bytes());
    }

    fn string(&mut self, text: &str) {
        self.u32(text.len());
        self.0.extend(text.as_bytes());
        self.0.push(0);
    }

    fn signature(&mut self, text: &str) {
        self.0.push(u8::try_from(text.len()).unwrap_or(u8::MAX));
        self.0.extend(text.as_bytes());
        self.0.push(0);
    }

    fn begin_field(&mut self, code: u8, kind: &str) {
        self.align(8);
        self.0.push(code);
        self.signature(kind);
    }
}

/// Reads them.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    fn align(&mut self, to: usize) {
        self.at = self.at.next_multiple_of(to);
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], BusError> {
        let taken = self.at.checked_add(count).and_then(|end| self.bytes.get(self.at..end));
        self.at = self.at.saturating_add(count);
        taken.ok_or(BusError::Malformed("a message that ends too early"))
    }

    fn byte(&mut self) -> Result<u8, BusError> {
        Ok(self.take(1)?[0])
    }

    fn u32(&mut self) -> Result<u32, BusError> {
        self.align(4);
        Ok(u32::from_le_bytes(self.take(4)?.try_into().expect("four bytes")))
    }

    fn u64(&mut self) -> Result<u64, BusError> {
        self.align(8);
        Ok(u64::from_le_bytes(self.take(8)?.try_into().expect("eight bytes")))
    }

    fn string(&mut self) -> Result<String, BusError> {
        let length = self.u32()? as usize;
        self.text(length)
    }

    fn signature(&mut self) -> Result<String, BusError> {
        let length = usize::from(self.byte()?);
        self.text(length)
    }

    /// Text of this length, and the zero behind it.
    fn text(&mut self, length: usize) -> Result<String, BusError> {
        let text = self.take(length)?.to_vec();
        self.take(1)?;
        String::from_utf8(text).map_err(|_| BusError::Malformed("text that is none"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HELLO: Method<'_> = Method {
        destination: "org.freedesktop.DBus",
        path: "/org/freedesktop/DBus",
        interface: "org.freedesktop.DBus",
        member: "Hello",
    };

    #[test]
    fn what_is_written_can_be_read() {
        let mut bytes = encode(HELLO, 7, &["a", "bc"]);
        let (message, length) = decode(&bytes).unwrap().unwrap();
        assert_eq!(
            (length, message.kind, message.member.as_str(), message.signature.as_str()),
            (bytes.len(), CALL, "Hello", "ss")
        );
        let mut reader = Reader::new(&message.body);
        assert_eq!((reader.string().unwrap(), reader.string().unwrap()), ("a".to_owned(), "bc".to_owned()));
        for end in 0..bytes.len() {
            assert!(decode(&bytes[..end]).unwrap().is_none(), "{end}");
        }
        bytes.push(1);
        assert_eq!(decode(&bytes).unwrap().unwrap().1, bytes.len() - 1);
    }

    #[test]
    fn nonsense_is_refused() {
        let good = encode(HELLO, 7, &["a"]);
        for at in 0..good.len() {
            for value in [0, 0x7f, 0xff] {
                let mut bad = good.clone();
                bad[at] = value;
                let _ = decode(&bad); // It may be another message; it must not panic.
            }
        }
        let mut long = good;
        long[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(decode(&long).is_err());
    }
}
