//! Messages as bytes.

use std::os::fd::OwnedFd;

use crate::{BusError, Value};

/// Longer messages are none that concern us (the specification allows 128 MiB).
const MESSAGE_MAX: usize = 64 << 10;
/// Values in values in values: the specification allows 64, and nothing that we read has more than four.
const DEPTH_MAX: usize = 8;

/// The kinds of messages.
pub(crate) const CALL: u8 = 1;
pub(crate) const RETURN: u8 = 2;
pub(crate) const ERROR: u8 = 3;
pub(crate) const SIGNAL: u8 = 4;

/// The fields of a header.
mod field {
    pub(super) const PATH: u8 = 1;
    pub(super) const INTERFACE: u8 = 2;
    pub(super) const MEMBER: u8 = 3;
    pub(super) const ERROR_NAME: u8 = 4;
    pub(super) const REPLY_SERIAL: u8 = 5;
    pub(super) const DESTINATION: u8 = 6;
    pub(super) const SENDER: u8 = 7;
    pub(super) const SIGNATURE: u8 = 8;
    pub(super) const UNIX_FDS: u8 = 9;
}

/// Whom to ask for what.
#[derive(Debug, Clone, Copy)]
pub struct Method<'a> {
    /// The name on the bus; empty where there is one other side only.
    pub destination: &'a str,
    /// The object.
    pub path: &'a str,
    /// The interface.
    pub interface: &'a str,
    /// The method.
    pub member: &'a str,
}

/// A message that came.
#[derive(Debug, Default)]
pub struct Message {
    pub(crate) kind: u8,
    pub(crate) reply_serial: u32,
    /// Of a signal.
    pub interface: String,
    /// Of a signal.
    pub member: String,
    /// Who sent it, as the bus says; empty where there is none.
    pub sender: String,
    pub(crate) error_name: String,
    signature: String,
    pub(crate) fd_count: usize,
    body: Vec<u8>,
    /// The descriptors that came with it.
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// What it says.
    ///
    /// # Errors
    /// It is not what its signature says, or has a type that is not among those of [`Value`].
    pub fn values(&self) -> Result<Vec<Value>, BusError> {
        let (mut reader, mut signature) = (Reader::new(&self.body), self.signature.as_str());
        let mut values = Vec::new();
        while !signature.is_empty() {
            let (one, rest) = split_type(signature)?;
            values.push(reader.value(one, DEPTH_MAX)?);
            signature = rest;
        }
        Ok(values)
    }

    /// The first of its values.
    ///
    /// # Errors
    /// As [`Self::values`], or it says nothing.
    pub fn value(&self) -> Result<Value, BusError> {
        self.values()?.into_iter().next().ok_or(BusError::Malformed("an empty answer"))
    }

    /// The text of an error.
    pub(crate) fn text(&self) -> String {
        self.value().ok().and_then(|value| value.text().ok().map(str::to_owned)).unwrap_or_default()
    }
}

/// The first complete type of a signature, and the rest.
fn split_type(signature: &str) -> Result<(&str, &str), BusError> {
    let unknown = BusError::Malformed("a value of a kind that is not known");
    let mut depth = 0usize;
    for (at, letter) in signature.bytes().enumerate() {
        match letter {
            b'a' => continue,
            b'(' => depth += 1,
            b')' => depth = depth.checked_sub(1).ok_or(BusError::Malformed("a signature that is none"))?,
            b'y' | b'b' | b'n' | b'q' | b'i' | b'u' | b'x' | b't' | b'd' | b's' | b'o' | b'g' | b'h' | b'v' => {}
            _ => return Err(unknown),
        }
        if depth == 0 {
            return Ok(signature.split_at(at + 1));
        }
    }
    Err(unknown)
}

/// A call as it goes over the wire, little-endian.
pub(crate) fn encode(method: Method<'_>, serial: u32, arguments: &[Value]) -> Vec<u8> {
    let mut body = Writer::default();
    arguments.iter().for_each(|argument| body.value(argument));
    let signature: String = arguments.iter().map(Value::signature).collect();
    let mut out = Writer::default();
    out.0.extend([b'l', CALL, 0, 1]);
    out.length(body.0.len());
    out.number(serial.to_le_bytes());
    let mut fields = Writer(vec![0; 16]); // The array's elements are aligned as they will lie.
    for (code, kind, value) in [
        (field::PATH, "o", method.path),
        (field::INTERFACE, "s", method.interface),
        (field::MEMBER, "s", method.member),
        (field::DESTINATION, "s", method.destination),
    ] {
        if !value.is_empty() {
            fields.begin_field(code, kind);
            fields.string(value);
        }
    }
    if !arguments.is_empty() {
        fields.begin_field(field::SIGNATURE, "g");
        fields.signature(&signature);
    }
    out.length(fields.0.len() - 16);
    out.0.extend(&fields.0[16..]);
    out.align(8);
    out.0.extend(body.0);
    out.0
}

