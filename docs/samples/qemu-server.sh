#!/bin/sh
# A guest with one queue pair on a port where pointworkd listens. QEMU connects, and again if the daemon restarts; the guest has
# its network back after that, unless its rings are packed and their records are lost.
#
#   [[port]]
#   name = "vm1"
#   socket = "/run/pointwork/vm1.sock"
#
# Arguments go on to QEMU: disks, displays and all that is not the network. Since QEMU 9.2 `reconnect-ms=1000` is the newer
# spelling of `reconnect=1`.
exec "${QEMU:-qemu-system-x86_64}" -name vm1 -accel "${ACCEL:-kvm}" -cpu max -smp "${CPUS:-1}" \
    -object "memory-backend-memfd,id=memory,size=${MEMORY:-1G},share=on" \
    -machine q35,memory-backend=memory -m "${MEMORY:-1G}" \
    -chardev "socket,id=port,path=${RUN:-/run/pointwork}/vm1.sock,reconnect=1" \
    -netdev vhost-user,id=net,chardev=port \
    -device virtio-net-pci,netdev=net,mac=52:54:00:00:00:01 \
    "$@"
