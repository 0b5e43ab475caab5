//! How a frame lies in guest memory: descriptors, and the ways to cut a frame into them.

use virtio_bindings::virtio_ring as bindings;

use super::{Buffer, GuestMemory, Result};

/// `struct virtq_desc` (virtio 1.2, §2.7.5).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest-physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// [`Self::NEXT`], [`Self::WRITE`], [`Self::INDIRECT`].
    pub flags: u16,
    /// The descriptor that follows, if [`Self::NEXT`] is set.
    pub next: u16,
}

impl Descriptor {
    /// The chain goes on.
    pub const NEXT: u16 = bindings::VRING_DESC_F_NEXT as u16;
    /// The device writes here; otherwise it reads.
    pub const WRITE: u16 = bindings::VRING_DESC_F_WRITE as u16;
    /// Points to a table of descriptors.
    pub const INDIRECT: u16 = bindings::VRING_DESC_F_INDIRECT as u16;
    /// Size in memory.
    pub const SIZE: usize = 16;

    /// As it stands in the descriptor table.
    pub fn to_bytes(self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }

    /// The inverse of [`Self::to_bytes`].
    pub fn from_bytes(bytes: [u8; Self::SIZE]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = bytes;
        Self {
            addr: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            len: u32::from_le_bytes([i, j, k, l]),
            flags: u16::from_le_bytes([m, n]),
            next: u16::from_le_bytes([o, p]),
        }
    }
}

/// The way a frame with its virtio-net header is cut into descriptors. All are legal since virtio 1.0 (§5.1.6.2 puts no
/// condition on the framing), and guests use all of them.
#[derive(Clone, Debug)]
pub struct Layout {
    cut: Cut,
    indirect: bool,
}

#[derive(Clone, Debug)]
enum Cut {
    Whole,
    Header,
    Even(usize),
    At(Vec<usize>),
}

impl Layout {
    /// Header and frame in one descriptor.
    pub fn single() -> Self {
        Self { cut: Cut::Whole, indirect: false }
    }

    /// The header in a descriptor of its own, the frame in a second one.
    pub fn split_header() -> Self {
        Self { cut: Cut::Header, indirect: false }
    }

    /// `count` descriptors of about the same length, without regard for where the header ends.
    pub fn chain(count: usize) -> Self {
        Self { cut: Cut::Even(count), indirect: false }
    }

    /// Descriptors of the given lengths, the first containing the header's start, and one more for what remains.
    pub fn pieces(lengths: &[usize]) -> Self {
        Self { cut: Cut::At(lengths.to_vec()), indirect: false }
    }

    /// The same descriptors in an indirect table, which takes one descriptor of the ring.
    pub fn indirect(self) -> Self {
        Self { indirect: true, ..self }
    }

    fn lengths(&self, total: usize, header: usize) -> Vec<usize> {
        let (mut lengths, mut left) = (Vec::new(), total);
        let mut take = |length: usize| {
            let length = length.min(left);
            left -= length;
            if length > 0 {
                lengths.push(length);
            }
        };
        match &self.cut {
            Cut::Whole => {}
            Cut::Header => take(header),
            Cut::Even(count) => (0..*count).for_each(|_| take(total.div_ceil(*count))),
            Cut::At(wanted) => wanted.iter().for_each(|&length| take(length)),
        }
        take(total);
        lengths
    }
}

/// A chain of buffers and the descriptors that describe it, ready to be posted any number of times.
pub(super) struct Chain {
    /// What goes into the ring; `next` is filled in when posted.
    pub descriptors: Vec<Descriptor>,
    /// Bytes in all pieces.
    pub len: usize,
    pieces: Vec<Buffer>,
    /// Keeps the table of an indirect chain allocated.
    _table: Option<Buffer>,
}

