//! Netlink's wire format: messages with a 16-byte header, attributes nested in them, all aligned to 4 bytes.

use std::os::fd::{AsRawFd as _, BorrowedFd};

use rustix::io::Errno;

use super::{Error, NLMSG_ERROR, REQUEST, Result};

const HEADER_BYTES: usize = 16;
const NLA_F_NESTED: u16 = 0x8000;
const NLA_TYPE_MASK: u16 = 0x3fff;
/// `NLM_F_DUMP_INTR`: the list changed while it was dumped.
const DUMP_INTERRUPTED: u16 = 0x10;
/// `NLMSGERR_ATTR_MSG`: the explanation in an extended acknowledgement.
const ERROR_TEXT: u16 = 1;
/// `NLM_F_ACK_TLVS`: an acknowledgement carries attributes.
const ACK_ATTRIBUTES: u16 = 0x200;

/// `NETLINK_CAP_ACK`: errors do not echo the request.
pub(super) const NETLINK_CAP_ACK: libc::c_int = 10;
/// `NETLINK_EXT_ACK`: errors come with an explanation.
pub(super) const NETLINK_EXT_ACK: libc::c_int = 11;

/// Switches on a boolean option of a netlink socket.
pub(super) fn set_option(fd: BorrowedFd<'_>, option: libc::c_int) -> Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the option value is a live c_int for the duration of the call and its size is passed with it.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_NETLINK,
            option,
            (&raw const on).cast(),
            libc::socklen_t::try_from(size_of_val(&on)).unwrap_or(0),
        )
    };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error().into()) }
}

/// ETHTOOL_GLINK (ethtool(8)) of a link in the socket's namespace.
pub(super) fn ask_for_link(fd: BorrowedFd<'_>, name: &str) -> Result<bool> {
    /// `struct ethtool_value` of linux/ethtool.h.
    #[repr(C)]
    struct Value {
        command: u32,
        data: u32,
    }
    const GLINK: u32 = 0x0a;
    const SIOCETHTOOL: libc::Ioctl = 0x8946;
    let mut value = Value { command: GLINK, data: 0 };
    // SAFETY: all zeros is a value of it.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(Errno::NODEV.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.as_bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    // SAFETY: the kernel reads the name and writes into `value`, which both live as long as the call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
    if result == 0 { Ok(value.data != 0) } else { Err(std::io::Error::last_os_error().into()) }
}

/// Messages being built. A socket that sends them numbers them.
#[derive(Debug, Default, Clone)]
pub struct Writer {
    bytes: Vec<u8>,
    count: u32,
    last: usize,
}

impl Writer {
    /// No message yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a message: `header` is the fixed part of its kind, `body` writes the attributes.
    pub fn message(&mut self, kind: u16, flags: u16, header: &[u8], body: impl FnOnce(&mut Writer)) {
        self.count += 1;
        self.last = self.bytes.len();
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&(flags | REQUEST).to_ne_bytes());
        self.bytes.extend_from_slice(&[0; 8]);
        self.bytes.extend_from_slice(header);
        self.pad();
        body(self);
        let length = u32::try_from(self.bytes.len() - start).expect("a message is far below 4 GiB");
        self.bytes[start..start + 4].copy_from_slice(&length.to_ne_bytes());
    }

    /// Adds flags to the message written last.
    pub fn flag_last(&mut self, flags: u16) {
        let at = self.last + 6;
        if let Some(field) = self.bytes.get_mut(at..at + 2) {
            let old = u16::from_ne_bytes([field[0], field[1]]);
            field.copy_from_slice(&(old | flags).to_ne_bytes());
        }
    }

    /// Attribute with raw bytes.
    pub fn bytes_attr(&mut self, kind: u16, value: &[u8]) {
        let length = u16::try_from(value.len() + 4).expect("callers keep an attribute below 64 KiB");
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.pad();
    }

    /// Attribute without a value.
    pub fn flag(&mut self, kind: u16) {
        self.bytes_attr(kind, &[]);
    }

    /// Attribute with one byte.
    pub fn u8(&mut self, kind: u16, value: u8) {
        self.bytes_attr(kind, &[value]);
    }

    /// Attribute in host order.
    pub fn u16(&mut self, kind: u16, value: u16) {
        self.bytes_attr(kind, &value.to_ne_bytes());
    }

    /// Attribute in network order.
    pub fn be16(&mut self, kind: u16, value: u16) {
        self.bytes_attr(kind, &value.to_be_bytes());
    }

    /// Attribute in host order.
    pub fn u32(&mut self, kind: u16, value: u32) {
        self.bytes_attr(kind, &value.to_ne_bytes());
    }

    /// Attribute in network order.
    pub fn be32(&mut self, kind: u16, value: u32) {
        self.bytes_attr(kind, &value.to_be_bytes());
    }

    /// Attribute in network order.
    pub fn be64(&mut self, kind: u16, value: u64) {
        self.bytes_attr(kind, &value.to_be_bytes());
    }

    /// Attribute with a text and its final zero.
    pub fn str(&mut self, kind: u16, value: &str) {
        let mut bytes = Vec::with_capacity(value.len() + 1);
        bytes.extend_from_slice(value.as_bytes());
        bytes.push(0);
        self.bytes_attr(kind, &bytes);
    }

    /// Attribute that holds attributes.
    pub fn nest(&mut self, kind: u16, body: impl FnOnce(&mut Writer)) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 2]);
        self.bytes.extend_from_slice(&(kind | NLA_F_NESTED).to_ne_bytes());
        body(self);
        let length = u16::try_from(self.bytes.len() - start).expect("callers keep an attribute below 64 KiB");
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
    }

    /// Raw bytes between attributes: for the few attributes that begin with a struct.
    pub fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        self.pad();
    }

    /// Numbers the messages from `first`.
    pub(super) fn number_from(&mut self, first: u32) {
        let (mut start, mut number) = (0, first);
        while let Some(length) = length_at(&self.bytes, start) {
            self.bytes[start + 8..start + 12].copy_from_slice(&number.to_ne_bytes());
            number = number.wrapping_add(1);
            start += length;
        }
    }

    /// The messages in portions of `most`, each with how many it has.
    pub(super) fn portions(&self, most: usize) -> impl Iterator<Item = (&[u8], usize)> {
        let mut rest = &self.bytes[..];
        std::iter::from_fn(move || {
            let (mut end, mut count) = (0, 0);
            while count < most
                && let Some(length) = length_at(rest, end)
            {
                (end, count) = (end + length, count + 1);
            }
            let portion;
            (portion, rest) = rest.split_at(end);
            (count > 0).then_some((portion, count))
        })
    }

    /// Number of messages.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Bytes written so far.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// Bytes of the message that starts there, with what pads it; none behind the last.
