//! The runtime's ends of a process's streams, for tokio.

use std::io;
use std::os::fd::OwnedFd;

use sys::rustix;
use sys::rustix::fs::OFlags;
use sys::rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A pipe, a socket or the master of a terminal.
pub(super) struct Descriptor(AsyncFd<OwnedFd>);

impl Descriptor {
    /// Makes `fd` non-blocking; it has to be one that can be polled.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        #[expect(deprecated, reason = "the replacement is unsafe; an OwnedFd keeps what that asks for")]
        let registered = AsyncFd::new(fd)?;
        Ok(Self(registered))
    }

    /// Reads what there is; nothing at the end, which a terminal reports as EIO. Cancel-safe.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.0.async_io(Interest::READABLE, |fd| Ok(rustix::io::read(fd, &mut *buffer)?)).await;
        match read {
            Err(error) if error.raw_os_error() == Some(Errno::IO.raw_os_error()) => Ok(0),
            read => read,
        }
    }

    /// Writes all bytes, waiting for room.
    ///
    /// # Errors
    /// The kernel's, such as EPIPE when nobody reads any more.
    pub(super) async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let count = self.0.async_io(Interest::WRITABLE, |fd| Ok(rustix::io::write(fd, bytes)?)).await?;
            bytes = &bytes[count..];
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_pipe() {
        let (reader, writer) = std::io::pipe().unwrap();
        let (reader, writer) = (Descriptor::new(reader.into()).unwrap(), Descriptor::new(writer.into()).unwrap());
        let sent = vec![7; 1 << 20];
        let write = async {
            writer.write_all(&sent).await.unwrap();
            drop(writer);
        };
        let read = async {
            let (mut all, mut buffer) = (Vec::new(), [0; 5000]);
            loop {
                match reader.read(&mut buffer).await.unwrap() {
                    0 => return all,
                    count => all.extend_from_slice(&buffer[..count]),
                }
            }
        };
        let ((), received) = tokio::join!(write, read);
        assert_eq!(received, sent);
    }

    #[tokio::test]
    async fn a_terminal_ends_with_its_last_process() {
        let (master, terminal) = sys::pty::pair().unwrap();
        let master = Descriptor::new(master.into()).unwrap();
        drop(terminal);
        assert_eq!(master.read(&mut [0; 8]).await.unwrap(), 0);
    }
}
