//! Opening, closing, and what is in the way of it.

use super::net::*;
use crate::xdp::device::Device;
use crate::xdp::program::Program;
use crate::xdp::{Attempt, Class, XdpConfig, XdpError, XdpMode, XdpPort};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};

fn refused(host: &Host, config: &XdpConfig) -> String {
    let error = host.run(|| XdpPort::open(config).err().map(|e| e.to_string())).expect("it was opened");
    assert!(!error.contains('\n'), "{error}");
    error
}

#[test]
fn the_best_mode_is_chosen_and_told() {
    let wire = Wire::new(2, 1500);
    let port = wire.near.open(&XdpConfig::new("near"));
    // The veth driver has native mode, several buffers, and no zero copy.
    assert_eq!((port.mode(), port.queues(), port.multi_buffer()), (XdpMode::Copy, 2, true));
    assert_eq!((port.name(), port.mtu(), port.mac()), ("near", 1500, NEAR_MAC));
    assert_eq!(port.describe(), "near by AF_XDP: copy mode, 2 queues, 2048-byte frames, multi-buffer");
    let warned = |word: &str| port.warnings().iter().any(|line| line.contains(word));
    assert!(
        warned("no zero copy") && warned("VLAN tags are not seen") && warned("checksums"),
        "{:?}",
        port.warnings()
    );
    assert!(!warned("queues are open") && !warned("MTU") && !warned("is down"), "{:?}", port.warnings());
    drop(port);
    let port = wire.near.open(&XdpConfig { queues: Some(1), ..small("near", Some(XdpMode::Generic)) });
    assert_eq!((port.mode(), port.queues()), (XdpMode::Generic, 1));
    assert!(port.warnings().iter().any(|line| line.contains("1 of 2 queues are open")));
}

#[test]
fn what_is_in_the_way_is_said_in_one_line() {
    let wire = Wire::new(1, 1500);
    let (near, usual) = (&wire.near, XdpConfig::new("near"));
    assert_eq!(refused(near, &XdpConfig::new("nothing")), "no network device 'nothing'");
    assert_eq!(
        refused(near, &XdpConfig::new("a name that is too long")),
        "no network device 'a name that is too long'"
    );
    assert_eq!(refused(near, &XdpConfig::new("lo")), "lo: it is not an Ethernet device");
    let three = XdpConfig { queues: Some(3), ..usual.clone() };
    assert_eq!(refused(near, &three), "near: 3 queues wanted, but it uses 1");
    assert!(refused(near, &XdpConfig { rx_frames: 100, ..usual.clone() }).contains("power of two"));
    let zero_copy = XdpConfig { mode: Some(XdpMode::ZeroCopy), ..usual.clone() };
    assert!(refused(near, &zero_copy).starts_with("near: cannot be opened: zero-copy mode"));
    near.ip("link add name br0 type bridge");
    assert!(refused(near, &XdpConfig::new("br0")).starts_with("br0: it is a bridge"));
    near.ip("link set near master br0");
    assert!(refused(near, &usual).starts_with("near: it is part of a bridge"));
    near.ip("link set near nomaster");
    let unprivileged = near.run(|| {
        let mut sets = capabilities(None).unwrap();
        sets.effective = CapabilitySet::empty();
        set_capabilities(None, sets).unwrap();
        XdpPort::open(&usual).err()
    });
    assert!(matches!(unprivileged, Some(XdpError::Permission)), "{unprivileged:?}");
    // Nothing of all this has left anything behind.
    drop(near.open(&usual));
}

#[test]
fn the_program_of_somebody_else_is_left_alone() {
    let wire = Wire::new(1, 1500);
    for native in [true, false] {
        let (mut theirs, _classes) = Program::load().map_err(|e| e.to_string()).unwrap();
        let index = wire.near.run(|| Device::ask("near").unwrap().index);
        // What the last round has let go of may still be there for a moment.
        wait_for("the device", || wire.near.run(|| theirs.attach(index, native).is_ok()));
        let id = wire.near.run(|| Device::ask("near").unwrap().program);
        let error = refused(&wire.near, &XdpConfig::new("near"));
        assert!(error.starts_with("near: there is an XDP program on it already"), "{error}");
        // Not even if it comes between the look and the attempt.
        let (mut ours, _classes) = Program::load().map_err(|e| e.to_string()).unwrap();
        for mode in [true, false] {
            assert!(wire.near.run(|| ours.attach(index, mode).is_err()));
        }
        let after = wire.near.run(|| Device::ask("near").unwrap().program);
        assert!(id.is_some() && id == after, "{id:?} {after:?}");
    }
}

