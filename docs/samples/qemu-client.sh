#!/bin/sh
# A guest with one queue pair on a port that pointworkd connects to: QEMU listens, and the daemon may come and go. QEMU's user must
# be able to make the socket in the run-time directory: it is a member of the group pointwork.
#
#   [[port]]
#   name = "vm2"
#   socket = "/run/pointwork/vm2.sock"
#   mode = "client"
#   mtu = 9000
#
# `host_mtu=` tells the guest the MTU of the port; without it both have 1500. Arguments go on to QEMU.
exec "${QEMU:-qemu-system-x86_64}" -name vm2 -accel "${ACCEL:-kvm}" -cpu max -smp "${CPUS:-1}" \
    -object "memory-backend-memfd,id=memory,size=${MEMORY:-1G},share=on" \
    -machine q35,memory-backend=memory -m "${MEMORY:-1G}" \
    -chardev "socket,id=port,path=${RUN:-/run/pointwork}/vm2.sock,server=on,wait=off" \
    -netdev vhost-user,id=net,chardev=port \
    -device virtio-net-pci,netdev=net,mac=52:54:00:00:00:02,host_mtu=9000 \
    "$@"
