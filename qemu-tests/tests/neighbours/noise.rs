//! The neighbours.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use qemu_tests::frontend::packet::{BROADCAST, Mac, Packet};
use qemu_tests::frontend::{Frontend, Layout, NetHeader, Notify, Prepared, QueuePair};
use qemu_tests::load::bind;

use crate::Bed;

const NOISY: (Mac, [u8; 4]) = ([2, 0, 0, 0, 9, 1], [10, 9, 0, 1]);
/// Of whom nobody has heard.
const SILENT: (Mac, [u8; 4]) = ([2, 0, 0, 0, 9, 2], [10, 9, 0, 2]);
/// Descriptors of the ring that is kept full, and frames posted at a time. So many that who sends them keeps the ring from being
/// empty even if they are taken without a pause: a worker that leaves a port only when it has nothing then serves no other. No more
/// than a receiver has room for, where all of them go to it too.
const RING: u16 = 1024;
const AT_ONCE: usize = 64;
/// Where source address and ports are in a frame.
const SOURCE: usize = 6;
const PORTS: usize = 34;

/// What the neighbours are told.
#[derive(Default)]
struct Orders {
    on: AtomicBool,
    ended: AtomicBool,
    /// Of one that does not send: what it has done.
    deeds: AtomicU64,
}

/// A neighbour that makes noise when it is told to.
pub struct Noise {
    orders: Arc<Orders>,
    /// A round of the one that sends.
    send: Option<Box<dyn FnMut() -> Result<()> + Send>>,
    /// The one that does something else.
    thread: Option<JoinHandle<Result<()>>>,
    /// Hold connections.
    _guests: Vec<Frontend>,
}

impl Noise {
    /// What the generator's thread is to do beside its own work: an idle neighbour does nothing.
    pub fn beside(&mut self) -> impl FnMut() -> Result<()> + Send + 'static {
        let (orders, mut send) = (self.orders.clone(), self.send.take());
        move || match &mut send {
            Some(send) if orders.on.load(Relaxed) => send(),
            _ => Ok(()),
        }
    }

    pub fn begin(&self) {
        self.orders.on.store(true, Relaxed);
    }

    /// It does no more, or has failed.
    pub fn end(&mut self) -> Result<()> {
        self.orders.on.store(false, Relaxed);
        match self.thread.take_if(|thread| thread.is_finished()) {
            Some(failed) => failed.join().map_err(|_| anyhow!("the neighbour panicked"))?,
            None => Ok(()),
        }
    }

    /// What it has done so far: packets that were taken from it, or what it counts.
    pub fn deeds(&self, bed: &Bed) -> Result<u64> {
        match self.thread {
            Some(_) => Ok(self.orders.deeds.load(Relaxed)),
            None => Ok(bed.daemon.stats()?.ports["noisy"].rx_packets),
        }
    }
}

