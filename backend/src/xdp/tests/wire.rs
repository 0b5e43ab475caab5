//! Wires on a veth, with the test as their worker: what is lost is counted, and nothing is taken whose tags are not seen.

use super::net::*;
use crate::port_config::{XdpChoice, XdpDevice};
use crate::quiesce::{Quiescence, WorkerEpoch};
use crate::virtio::Burst;
use crate::wire::{Wire as Port, WireLosses};
use crate::xdp::{Class, Selection, XdpRx};
use std::sync::Arc;

/// A wire on `near`, and its worker.
struct Bed {
    wire: Wire,
    port: Port,
    epoch: WorkerEpoch,
    rx: Option<XdpRx>,
}

impl Bed {
    fn new(mode: XdpChoice, selection: Option<Arc<Selection>>) -> Bed {
        let wire = Wire::new(1, 1500);
        let quiescence = Arc::new(Quiescence::new());
        let epoch = quiescence.register("worker").unwrap();
        let device = XdpDevice { name: "near".into(), mode };
        // Its thread stays where it was started.
        let port = wire.near.run(|| {
            let mut port = Port::new("near", &device, None, selection, quiescence, Box::new(|_| ())).unwrap();
            port.start().unwrap();
            port
        });
        let mut bed = Bed { wire, port, epoch, rx: None };
        bed.until("the ring", |bed| bed.rx.is_some());
        bed
    }

    /// What a worker does at the beginning of a round.
    fn round(&mut self) {
        self.epoch.quiescent();
        if self.epoch.changed() {
            self.port.shared().take_rx(0, &mut self.rx);
        }
    }

    fn until(&mut self, what: &str, mut done: impl FnMut(&mut Bed) -> bool) {
        wait_for(what, || {
            self.round();
            done(self)
        });
    }

    fn losses(&self) -> WireLosses {
        self.port.shared().losses()
    }

    /// Has `far` send packets, of which the ring may have no place for some.
    fn bring(&mut self, count: u64) {
        let far = self.wire.far.open(&small("far", None));
        let tx = far.tx(0).unwrap();
        let packet = ethernet(NEAR_MAC, 0x88b5, &[7; 50]);
        let arrived = |bed: &Bed| u64::from(bed.rx.as_ref().map_or(0, XdpRx::pending)) + bed.losses().overrun;
        let (before, mut sent) = (arrived(self), 0);
        while sent < count {
            // No more at a time than a veth holds.
            let some = (count - sent).min(64);
            send_all(&tx, &vec![packet.clone(); some as usize]);
            sent += some;
            self.until("packets", |bed| arrived(bed) == before + sent);
        }
    }

    /// Closes and opens the device, by another MTU.
    fn reopen(&mut self, mtu: u32) {
        self.wire.near.ip(&format!("link set near mtu {mtu}"));
        let id = self.rx.as_ref().map(XdpRx::id);
        self.until("another ring", |bed| bed.rx.is_some() && bed.rx.as_ref().map(XdpRx::id) != id);
    }
}

/// Frames of a wire's queue that receive.
const FRAMES: u64 = 4096;

#[test]
fn what_nobody_takes_is_counted() {
    for mode in [XdpChoice::Copy, XdpChoice::Generic] {
        let mut bed = Bed::new(mode, None);
        bed.bring(FRAMES + 10);
        assert_eq!(bed.losses(), WireLosses { overrun: 10, ..WireLosses::default() });
        let mut burst = Burst::new();
        let rx = bed.rx.as_mut().unwrap();
        assert_eq!(rx.receive(&mut burst, 6), 6);
        rx.complete(&mut burst);
        // Put into the ring, and never shown to the driver.
        let packet = ethernet(FAR_MAC, 0x88b5, &[7; 50]);
        bed.port.shared().tx(0).unwrap().send(&[frame(&packet), frame(&packet)]);
        bed.reopen(1400);
        let lost = WireLosses { overrun: 10, closed: FRAMES - 6, unsent: 2 };
        bed.until("the losses", |bed| bed.losses() == lost);
        assert!(bed.port.status().warnings.iter().any(|line| line.starts_with("2 packets that are counted")));
        // The next ring's come on top; one that was taken empty loses nothing.
        bed.bring(5);
        let rx = bed.rx.as_mut().unwrap();
        assert_eq!(rx.receive(&mut burst, 64), 5);
        rx.complete(&mut burst);
        bed.reopen(1500);
        bed.bring(3);
        bed.wire.near.ip("link del near");
        bed.until("the losses", |bed| bed.losses() == WireLosses { closed: FRAMES - 6 + 3, ..lost });
        bed.until("the end", |bed| bed.rx.is_none() && bed.port.status().absent);
    }
}

