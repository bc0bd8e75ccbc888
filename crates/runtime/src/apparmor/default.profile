# The profile of containers that ask for none, or for the runtime's default. `default.bin` is made of it by
# `cargo xtask codegen`.
abi <abi/3.0>,

profile orlop-default flags=(attach_disconnected, mediate_deleted) {
  # What a container may do is said by its capabilities, its system call filter and the owners of files. Here stands what
  # those leave open.
  file,
  capability,
  network,
  umount,

  # Signals come from the host and from the pod's own keeper, and go to containers only.
  signal (receive) peer=unconfined,
  signal (receive) peer=orlop,
  signal (receive) peer=/**/orlop,
  signal (receive) peer=runc,
  signal (receive) peer=crun,
  signal (send, receive) peer=orlop-default,
  ptrace (trace, tracedby, read, readby) peer=orlop-default,

  deny mount,

  # Of /proc a container writes below processes, and the shared memory's part of /proc/sys/kernel.
  deny /proc/* w,
  deny /proc/[^1-9s]*/** w,
  deny /proc/s[^y]*/** w,
  deny /proc/sy[^s]*/** w,
  deny /proc/sys[^/]*/** w,
  deny /proc/sys/[^k]** w,
  deny /proc/sys/k[^e]** w,
  deny /proc/sys/kernel/[^s]** w,
  deny /proc/sys/kernel/s[^h]** w,
  deny /proc/sys/kernel/sh[^m]** w,
  deny /proc/sysrq-trigger rwklx,
  deny /proc/kcore rwklx,

  # Of /sys it writes control groups that it has been given.
  deny /sys/[^f]*/** wklx,
  deny /sys/f[^s]*/** wklx,
  deny /sys/fs/[^c]*/** wklx,
  deny /sys/fs/c[^g]*/** wklx,
  deny /sys/fs/cg[^r]*/** wklx,
  deny /sys/firmware/** rwklx,
  deny /sys/devices/virtual/powercap/** rwklx,
  deny /sys/kernel/security/** rwklx,
}
