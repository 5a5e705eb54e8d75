#!/bin/busybox sh
# The guest's only program. On its serial console it says, over and over,
#   heartbeat N                  ten times a second
#   hashes N MEMORY DISK         the SHA-256 of what stays the same, read since heartbeat N
# and all the while it writes to its memory and to the end of its disk.
/bin/busybox mkdir -p /proc /sys /dev /work
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs -o size=100% work /work
for module in /modules/*; do [ ! -e "$module" ] || insmod "$module"; done
exec </dev/ttyS0 >/dev/ttyS0 2>&1

# MiB: memory that stays, memory that is rewritten; the end of the disk that is rewritten comes from the
# kernel's command line, whose unknown words are this program's environment.
kept=16 dirty=32 tail=${tail:?}
disk=0
[ ! -e /dev/vda ] || disk=$(($(cat /sys/block/vda/size) / 2048))

random() { # FILE KIB AT [OPTION...]: KIB of random bytes into the AT-th place of FILE
    to=$1 kib=$2 at=$3; shift 3
    dd if=/dev/urandom of="$to" bs="${kib}k" count=1 seek="$at" conv=notrunc "$@" 2>/dev/null
}

heartbeat() {
    n=0
    while :; do
        n=$((n + 1))
        echo $n >/work/beat
        echo "heartbeat $n"
        usleep 100000
    done
}

write() {
    at=0
    while :; do
        random /work/dirty 1024 $((at % dirty))
        [ $disk = 0 ] || random /dev/vda 64 $(((disk - tail) * 16 + at % (tail * 16))) oflag=direct
        at=$((at + 1))
        usleep 100000
    done
}

report() {
    while :; do
        since=$(cat /work/beat)
        memory=$(sha256sum /work/kept | cut -d ' ' -f 1)
        front=-
        [ $disk = 0 ] || front=$(dd if=/dev/vda bs=1M count=$((disk - tail)) iflag=direct 2>/dev/null | sha256sum | cut -d ' ' -f 1)
        echo "hashes $since $memory $front"
        usleep 100000
    done
}

dd if=/dev/urandom of=/work/kept bs=1M count=$kept 2>/dev/null
echo 0 >/work/beat
heartbeat & write & report &
while :; do wait; sleep 1; done
