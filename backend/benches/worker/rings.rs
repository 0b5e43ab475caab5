//! Rings alone: 32 frames of 64 bytes at a time.

use crate::meter::Meter;
use crate::rig::{BURST, Driver, Load};
use backend::virtio::{Burst, Frame, NetHeader};

const LEN: u64 = 64;

/// All rows.
pub fn all(meter: &Meter) {
    meter.row("ring/receive-and-complete", 1, || {
        let (mut driver, mut burst) = (Driver::sending(LEN), Burst::new());
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
    meter.row("ring/send", 1, || {
        let mut driver = Driver::receiving(LEN);
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
