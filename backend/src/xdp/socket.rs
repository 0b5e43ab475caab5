//! One AF_XDP socket: its UMEM, its four rings, and the queue that it is bound to.

use super::patiently;
use super::ring::{Consumer, Producer};
use super::umem::Umem;
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::sockopt::{
    set_socket_send_buffer_size_force, set_xdp_rx_ring_size, set_xdp_tx_ring_size,
    set_xdp_umem_completion_ring_size, set_xdp_umem_fill_ring_size, set_xdp_umem_reg, xdp_mmap_offsets,
};
use rustix::net::xdp::{
    SocketAddrXdp, SocketAddrXdpFlags, XDP_PGOFF_RX_RING, XDP_PGOFF_TX_RING, XDP_UMEM_PGOFF_COMPLETION_RING,
    XDP_UMEM_PGOFF_FILL_RING, XdpDesc, XdpUmemReg, XdpUmemRegFlags,
};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with};
use std::io;
use std::sync::Arc;

/// What the kernel keeps before a received packet in its frame (`XDP_PACKET_HEADROOM` in linux/bpf.h), in bytes.
pub(super) const HEADROOM: u32 = 256;
/// What a packet costs of the socket's send buffer beside its frame, generously, in bytes.
const SKB_OVERHEAD: u32 = 2048;

/// Frames of a socket. The first ones receive, the others send; each ring has room for all that can be in it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    /// Bytes.
    pub frame_size: u32,
    /// A power of two.
    pub rx_frames: u32,
    /// A power of two.
    pub tx_frames: u32,
}

/// An open socket, bound to a queue.
pub(super) struct Socket {
    pub fd: Arc<OwnedFd>,
    pub umem: Arc<Umem>,
    pub fill: Producer<u64>,
    pub completion: Consumer<u64>,
    pub rx: Consumer<XdpDesc>,
    pub tx: Producer<XdpDesc>,
}

impl Socket {
    /// Opens a socket on queue `queue` of the device. All receive frames are the kernel's then.
    ///
    /// # Errors
    /// `ENOBUFS`: more locked memory than allowed. Of `bind`: `EBUSY`, another socket has the queue; `EOPNOTSUPP`,
    /// `EINVAL`: the driver or kernel cannot do what `flags` ask for.
    pub(super) fn open(
        device: u32,
        queue: u32,
        layout: Layout,
        flags: SocketAddrXdpFlags,
    ) -> io::Result<Socket> {
        let Layout { frame_size, rx_frames, tx_frames } = layout;
        let umem = Umem::new(rx_frames + tx_frames, frame_size)?;
        let fd = socket_with(AddressFamily::XDP, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        let region = XdpUmemReg {
            addr: umem.addr(),
            len: umem.len(),
            chunk_size: frame_size,
            headroom: 0,
            flags: XdpUmemRegFlags::empty(),
            tx_metadata_len: 0,
        };
        set_xdp_umem_reg(&fd, region)?;
        // The kernel says that it has taken entries after it has shown us what it made of them (`xsk_flush` in
        // net/xdp/xsk.c; sending is the same): a frame can be back before its old place is free.
        let (fill_size, tx_size) = (2 * rx_frames, 2 * tx_frames);
        set_xdp_umem_fill_ring_size(&fd, fill_size)?;
        set_xdp_umem_completion_ring_size(&fd, tx_frames)?;
        set_xdp_rx_ring_size(&fd, rx_frames)?;
        set_xdp_tx_ring_size(&fd, tx_size)?;
        // Without zero copy packets are also limited by the send buffer; the frames shall be the limit.
        let send_buffer = tx_frames.saturating_mul(frame_size + SKB_OVERHEAD).min(i32::MAX as u32 / 2);
        let _ = set_socket_send_buffer_size_force(&fd, send_buffer as usize);
        let at = xdp_mmap_offsets(&fd)?;
        let mut fill = Producer::map(fd.as_fd(), fill_size, XDP_UMEM_PGOFF_FILL_RING, &at.fr)?;
        let completion = Consumer::map(fd.as_fd(), tx_frames, XDP_UMEM_PGOFF_COMPLETION_RING, &at.cr)?;
        let rx = Consumer::map(fd.as_fd(), rx_frames, XDP_PGOFF_RX_RING, &at.rx)?;
        let tx = Producer::map(fd.as_fd(), tx_size, XDP_PGOFF_TX_RING, &at.tx)?;
        // Before the driver looks for them at `bind`.
        for index in 0..rx_frames {
            fill.push(umem.frame(index));
        }
        fill.publish();
        let address = SocketAddrXdp::new(flags, device, queue);
        patiently(|| bind(&fd, &address), |result| *result == Err(Errno::BUSY))?;
        Ok(Socket { fd: Arc::new(fd), umem: Arc::new(umem), fill, completion, rx, tx })
    }
}
