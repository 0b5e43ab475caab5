//! What a migrating guest's front-end is told of the pages that we write.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use qemu_tests::daemon::{DaemonConfig, PortConfig};
use qemu_tests::frontend::Features;
use qemu_tests::host::{WorkDir, wait_for};
use qemu_tests::net::{Net, SOON};

const PAGE: usize = 4096;

/// The numbers of pages that are marked in a log, which is cleared, as whoever copies them does.
fn take(log: &File) -> Result<Vec<u64>> {
    let mut bytes = vec![0; log.metadata()?.len() as usize];
    log.read_exact_at(&mut bytes, 0)?;
    log.write_all_at(&vec![0; bytes.len()], 0)?;
    let bits =
        bytes.iter().zip(0..).flat_map(|(&byte, i)| (0..8).map(move |bit| (byte >> bit & 1, 8 * i + bit)));
    Ok(bits.filter(|&(set, _)| set != 0).map(|(_, page)| page).collect())
}

#[test]
fn every_page_that_is_written_is_in_the_log() -> Result<()> {
    for packed in [false, true] {
        for missing in [Features::default(), Features::MRG_RXBUF, Features::EVENT_IDX] {
            check(packed, missing).with_context(|| format!("packed {packed}, without {missing:?}"))?;
        }
    }
    Ok(())
}

fn check(packed: bool, missing: Features) -> Result<()> {
    let dir = WorkDir::new()?;
    let ports = ["p1", "p2"].map(|name| PortConfig::server(name, &dir));
    let mut net = Net::start(dir, DaemonConfig::new(ports), |_, builder| {
        if packed { builder.packed().without(missing) } else { builder.without(missing) }
    })?;
    net.daemon.ctl(&["add-flow", "in_port(p1)", "p2"])?;
    net.greet()?;
    let region = net.guests[1].frontend.memory().regions()[0].clone();
    let first_page = region.spec().gpa / PAGE as u64;
    let memory = || -> Result<Vec<u8>> {
        let mut bytes = vec![0; region.spec().len];
        region.file().read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    };
    let log = net.guests[1].frontend.start_logging()?;
    // Twice, as if the first attempt had been given up.
    for attempt in 0..2_u16 {
        take(&log)?;
        let before = memory()?;
        let sent = net.daemon.balanced_stats()?.ports["p2"].tx_packets;
        // The driver sleeps: whatever changes in its memory is our work. It has few buffers if they are not mergeable.
        for number in 0..6 {
            let size = 60 + 200 * usize::from(number);
            let frame = net.packet(0, 1).udp(attempt, number).payload_len(size).build();
            net.guests[0].send(&frame)?;
        }
        wait_for("the packets", SOON, || {
            Ok((net.daemon.stats()?.ports["p2"].tx_packets == sent + 6).then_some(()))
        })?;
        net.daemon.balanced_stats()?;
        let after = memory()?;
        let changed: Vec<u64> = (first_page..)
            .zip(before.chunks(PAGE).zip(after.chunks(PAGE)))
            .filter(|(_, (before, after))| before != after)
            .map(|(page, _)| page)
            .collect();
        let marked = take(&log)?;
        ensure!(changed.len() >= 3, "{changed:?}");
        ensure!(
            changed.iter().all(|page| marked.contains(page)),
            "{changed:?} have changed, {marked:?} are marked"
        );
        ensure!(marked.len() <= changed.len() + 8, "{marked:?} are marked, {changed:?} have changed");
        // Of what it sends, it is told that it is used.
        while net.guests[1].receive(std::time::Duration::ZERO)?.is_some() {}
        take(&log)?;
        let used = {
            let [descriptors, _, used] = net.guests[1].frontend.queue(0).tx.raw().addresses();
            if packed { descriptors } else { used }
        };
        let frame = net.packet(1, 0).udp(1, 2).payload_len(9).build();
        net.guests[1].send(&frame)?;
        net.guests[0].expect(&frame)?;
        wait_for("the ring to be marked", SOON, || {
            Ok(take(&log)?.contains(&(used / PAGE as u64)).then_some(()))
        })?;
        net.guests[1].frontend.set_logging(false)?;
        take(&log)?;
        let frame = net.packet(0, 1).udp(3, 4).payload_len(1000).build();
        net.guests[0].send(&frame)?;
        net.guests[1].expect(&frame)?;
        ensure!(take(&log)?.is_empty(), "given up, and still logged");
        net.guests[1].frontend.set_logging(true)?;
    }
    net.daemon.balanced_stats()?;
    Ok(())
}
