//! The parser: no frame makes it panic, it says the same twice, and so does the short way for packets of common shapes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use switch_core::common::recognize;
use switch_core::key::{Field, Key};
use switch_core::packet::{Packet, PortId};
use switch_core::parse::{Extracted, extract};

fuzz_target!(|frame: &[u8]| {
    let port = PortId { slot: 0, generation: 1 };
    let mut packet = Packet::from_frame(port, frame);
    let mut key = Key::default();
    let extracted = extract(&mut packet, &mut key);
    let mut again = Key::default();
    assert_eq!((extract(&mut packet.clone(), &mut again), &again), (extracted, &key));
    let layout = packet.layout;
    // The greatest number says that there is no such header.
    let within = |at: u16| at == u16::MAX || usize::from(at) <= packet.head().len();
    if extracted == Extracted::Done {
        assert!(within(layout.l3) && within(layout.l4), "{layout:?} of {} bytes", packet.head().len());
    }
    let mut common = Packet::from_frame(port, frame);
    if let Some(recognized) = recognize::<false>(&mut common) {
        assert_eq!(extracted, Extracted::Done);
        assert_eq!(common.layout, layout);
        assert_eq!(u128::from(recognized.shape.eth_type()), key.get(Field::EthType));
        assert_eq!(u128::from(recognized.shape.ip_proto()), key.get(Field::IpProto));
    }
});
