//! Numbered packets from cable to cable, and a record of when each was sent, and where and when it came out.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::frontend::NetHeader;
use crate::frontend::packet::{Mac, Packet, check};
use crate::host::wait_for;
use crate::nics::Cable;

/// How often it is looked for what has come.
const LOOK: Duration = Duration::from_millis(1);
/// Bytes behind the headers; the first four are the packet's number.
const PAYLOAD: usize = 64;

/// A packet that has come out.
#[derive(Debug, Clone, Copy)]
pub struct Arrival {
    /// Its number: the first has 0.
    pub number: usize,
    /// The cable that it came out of.
    pub cable: usize,
    /// When it was found there.
    pub at: Instant,
}

/// UDP packets from one station to another.
#[derive(Debug)]
pub struct Traffic {
    cables: Vec<Arc<Cable>>,
    from: usize,
    packet: Packet,
    addresses: (Mac, Mac),
    /// When each was sent, by its number.
    pub sent: Vec<Instant>,
    /// What has come out, in order.
    pub came: Vec<Arrival>,
}

impl Traffic {
    /// From the station `src` at cable `from` to the station `dst`, between these cables.
    pub fn new(cables: &[Arc<Cable>], from: usize, src: Mac, dst: Mac) -> Self {
        let ip = |mac: Mac| [10, mac[3], mac[4], mac[5]];
        let packet = Packet::eth(src, dst).ipv4(ip(src), ip(dst)).udp(1000, 9);
        let cables = cables.to_vec();
        Self { cables, from, packet, addresses: (src, dst), sent: Vec::new(), came: Vec::new() }
    }

    /// Sends the next packet.
    pub fn send(&mut self) -> Result<()> {
        let mut payload = (self.sent.len() as u32).to_be_bytes().to_vec();
        payload.resize(PAYLOAD, 0x5a);
        let at = Instant::now();
        self.cables[self.from].send(&self.packet.clone().payload(&payload).build())?;
        self.sent.push(at);
        Ok(())
    }

    /// Notes what has come out.
    ///
    /// # Errors
    /// A packet that is damaged, or came out where it was sent.
    pub fn look(&mut self) -> Result<()> {
        for (index, cable) in self.cables.iter().enumerate() {
            while let Some(frame) = cable.try_receive()? {
                let at = Instant::now();
                let (src, dst) = self.addresses;
                // Others have their say too.
                if frame.get(..12) != Some(&[dst, src].concat()) {
                    continue;
                }
                let checked = check(&NetHeader::default(), &frame).map_err(anyhow::Error::msg)?;
                let number = frame[checked.payload].first_chunk().context("a packet without a number")?;
                ensure!(index != self.from, "a packet came back");
                self.came.push(Arrival { number: u32::from_be_bytes(*number) as usize, cable: index, at });
            }
        }
        Ok(())
    }

    /// Waits until all that was sent has come out somewhere.
    pub fn wait_all(&mut self, deadline: Duration) -> Result<()> {
        wait_for("all packets to arrive", deadline, || {
            self.look()?;
            Ok((self.came.len() >= self.sent.len()).then_some(()))
        })
        .with_context(|| format!("{} of {} have come", self.came.len(), self.sent.len()))
    }

    /// How many have come out of a cable.
    pub fn count(&self, cable: usize) -> usize {
        self.came.iter().filter(|arrival| arrival.cable == cable).count()
    }

    /// An error if a packet has come out twice. How many did not come out at all.
    pub fn lost(&self) -> Result<usize> {
        let mut seen = HashSet::new();
        let twice: Vec<usize> =
            self.came.iter().map(|arrival| arrival.number).filter(|number| !seen.insert(*number)).collect();
        ensure!(twice.is_empty(), "packets {twice:?} of {} came out twice", self.sent.len());
        Ok(self.sent.len() - seen.len())
    }
}

/// Traffic at a steady rate, on a thread of its own. Dropped, it ends.
#[derive(Debug)]
pub struct Stream {
    traffic: Arc<Mutex<Traffic>>,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Stream {
    /// Sends so many packets a second from now on.
    pub fn start(traffic: Traffic, rate: u32) -> Self {
        let (traffic, over) = (Arc::new(Mutex::new(traffic)), Arc::new(AtomicBool::new(false)));
        let (theirs, ends) = (Arc::clone(&traffic), Arc::clone(&over));
        let thread = thread::spawn(move || {
            let pause = Duration::from_secs(1) / rate;
            let mut next = Instant::now();
            while !ends.load(Ordering::Relaxed) {
                let mut traffic = lock(&theirs);
                let now = Instant::now();
                if now >= next {
                    traffic.send()?;
                    // What it is late is not made up for: that would be a burst.
                    next = now.max(next + pause);
                }
                traffic.look()?;
                drop(traffic);
                thread::sleep(LOOK);
            }
            Ok(())
        });
        Self { traffic, over, thread: Some(thread) }
    }

    /// The record so far; the stream waits as long as it is held.
    pub fn traffic(&self) -> MutexGuard<'_, Traffic> {
        lock(&self.traffic)
    }

    /// Waits until a cable has given so many more packets.
    pub fn wait_more(&self, cable: usize, more: usize, deadline: Duration) -> Result<()> {
        let before = self.traffic().count(cable);
        wait_for(&format!("{more} packets at cable {cable}"), deadline, || {
            ensure!(self.thread.as_ref().is_some_and(|thread| !thread.is_finished()), "the stream has ended");
            Ok((self.traffic().count(cable) >= before + more).then_some(()))
        })
    }

    /// Ends it; what is on its way is still noted.
    pub fn stop(mut self, grace: Duration) -> Result<Traffic> {
        self.over.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("it has been stopped")?;
        thread.join().map_err(|_| anyhow::anyhow!("the stream's thread has panicked"))??;
        let empty = Traffic::new(&[], 0, [0; 6], [0; 6]);
        let mut traffic = std::mem::replace(&mut *lock(&self.traffic), empty);
        let begin = Instant::now();
        while traffic.came.len() < traffic.sent.len() && begin.elapsed() < grace {
            traffic.look()?;
            thread::sleep(LOOK);
        }
        Ok(traffic)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // What it ended with, nobody asks any more.
            let _ = thread.join();
        }
    }
}

fn lock(traffic: &Mutex<Traffic>) -> MutexGuard<'_, Traffic> {
    // A record of what was sent and came is right between any two statements.
    traffic.lock().unwrap_or_else(PoisonError::into_inner)
}
