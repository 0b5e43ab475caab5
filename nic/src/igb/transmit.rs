//! Sending: frames over one slot or several, and the context of those that ask for an offload or have a tag (82576 datasheet,
//! 7.2). The device keeps a context, and uses it for all frames that ask for one, until it is given another.

use switch_core::checksum;
use switch_core::packet::{Gso, Offload};

use crate::io::{NicError, SendError};
use crate::layers::{Head, Layers};
use crate::pci::{BadAccess, Bar, PciError, PciFunction};

use super::ring::Ring;
use super::{ADDRESSES, MIN_FRAME, TAG, regs};

/// The least bytes of a buffer: frames to be segmented need few of them.
const BUFFER: usize = 2048;
/// The longest frame to be segmented: what IP can have, and a link header with two tags.
const MAX_SUPER: usize = 65_535 + 22;

/// Descriptor extension, in command words.
const DEXT: u64 = 1 << 29;
/// A context descriptor.
const CONTEXT: u64 = DEXT | 2 << 20;
/// Context: IPv4, and TCP.
const CONTEXT_IPV4: u64 = 1 << 10;
const CONTEXT_TCP: u64 = 1 << 11;
/// A data descriptor: FCS inserted.
const DATA: u64 = DEXT | 3 << 20 | 1 << 25;
/// Data: end of packet, to be reported when done.
const LAST: u64 = 1 << 24 | 1 << 27;
/// Data: the tag of the context before it is put on.
const INSERT_TAG: u64 = 1 << 30;
/// Data: segment.
const SEGMENT: u64 = 1 << 31;
/// Data: as the context before it says, insert the transport checksum, or that of IP.
const CHECKSUM: u64 = 1 << (32 + 9) | 1 << (32 + 7);
const IP_CHECKSUM: u64 = 1 << (32 + 8);
/// Descriptor done; the device writes it over the upper word of data descriptors that ask for it, and of no others.
const DONE: u64 = 1 << 32;

/// What a frame asks for, in the device's words.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Request {
    /// The context descriptor.
    context: (u64, u64),
    /// Flags of data descriptors.
    flags: u64,
    /// Bytes of the frame that leave, and those that are said to.
    len: usize,
    payload: usize,
}

/// The addresses of a frame with this first piece, and the TCI of the tag behind them, if the device can put it on.
fn tag(first: &[u8]) -> Option<(&[u8], u16)> {
    let (addresses, rest) = first.split_at_checked(ADDRESSES)?;
    match rest.first_chunk::<TAG>()? {
        &[0x81, 0x00, high, low] => Some((addresses, u16::from_be_bytes([high, low]))),
        _ => None,
    }
}

/// What the device is to do for a frame with these layers, whose first tag has this TCI if it is for the device to put on.
fn request(layers: &Layers, len: usize, offload: &Offload, tci: Option<u16>) -> Option<Request> {
    let (header, tagged) = (layers.transport - layers.network, tci.map_or(0, |_| TAG));
    let network = layers.network.checked_sub(tagged)?;
    let mut words = (u64::from(tci.unwrap_or(0)) << 16 | (network as u64) << 9 | header as u64, CONTEXT);
    // The device has 9 bits for the length of the IP header, 7 for what is before it.
    if header > 511 || network > 127 {
        return None;
    }
    words.1 |= if layers.ipv4 { CONTEXT_IPV4 } else { 0 } | if layers.tcp { CONTEXT_TCP } else { 0 };
    if offload.gso == Gso::None {
        // Behind the packet it would count padding in, so that stays here.
        let payload = layers.end.checked_sub(tagged)?;
        return Some(Request { context: words, flags: CHECKSUM, len: layers.end, payload });
    }
    // Congestion marks need no word: the device leaves CWR to the first segment, FIN and PSH to the last.
    let tcp = layers.payload - layers.transport;
    words.1 |= ((tcp as u64) << 8 | u64::from(offload.gso_size) << 16) << 32;
    let flags = SEGMENT | CHECKSUM | if layers.ipv4 { IP_CHECKSUM } else { 0 };
    Some(Request { context: words, flags, len, payload: len.checked_sub(layers.payload)? })
}

/// Makes the headers of a frame that is to be segmented such as the device wants them: without lengths, neither in IP nor
/// in the sum that the TCP header has of the pseudo-header.
fn prepare(head: &mut Head, layers: &Layers, len: usize) -> Option<()> {
    let bytes = head.first_mut(layers.payload)?;
    let ip = bytes.get_mut(layers.network..)?;
    if layers.ipv4 {
        ip.get_mut(2..4)?.fill(0);
        ip.get_mut(10..12)?.fill(0);
    } else {
        ip.get_mut(4..6)?.fill(0);
    }
    let field = bytes.get_mut(layers.transport + 16..layers.transport + 18)?;
    let sum = u16::from_be_bytes([*field.first()?, *field.get(1)?]);
    let covered = (len - layers.transport) as u32;
    let sum = checksum::update_partial(sum, &covered.to_be_bytes(), &[0; 4]);
    field.copy_from_slice(&sum.to_be_bytes());
    Some(())
}