impl Drop for Noise {
    fn drop(&mut self) {
        self.orders.ended.store(true, Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn guest(bed: &Bed, port: &str) -> Result<Frontend> {
    let builder = Frontend::builder(bed.socket(port)).ring_size(RING).notify(Notify::Poll);
    Ok(builder.timeout(Duration::from_secs(30)).start()?)
}

/// One that keeps its transmit ring full of copies of `frame`, each changed by `change`, which is told its number.
fn sender(bed: &Bed, frame: &Packet, change: impl Fn(&Prepared, u32) + Send + 'static) -> Result<Noise> {
    let mut noisy = guest(bed, "noisy")?;
    let QueuePair { mut tx, .. } = noisy.take_queues().pop().context("a queue")?;
    // One that is used again was sent: there are more than descriptors.
    let frames = (0..2 * usize::from(RING))
        .map(|_| tx.prepare(&frame.build(), &NetHeader::default(), &Layout::single()))
        .collect::<Result<Vec<_>, _>>()?;
    let mut number = 0u32;
    let send = move || {
        tx.tx_reap()?;
        let at = number as usize % frames.len();
        let room = tx.free().min(AT_ONCE).min(frames.len() - at);
        let next = &frames[at..at + room];
        next.iter().zip(number..).for_each(|(frame, number)| change(frame, number));
        number = number.wrapping_add(tx.tx_batch(next)? as u32);
        Ok(())
    };
    Ok(Noise {
        orders: Arc::default(),
        send: Some(Box::new(send)),
        thread: None,
        _guests: vec![noisy, guest(bed, "silent")?],
    })
}

/// Every packet goes to everybody, also to one that takes none.
pub fn flood(bed: &Bed) -> Result<Noise> {
    let (mac, ip) = NOISY;
    sender(bed, &Packet::eth(mac, BROADCAST).arp_request(ip, ip), |_, _| {})
}

fn udp() -> Packet {
    Packet::eth(NOISY.0, SILENT.0).ipv4(NOISY.1, SILENT.1).udp(1, 1).payload_len(40)
}

/// Ports that no packet had before, the destination's from 32768 on.
fn new_ports(frame: &Prepared, number: u32) {
    let (source, destination) = (number as u16, (number >> 16) as u16 | 0x8000);
    frame.patch(PORTS, &(u32::from(source) << 16 | u32::from(destination)).to_be_bytes());
}

/// Every packet is a flow of its own to the exact-match table, for a flow that none matches names all five.
pub fn scan(bed: &Bed) -> Result<Noise> {
    let flow =
        "in_port(noisy),eth_type(0x0800),ipv4(src=192.0.2.1,dst=192.0.2.2,proto=17,frag=no),udp(src=1,dst=1)";
    bed.daemon.ctl(&["add-flow", flow, "drop"])?;
    sender(bed, &udp(), new_ports)
}

/// No flow matches any packet, and the host is to learn an address from each.
pub fn stations(bed: &Bed) -> Result<Noise> {
    sender(bed, &udp(), |frame, number| {
        let [a, b, c, d] = number.to_be_bytes();
        frame.patch(SOURCE, &[2, 1, a, b, c, d]);
    })
}

/// Every packet is a flow of its own, and is looked for in vain under each of 200 masks.
pub fn masks(bed: &Bed) -> Result<Noise> {
    for number in 0..200u32 {
        let (source, destination) = (1 + number / 20, 1 + number % 20);
        let mask = |bits: u32| std::net::Ipv4Addr::from_bits(u32::MAX << (32 - bits));
        // Of a port of its own each, so that none overlaps another.
        let flow = format!(
            "in_port(noisy),eth_type(0x0800),ipv4(src=0.0.0.0/{},dst=0.0.0.0/{},proto=17,frag=no),udp(dst={})",
            mask(source),
            mask(destination),
            1 + number
        );
        bed.daemon.ctl(&["add-flow", &flow, "drop"])?;
    }
    sender(bed, &udp(), new_ports)
}

/// One that does something again and again, on the guests' processor.
fn doer(bed: &Bed, mut act: impl FnMut(&mut Frontend) -> Result<()> + Send + 'static) -> Result<Noise> {
    let mut noisy = guest(bed, "noisy")?;
    let (orders, cpu) = (Arc::<Orders>::default(), bed.guests_cpu);
    let shared = orders.clone();
    let thread = std::thread::Builder::new().name("noise".into()).spawn(move || {
        cpu.map_or(Ok(()), bind)?;
        while !shared.ended.load(Relaxed) {
            if shared.on.load(Relaxed) {
                act(&mut noisy)?;
                shared.deeds.fetch_add(1, Relaxed);
            } else {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        Ok(())
    })?;
    Ok(Noise { orders, send: None, thread: Some(thread), _guests: vec![guest(bed, "silent")?] })
}

/// Stops its rings, negotiates, and starts them.
pub fn reset(bed: &Bed) -> Result<Noise> {
    doer(bed, |guest| Ok(guest.start()?))
}

/// Goes without a word, and comes back.
pub fn reconnect(bed: &Bed) -> Result<Noise> {
    doer(bed, |guest| {
        guest.abandon();
        Ok(guest.start()?)
    })
}
