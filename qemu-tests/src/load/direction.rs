//! One direction of a pair of ports: the sender's transmit ring, the receiver's receive ring, and the books about both.

use anyhow::Result;

use super::traffic::{Checker, PORTS, Stamp, Wrong};
use super::{Ends, Histogram, LoadConfig, Order, Outcome, Traffic};
use crate::frontend::lean::{LeanRx, LeanTx, cycles};
use crate::frontend::{Features, RxRing, TxRing};

/// Frames that are taken before it is the other direction's turn.
const TURN: u32 = 128;
/// Of a frame that is not checked to its end, so much is looked at: headers and stamp.
const START: usize = 96;

pub(super) struct Direction {
    tx: LeanTx,
    rx: LeanRx,
    traffic: Traffic,
    checker: Checker,
    /// Bytes around the frames that are sent, and around those that arrive; where the former may have a UDP source port.
    sent_in: usize,
    arrives_in: usize,
    has_source: bool,
    payload_at: usize,
    window: u64,
    /// Number of the next packet, and its flow if flows are walked.
    seq: u64,
    flow: u32,
    /// Packets sent before counting began.
    base: u64,
    received: u64,
    bytes: u64,
    /// Sent, not received, and given up.
    written_off: u64,
    strangers: bool,
    /// When something was last received, or could be sent.
    last_progress: u64,
    /// When the next packet is due, and cycles from one to the next.
    due: f64,
    pace: Option<f64>,
    /// Whether packets that were due found no room when it was tried last; and how many were given up for that.
    is_blocked: bool,
    refused: u64,
    check_every: u32,
    check_whole: u32,
    /// Packets until the next check; checks until the next whole one.
    until_check: u32,
    until_whole: u32,
    checked: u64,
    wrong: u64,
    disordered: u64,
    first_wrong: Option<String>,
    latencies: Histogram,
    frame: Vec<u8>,
}

impl Direction {
    /// `features` are those of sender and receiver; `room` is what a receive buffer holds.
    pub fn new(
        config: &LoadConfig,
        ends: Ends,
        tx: TxRing,
        rx: RxRing,
        features: [Features; 2],
        room: usize,
    ) -> Result<Self> {
        let (traffic, longest) = (config.traffic, config.longest());
        let [sent_in, arrives_in] = config.envelopes();
        // A frame takes as many buffers as its header and bytes fill.
        let buffers = (longest + 12).div_ceil(room + 12) as u32;
        let window = config.window.unwrap_or(u32::from(config.ring) / buffers).max(1);
        Ok(Self {
            tx: LeanTx::new(tx, features[0], longest, |slot| traffic.sent(&ends, slot, sent_in.as_ref()))?,
            rx: LeanRx::new(rx, features[1], room, longest)?,
            checker: Checker::new(traffic, &ends, config.routed, arrives_in.as_ref()),
            sent_in: sent_in.map_or(0, |envelope| envelope.overhead()),
            arrives_in: arrives_in.map_or(0, |envelope| envelope.overhead()),
            has_source: sent_in.is_some_and(|envelope| envelope.kind.udp_port().is_some()),
            payload_at: traffic.sizes.payload_at(),
            traffic,
            window: u64::from(window),
            seq: 0,
            flow: 0,
            base: 0,
            received: 0,
            bytes: 0,
            written_off: 0,
            strangers: config.strangers,
            last_progress: cycles(),
            due: 0.0,
            pace: None,
            is_blocked: false,
            refused: 0,
            check_every: config.check_every,
            check_whole: config.check_whole,
            until_check: 1,
            until_whole: 1,
            checked: 0,
            wrong: 0,
            disordered: 0,
            first_wrong: None,
            latencies: Histogram::default(),
            frame: vec![0; longest],
        })
    }

    pub fn sent(&self) -> u64 {
        self.seq - self.base
    }

