//! A guest without a machine: a vhost-user front-end joined to a TAP, so that the programs of a network namespace talk
//! through a port of a vhost-user backend as those of a guest do.
//!
//! It is started inside the namespace (`ip netns exec`), makes the TAP, and copies frames both ways with their virtio-net
//! headers, so segments and partial checksums pass as they are. A backend that goes away is waited for, and the rings go on
//! where they were, as with QEMU.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use qemu_tests::frontend::{Error, Features, Frontend, NetHeader, QueuePair, RegionSpec};
use qemu_tests::tap::OffloadTap;

/// Frames copied one way before it is the other's turn.
const BURST: usize = 64;
/// The largest frame: a segment of 64 KiB with its headers.
const MAX_FRAME: usize = 65_536 + 64;
/// Receive buffers, of a page each: mergeable buffers make long frames of them.
const BUFFER: usize = 4096;
const RING: u16 = 512;

/// Joins a vhost-user socket to a TAP of the network namespace that this runs in, until it is killed.
#[derive(Parser)]
struct Options {
    /// The backend's socket.
    socket: PathBuf,
    /// Name of the TAP.
    #[arg(long, default_value = "eth0")]
    tap: String,
    /// The TAP's MAC address.
    #[arg(long)]
    mac: Option<String>,
    /// The TAP's address with its prefix length; may be given several times.
    #[arg(long)]
    address: Vec<String>,
    /// The TAP's MTU.
    #[arg(long, default_value_t = 1500)]
    mtu: u16,
    /// Listen on the socket, for a backend in client mode.
    #[arg(long)]
    listen: bool,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let tap = OffloadTap::new(&options.tap)?;
    let mut builder = Frontend::builder(&options.socket)
        .ring_size(RING)
        .memory(&[RegionSpec::mib(0, 64)])
        .timeout(Duration::from_secs(3600));
    if !tap.udp_segmentation {
        builder = builder.without(Features::GUEST_USO4 | Features::GUEST_USO6 | Features::HOST_USO);
    }
    if options.listen {
        builder = builder.listen();
    }
    let mut frontend = builder.build()?;
    frontend.start()?;
    ensure!(frontend.features().contains(Features::MRG_RXBUF), "the backend has no mergeable buffers");
    let mut queues = frontend.take_queues();
    let pair = queues.first_mut().context("no queues")?;
    pair.rx.rx_fill(BUFFER, RING.into())?;
    configure(options)?;
    loop {
        pump(&frontend, pair, &tap)?;
        eprintln!("the backend has gone");
        frontend.abandon();
        loop {
            match frontend.resume() {
                Ok(()) => break,
                // It went again while it was being asked.
                Err(Error::Io { .. } | Error::Request { .. }) => frontend.abandon(),
                Err(error) => return Err(error.into()),
            }
        }
        eprintln!("the backend is back");
    }
}

/// Gives the TAP its addresses and sets it up.
fn configure(options: &Options) -> Result<()> {
    let tap = options.tap.as_str();
    let mtu = options.mtu.to_string();
    ip(&["link", "set", tap, "mtu", &mtu])?;
    if let Some(mac) = &options.mac {
        ip(&["link", "set", tap, "address", mac])?;
    }
    ip(&["link", "set", tap, "up"])?;
    options.address.iter().try_for_each(|address| ip(&["address", "add", address, "dev", tap]))
}

fn ip(arguments: &[&str]) -> Result<()> {
    let status = Command::new("ip").args(arguments).status().context("ip")?;
    ensure!(status.success(), "ip {}: {status}", arguments.join(" "));
    Ok(())
}

/// Copies frames both ways until the backend goes away.
fn pump(frontend: &Frontend, pair: &mut QueuePair, tap: &OffloadTap) -> Result<()> {
    let mut bytes = vec![0; NetHeader::LEN + MAX_FRAME];
    loop {
        let received = receive(pair, tap, &mut bytes)?;
        let sent = send(pair, tap, &mut bytes)?;
        if received + sent > 0 {
            continue;
        }
        // Nothing to do: who has something for us calls.
        let is_full = pair.tx.free() == 0;
        pair.rx.arm();
        if is_full {
            pair.tx.arm();
        }
        if pair.rx.has_used() || is_full && pair.tx.has_used() {
            continue;
        }
        let Some(socket) = frontend.socket() else { return Ok(()) };
        let more = if is_full { pair.tx.call_fd() } else { tap.as_fd() };
        let mut fds =
            [socket.as_fd(), pair.rx.call_fd(), more].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        match poll(&mut fds, Some(&Timespec { tv_sec: 1, tv_nsec: 0 })) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        // The backend sends replies only, so this is its end.
        let is_over = !fds[0].revents().is_empty();
        pair.rx.calls();
        pair.tx.calls();
        if is_over {
            return Ok(());
        }
    }
}

/// From the rings to the TAP. What the namespace's stack does not take is lost, as on a wire.
fn receive(pair: &mut QueuePair, tap: &OffloadTap, bytes: &mut [u8]) -> Result<usize> {
    let mut outcome = Ok(());
    let count = pair.rx.rx_batch(BURST, |frame| {
        let len = frame.frame_len().min(MAX_FRAME);
        bytes[..NetHeader::LEN].copy_from_slice(&NetHeader { num_buffers: 0, ..frame.header() }.to_bytes());
        frame.read(0, &mut bytes[NetHeader::LEN..][..len]);
        let written = tap.write(&bytes[..NetHeader::LEN + len]);
        // Full, or not up yet.
        if let Err(error) = written
            && !matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EIO | libc::ENOBUFS))
        {
            outcome = Err(error).with_context(|| format!("a frame of {len} bytes with {:?}", frame.header()));
        }
    })?;
    outcome.map(|()| count)
}

/// From the TAP to the rings, as long as there is room.
fn send(pair: &mut QueuePair, tap: &OffloadTap, bytes: &mut [u8]) -> Result<usize> {
    pair.tx.tx_reap()?;
    for count in 0..BURST {
        if pair.tx.free() == 0 {
            return Ok(count);
        }
        let Some(len) = tap.read(bytes)? else { return Ok(count) };
        let Some((header, frame)) = bytes[..len].split_first_chunk() else { continue };
        // The kernel leaves the part of the header that it does not know as it finds it.
        let header = NetHeader { num_buffers: 0, ..NetHeader::from_bytes(*header) };
        pair.tx.tx(frame, &header)?;
    }
    Ok(BURST)
}
