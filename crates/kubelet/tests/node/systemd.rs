//! As much of systemd on a message bus as logind asks before it shuts a machine down: whether there is a target for that.
//! Everything else it refuses, so that nothing is ever shut down.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Answers on the bus until the bus ends.
pub(crate) fn serve(bus: &Path) {
    let mut socket = UnixStream::connect(bus).unwrap();
    let uid: String =
        sys::rustix::process::geteuid().as_raw().to_string().bytes().map(|digit| format!("{digit:02x}")).collect();
    write!(socket, "\0AUTH EXTERNAL {uid}\r\nBEGIN\r\n").unwrap();
    let mut line = Vec::new();
    while !line.ends_with(b"\r\n") {
        let mut byte = [0];
        socket.read_exact(&mut byte).unwrap();
        line.push(byte[0]);
    }
    let mut service = Service { socket, serial: 0 };
    let mut name = string("org.freedesktop.systemd1");
    align(&mut name, 4);
    name.extend(0u32.to_le_bytes());
    service.ask_bus("Hello", "", &[]);
    service.ask_bus("RequestName", "su", &name);
    std::thread::spawn(move || while service.answer().is_some() {});
}

struct Service {
    socket: UnixStream,
    serial: u32,
}

/// What is needed of a message that came.
#[derive(Default)]
struct Call {
    kind: u8,
    serial: u32,
    member: String,
    sender: String,
}

impl Service {
    fn ask_bus(&mut self, member: &str, signature: &str, body: &[u8]) {
        let fields = [
            (1, "o", "/org/freedesktop/DBus"),
            (2, "s", "org.freedesktop.DBus"),
            (3, "s", member),
            (6, "s", "org.freedesktop.DBus"),
            (8, "g", signature),
        ];
        self.send(1, &fields, None, body);
    }

    /// Answers one call; none at the end of the bus.
    fn answer(&mut self) -> Option<()> {
        let call = self.receive()?;
        match (call.kind, call.member.as_str()) {
            (1, "Get") => {
                let mut body = b"\x01s\0\0".to_vec();
                body.extend(string("loaded"));
                self.send(2, &[(6, "s", &call.sender), (8, "g", "v")], Some(call.serial), &body);
            }
            (1, _) => {
                let error = "org.freedesktop.DBus.Error.NotSupported";
                self.send(3, &[(4, "s", error), (6, "s", &call.sender)], Some(call.serial), &[]);
            }
            _ => {}
        }
        Some(())
    }

    fn send(&mut self, kind: u8, fields: &[(u8, &str, &str)], reply_to: Option<u32>, body: &[u8]) {
        self.serial += 1;
        let mut header = vec![0; 16];
        for (code, signature, value) in fields.iter().filter(|(_, _, value)| !value.is_empty()) {
            align(&mut header, 8);
            header.extend([*code, 1, signature.as_bytes()[0], 0]);
            if *signature == "g" {
                header.push(u8::try_from(value.len()).unwrap());
                header.extend(value.bytes().chain([0]));
            } else {
                header.extend(string(value));
            }
        }
        if let Some(serial) = reply_to {
            align(&mut header, 8);
            header.extend([5, 1, b'u', 0]);
            header.extend(serial.to_le_bytes());
        }
        let length = u32::try_from(header.len() - 16).unwrap();
        header[..4].copy_from_slice(&[b'l', kind, 0, 1]);
        header[4..8].copy_from_slice(&u32::try_from(body.len()).unwrap().to_le_bytes());
        header[8..12].copy_from_slice(&self.serial.to_le_bytes());
        header[12..16].copy_from_slice(&length.to_le_bytes());
        align(&mut header, 8);
        header.extend(body);
        let _ = self.socket.write_all(&header); // The bus ends with the test.
    }

    fn receive(&mut self) -> Option<Call> {
        let mut start = [0; 16];
        self.socket.read_exact(&mut start).ok()?;
        let number = |at: usize| u32::from_le_bytes(start[at..at + 4].try_into().unwrap());
        let mut fields = vec![0; (number(12) as usize).next_multiple_of(8)];
        self.socket.read_exact(&mut fields).ok()?;
        let mut body = vec![0; number(4) as usize];
        self.socket.read_exact(&mut body).ok()?;
        let mut call = Call { kind: start[1], serial: number(8), ..Call::default() };
        let mut at = 0;
        while at + 4 < number(12) as usize {
            let (code, signature) = (fields[at], fields[at + 2]);
            at += 4;
            let word = |at: usize| u32::from_le_bytes(fields[at..at + 4].try_into().unwrap()) as usize;
            match signature {
                b's' | b'o' => {
                    let text = String::from_utf8(fields[at + 4..at + 4 + word(at)].to_vec()).unwrap();
                    at += 4 + text.len() + 1;
                    match code {
                        3 => call.member = text,
                        7 => call.sender = text,
                        _ => {}
                    }
                }
                b'g' => at += usize::from(fields[at]) + 2,
                _ => at += 4,
            }
            at = at.next_multiple_of(8);
        }
        Some(call)
    }
}

fn align(bytes: &mut Vec<u8>, to: usize) {
    bytes.resize(bytes.len().next_multiple_of(to), 0);
}

fn string(text: &str) -> Vec<u8> {
    [&u32::try_from(text.len()).unwrap().to_le_bytes()[..], text.as_bytes(), &[0]].concat()
}
