//! The send side of a queue.

use super::ring::{Consumer, Producer};
use super::rx::{SocketParts, XdpLosses};
use super::umem::Umem;
use crate::virtio::{Blocked, Frame, Frames, SendResult, SpinLock};
use arrayvec::ArrayVec;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::xdp::{XdpDesc, XdpDescOptions};
use rustix::net::{SendFlags, send};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// UMEM frames reserved at a time.
const BATCH: usize = 128;
/// Pieces of a packet at most: what a packet of the kernel has beside its linear part (`MAX_SKB_FRAGS`).
pub(super) const MAX_PIECES: u32 = 17;
/// What a packet is padded to. A driver without copy hands the device what it gets, and some devices take nothing
/// shorter than the shortest Ethernet frame (IEEE 802.3, without checksum). With a copy the driver pads by itself; an
/// Ethernet header the kernel wants.
const MIN_LEN: u32 = 14;
const MIN_LEN_ZERO_COPY: u32 = 60;
/// Free frames below which completed ones are looked for.
const LOW: usize = 2 * BATCH;

struct State {
    /// Frames that nobody uses. Those in the tx ring, with the driver, or in the completion ring are not among them.
    free: Vec<u64>,
    completion: Consumer<u64>,
    tx: Producer<XdpDesc>,
}

impl State {
    /// Takes back the frames that were sent.
    fn reclaim(&mut self) {
        let n = self.completion.available();
        for i in 0..n {
            // There are no more frames than `free` has room for: this does not allocate.
            self.free.push(self.completion.peek(i));
        }
        self.completion.release(n);
    }
}

/// What a port's send sides have in common.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Bytes of a frame at most, without checksum.
    pub max_len: u32,
    /// Pieces of a frame at most.
    pub max_pieces: u32,
    /// The driver works on our frames itself.
    pub zero_copy: bool,
}

/// The send side of a queue of a device, shared by all workers. It takes packets as a guest's receive ring does:
/// ```text
/// tx.send(&frames)                 leading frames that went in, and what blocked the next one
/// tx.notify()                      once after a burst: the system call, if one is needed
/// ```
/// UMEM frames are reserved and published under a spin lock, and filled outside of it. There are as many of them as
/// places in the completion ring, and fewer than in the tx ring, so neither of those can be full.
pub struct XdpTx {
    queue: u32,
    fd: Arc<OwnedFd>,
    umem: Arc<Umem>,
    limits: Limits,
    state: SpinLock<State>,
    /// Something was published that the kernel may not know of.
    unkicked: AtomicBool,
    stopped: AtomicBool,
    lost: AtomicU64,
}

impl XdpTx {
    pub(super) fn new(
        socket: &SocketParts,
        frames: std::ops::Range<u32>,
        completion: Consumer<u64>,
        tx: Producer<XdpDesc>,
        limits: Limits,
    ) -> XdpTx {
        let free: Vec<u64> = frames.map(|index| socket.umem.frame(index)).collect();
        XdpTx {
            queue: socket.queue,
            fd: Arc::clone(&socket.fd),
            umem: Arc::clone(&socket.umem),
            limits,
            state: SpinLock::new(State { free, completion, tx }),
            unkicked: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            lost: AtomicU64::new(0),
        }
    }

    /// The device's queue.
    pub fn queue(&self) -> u32 {
        self.queue
    }

    /// Bytes of the queue's frames, both ways.
    pub fn memory(&self) -> u64 {
        self.umem.len()
    }

    /// The virtio features by which a sender decides what to do in software: none, so checksums and segments are.
    pub fn features(&self) -> u64 {
        0
    }

    /// Puts frames into the ring, in order, until one does not go in. They leave when it is [notified](Self::notify). The
    /// frames' virtio headers are not looked at.
    pub fn send<F: Frames + ?Sized>(&self, frames: &F) -> SendResult {
        let mut sent = 0;
        while sent < frames.count() {
            let mut reserved = ArrayVec::<u64, BATCH>::new();
            let (count, blocked) = self.reserve(frames, sent, &mut reserved);
            let mut descs = ArrayVec::<XdpDesc, BATCH>::new();
            let mut addrs = reserved.into_iter();
            for i in sent..sent + count {
                self.fill(&frames.frame(i), &mut addrs, &mut descs);
            }
            self.publish(&descs);
            sent += count;
            if blocked.is_some() {
                return SendResult { sent, blocked };
            }
        }
        SendResult { sent, blocked: None }
    }

    /// Bytes of a frame of `len` as it is sent.
    fn padded(&self, len: u32) -> u32 {
        len.max(if self.limits.zero_copy { MIN_LEN_ZERO_COPY } else { MIN_LEN })
    }

