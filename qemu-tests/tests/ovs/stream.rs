//! A guest that sends at a steady rate to another, which counts what it gets.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use qemu_tests::frontend::packet::Packet;
use qemu_tests::frontend::{Layout, NetHeader, QueuePair};
use qemu_tests::host::wait_for;
use qemu_tests::net::{Net, SOON};

type Ends = (Vec<QueuePair>, Vec<QueuePair>);

/// The stream between two guests, whose queues are lent out until [`Stream::stop`].
pub struct Stream {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    received: Arc<AtomicU64>,
    thread: Option<JoinHandle<Result<Ends>>>,
}

impl Stream {
    /// Has guest `from` send `packet` so many times a second, on its first queue; guest `to` takes all that it gets.
    pub fn start(net: &mut Net, from: usize, to: usize, packet: &Packet, per_second: u64) -> Result<Stream> {
        let mut sender = net.guests[from].frontend.take_queues();
        let mut receiver = net.guests[to].frontend.take_queues();
        let tx = &mut sender.first_mut().context("a guest without queues")?.tx;
        let prepared = tx.prepare(&packet.build(), &NetHeader::default(), &Layout::single())?;
        let stop = Arc::<AtomicBool>::default();
        let [sent, received] = [(); 2].map(|()| Arc::<AtomicU64>::default());
        let (told, posted, count) = (stop.clone(), sent.clone(), received.clone());
        let thread = std::thread::spawn(move || {
            let start = Instant::now();
            loop {
                let is_last = told.load(Ordering::Relaxed);
                let tx = &mut sender[0].tx;
                if !is_last {
                    let due = start.elapsed().as_micros() as u64 * per_second / 1_000_000;
                    let missing = due.saturating_sub(posted.load(Ordering::Relaxed)).min(64) as usize;
                    let n = tx.tx_batch(std::iter::repeat_n(&prepared, missing))?;
                    posted.fetch_add(n as u64, Ordering::Relaxed);
                }
                tx.tx_reap()?;
                for queue in &mut receiver {
                    let n = queue.rx.rx_batch(256, |_| ())?;
                    count.fetch_add(n as u64, Ordering::Relaxed);
                }
                if is_last && sender[0].tx.in_flight() == 0 {
                    return Ok((sender, receiver));
                }
                std::thread::sleep(Duration::from_micros(500));
            }
        });
        Ok(Stream { stop, sent, received, thread: Some(thread) })
    }

    /// Packets sent so far.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Frames that have arrived so far.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Waits until `count` frames more have arrived.
    pub fn flows(&self, count: u64) -> Result<()> {
        let before = self.received();
        wait_for("frames of the stream", SOON, || Ok((self.received() >= before + count).then_some(())))
    }

    /// Waits until nothing arrives any more, while packets are sent.
    pub fn stands_still(&self) -> Result<()> {
        let mut before = (self.sent(), self.received());
        wait_for("the stream to stand still", SOON, || {
            std::thread::sleep(Duration::from_millis(200));
            let now = (self.sent(), self.received());
            let stands = now.1 == before.1 && now.0 > before.0 + 50;
            before = now;
            Ok(stands.then_some(()))
        })
    }

    /// Ends it, once all has been taken from the ring. The guests get their queues back.
    pub fn stop(mut self, net: &mut Net, from: usize, to: usize) -> Result<()> {
        let (sender, receiver) = self.halt()?.context("it was stopped")?;
        net.guests[from].frontend.return_queues(sender);
        net.guests[to].frontend.return_queues(receiver);
        Ok(())
    }

    fn halt(&mut self) -> Result<Option<Ends>> {
        self.stop.store(true, Ordering::Relaxed);
        let Some(thread) = self.thread.take() else { return Ok(None) };
        let outcome = thread.join();
        ensure!(outcome.is_ok(), "the stream's thread has panicked");
        outcome.ok().transpose()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // Without a daemon the ring is never empty: the thread ends with the process then.
        self.stop.store(true, Ordering::Relaxed);
    }
}
