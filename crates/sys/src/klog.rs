//! The kernel's log as a whole (syslog(2)), for where its device is not.

use std::io;

/// As much of it as is read: what was said last.
const LENGTH_MAX: usize = 1 << 20;
/// `SYSLOG_ACTION_READ_ALL` and `SYSLOG_ACTION_SIZE_BUFFER` of linux/syslog.h.
const READ_ALL: libc::c_int = 3;
const SIZE_BUFFER: libc::c_int = 10;

/// Its lines, `<priority>[time] text`. They stay for other readers.
///
/// # Errors
/// The kernel's: it wants `CAP_SYSLOG`, or a `kernel.dmesg_restrict` of 0.
pub fn read_all() -> io::Result<Vec<u8>> {
    let size = call(SIZE_BUFFER, &mut [])?;
    let mut text = vec![0; size.min(LENGTH_MAX)];
    let length = call(READ_ALL, &mut text)?;
    text.truncate(length);
    Ok(text)
}

fn call(action: libc::c_int, buffer: &mut [u8]) -> io::Result<usize> {
    let length = libc::c_int::try_from(buffer.len()).map_err(io::Error::other)?;
    // SAFETY: the kernel writes at most `length` bytes, and the buffer has as many.
    let result = unsafe { libc::klogctl(action, buffer.as_mut_ptr().cast(), length) };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
