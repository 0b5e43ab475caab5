//! The receive side of a queue.

use super::ring::{Consumer, Producer};
use super::socket::Socket;
use super::umem::Umem;
use crate::virtio::{Burst, MAX_BURST, Mapping, next_ring_id};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::net::sockopt::xdp_statistics;
use rustix::net::xdp::{XdpDesc, XdpDescOptions};
use rustix::net::{RecvFlags, recv};
use std::sync::Arc;

/// Pieces of a packet at most; the kernel has 1 + `MAX_SKB_FRAGS` (17, or 45 if so built).
const MAX_PIECES: u32 = 64;

/// The receive side of a queue of a device. One owner at a time; it brings packets as a guest's transmit ring does:
/// ```text
/// rx.receive(&mut burst, 64)       packets and where their bytes are in UMEM
/// rx.complete(&mut burst)          the frames go back to the device
/// if rx.arm() { /* sleep on rx.kick_fd() */ } rx.disarm()
/// ```
pub struct XdpRx {
    id: u64,
    queue: u32,
    fd: Arc<OwnedFd>,
    umem: Arc<Umem>,
    mapping: Arc<dyn Mapping>,
    fill: Producer<u64>,
    rx: Consumer<XdpDesc>,
    /// Taken, but not given back.
    in_flight: u32,
    /// The rest of a packet that is given up is still to come.
    skipping: bool,
    malformed: u64,
}

/// Packets that did not reach us, counted since the socket was opened (`struct xdp_statistics`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct XdpLosses {
    /// The kernel had no room: packet larger than the frames, or no memory.
    pub dropped: u64,
    /// No place in the receive ring.
    pub ring_full: u64,
    /// No free frame: we were too slow.
    pub no_frame: u64,
    /// What the kernel found malformed of what we gave it; always 0, or there is a defect.
    pub invalid: u64,
    /// Packets in more pieces than we take, or with none.
    pub malformed: u64,
}

impl XdpRx {
    pub(super) fn new(socket: &SocketParts, fill: Producer<u64>, rx: Consumer<XdpDesc>) -> XdpRx {
        XdpRx {
            id: next_ring_id(),
            queue: socket.queue,
            fd: Arc::clone(&socket.fd),
            umem: Arc::clone(&socket.umem),
            mapping: Arc::clone(&socket.umem) as Arc<dyn Mapping>,
            fill,
            rx,
            in_flight: 0,
            skipping: false,
            malformed: 0,
        }
    }

    /// Unlike that of any other ring.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The device's receive queue.
    pub fn queue(&self) -> u32 {
        self.queue
    }

    /// Takes up to `max` packets (at most [`MAX_BURST`]) into `burst`, which is cleared first. Returns their number.
    /// Their headers are empty: no offload came with them.
    pub fn receive(&mut self, burst: &mut Burst, max: usize) -> usize {
        let available = self.rx.available();
        if available == 0 {
            burst.clear();
            return 0;
        }
        burst.begin(self.id, Arc::clone(&self.mapping));
        // Entries taken so far, and the pieces of them that are in the burst.
        let (mut taken, mut kept) = (0, 0);
        while burst.frames().len() < max.min(MAX_BURST) {
            let Some((pieces, ends)) = self.next_packet(taken, available) else { break };
            let whole = ends && !self.skipping && pieces <= MAX_PIECES;
            let mut each = (taken..taken + pieces).map(|i| self.rx.peek(i)).map(|desc| (desc.addr, desc.len));
            // A piece that is no piece of ours (never seen) makes the packet another one than was sent.
            if whole && each.clone().all(|(addr, len)| self.umem.contains(addr, len)) {
                if !self.umem.push(burst, &mut each) {
                    break;
                }
                kept += pieces;
            } else {
                self.give_up(taken, pieces, ends);
            }
            taken += pieces;
        }
        self.rx.release(taken);
        self.in_flight += kept;
        if burst.frames().is_empty() {
            burst.clear();
            if taken > 0 {
                self.return_frames();
            }
        }
        burst.frames().len()
    }

    /// Pieces of the packet that begins at entry `first` of `available`, and whether its end is among them: it is not if
    /// it has more than we take. `None`: it has not come whole yet.
    #[inline]
    fn next_packet(&self, first: u32, available: u32) -> Option<(u32, bool)> {
        let end = available.min(first.saturating_add(MAX_PIECES + 1));
        for i in first..end {
            if !self.rx.peek(i).options.contains(XdpDescOptions::XDP_PKT_CONTD) {
                return Some((i - first + 1, true));
            }
        }
        (end - first > MAX_PIECES).then_some((end - first, false))
    }

