#!/bin/busybox sh
# First program of the machine, in the initramfs: finds the disk and continues there.
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
for module in $(cat /modules/order); do
    insmod "/modules/$module" || echo "start: module $module does not load"
done
mount -t ext4 /dev/vda /disk || echo "start: no disk"
umount /proc
mount -o move /dev /disk/dev
exec switch_root /disk /init