fn length_at(bytes: &[u8], start: usize) -> Option<usize> {
    let length = u32::from_ne_bytes(*bytes.get(start..)?.first_chunk()?);
    Some(usize::try_from(length).ok()?.next_multiple_of(4))
}

/// One message from the kernel.
#[derive(Debug, Clone, Copy)]
pub struct Message<'a> {
    /// Its type.
    pub kind: u16,
    /// Its flags.
    pub flags: u16,
    /// The number of the request it answers.
    pub sequence: u32,
    /// Fixed header of the kind and attributes.
    pub payload: &'a [u8],
}

impl<'a> Message<'a> {
    /// Attributes behind a fixed header of `header` bytes.
    pub fn attributes(&self, header: usize) -> Attributes<'a> {
        Attributes { bytes: self.payload.get(header.next_multiple_of(4)..).unwrap_or(&[]) }
    }

    /// Whether the list that it belongs to has changed since the part before.
    pub(super) fn is_interrupted(&self) -> bool {
        self.flags & DUMP_INTERRUPTED != 0 && self.kind != NLMSG_ERROR
    }

    /// What an error, acknowledgement or end-of-list message says.
    pub(super) fn acknowledgement(&self) -> Result<()> {
        let code = self.payload.first_chunk().map_or(0, |bytes| i32::from_ne_bytes(*bytes));
        if code == 0 {
            return Ok(());
        }
        // The kernel's error numbers are from 1 to 4095 (MAX_ERRNO).
        let errno = code.checked_neg().filter(|number| (1..4096).contains(number));
        let errno = errno.map_or(Errno::PROTO, Errno::from_raw_os_error);
        Err(Error { errno, explanation: self.explanation(), sequence: self.sequence })
    }

    fn explanation(&self) -> Option<String> {
        if self.kind != NLMSG_ERROR || self.flags & ACK_ATTRIBUTES == 0 {
            return None;
        }
        // With NETLINK_CAP_ACK only the header of the request follows the error number.
        self.attributes(4 + HEADER_BYTES).find(|a| a.kind == ERROR_TEXT).map(|a| a.text())
    }
}

/// The messages in a received buffer; ends at the first malformed one.
#[derive(Debug, Clone)]
pub struct Messages<'a> {
    bytes: &'a [u8],
}

impl<'a> Messages<'a> {
    /// Messages in `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Messages { bytes }
    }
}

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;

    fn next(&mut self) -> Option<Message<'a>> {
        let header: &[u8; HEADER_BYTES] = self.bytes.first_chunk()?;
        let length = usize::try_from(u32::from_ne_bytes([header[0], header[1], header[2], header[3]])).ok()?;
        let payload = self.bytes.get(HEADER_BYTES..length)?;
        self.bytes = self.bytes.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some(Message {
            kind: u16::from_ne_bytes([header[4], header[5]]),
            flags: u16::from_ne_bytes([header[6], header[7]]),
            sequence: u32::from_ne_bytes([header[8], header[9], header[10], header[11]]),
            payload,
        })
    }
}

