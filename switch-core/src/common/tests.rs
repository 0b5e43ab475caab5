use super::*;
use crate::drop::DropReason;
use crate::key::Key;
use crate::offload::{self, RawHeader};
use crate::packet::PortId;
use crate::parse::{Extracted, extract, is_settled};
use proptest::prelude::*;

const PORT: PortId = PortId { slot: 3, generation: 1 };

/// A frame of a common shape, or nearly so: `seed` fills it, `twist` may spoil a byte of it.
#[derive(Clone, Debug)]
struct Made {
    tagged: bool,
    v6: bool,
    tcp: bool,
    options: usize,
    payload: usize,
    padding: usize,
    seed: Vec<u8>,
    twists: Vec<(usize, u8)>,
}

fn made() -> impl Strategy<Value = Made> {
    let shape = (
        any::<bool>(),
        any::<bool>(),
        any::<bool>(),
        0usize..11,
        0usize..40,
        prop_oneof![Just(0usize), 0usize..9],
    );
    let twists = prop::collection::vec(
        (0usize..90, prop_oneof![any::<u8>(), prop::sample::select(vec![0u8, 6, 8, 17, 0x45, 0x60, 0x81])]),
        0..3,
    );
    (shape, prop::collection::vec(any::<u8>(), 160), twists).prop_map(
        |((tagged, v6, tcp, options, payload, padding), seed, twists)| Made {
            tagged,
            v6,
            tcp,
            options,
            payload,
            padding,
            seed,
            twists,
        },
    )
}

impl Made {
    fn frame(&self) -> Vec<u8> {
        let mut frame = self.seed[..12].to_vec();
        if self.tagged {
            frame.extend([0x81, 0, self.seed[12], self.seed[13]]);
        }
        let transport = if self.tcp { 20 + 4 * self.options.min(10) } else { 8 };
        let len = transport + self.payload;
        let (proto, l3) = (if self.tcp { 6 } else { 17 }, frame.len() + 2);
        frame.extend(if self.v6 { [0x86, 0xdd] } else { [8, 0] });
        frame.extend(&self.seed[14..14 + if self.v6 { 40 } else { 20 }]);
        let ip = &mut frame[l3..];
        if self.v6 {
            ip[0] = 0x60 | ip[0] & 15;
            ip[4..6].copy_from_slice(&(len as u16).to_be_bytes());
            ip[6] = proto;
        } else {
            ip[0] = 0x45;
            ip[2..4].copy_from_slice(&(20 + len as u16).to_be_bytes());
            (ip[6], ip[7]) = (ip[6] & 0x40, 0);
            ip[9] = proto;
        }
        let l4 = frame.len();
        frame.extend(&self.seed[60..60 + len.min(100)]);
        if self.tcp {
            frame[l4 + 12] = (transport as u8 / 4) << 4 | frame[l4 + 12] & 15;
        }
        frame.extend(&self.seed[..self.padding]);
        for &(at, byte) in &self.twists {
            if let Some(place) = frame.get_mut(at) {
                *place = byte;
            }
        }
        frame
    }
}

/// A mask of whole fields and single bits.
fn masks() -> impl Strategy<Value = Mask> {
    let fields =
        prop::collection::vec((prop::sample::select(Field::ALL), any::<u128>(), any::<bool>()), 0..8);
    fields.prop_map(|fields| {
        let mut mask = Mask::EMPTY;
        for (field, bits, exact) in fields {
            mask.set(field, if exact { u128::MAX } else { bits });
        }
        mask
    })
}

fn parsed(frame: &[u8]) -> (Extracted, Packet, Key) {
    let (mut packet, mut key) = (Packet::from_frame(PORT, frame), Key::default());
    let extracted = extract(&mut packet, &mut key);
    (extracted, packet, key)
}