impl Chain {
    /// Allocates a chain of `len` bytes for a ring of this kind. `access` is 0 or [`Descriptor::WRITE`].
    pub fn new(
        memory: &GuestMemory,
        len: usize,
        header: usize,
        layout: &Layout,
        (packed, access): (bool, u16),
    ) -> Result<Self> {
        let lengths = layout.lengths(len, header);
        // A lone buffer starts on a cache line as drivers take care to do; pieces lie at any address.
        let align = if lengths.len() == 1 { 64 } else { 1 };
        let pieces: Vec<Buffer> =
            lengths.iter().map(|&length| memory.alloc(length, align)).collect::<Result<_>>()?;
        let mut descriptors: Vec<Descriptor> = pieces
            .iter()
            .map(|piece| Descriptor {
                addr: piece.gpa(),
                len: piece.len() as u32,
                flags: access | Descriptor::NEXT,
                next: 0,
            })
            .collect();
        if let Some(last) = descriptors.last_mut() {
            last.flags &= !Descriptor::NEXT;
        }
        let mut table = None;
        if layout.indirect {
            let buffer = memory.alloc(descriptors.len() * Descriptor::SIZE, Descriptor::SIZE)?;
            for (index, descriptor) in descriptors.iter_mut().enumerate() {
                if descriptor.flags & Descriptor::NEXT != 0 {
                    descriptor.next = index as u16 + 1;
                }
                if packed {
                    // An id, which means nothing here, and the flags behind it (virtio 1.2, §2.8.7).
                    (descriptor.flags, descriptor.next) = (0, descriptor.flags);
                }
                buffer.write(index * Descriptor::SIZE, &descriptor.to_bytes());
            }
            descriptors = vec![Descriptor {
                addr: buffer.gpa(),
                len: buffer.len() as u32,
                flags: Descriptor::INDIRECT,
                next: 0,
            }];
            table = Some(buffer);
        }
        Ok(Self { descriptors, len, pieces, _table: table })
    }

    /// Copies `bytes` to offset `at`; the caller keeps within [`Self::len`].
    pub fn write(&self, at: usize, bytes: &[u8]) {
        let mut done = 0;
        self.visit(at, bytes.len(), |piece, offset, count| {
            piece.write(offset, &bytes[done..done + count]);
            done += count;
        });
    }

    /// Fills `bytes` from offset `at`; the caller keeps within [`Self::len`].
    pub fn read(&self, at: usize, bytes: &mut [u8]) {
        let mut done = 0;
        self.visit(at, bytes.len(), |piece, offset, count| {
            piece.read(offset, &mut bytes[done..done + count]);
            done += count;
        });
    }

    fn visit(&self, mut at: usize, mut len: usize, mut each: impl FnMut(&Buffer, usize, usize)) {
        for piece in &self.pieces {
            if at >= piece.len() {
                at -= piece.len();
                continue;
            }
            let count = len.min(piece.len() - at);
            if count == 0 {
                return;
            }
            each(piece, at, count);
            (at, len) = (0, len - count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frontend::RegionSpec;

    #[test]
    fn layouts_cut_where_they_say() {
        assert_eq!(Layout::single().lengths(100, 12), [100]);
        assert_eq!(Layout::split_header().lengths(100, 12), [12, 88]);
        assert_eq!(Layout::split_header().lengths(12, 12), [12]);
        assert_eq!(Layout::chain(3).lengths(100, 12), [34, 34, 32]);
        assert_eq!(Layout::pieces(&[5, 7, 14]).lengths(100, 12), [5, 7, 14, 74]);
        assert_eq!(Layout::chain(9).lengths(4, 12), [1, 1, 1, 1]);
    }

    #[test]
    fn bytes_cross_pieces() {
        let memory = GuestMemory::new(&[RegionSpec::mib(0, 1), RegionSpec::mib(8 << 20, 1)], false).unwrap();
        let bytes: Vec<u8> = (0..100).collect();
        for layout in [Layout::chain(7), Layout::pieces(&[1, 30]).indirect(), Layout::single()] {
            let chain = Chain::new(&memory, 100, 12, &layout, (false, 0)).unwrap();
            chain.write(0, &bytes);
            chain.write(33, &[200; 40]);
            let mut back = [0; 90];
            chain.read(5, &mut back);
            assert_eq!(back[..28], bytes[5..33]);
            assert_eq!(back[28..68], [200; 40]);
            assert_eq!(back[68..], bytes[73..95]);
        }
    }
}
