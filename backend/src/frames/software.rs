//! What a receiving guest or device cannot take as it is: checksums completed and segments cut before it gets them.

use super::outgoing::Outgoing;
use crate::virtio::{NetHeader, has_feature};
use switch_core::drop::DropReason;
use switch_core::offload::{self, RawHeader};
use switch_core::packet::{Gso, HEADROOM, MAX_FRAME};
use switch_core::segment;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
};

/// Whether a guest that negotiated `features` takes a packet as it is.
#[inline]
pub fn is_accepted(outgoing: &Outgoing, features: u64) -> bool {
    let offload = &outgoing.packet.offload;
    let has = |bit| has_feature(features, bit);
    if !offload.needs_csum {
        return true;
    }
    !outgoing.is_cut()
        && has(VIRTIO_NET_F_GUEST_CSUM)
        && match offload.gso {
            Gso::None => true,
            // No receiver is asked for what it could do inside a tunnel.
            _ if offload.inner.is_some() => false,
            Gso::Tcp4 => has(VIRTIO_NET_F_GUEST_TSO4) && (!offload.ecn || has(VIRTIO_NET_F_GUEST_ECN)),
            Gso::Tcp6 => has(VIRTIO_NET_F_GUEST_TSO6) && (!offload.ecn || has(VIRTIO_NET_F_GUEST_ECN)),
            Gso::UdpL4 => has(VIRTIO_NET_F_GUEST_USO4) && has(VIRTIO_NET_F_GUEST_USO6),
        }
}

/// The header as the guest wrote it, for the check.
#[inline]
pub fn raw_header(header: &NetHeader) -> RawHeader {
    RawHeader {
        flags: header.flags,
        gso_type: header.gso_type,
        hdr_len: header.hdr_len,
        gso_size: header.gso_size,
        csum_start: header.csum_start,
        csum_offset: header.csum_offset,
    }
}

/// The header for the receiving guest, written anew from what was checked.
#[inline]
pub fn net_header(outgoing: &Outgoing, features: u64) -> NetHeader {
    let offload = outgoing.offload();
    if !offload.needs_csum && !offload.csum_valid {
        return NetHeader::default(); // nothing is left to do
    }
    let raw = offload::to_raw(outgoing.packet);
    let mut flags = raw.flags;
    if !has_feature(features, VIRTIO_NET_F_GUEST_CSUM) {
        flags &= !NetHeader::DATA_VALID;
    }
    NetHeader {
        flags,
        gso_type: raw.gso_type,
        hdr_len: raw.hdr_len,
        gso_size: raw.gso_size,
        csum_start: raw.csum_start,
        csum_offset: raw.csum_offset,
        num_buffers: 0,
    }
}

/// The longest frame that leaves: the longest that comes in, with all that actions can push.
const LONGEST: usize = MAX_FRAME as usize + HEADROOM;

/// Room to put a frame together and to cut it.
pub struct Software {
    frame: Box<[u8]>,
    segment: Box<[u8]>,
}

impl Default for Software {
    fn default() -> Self {
        let buffer = || vec![0; LONGEST].into();
        Software { frame: buffer(), segment: buffer() }
    }
}

impl Software {
    /// Gives `emit` the frames that a packet becomes for a guest that needs them complete. Its second argument is true
    /// for the last one. On an error nothing has been given.
    pub fn send(&mut self, outgoing: &Outgoing, mut emit: impl FnMut(&[u8], bool)) -> Result<(), DropReason> {
        let len = outgoing.copy_uncut(&mut self.frame);
        let frame = &mut self.frame[..len];
        let offload = outgoing.packet.offload;
        // Each frame is cut by itself, as it would be had its sender left nothing to do.
        let cut = |frame: &[u8]| frame.len().min(outgoing.max_len as usize);
        if offload.gso == Gso::None {
            offload::finish_checksum(frame, &offload)?;
            emit(&frame[..cut(frame)], true);
            return Ok(());
        }
        let layout = &outgoing.packet.layout;
        let mut left = segment::count(frame.len(), layout, &offload);
        segment::segment(frame, layout, &offload, &mut self.segment, |segment| {
            left -= 1;
            emit(&segment[..cut(segment)], left == 0);
        })?;
        Ok(())
    }
}
