//! Rings alone: 32 frames of 64 bytes at a time.

use crate::meter::Meter;
use crate::rig::{BURST, Driver, Kind, Load};
use backend::virtio::{Burst, Frame, NetHeader};

const LEN: u64 = 64;

/// All rows.
pub fn all(meter: &Meter) {
    both(meter, Kind::Split, "");
    both(meter, Kind::Packed, "-packed");
}

/// The rows of rings of one layout.
fn both(meter: &Meter, kind: Kind, suffix: &str) {
    meter.row(&format!("ring/receive-and-complete{suffix}"), 1, || {
        let (mut driver, mut burst) = (Driver::sending(kind, LEN), Burst::new());
        let (mut ring, mut load) = (driver.transmit(), Load::new(LEN, 1, 1));
        move |watch| {
            (0..BURST).for_each(|i| driver.write(i, load.next()));
            driver.offer(BURST);
            let taken = watch.measure(|| {
                let taken = ring.receive(&mut burst, BURST.into());
                ring.complete(&mut burst);
                taken
            });
            assert_eq!((taken, driver.out()), (Ok(BURST.into()), 0));
            BURST.into()
        }
    });
    meter.row(&format!("ring/send{suffix}"), 1, || {
        let mut driver = Driver::receiving(kind, LEN);
        let (ring, mut load) = (driver.receive(), Load::new(LEN, 1, 1));
        move |watch| {
            let header = NetHeader::default();
            let head = load.next();
            let frame = Frame { header, head, body: &[], tail: &[], tail_offset: 0, len: LEN as u32 };
            let frames = [frame; BURST as usize];
            watch.measure(|| {
                ring.send(&frames);
                ring.notify();
            });
            assert_eq!(driver.refill(), BURST);
            BURST.into()
        }
    });
}