    pub fn received(&self) -> u64 {
        self.received
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn refused(&self) -> u64 {
        self.refused
    }

    pub fn latencies(&self) -> &Histogram {
        &self.latencies
    }

    /// Packets sent, not received, and not given up.
    pub fn missing(&self) -> u64 {
        self.sent().saturating_sub(self.received + self.written_off)
    }

    /// Begins to count; what was sent before is forgotten.
    pub fn start_over(&mut self) {
        self.base = self.seq;
        (self.received, self.bytes, self.written_off) = (0, 0, 0);
        (self.checked, self.wrong, self.disordered, self.first_wrong) = (0, 0, 0, None);
        self.latencies.clear();
    }

    pub fn forget_latencies(&mut self) {
        self.latencies.clear();
    }

    /// From `now` on a packet each `pace` cycles; without, as many as go.
    pub fn set_pace(&mut self, now: u64, pace: Option<f64>) {
        (self.due, self.pace, self.last_progress) = (now as f64, pace, now);
    }

    pub fn reap(&mut self) -> Result<()> {
        Ok(self.tx.reap()?)
    }

    /// Sends what is due at `now`, or a burst if one goes. Gives how many packets went.
    #[inline(always)]
    pub fn send_more(&mut self, now: u64, burst: u32) -> Result<u32> {
        self.tx.reap()?;
        let room = (u64::from(self.tx.space())).min(self.window.saturating_sub(self.missing())) as u32;
        let count = match self.pace {
            // Full bursts only, unless the window is smaller.
            None if room >= burst || u64::from(room) >= self.window => room.min(burst),
            None => 0,
            Some(pace) => {
                let behind = now as f64 - self.due;
                let due = if behind < 0.0 { 0 } else { (behind / pace) as u32 + 1 };
                if due > burst {
                    // We were kept from sending: go on from here, without a flood.
                    self.due = now as f64 - f64::from(burst - 1) * pace;
                    if self.is_blocked {
                        self.refused += u64::from(due - burst);
                    }
                }
                let count = due.min(burst).min(room);
                self.is_blocked = count < due.min(burst);
                self.due += f64::from(count) * pace;
                count
            }
        };
        if count > 0 {
            self.push(now, count);
        }
        Ok(count)
    }

    /// Sends up to `count` packets at once.
    pub fn send(&mut self, now: u64, count: u32) -> Result<()> {
        self.tx.reap()?;
        self.push(now, count.min(u32::from(self.tx.space())));
        Ok(())
    }

    #[inline(always)]
    fn push(&mut self, now: u64, count: u32) {
        for _ in 0..count {
            let flow = match self.traffic.order {
                Order::Walk => self.flow,
                Order::Random => self.traffic.flow(self.seq),
            };
            self.tx.patch(self.sent_in + PORTS, self.traffic.ports(flow));
            self.tx.patch(self.sent_in + self.payload_at, Stamp { seq: self.seq, sent: now }.to_bytes());
            if self.has_source {
                self.tx.patch(PORTS, (0x8000 | flow as u16).to_be_bytes());
            }
            self.tx.push();
            self.seq += 1;
            self.flow = if self.flow + 1 == self.traffic.flows { 0 } else { self.flow + 1 };
        }
        self.tx.publish();
    }

    /// Receives what is there, up to a turn's worth, and gives the number of packets.
    #[inline(always)]
    pub fn receive(&mut self, now: u64) -> Result<u32> {
        if self.rx.poll()? == 0 {
            return Ok(0);
        }
        let (mut count, mut strange) = (0, 0);
        while count < TURN
            && let Some(len) = self.rx.take()?
        {
            count += 1;
            if self.strangers && !self.traffic.sizes.has(len.wrapping_sub(self.arrives_in)) {
                strange += 1;
                continue;
            }
            self.bytes += len as u64;
            self.until_check -= 1;
            if self.until_check == 0 {
                self.until_check = self.check_every;
                self.check(len);
            }
        }
        // Before they count as received: who sends by that count must find buffers.
        self.rx.release();
        self.received += u64::from(count - strange);
        // What was given up may have come all the same.
        self.written_off = self.written_off.min(self.sent().saturating_sub(self.received));
        self.last_progress = now;
        Ok(count)
    }

    /// Gives up what has been on its way for longer than `patience`, if it keeps new packets from being sent.
    #[inline(always)]
    pub fn write_off(&mut self, now: u64, patience: u64) {
        if self.missing() < self.window / 2 {
            self.last_progress = now;
        } else if now.saturating_sub(self.last_progress) > patience {
            self.written_off += self.missing();
            self.last_progress = now;
        }
    }

    #[inline(never)]
    fn check(&mut self, len: usize) {
        self.until_whole -= 1;
        let wanted = if self.until_whole == 0 {
            self.until_whole = self.check_whole;
            len
        } else {
            len.min(self.arrives_in + START)
        };
        let wanted = wanted.min(self.frame.len());
        let read = self.rx.read(0, &mut self.frame[..wanted]);
        self.checked += 1;
        let text = match self.checker.check(&self.frame[..read], len) {
            Ok(stamp) => return self.latencies.add(cycles().saturating_sub(stamp.sent)),
            Err(Wrong::Content(text)) => {
                self.wrong += 1;
                text
            }
            Err(Wrong::Order(text)) => {
                self.disordered += 1;
                text
            }
        };
        self.first_wrong.get_or_insert(text);
    }

    /// Adds what became of this direction's packets to `outcome`.
    pub fn report(&self, outcome: &mut Outcome) {
        outcome.sent += self.sent();
        outcome.received += self.received;
        outcome.lost += self.sent() as i64 - self.received as i64;
        outcome.checked += self.checked;
        outcome.wrong += self.wrong;
        outcome.disordered += self.disordered;
        if let Some(text) = &self.first_wrong {
            outcome.first_wrong.get_or_insert_with(|| text.clone());
        }
    }
}
