//! Rings of either layout in memory of anybody's making, which changes while they are in use: no content makes us panic or
//! leave guest memory, and a ring that is found malformed is found empty from then on.
#![no_main]

use std::sync::Arc;

use backend::virtio::{
    Blocked, Burst, Call, Frame, GuestRegions, GuestRx, GuestTx, NetHeader, RingBase, RingConfig,
};
use libfuzzer_sys::fuzz_target;
use virtio_bindings::virtio_config::{VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_net::{VIRTIO_NET_F_CSUM, VIRTIO_NET_F_MRG_RXBUF};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Two regions that adjoin, and one apart.
const REGIONS: [(u64, usize); 3] = [(0, 0x2000), (0x2000, 0x1000), (0x8000, 0x1000)];
const FEATURES: [u32; 7] = [
    VIRTIO_F_RING_PACKED,
    VIRTIO_F_IN_ORDER,
    VIRTIO_F_VERSION_1,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_CSUM,
];

fuzz_target!(|data: &[u8]| {
    // Features, size, base, lengths of the frames; then memory, and how much of the rest replaces it between rounds.
    let Some((&[features, size, base_low, base_high, rounds, step], data)) = data.split_first_chunk() else {
        return;
    };
    let ranges = REGIONS.map(|(at, len)| (GuestAddress(at), len));
    let Ok(memory) = GuestMemoryMmap::from_ranges(&ranges) else { return };
    let memory = Arc::new(memory);
    let put = |at: usize, bytes: &[u8]| {
        let _ = memory.write(bytes, GuestAddress(at as u64));
    };
    let (first, mut later) = data.split_at(data.len().min(0x2000));
    put(0, first);
    let features =
        FEATURES.iter().enumerate().fold(0u64, |all, (i, bit)| all | u64::from(features >> i & 1) << bit);
    let packed = features & 1 << VIRTIO_F_RING_PACKED != 0;
    let size = if packed { u16::from(size) } else { 1 << (size % 8) };
    let table = u64::from(size) * 16;
    let config = RingConfig {
        size,
        desc: 0,
        avail: table,
        used: (table + 6 + 2 * u64::from(size)).next_multiple_of(4),
        features,
    };
    let regions = Arc::new(GuestRegions::new(memory.clone()));
    let base = || {
        let base = RingBase::default();
        base.name(u16::from_le_bytes([base_low, base_high]));
        Arc::new(base)
    };
    let mut tx = GuestTx::new(regions.clone(), &config, None, Arc::new(Call::default()), base());
    let rx = GuestRx::new(regions, &config, Arc::new(Call::default()), base());
    let mut burst = Burst::new();
    for round in 0..u32::from(rounds % 16) {
        if let Ok(tx) = &mut tx {
            match tx.receive(&mut burst, 32) {
                Ok(_) => {
                    let mut head = [0; 64];
                    for received in burst.frames() {
                        burst.copy_head(received, &mut head);
                    }
                    tx.complete(&mut burst);
                }
                Err(_) => assert_eq!(tx.receive(&mut burst, 32), Ok(0)),
            }
            if tx.arm() {
                tx.disarm();
            }
        }
        if let Ok(rx) = &rx {
            let bytes = [7; 300];
            let frames: Vec<Frame<'_>> = (0..4)
                .map(|i| {
                    let len = (round * 61 + i * 97) % 299 + 1;
                    Frame {
                        header: NetHeader::EMPTY,
                        head: &bytes[..len as usize],
                        body: &[],
                        tail: &[],
                        tail_offset: 0,
                        len,
                    }
                })
                .collect();
            if let Some(Blocked::Fault(_)) = rx.send(&frames[..]).blocked {
                assert!(rx.is_stopped());
                assert_eq!(rx.send(&frames[..]).blocked, Some(Blocked::Stopped));
            }
            rx.notify();
        }
        let (now, rest) = later.split_at(later.len().min(usize::from(step)));
        put(usize::from(round as u16) * 37 % 0x2000, now);
        later = rest;
    }
});