#[test]
fn a_port_is_closed_and_opened_again() {
    let wire = Wire::new(1, 1500);
    let mut far = wire.far.open(&small("far", None));
    let (_, tx) = sides(&mut far);
    let ours = ethernet(NEAR_MAC, 0x88b5, b"local experiment");
    for _ in 0..5 {
        let mut near = wire.near.open(&small("near", None));
        assert!(near.take_rx(1).is_none() && near.tx(1).is_none());
        let (mut rx, near_tx) = sides(&mut near);
        assert!(near.take_rx(0).is_none(), "it has one owner");
        assert_eq!(near.classes().list().unwrap(), []);
        near.classes().insert(Class::Ethertype { ethertype: 0x88b5, vlan: None }).unwrap();
        send_all(&tx, std::slice::from_ref(&ours));
        assert_eq!(expect(&mut rx, 1), std::slice::from_ref(&ours));
        assert!(refused(&wire.near, &small("near", None)).contains("XDP program"));
        // Closed before its sides are: nothing comes or goes any more.
        drop(near);
        send_all(&tx, std::slice::from_ref(&ours));
        let result = near_tx.send(&[frame(&ours)]);
        assert_eq!((result.sent, result.blocked), (0, Some(crate::virtio::Blocked::Stopped)));
        wire.kernels_talk();
        assert_eq!(rx.pending(), 0);
    }
}

#[test]
fn a_queue_that_is_taken_is_waited_for_and_then_named() {
    let wire = Wire::new(1, 1500);
    let mut first = wire.near.open(&small("near", None));
    let sides = sides(&mut first);
    drop(first);
    let error = refused(&wire.near, &small("near", None));
    assert_eq!(error, "near: another AF_XDP socket has queue 0");
    drop(sides);
    drop(wire.near.open(&small("near", None)));
}

#[test]
fn a_device_that_goes_away_stops_its_port() {
    let wire = Wire::new(1, 1500);
    let mut near = wire.near.open(&small("near", None));
    let (mut rx, tx) = sides(&mut near);
    wire.near.ip("link del near");
    let packet = ethernet(FAR_MAC, 0x88b5, &[0; 50]);
    tx.send(&[frame(&packet)]);
    wait_for("the end", || {
        tx.send(&[frame(&packet)]);
        tx.notify();
        tx.is_stopped()
    });
    assert!(rx.arm());
}

#[test]
fn jumbo_frames_are_worth_more_than_zero_copy() {
    let modes = |wanted, jumbo| {
        let all = crate::xdp::attempts(wanted, jumbo).into_iter();
        all.map(|Attempt { mode, multi_buffer }| (mode, multi_buffer)).collect::<Vec<_>>()
    };
    use XdpMode::*;
    let usual = [(ZeroCopy, false), (Copy, true), (Copy, false), (Generic, true), (Generic, false)];
    assert_eq!(modes(None, false), usual);
    let large = [(ZeroCopy, true), (Copy, true), (Generic, true)];
    assert_eq!(modes(None, true), [large, large.map(|(mode, _)| (mode, false))].concat());
    assert_eq!(modes(Some(Copy), true), [(Copy, true), (Copy, false)]);
}

/// In a child process of the test below, as the environment says: opens a port, and waits to be killed.
const CHILD: &str = "POINTWORK_TEST_OPENS_XDP";

#[test]
fn a_process_that_is_killed_leaves_nothing_behind() {
    if std::env::var_os(CHILD).is_some() {
        let mut port = XdpPort::open(&small("near", None)).unwrap();
        port.classes().set_everything(true).unwrap();
        println!("it is open");
        // Ends with the parent, if that does not end it.
        let _ = std::io::stdin().read(&mut [0]);
        return;
    }
    let wire = Wire::new(1, 1500);
    let name = "xdp::tests::open::a_process_that_is_killed_leaves_nothing_behind";
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--nocapture"]).env(CHILD, "1");
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = wire.near.run(|| command.spawn().unwrap());
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().ends_with("it is open")));
    let program = || wire.near.run(|| Device::ask("near").unwrap().program);
    assert!(program().is_some());
    child.kill().unwrap();
    child.wait().unwrap();
    wait_for("the program to go", || program().is_none());
    wire.kernels_talk();
    drop(wire.near.open(&small("near", None)));
}