    /// Takes UMEM frames for as many frames as possible, from frame `from` on, and gives their number. The reason is `None` if all
    /// went in, or only the size of the reservation was in the way.
    fn reserve<F: Frames + ?Sized>(
        &self,
        frames: &F,
        from: usize,
        reserved: &mut ArrayVec<u64, BATCH>,
    ) -> (usize, Option<Blocked>) {
        if self.is_stopped() {
            return (0, Some(Blocked::Stopped));
        }
        let mut state = self.state.lock();
        if state.free.len() < LOW {
            state.reclaim();
        }
        let wanted = frames.count() - from;
        for i in 0..wanted {
            let len = frames.len(from + i);
            let pieces = self.padded(len).div_ceil(self.umem.frame_size());
            if len > self.limits.max_len || pieces > self.limits.max_pieces {
                return (i, Some(Blocked::TooBig));
            }
            let pieces = pieces as usize;
            if reserved.remaining_capacity() < pieces {
                return (i, None);
            }
            let Some(rest) = state.free.len().checked_sub(pieces) else { return (i, Some(Blocked::Full)) };
            reserved.extend(state.free.drain(rest..));
        }
        (wanted, None)
    }

    /// Copies a frame into reserved UMEM frames.
    fn fill(
        &self,
        frame: &Frame<'_>,
        addrs: &mut impl Iterator<Item = u64>,
        descs: &mut ArrayVec<XdpDesc, BATCH>,
    ) {
        let (mut rest, first) = (self.padded(frame.len), descs.len());
        while rest > 0
            && let Some(addr) = addrs.next()
        {
            let len = rest.min(self.umem.frame_size());
            rest -= len;
            let more = if rest > 0 { XdpDescOptions::XDP_PKT_CONTD } else { XdpDescOptions::empty() };
            descs.push(XdpDesc { addr, len, options: more });
        }
        self.umem.write(frame, descs[first..].iter().map(|desc| (desc.addr, desc.len)));
    }

    fn publish(&self, descs: &[XdpDesc]) {
        if descs.is_empty() {
            return;
        }
        let mut state = self.state.lock();
        for &desc in descs {
            let pushed = state.tx.push(desc);
            debug_assert!(pushed, "more frames than places in the ring");
        }
        state.tx.publish();
        drop(state);
        self.unkicked.store(true, Ordering::Release);
    }

    /// Has the kernel send what was put into the ring, if it does not look by itself. Once after a burst.
    pub fn notify(&self) {
        if !self.unkicked.swap(false, Ordering::AcqRel) {
            return;
        }
        let mut before = u32::MAX;
        loop {
            let queued = {
                let state = self.state.lock();
                if state.tx.needs_wakeup() { state.tx.queued() } else { 0 }
            };
            if queued == 0 {
                return;
            }
            // Without zero copy each call sends a few packets, and says so by an error (`xsk_generic_xmit` in
            // net/xdp/xsk.c): go on while it helps.
            if queued >= before {
                break;
            }
            before = queued;
            match send(&self.fd, &[], SendFlags::DONTWAIT) {
                Ok(_) => return,
                Err(Errno::AGAIN | Errno::NOBUFS | Errno::INTR) => {}
                // The device has refused a packet, which is gone.
                Err(Errno::BUSY) => {
                    self.lost.fetch_add(1, Ordering::Relaxed);
                }
                Err(Errno::NETDOWN) => break,
                // The device is gone, and the socket will not come back.
                Err(_) => {
                    self.stopped.store(true, Ordering::Relaxed);
                    return;
                }
            }
        }
        self.unkicked.store(true, Ordering::Release);
    }

    /// Whether the last [`notify`](Self::notify) left something in the ring that the device did not take; it should be
    /// called again soon, even if nothing else is sent.
    pub fn is_waiting(&self) -> bool {
        self.unkicked.load(Ordering::Relaxed)
    }

    /// Whether the ring takes nothing any more: the device has gone, or the port was closed.
    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    /// Refuses new frames from now on.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    /// UMEM frames that nobody uses, those included that were sent meanwhile.
    pub fn free_frames(&self) -> usize {
        let mut state = self.state.lock();
        state.reclaim();
        state.free.len()
    }

    /// Packets, or pieces of them, that the kernel has not taken out of the ring.
    pub fn left(&self) -> u64 {
        self.state.lock().tx.queued().into()
    }

    /// What was lost on the way to the other side of this queue.
    pub fn losses(&self) -> XdpLosses {
        XdpLosses::of(&self.fd)
    }

    /// Packets that the device's driver has refused.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}
