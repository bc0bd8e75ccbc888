#!/bin/sh
# First program on the disk: what a distribution has done before a node starts, then the jobs.
export PATH=/usr/sbin:/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t securityfs security /sys/kernel/security
# A machine that was booted with SELinux gets a policy first; elsewhere the service manager does that.
if [ -d /sys/fs/selinux ]; then
    mount -t selinuxfs selinuxfs /sys/fs/selinux
    dd if=/etc/selinux/lab/policy of=/sys/fs/selinux/load bs=1M
    echo 1 >/sys/fs/selinux/enforce
fi
mkdir -p /dev/pts /dev/shm
# As every distribution has them: programs read from there what they are handed.
ln -s /proc/self/fd /dev/fd
for number in 0:stdin 1:stdout 2:stderr; do ln -s "/proc/self/fd/${number%%:*}" "/dev/${number#*:}"; done
mount -t devpts -o ptmxmode=0666,mode=0620,gid=5 devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t tmpfs -o mode=0755 run /run
# Service managers share every mount; a program that relies on private ones fails here as it would there.
mount --make-rshared /
# Modules are loaded when the kernel asks for them, as everywhere.
echo /bin/modprobe >/proc/sys/kernel/modprobe
# Elsewhere udev makes these nodes when somebody looks for them.
modprobe -a fuse tun loop
# Nobody's programs live in the root group of version 2.
mkdir /sys/fs/cgroup/lab
echo $$ >/sys/fs/cgroup/lab/cgroup.procs
hostname lab
ip link set lo up

if [ ! -b /dev/vdb ]; then
    setsid cttyhack sh
    poweroff -f
fi

mount -t ext4 -o ro /dev/vdb /jobs
# Libraries of the jobs' programs.
if [ -d /jobs/root ]; then cp -a /jobs/root/. /; fi
out=/dev/ttyS1
stty -F $out raw -echo
while IFS='	' read -r name command; do
    echo "@@begin $name" >$out
    (
        cd /tmp
        exec setsid env -i HOME=/root PATH=/jobs:/usr/sbin:/bin ORLOP_TEST_MACHINE=own sh -c "$command"
    ) >$out 2>&1 </dev/null
    echo "@@end $? $name" >$out
    # What a job left running is not the next one's business.
    kill -KILL -1
done </jobs/list
poweroff -f