/// One attribute.
#[derive(Debug, Clone, Copy)]
pub struct Attribute<'a> {
    /// Its type, without the flags.
    pub kind: u16,
    /// Its value.
    pub value: &'a [u8],
}

impl<'a> Attribute<'a> {
    /// The attributes in it.
    pub fn nested(&self) -> Attributes<'a> {
        Attributes { bytes: self.value }
    }

    /// The value as text, up to a zero.
    pub fn text(&self) -> String {
        let end = self.value.iter().position(|b| *b == 0).unwrap_or(self.value.len());
        String::from_utf8_lossy(&self.value[..end]).into_owned()
    }

    /// The value in host order, 0 if it is too short.
    pub fn u16(&self) -> u16 {
        self.value.first_chunk().map_or(0, |b| u16::from_ne_bytes(*b))
    }

    /// The value in host order, 0 if it is too short.
    pub fn u32(&self) -> u32 {
        self.value.first_chunk().map_or(0, |b| u32::from_ne_bytes(*b))
    }

    /// The value in network order, 0 if it is too short.
    pub fn be16(&self) -> u16 {
        self.value.first_chunk().map_or(0, |b| u16::from_be_bytes(*b))
    }

    /// The value in network order, 0 if it is too short.
    pub fn be32(&self) -> u32 {
        self.value.first_chunk().map_or(0, |b| u32::from_be_bytes(*b))
    }

    /// The value in network order, 0 if it is too short.
    pub fn be64(&self) -> u64 {
        self.value.first_chunk().map_or(0, |b| u64::from_be_bytes(*b))
    }

    /// The value as an address of the family its length tells.
    pub fn address(&self) -> Option<std::net::IpAddr> {
        if let Ok(octets) = <[u8; 4]>::try_from(self.value) {
            return Some(octets.into());
        }
        <[u8; 16]>::try_from(self.value).ok().map(Into::into)
    }
}

/// A sequence of attributes; ends at the first malformed one.
#[derive(Debug, Clone)]
pub struct Attributes<'a> {
    bytes: &'a [u8],
}

impl<'a> Attributes<'a> {
    /// The first attribute of a type.
    pub fn get(&self, kind: u16) -> Option<Attribute<'a>> {
        self.clone().find(|attribute| attribute.kind == kind)
    }

    /// The bytes of all attributes as they came.
    pub fn raw(&self) -> &'a [u8] {
        self.bytes
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = Attribute<'a>;

    fn next(&mut self) -> Option<Attribute<'a>> {
        let header: &[u8; 4] = self.bytes.first_chunk()?;
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let kind = u16::from_ne_bytes([header[2], header[3]]) & NLA_TYPE_MASK;
        let value = self.bytes.get(4..length)?;
        self.bytes = self.bytes.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some(Attribute { kind, value })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_can_be_read() {
        let mut writer = Writer::new();
        writer.message(16, 0, &[1, 2, 3], |w| {
            w.str(3, "eth0");
            w.nest(18, |w| {
                w.u32(1, 7);
                w.be16(2, 0x1234);
            });
        });
        writer.message(17, 4, &[], |_| ());
        writer.number_from(u32::MAX);
        let messages: Vec<_> = Messages::new(writer.bytes()).collect();
        assert_eq!((messages[0].kind, messages[0].sequence), (16, u32::MAX));
        assert_eq!((messages[1].kind, messages[1].flags, messages[1].sequence), (17, 5, 0));
        let attributes = messages[0].attributes(3);
        assert_eq!(attributes.get(3).unwrap().text(), "eth0");
        let nested = attributes.get(18).unwrap().nested();
        assert_eq!(nested.get(1).unwrap().u32(), 7);
        assert_eq!(nested.get(2).unwrap().be16(), 0x1234);
    }

    #[test]
    fn portions_are_all_messages_in_their_order() {
        let mut writer = Writer::new();
        assert_eq!(writer.portions(2).count(), 0);
        (0..5).for_each(|kind| writer.message(kind, 0, &[0; 3][..usize::from(kind % 4)], |_| ()));
        let portions: Vec<_> = writer.portions(2).collect();
        assert_eq!(portions.iter().map(|(_, count)| *count).collect::<Vec<_>>(), [2, 2, 1]);
        let kinds = portions.iter().flat_map(|(bytes, _)| Messages::new(bytes).map(|message| message.kind));
        assert_eq!(kinds.collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn malformed_bytes_end_the_walk() {
        for bytes in [&[0u8; 3][..], &[0; 16], &[200, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]] {
            assert_eq!(Messages::new(bytes).count(), 0);
        }
        assert_eq!(Attributes { bytes: &[0, 0, 1, 0] }.count(), 0);
        assert_eq!(Attributes { bytes: &[9, 0, 1, 0, 5] }.count(), 0);
    }
}
