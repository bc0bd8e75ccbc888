//! Generic netlink: families of messages whose numbers the kernel gives out as they register (`linux/genetlink.h`).

use super::{ACK, Result, Socket, Writer};

/// The family that tells of the others (`GENL_ID_CTRL`).
const CONTROLLER: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
/// `struct genlmsghdr`.
pub(super) const HEADER_BYTES: usize = 4;

/// `struct genlmsghdr`: command and version.
pub(super) fn header(command: u8, version: u8) -> [u8; HEADER_BYTES] {
    [command, version, 0, 0]
}

impl Socket {
    /// The number of a family. The kernel loads the module that has it, where there is one and the caller has
    /// CAP_NET_ADMIN (`ctrl_getfamily` in net/netlink/genetlink.c).
    ///
    /// # Errors
    /// `ENOENT`: the kernel has no such family.
    pub fn family(&mut self, name: &str) -> Result<u16> {
        let mut id = None;
        self.list(&family_request(name), |message| {
            id = message.attributes(HEADER_BYTES).get(CTRL_ATTR_FAMILY_ID).map(|id| id.u16());
        })?;
        id.ok_or_else(|| rustix::io::Errno::NOENT.into())
    }
}

fn family_request(name: &str) -> Writer {
    let mut request = Writer::new();
    request.message(CONTROLLER, ACK, &header(CTRL_CMD_GETFAMILY, 1), |w| w.str(CTRL_ATTR_FAMILY_NAME, name));
    request
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_controller_is_known_to_itself_and_nobody_is_unknown() {
        let mut socket = Socket::generic().unwrap();
        assert_eq!(socket.family("nlctrl"), Ok(CONTROLLER));
        assert_eq!(socket.family("orlop-none").unwrap_err().errno, rustix::io::Errno::NOENT);
    }
}
