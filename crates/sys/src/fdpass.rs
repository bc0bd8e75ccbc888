//! File descriptors over Unix sockets (`SCM_RIGHTS`), for blocking and non-blocking sockets alike.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};

/// Most file descriptors that one message carries (`SCM_MAX_FD` in `include/net/scm.h`).
pub const FDS_MAX: usize = 253;
const SPACE: usize = rustix::cmsg_space!(ScmRights(FDS_MAX));

/// Sends `bytes`, or as many as fit, and with the first of them all of `fds`; answers how many bytes went.
///
/// # Errors
/// The kernel's; `WouldBlock` when a non-blocking socket is full, and then nothing went.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "more file descriptors than a message carries"));
    }
    let data = [IoSlice::new(bytes)];
    retry(|| rustix::net::sendmsg(socket, &data, &mut control, SendFlags::NOSIGNAL))
}

/// Receives bytes into `buffer` and appends what file descriptors came with them to `fds`, all close-on-exec.
/// Answers the number of bytes, 0 at the end of the stream.
///
/// # Errors
/// The kernel's; `WouldBlock` when a non-blocking socket has nothing; `InvalidData` when file descriptors were lost
/// because the process has too many.
pub fn recv(socket: BorrowedFd<'_>, buffer: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut data = [IoSliceMut::new(buffer)];
    let got = retry(|| rustix::net::recvmsg(socket, &mut data, &mut control, RecvFlags::CMSG_CLOEXEC))?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if got.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "file descriptors were lost: raise the limit (RLIMIT_NOFILE)",
        ));
    }
    Ok(got.bytes)
}

fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => {}
            other => return other.map_err(Into::into),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_pipe_goes_through_a_socket() {
        let (here, there) = UnixStream::pair().unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        assert_eq!(send(here.as_fd(), b"take it", &[writer.as_fd()]).unwrap(), 7);
        drop(writer);

        let (mut buffer, mut fds) = ([0; 16], Vec::new());
        assert_eq!(recv(there.as_fd(), &mut buffer, &mut fds).unwrap(), 7);
        std::fs::File::from(fds.pop().unwrap()).write_all(b"hello").unwrap();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
    }

    #[test]
    fn the_end_of_the_stream_is_zero_bytes() {
        let (here, there) = UnixStream::pair().unwrap();
        drop(here);
        assert_eq!(recv(there.as_fd(), &mut [0; 4], &mut Vec::new()).unwrap(), 0);
    }
}