/// The transmit queue.
#[derive(Debug)]
pub(super) struct Transmit {
    ring: Ring,
    /// Of each frame's first slot, the number of its slots, contexts included: the device may write over what says so.
    spans: Vec<u32>,
    /// Frames in the ring.
    frames: u64,
    /// The context that the device has, or will have when it comes to what is put into the ring next.
    context: Option<(u64, u64)>,
    max_frame: usize,
}

impl Transmit {
    pub fn new(
        function: &mut dyn PciFunction,
        size: u32,
        buffer: usize,
        max_frame: usize,
    ) -> Result<Transmit, PciError> {
        let ring = Ring::new(function, regs::TDBAL, size, buffer.max(BUFFER))?;
        Ok(Transmit { ring, spans: vec![0; size as usize], frames: 0, context: None, max_frame })
    }

    /// The longest frame to be segmented: one more slot is for what is said of it.
    pub fn max_super(&self) -> usize {
        MAX_SUPER.min((self.ring.size() as usize - 2) * self.ring.buffer())
    }

    /// Gives the empty ring to the device.
    pub fn start(&mut self, bar: &Bar) -> Result<(), NicError> {
        self.context = None;
        self.ring.start(bar)
    }

    /// Gives up what is in the ring: the number of frames.
    pub fn forget(&mut self) -> u64 {
        std::mem::take(&mut self.frames)
    }

    /// Puts a frame of `len` bytes into the ring.
    pub fn send(&mut self, frame: &[&[u8]], len: usize, offload: &Offload) -> Result<(), SendError> {
        let longest = match offload.gso {
            Gso::None => self.max_frame,
            _ => self.max_super(),
        };
        if len > longest {
            return Err(SendError::TooLong);
        }
        let tag = frame.first().and_then(|first| tag(first)).filter(|_| len >= MIN_FRAME + TAG);
        let tagged = tag.map_or(0, |_| TAG);
        let (mut len, mut flags, mut head, mut context) = (len, 0, None, None);
        let mut payload = len - tagged;
        if let Some((_, tci)) = tag {
            flags = INSERT_TAG;
            context = Some((u64::from(tci) << 16 | (MIN_FRAME as u64) << 9, CONTEXT));
        }
        if offload.needs_csum || offload.gso != Gso::None {
            let mut first = Head::new(frame);
            let layers = first.layers(len, offload).ok_or(SendError::Offload)?;
            if offload.gso != Gso::None {
                let segment = layers.payload + usize::from(offload.gso_size);
                prepare(&mut first, &layers, len)
                    .filter(|()| segment <= self.max_frame)
                    .ok_or(SendError::Offload)?;
                head = Some((first, layers.payload));
            }
            let request =
                request(&layers, len, offload, tag.map(|(_, tci)| tci)).ok_or(SendError::Offload)?;
            context = Some(request.context);
            (len, payload) = (request.len, request.payload);
            flags |= request.flags;
        }
        let context = context.filter(|context| self.context != Some(*context));
        let data = len.div_ceil(self.ring.buffer()) as u32;
        let span = data + u32::from(context.is_some());
        if self.ring.free() < span {
            return Err(SendError::Full);
        }
        if let Some(place) = self.spans.get_mut(self.ring.head() as usize) {
            *place = span;
        }
        let fill = || {
            if let Some((low, high)) = context {
                self.ring.push(low, high)?;
                self.context = context;
            }
            let first = self.ring.head();
            let mut at = 0;
            if let Some((mut head, prepared)) = head
                && let Some(bytes) = head.first_mut(prepared)
            {
                self.ring.write(first, 0, bytes)?;
                at = bytes.len();
            }
            let mut seen = 0;
            for piece in frame {
                // What was prepared, and what is left out, is not copied.
                let end = (seen + piece.len()).min(len);
                if let Some(bytes) = piece.get(at.saturating_sub(seen)..end.saturating_sub(seen)) {
                    self.ring.write(first, at, bytes)?;
                    at += bytes.len();
                }
                seen += piece.len();
            }
            // What the device sees begins behind the first bytes: the addresses move over the tag.
            if let Some((addresses, _)) = tag {
                self.ring.write(first, TAG, addresses)?;
            }
            let (mut from, mut left) = (tagged, len - tagged);
            for _ in 0..data {
                let step = left.min(self.ring.buffer() - from);
                left -= step;
                let last = if left == 0 { LAST } else { 0 };
                let address = self.ring.address(self.ring.head()) + std::mem::take(&mut from) as u64;
                self.ring.push(address, (payload as u64) << (32 + 14) | flags | DATA | last | step as u64)?;
            }
            Ok::<_, BadAccess>(())
        };
        fill().map_err(|_| SendError::Device)?;
        self.frames += 1;
        Ok(())
    }

