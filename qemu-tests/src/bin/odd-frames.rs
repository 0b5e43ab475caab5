//! Two guests that send each other frames that nobody knows what to make of, both ways, and look at every byte that arrives.
//!
//! It tells what it sent: for the host, the frames whose headers are not read and that the host must decide about each time;
//! in all, those too whose Ethernet type or protocol is unknown but is as good as any for a flow.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;

use qemu_tests::frontend::packet::{BROADCAST, IPV6, Packet};
use qemu_tests::frontend::{Frontend, RegionSpec};
use qemu_tests::host::wait_for;
use qemu_tests::net::Guest;

/// Longer than anything here takes on a busy machine.
const DEADLINE: Duration = Duration::from_secs(20);
/// How often each frame is sent each way.
const ROUNDS: usize = 5;

/// Exchanges odd frames between two ports, and prints "SENT FOR-THE-HOST".
#[derive(Parser)]
struct Options {
    /// The socket of one port.
    one: PathBuf,
    /// That of the other.
    other: PathBuf,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok((sent, for_host)) => {
            println!("{sent} {for_host}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<(usize, usize)> {
    let mut guests = [guest(&options.one, 3)?, guest(&options.other, 4)?];
    let mut sent = 0;
    for from in [0, 1] {
        let (mac, ip) = (guests[from].mac, guests[from].ip);
        let hello = Packet::eth(mac, BROADCAST).arp_request(ip, ip).build();
        wait_for("the guests to hear each other", DEADLINE, || {
            guests[from].send(&hello)?;
            sent += 1;
            hear(&mut guests, 1 - from, Duration::from_millis(500))
        })?;
    }
    // What was flooded late.
    for to in [0, 1] {
        while hear(&mut guests, to, Duration::from_millis(500))?.is_some() {}
    }
    let mut for_host = 0;
    for from in [0, 1] {
        for (what, is_for_host, frame) in frames(&guests[from], &guests[1 - from]) {
            for round in 0..ROUNDS {
                guests[from].send(&frame)?;
                sent += 1;
                for_host += usize::from(is_for_host);
                let heard = hear(&mut guests, 1 - from, DEADLINE)?;
                let heard = heard.with_context(|| format!("{what}, {round}: lost"))?;
                ensure!(heard == frame, "{what}, {round}: {heard:02x?}, not {frame:02x?}");
            }
            let again = hear(&mut guests, 1 - from, Duration::from_millis(100))?;
            ensure!(again.is_none(), "{what}: again, as {again:02x?}");
        }
    }
    Ok((sent, for_host))
}

fn guest(socket: &std::path::Path, number: u8) -> Result<Guest> {
    let builder = Frontend::builder(socket).memory(&[RegionSpec::mib(0, 8)]).timeout(DEADLINE);
    let mut frontend = builder.build()?;
    frontend.start()?;
    let mut ip6 = [0; 16];
    (ip6[0], ip6[15]) = (0xfd, number);
    let mac = [2, 0, 0, 0, 0, number];
    let mut guest = Guest { frontend, mac, ip: [10, 1, 0, number], ip6 };
    guest.post_buffers()?;
    Ok(guest)
}

/// The next frame that `to` gets from the other of the two.
fn hear(guests: &mut [Guest; 2], to: usize, timeout: Duration) -> Result<Option<Vec<u8>>> {
    let peer = guests[1 - to].mac;
    let end = Instant::now() + timeout;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        match guests[to].receive(left)? {
            Some((_, _, frame)) if frame.get(6..12) == Some(&peer) => return Ok(Some(frame)),
            Some(_) => {}
            None => return Ok(None),
        }
    }
}

/// What it is, whether the host must decide each time, and the frame.
fn frames(from: &Guest, to: &Guest) -> Vec<(&'static str, bool, Vec<u8>)> {
    let eth = || Packet::eth(from.mac, to.mac);
    let ipv6 = |next: u8, rest: &[u8]| {
        let [high, low] = (rest.len() as u16).to_be_bytes();
        let header = [&[0x60, 0, 0, 0, high, low, next, 64][..], &from.ip6, &to.ip6, rest].concat();
        eth().ethertype(IPV6).payload(&header).build()
    };
    let ipv4 = || eth().ipv4(from.ip, to.ip).udp(1, 2).payload_len(60).build();

    let mut llc = eth().ethertype(50).payload_len(50).build();
    llc[14..17].copy_from_slice(&[0x42, 0x42, 3]);
    // Information, where SNAP has unnumbered information.
    let mut snap = eth().ethertype(50).payload_len(50).build();
    snap[14..22].copy_from_slice(&[0xaa, 0xaa, 0, 0, 0, 0, 8, 0]);
    let mut protocol = ipv4();
    // For experiments (RFC 3692).
    protocol[23] = 253;
    sum_header(&mut protocol);
    let mut long = ipv4();
    // Longer than the frame.
    long[16..18].copy_from_slice(&400_u16.to_be_bytes());
    sum_header(&mut long);
    // Destination options of 1200 bytes, filled with PadN (RFC 8200, §4.2).
    let mut options = vec![17, 149];
    for len in [198, 198, 198, 198, 198, 196] {
        options.extend([1, len]);
        options.resize(options.len() + usize::from(len), 0);
    }
    options.extend([0, 1, 0, 2, 0, 8, 0, 0]);
    // More extension headers than are followed: destination options of eight bytes each.
    let mut chain = Vec::new();
    for left in (0..14).rev() {
        let next = if left == 0 { 17 } else { 60 };
        chain.extend([next, 0, 1, 4, 0, 0, 0, 0]);
    }
    chain.extend([0, 1, 0, 2, 0, 8, 0, 0]);
    vec![
        ("an unknown Ethernet type", false, eth().ethertype(0x9999).payload_len(100).build()),
        ("802.2", false, llc),
        ("an unknown protocol on IPv4", false, protocol),
        ("an unknown protocol on IPv6", false, ipv6(253, &[0xa5; 40])),
        ("odd SNAP", true, snap),
        ("an IPv4 length beyond the frame", true, long),
        ("long headers", true, ipv6(60, &options)),
        ("many headers", true, ipv6(60, &chain)),
    ]
}

/// Completes the checksum of an IPv4 header without options.
fn sum_header(frame: &mut [u8]) {
    frame[24..26].fill(0);
    let words = frame[14..34].chunks(2);
    let sum: u32 = words.map(|word| u32::from(word[0]) << 8 | u32::from(word[1])).sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
}