#[test]
fn nothing_is_taken_where_tags_are_not_seen() {
    let selection = Arc::new(Selection::default());
    selection.set(Class::Mac { mac: NEAR_MAC, vlan: None }, true);
    let mut bed = Bed::new(XdpChoice::Auto, Some(selection.clone()));
    let classes = |bed: &Bed| bed.port.status().features.last().cloned().unwrap_or_default();
    let warned = |bed: &Bed| {
        let lines = bed.port.status().warnings;
        lines.iter().filter(|line| line.contains("what it receives stays the kernel's")).count()
    };
    assert_eq!((classes(&bed), warned(&bed)), ("classes=0".into(), 1));
    bed.wire.kernels_talk();
    for _ in 0..2 {
        bed.wire.near.features("near rxvlan off rx-vlan-stag-hw-parse off");
        bed.until("the class to be taken", |bed| (classes(bed), warned(bed)) == ("classes=1".into(), 0));
        bed.bring(3);
        bed.wire.near.features("near rx-vlan-stag-hw-parse on");
        bed.until("the class to be given back", |bed| (classes(bed), warned(bed)) == ("classes=0".into(), 1));
        // What is wanted meanwhile waits as well.
        selection.set(Class::Ethertype { ethertype: 0x0800, vlan: None }, true);
        bed.wire.kernels_talk();
        selection.set(Class::Ethertype { ethertype: 0x0800, vlan: None }, false);
        assert_eq!(u64::from(bed.rx.as_ref().unwrap().pending()), 3);
        let (rx, mut burst) = (bed.rx.as_mut().unwrap(), Burst::new());
        rx.receive(&mut burst, 64);
        rx.complete(&mut burst);
    }
    assert_eq!(bed.losses(), WireLosses::default());
}

#[test]
fn a_queue_that_changes_hands_loses_nothing_and_is_counted_wherever_it_is() {
    let mut bed = Bed::new(XdpChoice::Copy, None);
    let shared = bed.port.shared().clone();
    let mut burst = Burst::new();
    let mut take = |bed: &mut Bed, max: usize| {
        let rx = bed.rx.as_mut().unwrap();
        let taken = rx.receive(&mut burst, max);
        rx.complete(&mut burst);
        taken
    };
    bed.bring(5);
    assert_eq!(take(&mut bed, 2), 2);
    let id = bed.rx.as_ref().map(XdpRx::id);
    shared.give_back_rx(0, bed.rx.take().unwrap());
    shared.take_rx(0, &mut bed.rx);
    assert_eq!(bed.rx.as_ref().map(XdpRx::id), id);
    assert_eq!(take(&mut bed, 64), 3);
    // The device closes while nobody has the queue.
    bed.bring(4);
    shared.give_back_rx(0, bed.rx.take().unwrap());
    bed.wire.near.ip("link set near mtu 1400");
    bed.until("another ring", |bed| bed.rx.is_some());
    assert_eq!(bed.losses(), WireLosses { closed: 4, ..WireLosses::default() });
    // It closes, and who has the queue gives it back before it hears of that.
    bed.bring(3);
    bed.wire.near.ip("link del near");
    wait_for("the queue to be taken away", || shared.queues() == 0);
    shared.give_back_rx(0, bed.rx.take().unwrap());
    bed.until("the losses", |bed| bed.losses() == WireLosses { closed: 7, ..WireLosses::default() });
}