/// A message at the beginning of what was received, and its length; none while it is not complete.
pub(crate) fn decode(received: &[u8]) -> Result<Option<(Message, usize)>, BusError> {
    if received.len() < 16 {
        return Ok(None);
    }
    if received[0] != b'l' {
        return Err(BusError::Malformed("a message in the order of bytes of another machine"));
    }
    let number = |at: usize| Reader { bytes: received, at }.u32().map(|number| number as usize);
    let (body, fields) = (number(4)?, number(12)?);
    if fields > MESSAGE_MAX || body > MESSAGE_MAX {
        return Err(BusError::Malformed("a message that is far too long"));
    }
    let begin = (16 + fields).next_multiple_of(8);
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
                field::SENDER => message.sender = text,
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

/// At which multiples values of a type lie, by its first letter.
fn alignment(signature: &str) -> usize {
    match signature.bytes().next() {
        Some(b'n' | b'q') => 2,
        Some(b'b' | b'i' | b'u' | b'h' | b's' | b'o' | b'a') => 4,
        Some(b'x' | b't' | b'd' | b'(') => 8,
        _ => 1,
    }
}

/// Writes values, each at a multiple of its size.
#[derive(Default)]
struct Writer(Vec<u8>);

impl Writer {
    fn align(&mut self, to: usize) {
        self.0.resize(self.0.len().next_multiple_of(to), 0);
    }

    fn number<const SIZE: usize>(&mut self, bytes: [u8; SIZE]) {
        self.align(SIZE);
        self.0.extend(bytes);
    }

    fn length(&mut self, length: usize) {
        // Our own messages are far shorter.
        self.number(u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
    }

    fn string(&mut self, text: &str) {
        self.length(text.len());
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

    fn value(&mut self, value: &Value) {
        match value {
            Value::Bool(truth) => self.number(u32::from(*truth).to_le_bytes()),
            Value::Byte(number) => self.0.push(*number),
            Value::I16(number) => self.number(number.to_le_bytes()),
            Value::U16(number) => self.number(number.to_le_bytes()),
            Value::I32(number) => self.number(number.to_le_bytes()),
            Value::U32(number) => self.number(number.to_le_bytes()),
            Value::I64(number) => self.number(number.to_le_bytes()),
            Value::U64(number) => self.number(number.to_le_bytes()),
            Value::F64(number) => self.number(number.to_le_bytes()),
            Value::Text(text) => self.string(text),
            Value::Array(of, elements) => self.array(of, elements),
            Value::Struct(parts) => {
                self.align(8);
                parts.iter().for_each(|part| self.value(part));
            }
            Value::Variant(inner) => {
                self.signature(&inner.signature());
                self.value(inner);
            }
        }
    }

    /// Its length counts from its first element on.
    fn array(&mut self, of: &str, elements: &[Value]) {
        self.length(0);
        let length_at = self.0.len() - 4;
        self.align(alignment(of));
        let begin = self.0.len();
        elements.iter().for_each(|element| self.value(element));
        let length = u32::try_from(self.0.len() - begin).unwrap_or(u32::MAX);
        self.0[length_at..length_at + 4].copy_from_slice(&length.to_le_bytes());
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

    fn number<const SIZE: usize>(&mut self) -> Result<[u8; SIZE], BusError> {
        self.align(SIZE);
        Ok(self.take(SIZE)?.try_into().expect("as many bytes as were asked for"))
    }

    fn byte(&mut self) -> Result<u8, BusError> {
        Ok(self.take(1)?[0])
    }

    fn u32(&mut self) -> Result<u32, BusError> {
        Ok(u32::from_le_bytes(self.number()?))
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

    /// A value of a complete type.
    fn value(&mut self, signature: &str, depth: usize) -> Result<Value, BusError> {
        let depth = depth.checked_sub(1).ok_or(BusError::Malformed("values in values without end"))?;
        let (letter, inner) = signature.split_at(1);
        Ok(match letter {
            "b" => Value::Bool(self.u32()? != 0),
            "y" => Value::Byte(self.byte()?),
            "n" => Value::I16(i16::from_le_bytes(self.number()?)),
            "q" => Value::U16(u16::from_le_bytes(self.number()?)),
            "i" => Value::I32(i32::from_le_bytes(self.number()?)),
            "u" | "h" => Value::U32(self.u32()?),
            "x" => Value::I64(i64::from_le_bytes(self.number()?)),
            "t" => Value::U64(u64::from_le_bytes(self.number()?)),
            "d" => Value::F64(f64::from_le_bytes(self.number()?)),
            "s" | "o" => Value::Text(self.string()?),
            "g" => Value::Text(self.signature()?),
            "v" => {
                let signature = self.signature()?;
                match split_type(&signature)? {
                    (one, "") => Value::Variant(Box::new(self.value(one, depth)?)),
                    _ => return Err(BusError::Malformed("a variant of several types")),
                }
            }
            "a" => self.array(inner, depth)?,
            "(" => {
                self.align(8);
                let mut rest = inner.strip_suffix(')').ok_or(BusError::Malformed("a signature that is none"))?;
                let mut parts = Vec::new();
                while !rest.is_empty() {
                    let (one, after) = split_type(rest)?;
                    parts.push(self.value(one, depth)?);
                    rest = after;
                }
                Value::Struct(parts)
            }
            _ => return Err(BusError::Malformed("a value of a kind that is not known")),
        })
    }

    fn array(&mut self, of: &str, depth: usize) -> Result<Value, BusError> {
        let length = self.u32()? as usize;
        self.align(alignment(of));
        let end = self.at.checked_add(length).filter(|end| *end <= self.bytes.len());
        let end = end.ok_or(BusError::Malformed("a message that ends too early"))?;
        let mut elements = Vec::new();
        while self.at < end {
            let before = self.at;
            elements.push(self.value(of, depth)?);
            if self.at == before {
                return Err(BusError::Malformed("an array of nothing"));
            }
        }
        Ok(Value::Array(of.to_owned(), elements))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HELLO: Method<'_> =
        Method { destination: crate::BUS, path: crate::BUS_PATH, interface: crate::BUS, member: "Hello" };

    /// One of each kind.
    fn values() -> Vec<Value> {
        let pair = |a: &str, b: u64| Value::Struct(vec![a.into(), Value::U64(b).variant()]);
        vec![
            Value::Byte(1),
            Value::Bool(true),
            Value::I16(-2),
            Value::U16(3),
            Value::I32(-4),
            Value::U32(5),
            Value::I64(-6),
            Value::U64(7),
            Value::F64(0.5),
            "text".into(),
            Value::texts(["a", "bc", ""]),
            Value::bytes(&[1, 2, 3]),
            Value::Array("(sv)".to_owned(), vec![pair("one", 1), pair("two", 2)]),
            Value::Array("(ss)".to_owned(), Vec::new()).variant(),
            Value::Array("(sa(sv))".to_owned(), Vec::new()),
        ]
    }

    #[test]
    fn what_is_written_can_be_read() {
        let mut bytes = encode(HELLO, 7, &values());
        let (message, length) = decode(&bytes).unwrap().unwrap();
        assert_eq!((length, message.kind, message.member.as_str()), (bytes.len(), CALL, "Hello"));
        assert_eq!(message.signature, "ybnqiuxtdsasaya(sv)va(sa(sv))");
        assert_eq!(message.values().unwrap(), values());
        for end in 0..bytes.len() {
            assert!(decode(&bytes[..end]).unwrap().is_none(), "{end}");
        }
        bytes.push(1);
        assert_eq!(decode(&bytes).unwrap().unwrap().1, bytes.len() - 1);
    }

    /// By the examples of the specification ("Marshaling Containers"): an array's length does not count what aligns its
    /// first element.
    #[test]
    fn values_lie_where_the_specification_has_them() {
        let mut writer = Writer::default();
        writer.value(&Value::Array("x".to_owned(), vec![Value::I64(5)]));
        assert_eq!(writer.0, [8, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
        let mut writer = Writer::default();
        writer.value(&Value::U32(5).variant());
        assert_eq!(writer.0, [1, b'u', 0, 0, 5, 0, 0, 0]);
    }

    #[test]
    fn nonsense_is_refused() {
        let good = encode(HELLO, 7, &values());
        for at in 0..good.len() {
            for value in [0, 0x7f, 0xff] {
                let mut bad = good.clone();
                bad[at] = value;
                // It may be another message; it must not panic.
                if let Ok(Some((message, _))) = decode(&bad) {
                    let _ = message.values();
                }
            }
        }
        let mut long = good;
        long[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(decode(&long).is_err());
        for signature in ["a", "(", ")", "a{sv}", "((s)", "sz"] {
            let message = Message { signature: signature.to_owned(), body: vec![0; 64], ..Message::default() };
            assert!(message.values().is_err(), "{signature}");
        }
        // One element of nothing, and values in values.
        let endless = [&1u32.to_le_bytes()[..], &[0; 60]].concat();
        let deep = [1, b'v', 0].repeat(20);
        for (signature, body) in [("a()", endless), ("v", deep)] {
            let message = Message { signature: signature.to_owned(), body, ..Message::default() };
            assert!(message.values().is_err(), "{signature}");
        }
    }
}
