//! Packed rings: what becomes of their positions, and drivers of both layouts beside each other.

use anyhow::{Context, Result, ensure};
use qemu_tests::daemon::{DaemonConfig, PortConfig};
use qemu_tests::frontend::Features;
use qemu_tests::host::WorkDir;
use qemu_tests::net::{Net, QUIET, SOON};

fn net() -> Result<Net> {
    net_without(Features::default())
}

/// The first guest has packed rings, the second split ones.
fn net_without(missing: Features) -> Result<Net> {
    let dir = WorkDir::new()?;
    let ports = ["p1", "p2"].map(|name| PortConfig::server(name, &dir));
    let mut net = Net::start(dir, DaemonConfig::new(ports), |index, builder| match index {
        0 => builder.packed().first_index(250).without(missing),
        _ => builder,
    })?;
    net.greet()?;
    let packed = [0, 1].map(|i| net.guests[i].frontend.features().contains(Features::RING_PACKED));
    ensure!(packed == [true, false]);
    Ok(net)
}

/// So many packets both ways, each of them once and in order.
fn talk(net: &mut Net, packets: u16, when: &str) -> Result<()> {
    for number in 0..packets {
        for (from, to) in [(0, 1), (1, 0)] {
            let packet = net.packet(from, to).udp(number, 7).payload_len(usize::from(number) % 300).build();
            net.guests[from].send(&packet)?;
            net.guests[to].expect(&packet).with_context(|| format!("{when}: packet {number}"))?;
        }
    }
    net.daemon.balanced_stats().context(when.to_owned())?;
    Ok(())
}

#[test]
fn a_ring_that_is_stopped_goes_on_where_it_was() -> Result<()> {
    let mut net = net()?;
    talk(&mut net, 700, "at first")?;
    for round in 0..5 {
        // What comes meanwhile waits in the ring.
        net.guests[0].frontend.stop_ring(1)?;
        let waiting = net.packet(0, 1).udp(9, 9).payload_len(round).build();
        net.guests[0].send(&waiting)?;
        net.guests[1].expect_nothing()?;
        net.guests[0].frontend.start_ring(1)?;
        net.guests[1].expect(&waiting)?;
        net.guests[0].frontend.stop()?;
        net.guests[0].frontend.resume()?;
        talk(&mut net, 50, "after all rings were stopped and started")?;
        net.guests[0].frontend.disconnect()?;
        net.guests[0].frontend.resume()?;
        talk(&mut net, 50, "after another connection")?;
    }
    net.guests[0].frontend.start()?;
    net.guests[0].post_buffers()?;
    talk(&mut net, 300, "after a reboot")
}

/// The daemon is killed while the ring is full of packets, and another one is started, which goes on where it ended: packets that
/// it had taken, but not given back, are sent again, and nothing else is amiss.
#[test]
fn a_daemon_that_is_killed_is_followed_by_one_that_goes_on() -> Result<()> {
    for variant in [Features::default(), Features::EVENT_IDX, Features::INDIRECT_DESC] {
        let mut net = net_without(variant)?;
        // Known to the next daemon before it has heard of anybody.
        net.daemon.ctl(&["add-flow", "in_port(p1)", "p2"])?;
        talk(&mut net, 300, "at first")?;
        // No more at a time than there are receive buffers for, twice.
        for round in 0..8_u16 {
            let when = format!("without {variant:?}, round {round}");
            let frames: Vec<_> = (0..60)
                .map(|number| net.packet(0, 1).udp(number, 7).payload_len(usize::from(number)).build())
                .collect();
            for frame in &frames {
                net.guests[0].send(frame)?;
            }
            net.daemon.kill()?;
            for guest in &net.guests {
                ensure!(guest.frontend.wait_disconnected(SOON), "a connection outlives the daemon");
            }
            net.reconnect()?; // the receiver first
            // Those that had gone, those that went twice, and the rest: in order, but for where it begins again.
            let (mut next, mut again) = (0, 0);
            while let Some((_, _, frame)) = net.guests[1].receive(QUIET)? {
                let number = frames.iter().position(|sent| *sent == frame).context("what nobody sent")?;
                ensure!(number <= next || next == 0, "{when}: {number} after {next}: packets are lost");
                again += usize::from(number < next);
                next = next.max(number + 1);
            }
            ensure!(next == 60 && again < 60, "{when}: up to {next}, {again} twice");
            talk(&mut net, 60, &when)?;
        }
    }
    Ok(())
}

#[test]
fn a_front_end_that_comes_back_names_any_position_it_likes() -> Result<()> {
    let mut net = net()?;
    talk(&mut net, 20, "at first")?;
    // As QEMU after its backend has died: it names the position that it has started with.
    net.guests[0].frontend.abandon();
    net.guests[0].frontend.resume()?;
    talk(&mut net, 300, "after a connection that broke off")?;
    // Its memory, its rings, all anew in the same place.
    net.guests[0].frontend.abandon();
    net.guests[0].frontend.start()?;
    net.guests[0].post_buffers()?;
    while net.guests[0].receive(QUIET)?.is_some() {}
    talk(&mut net, 20, "after a reset")
}

#[test]
fn a_position_that_is_lost_is_refused_until_the_driver_resets() -> Result<()> {
    let mut net = net()?;
    talk(&mut net, 20, "at first")?;
    net.daemon.kill()?;
    for guest in &net.guests {
        ensure!(guest.frontend.wait_disconnected(SOON), "a connection outlives the daemon");
    }
    let records = net.daemon.control().with_extension("rings");
    std::fs::remove_dir_all(&records).with_context(|| records.display().to_string())?;
    net.reconnect()?;
    // Both rings are refused: the link stays down.
    net.daemon.wait_link(&["p1"], false, SOON)?;
    let packet = net.packet(0, 1).udp(1, 2).payload_len(10).build();
    net.guests[0].send(&packet)?;
    net.guests[1].expect_nothing()?;
    net.guests[0].frontend.start()?;
    net.guests[0].post_buffers()?;
    while net.guests[0].receive(QUIET)?.is_some() {}
    talk(&mut net, 20, "after a reset")
}