fn window(frame: &[u8], window: &Window) -> [u64; WINDOW_WORDS] {
    let packet = Packet::from_frame(PORT, frame);
    let (chunks, _) = packet.window::<false>().as_chunks::<8>();
    let words = window.words();
    std::array::from_fn(|i| u64::from_ne_bytes(chunks[i]) & words[i])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn what_is_recognized_is_what_the_parser_finds(made in made()) {
        let frame = made.frame();
        let mut packet = Packet::from_frame(PORT, &frame);
        let recognized = recognize::<false>(&mut packet);
        if made.twists.is_empty() && made.options <= 10 && (made.padding == 0 || !made.v6) && frame.len() < 160 {
            prop_assert!(recognized.is_some(), "{:02x?}", frame);
        }
        let Some(Recognized { shape, tcp_flags }) = recognized else { return Ok(()) };
        let (extracted, other, key) = parsed(&frame);
        prop_assert_eq!(extracted, Extracted::Done);
        prop_assert!(is_settled(&other, &key));
        prop_assert_eq!(packet.layout, other.layout);
        prop_assert_eq!(key.eth_type(), shape.eth_type());
        prop_assert_eq!(key.ip_proto(), shape.ip_proto());
        prop_assert_eq!(key.get(Field::TcpFlags) as u16, tcp_flags);
        prop_assert_eq!(key.get(Field::VlanTpid), if shape.0 & Shape::TAGGED != 0 { 0x8100 } else { 0 });
    }

    /// The property that L1 rests on: what is equal in the window is equal in the key, and the other way round.
    #[test]
    fn windows_tell_apart_what_keys_tell_apart(a in made(), b in made(), union in masks(), same: bool, flips in prop::collection::vec((0usize..90, any::<u8>()), 0..3)) {
        let first = a.frame();
        let second = if same {
            let mut frame = first.clone();
            for (at, bits) in flips {
                if let Some(byte) = frame.get_mut(at) { *byte ^= bits }
            }
            frame
        } else {
            b.frame()
        };
        let shape = |frame: &[u8]| Some(recognize::<false>(&mut Packet::from_frame(PORT, frame))?.shape);
        let (Some(one), Some(two)) = (shape(&first), shape(&second)) else { return Ok(()) };
        let (_, _, key) = parsed(&first);
        let (_, _, other) = parsed(&second);
        let always = [Field::Shape, Field::EthType, Field::VlanTpid, Field::VlanTci, Field::CvlanTpid, Field::CvlanTci, Field::IpProto, Field::IpFrag];
        let mut mask = union;
        always.into_iter().for_each(|field| mask.set_exact(field));
        let keys_equal = key.matches(&other, &mask);
        let windows_equal = window(&first, &Window::of(one, &union)) == window(&second, &Window::of(two, &union));
        prop_assert_eq!(keys_equal, windows_equal, "{:02x?} {:02x?}", first, second);
    }

    #[test]
    fn offloads_are_checked_alike(made in made(), flags in 0u8..4, gso_type in prop::sample::select(vec![0u8, 1, 4, 5, 0x81, 7]), near: bool, start: u16, offset in prop::sample::select(vec![6u16, 16, 0, 8]), gso_size in 0u16..200) {
        let frame = made.frame();
        let mut packet = Packet::from_frame(PORT, &frame);
        let Some(Recognized { shape, .. }) = recognize::<false>(&mut packet) else { return Ok(()) };
        let csum_start = if near { packet.layout.l4 } else { start };
        let raw = RawHeader { flags, gso_type, hdr_len: 0, gso_size, csum_start, csum_offset: offset };
        let (_, other, key) = parsed(&frame);
        let expected: Result<_, DropReason> = offload::check(&raw, &other, &key);
        prop_assert_eq!(offload::check_common(&raw, &packet, shape), expected);
    }
}

#[test]
fn nothing_behind_the_head_is_read() {
    // A packet whose buffer held a longer one before.
    let mut packet = Packet::from_frame(PORT, &[0xff; 200]);
    let made = Made {
        tagged: false,
        v6: false,
        tcp: false,
        options: 0,
        payload: 0,
        padding: 0,
        seed: vec![1; 160],
        twists: vec![],
    };
    let frame = made.frame();
    packet.reset(PORT, frame.len() as u32, 256).copy_from_slice(&frame);
    let shape = recognize::<false>(&mut packet).unwrap().shape;
    let mut all = Mask::EMPTY;
    Field::ALL.iter().for_each(|&field| all.set_exact(field));
    let bytes = Window::of(shape, &all).0;
    assert!(bytes[frame.len()..].iter().all(|&byte| byte == 0), "{bytes:02x?}");
    for cut in 0..frame.len() {
        assert_eq!(recognize::<false>(&mut Packet::from_frame(PORT, &frame[..cut])), None, "{cut}");
    }
}