    /// Gives a packet's frames back at once.
    #[cold]
    fn give_up(&mut self, first: u32, pieces: u32, ends: bool) {
        for i in first..first + pieces {
            self.fill.push(self.umem.frame_at(self.rx.peek(i).addr));
        }
        self.malformed += u64::from(ends);
        self.skipping = !ends;
    }

    /// Gives the frames of `burst` back to the device, and clears the burst. A burst of another ring is only cleared.
    pub fn complete(&mut self, burst: &mut Burst) {
        if burst.ring() == self.id {
            for seg in burst.pushed_segments() {
                if let Some(frame) = self.umem.frame_of(seg) {
                    // The ring has more room than there are frames that receive.
                    let pushed = self.fill.push(frame);
                    debug_assert!(pushed);
                }
            }
            self.in_flight -= burst.pushed_segments().len() as u32;
            self.return_frames();
        }
        burst.clear();
    }

    /// Shows the driver the frames that were given back, and wakes it if it has run out of them.
    fn return_frames(&mut self) {
        self.fill.publish();
        if self.fill.needs_wakeup() {
            self.wake_driver();
        }
    }

    #[cold]
    fn wake_driver(&self) {
        // There is nothing to read by this way; the call itself wakes. If it fails, the next one will be made.
        let _ = recv(&self.fd, &mut [0u8; 0][..], RecvFlags::DONTWAIT);
    }

    /// How many pieces of packets can be received now.
    #[inline]
    pub fn pending(&self) -> u16 {
        self.rx.available().min(u32::from(u16::MAX)) as u16
    }

    /// Prepares for sleep. True: there is nothing to receive and the caller may sleep until [`kick_fd`](Self::kick_fd) is
    /// readable, which it is for as long as there is something. False: there is something.
    pub fn arm(&mut self) -> bool {
        if self.fill.needs_wakeup() {
            self.wake_driver();
        }
        self.pending() == 0
    }

    /// Ends what [`arm`](Self::arm) began. The kernel needs to be told nothing: it wakes only those who poll.
    pub fn disarm(&mut self) {}

    /// What is readable while there are packets; to be polled while asleep.
    pub fn kick_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The socket, which is what [`kick_fd`](Self::kick_fd) borrows.
    pub(crate) fn socket(&self) -> &Arc<OwnedFd> {
        &self.fd
    }

    /// Frames that were received and not given back.
    pub fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// Frames that wait in the fill ring for the driver.
    pub fn free_frames(&self) -> u32 {
        self.fill.queued()
    }

    /// Packets that have come and were not received.
    pub fn left(&self) -> u64 {
        let whole = |i: &u32| !self.rx.peek(*i).options.contains(XdpDescOptions::XDP_PKT_CONTD);
        (0..self.rx.available()).filter(whole).count() as u64
    }

    /// Packets that were given up because nobody could take them: in too many pieces, or in memory that is not ours.
    pub fn malformed(&self) -> u64 {
        self.malformed
    }

    /// What was lost on the way to us.
    pub fn losses(&self) -> XdpLosses {
        XdpLosses { malformed: self.malformed, ..XdpLosses::of(&self.fd) }
    }
}

impl XdpLosses {
    /// Those of a socket that the kernel has counted.
    pub(super) fn of(socket: &OwnedFd) -> XdpLosses {
        // Only a closed socket has none.
        let Ok(of) = xdp_statistics(socket) else { return XdpLosses::default() };
        XdpLosses {
            dropped: of.rx_dropped,
            ring_full: of.rx_ring_full.unwrap_or_default(),
            no_frame: of.rx_fill_ring_empty_descs.unwrap_or_default(),
            invalid: of.rx_invalid_descs + of.tx_invalid_descs,
            malformed: 0,
        }
    }
}

/// What the two sides of a socket share.
pub(super) struct SocketParts {
    pub queue: u32,
    pub fd: Arc<OwnedFd>,
    pub umem: Arc<Umem>,
}

impl SocketParts {
    pub(super) fn of(socket: &Socket, queue: u32) -> SocketParts {
        SocketParts { queue, fd: Arc::clone(&socket.fd), umem: Arc::clone(&socket.umem) }
    }
}
