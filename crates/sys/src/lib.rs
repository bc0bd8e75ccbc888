//! Every system call, ioctl and netlink socket of orlop, behind typed wrappers; the only crate with `unsafe`.
