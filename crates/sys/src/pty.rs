//! Pseudo-terminals.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

/// Opens a terminal of the `devpts` instance whose root is `devpts`: a container's own, so that the terminal has a name
/// there. Answers the master.
///
/// # Errors
/// The kernel's; `ENODEV` when `devpts` is something else, which a container may have put in its place.
pub fn open_in(devpts: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    if rustix::fs::fstatfs(devpts)?.f_type != libc::DEVPTS_SUPER_MAGIC {
        return Err(Errno::NODEV.into());
    }
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    // Nor may anything lie over the one name that is opened.
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS;
    let master = rustix::fs::openat2(devpts, "ptmx", flags, Mode::empty(), resolve)?;
    rustix::pty::unlockpt(&master)?;
    Ok(master)
}

/// Opens a terminal of the caller's own `devpts`. Answers the master.
///
/// # Errors
/// The kernel's.
pub fn open() -> io::Result<OwnedFd> {
    let master = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    rustix::pty::unlockpt(&master)?;
    Ok(master)
}

/// The terminal itself: the other side of a master. No path is resolved (`TIOCGPTPEER`).
///
/// # Errors
/// The kernel's.
pub fn peer(master: impl AsFd) -> io::Result<OwnedFd> {
    Ok(rustix::pty::ioctl_tiocgptpeer(master.as_fd(), OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?)
}

/// Sets the size; its foreground processes get SIGWINCH.
///
/// # Errors
/// The kernel's.
pub fn resize(terminal: impl AsFd, rows: u16, columns: u16) -> io::Result<()> {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    Ok(rustix::termios::tcsetwinsize(terminal, size)?)
}

/// The size as (rows, columns).
///
/// # Errors
/// The kernel's.
pub fn size(terminal: impl AsFd) -> io::Result<(u16, u16)> {
    let size = rustix::termios::tcgetwinsize(terminal)?;
    Ok((size.ws_row, size.ws_col))
}

/// Makes `terminal` the controlling terminal of the calling session leader.
///
/// # Errors
/// The kernel's.
pub fn make_controlling(terminal: impl AsFd) -> io::Result<()> {
    Ok(rustix::process::ioctl_tiocsctty(terminal)?)
}

/// A terminal and its master, as [`open`] and [`peer`].
///
/// # Errors
/// The kernel's.
pub fn pair() -> io::Result<(File, File)> {
    let master = open()?;
    let terminal = peer(&master)?;
    Ok((master.into(), terminal.into()))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn what_is_written_to_the_terminal_comes_out_of_the_master() {
        let (mut master, mut terminal) = pair().unwrap();
        resize(&master, 40, 100).unwrap();
        assert_eq!(size(&terminal).unwrap(), (40, 100));
        terminal.write_all(b"hi\n").unwrap();
        let mut text = [0; 4];
        master.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"hi\r\n");
    }
}
