#!/bin/sh
# A guest with packed rings, which it takes if its driver knows them, of the largest size, for bursts.
#
#   [[port]]
#   name = "vm4"
#   socket = "/run/pointwork/vm4.sock"
#   mode = "client"
#
# Arguments go on to QEMU.
exec "${QEMU:-qemu-system-x86_64}" -name vm4 -accel "${ACCEL:-kvm}" -cpu max -smp "${CPUS:-1}" \
    -object "memory-backend-memfd,id=memory,size=${MEMORY:-1G},share=on" \
    -machine q35,memory-backend=memory -m "${MEMORY:-1G}" \
    -chardev "socket,id=port,path=${RUN:-/run/pointwork}/vm4.sock,server=on,wait=off" \
    -netdev vhost-user,id=net,chardev=port \
    -device virtio-net-pci,netdev=net,mac=52:54:00:00:00:04,packed=on,rx_queue_size=1024,tx_queue_size=1024 \
    "$@"
