#!/bin/sh
# A guest with four queue pairs, of which it takes one for each processor: `vectors` are two for each pair and two more.
#
#   [[port]]
#   name = "vm3"
#   socket = "/run/pointwork/vm3.sock"
#   mode = "client"
#   queues = 4
#
# Arguments go on to QEMU.
exec "${QEMU:-qemu-system-x86_64}" -name vm3 -accel "${ACCEL:-kvm}" -cpu max -smp "${CPUS:-4}" \
    -object "memory-backend-memfd,id=memory,size=${MEMORY:-1G},share=on" \
    -machine q35,memory-backend=memory -m "${MEMORY:-1G}" \
    -chardev "socket,id=port,path=${RUN:-/run/pointwork}/vm3.sock,server=on,wait=off" \
    -netdev vhost-user,id=net,chardev=port,queues=4 \
    -device virtio-net-pci,netdev=net,mac=52:54:00:00:00:03,mq=on,vectors=10 \
    "$@"
