#!/bin/sh
# A guest whose memory is on huge pages of 2 MiB, all of them taken before it starts. Set them aside for it and others first, those
# of 1 GiB at boot (`hugepagesz=1G hugepages=16`), these at any time:
#
#     echo 512 >/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages
#
# The port:
#
#   [[port]]
#   name = "vm5"
#   socket = "/run/pointwork/vm5.sock"
#   mode = "client"
#
# Arguments go on to QEMU. On a machine with several NUMA nodes, `host-nodes=0,policy=bind` behind `prealloc=on` keeps the memory on
# node 0, where the workers of its port should run, too (`workers =` of the port, `cpus =` of the datapath).
exec "${QEMU:-qemu-system-x86_64}" -name vm5 -accel "${ACCEL:-kvm}" -cpu max -smp "${CPUS:-1}" \
    -object "memory-backend-memfd,id=memory,size=${MEMORY:-1G},share=on,hugetlb=on,hugetlbsize=2M,prealloc=on" \
    -machine q35,memory-backend=memory -m "${MEMORY:-1G}" \
    -chardev "socket,id=port,path=${RUN:-/run/pointwork}/vm5.sock,server=on,wait=off" \
    -netdev vhost-user,id=net,chardev=port \
    -device virtio-net-pci,netdev=net,mac=52:54:00:00:00:05 \
    "$@"