    /// Lets the device send what it was given.
    pub fn ring(&mut self, bar: &Bar) -> Result<(), NicError> {
        Ok(self.ring.ring(bar)?)
    }

    /// Takes up what the device has sent: the number of frames.
    pub fn reap(&mut self) -> Result<u64, NicError> {
        let before = self.frames;
        while let Some(slot) = self.ring.tail() {
            let span = self.spans.get(slot as usize).copied().unwrap_or(1).max(1);
            // The last slot is done when all of the frame is.
            if self.ring.word(self.ring.after(slot, span - 1))? & DONE == 0 {
                break;
            }
            self.ring.take(self.ring.after(slot, span));
            self.frames = self.frames.saturating_sub(1);
        }
        Ok(before - self.frames)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layers(network: usize, header: usize) -> Layers {
        let transport = network + header;
        Layers { network, transport, payload: transport + 32, end: transport + 100, ipv4: true, tcp: true }
    }

    #[test]
    fn requests_are_what_the_device_knows() {
        let offload = Offload { needs_csum: true, csum_start: 34, csum_offset: 16, ..Offload::default() };
        let plain = request(&layers(14, 20), 140, &offload, None).unwrap();
        assert_eq!(plain.context, (14 << 9 | 20, CONTEXT | CONTEXT_IPV4 | CONTEXT_TCP));
        assert_eq!((plain.flags, plain.len, plain.payload), (CHECKSUM, 134, 134), "without the padding");
        let udp6 = Layers { ipv4: false, tcp: false, ..layers(18, 40) };
        assert_eq!(request(&udp6, 200, &offload, None).unwrap().context, (18 << 9 | 40, CONTEXT));
        let tagged = request(&udp6, 200, &offload, Some(0x2005)).unwrap();
        assert_eq!(tagged.context, (0x2005 << 16 | 14 << 9 | 40, CONTEXT));
        assert_eq!((tagged.len, tagged.payload), (158, 154), "the device puts its tag on");
        let gso = Offload { gso: Gso::Tcp4, gso_size: 1400, ..offload };
        let segmented = request(&layers(14, 20), 9066, &gso, None).unwrap();
        let words = (32 << 8 | 1400 << 16) << 32;
        assert_eq!(segmented.context.1, CONTEXT | CONTEXT_IPV4 | CONTEXT_TCP | words);
        assert_eq!((segmented.len, segmented.payload), (9066, 9000));
        assert_eq!(segmented.flags, SEGMENT | CHECKSUM | IP_CHECKSUM);
        assert_eq!(request(&layers(14, 512), 9066, &offload, None), None, "more than the device can say");
    }

    #[test]
    fn headers_of_super_frames_lack_their_lengths() {
        let len = 14 + 20 + 20 + 9000;
        let mut frame = vec![2; 12];
        frame.extend([0x08, 0x00, 0x45, 0, 0x23, 0x50, 0, 0, 0x40, 0, 64, 6, 1, 2, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend([0, 1, 0, 2, 0, 0, 0, 9, 0, 0, 0, 0, 0x50, 0x10, 1, 0]);
        let with_length = checksum::fold(checksum::pseudo_v4(0x0a00_0001, 0x0a00_0002, 6, 9020));
        frame.extend(with_length.to_be_bytes());
        frame.resize(len, 0);
        let gso = Offload {
            needs_csum: true,
            csum_start: 34,
            csum_offset: 16,
            gso: Gso::Tcp4,
            gso_size: 1400,
            ..Offload::default()
        };
        let mut head = Head::new(&[&frame]);
        let layers = head.layers(len, &gso).unwrap();
        prepare(&mut head, &layers, len).unwrap();
        let prepared = head.first_mut(54).unwrap();
        assert_eq!((&prepared[16..18], &prepared[24..26]), (&[0; 2][..], &[0; 2][..]));
        let without = checksum::fold(checksum::pseudo_v4(0x0a00_0001, 0x0a00_0002, 6, 0));
        assert_eq!(prepared[50..52], without.to_be_bytes());
        (prepared[16], prepared[17], prepared[24], prepared[25]) = (0x23, 0x50, 1, 2);
        prepared[50..52].copy_from_slice(&with_length.to_be_bytes());
        assert_eq!(prepared, &frame[..54], "nothing else is changed");
    }
}
