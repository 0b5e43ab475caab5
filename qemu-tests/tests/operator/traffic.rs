//! Guests that send and receive on their own, as fast as their rings allow, while a test does something else.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use qemu_tests::frontend::packet::Packet;
use qemu_tests::frontend::{Layout, NetHeader, Prepared, QueuePair};
use qemu_tests::host::wait_for;
use qemu_tests::net::{Guest, SOON};

/// Queue pairs, each with the frame that is sent on it.
type Queues = Vec<(QueuePair, Prepared)>;

/// A guest whose queues are driven by a thread.
pub struct Traffic {
    stop: Arc<AtomicBool>,
    received: Arc<AtomicU64>,
    thread: Option<JoinHandle<Result<Queues>>>,
    /// What the rings may still point at.
    queues: Queues,
}

impl Traffic {
    /// Has `guest` send `packet` on all its queues, again and again, and take what it gets. The queues are lent out
    /// until [`Self::stop`].
    pub fn start(guest: &mut Guest, packet: &Packet) -> Result<Self> {
        let frame = packet.build();
        let mut queues = Vec::new();
        for queue in guest.frontend.take_queues() {
            let prepared = queue.tx.prepare(&frame, &NetHeader::default(), &Layout::single())?;
            queues.push((queue, prepared));
        }
        let (stop, received) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (told, count) = (stop.clone(), received.clone());
        let thread = std::thread::spawn(move || {
            while !told.load(Ordering::Relaxed) {
                for (queue, prepared) in &mut queues {
                    queue.tx.tx_batch(std::iter::repeat_n(&*prepared, 32))?;
                    queue.tx.tx_reap()?;
                    let frames = queue.rx.rx_batch(256, |_| ())?;
                    count.fetch_add(frames as u64, Ordering::Relaxed);
                }
                // There are more threads than processors.
                std::thread::sleep(Duration::from_micros(200));
            }
            Ok(queues)
        });
        Ok(Self { stop, received, thread: Some(thread), queues: Vec::new() })
    }

    /// Waits until the guest has received `count` frames more.
    pub fn flows(&self, count: u64) -> Result<()> {
        let before = self.received.load(Ordering::Relaxed);
        wait_for("frames to be received", SOON, || {
            Ok((self.received.load(Ordering::Relaxed) >= before + count).then_some(()))
        })
    }

    /// Ends it. With a daemon that lives and a port that is there, `drain` waits until everything was sent. The guest
    /// gets its queues back.
    pub fn stop(mut self, guest: &mut Guest, drain: bool) -> Result<()> {
        self.halt()?;
        for (queue, _) in self.queues.iter_mut().filter(|_| drain) {
            wait_for("the transmit ring to be empty", SOON, || {
                queue.tx.tx_reap()?;
                Ok((queue.tx.in_flight() == 0).then_some(()))
            })?;
        }
        // What a ring may still point at has to stay: the test's process is short-lived.
        let queues = std::mem::take(&mut self.queues).into_iter().map(|(queue, prepared)| {
            if !drain {
                std::mem::forget(prepared);
            }
            queue
        });
        guest.frontend.return_queues(queues.collect());
        Ok(())
    }

    fn halt(&mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let Some(thread) = self.thread.take() else { return Ok(()) };
        let outcome = thread.join();
        ensure!(outcome.is_ok(), "the traffic's thread has panicked");
        self.queues = outcome.unwrap_or_else(|_| Ok(Vec::new())).context("traffic")?;
        Ok(())
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        if let Err(error) = self.halt() {
            eprintln!("{error:#}");
        }
    }
}
