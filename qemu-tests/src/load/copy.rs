//! What it takes to copy frames from one guest's memory to another's, and nothing else: no switch can be faster.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::{LoadConfig, Sample, bind, guest_memory, hugepages, receive_room};
use crate::frontend::lean::cycles;
use crate::frontend::{Buffer, GuestMemory, RegionSpec};
use crate::host;

/// Offset of frames in their buffers, as in the load's.
const LINE: usize = 64;

/// Buffers of one ring.
struct Buffers {
    memory: Buffer,
    /// Bytes from one to the next.
    stride: usize,
    count: usize,
}

impl Buffers {
    fn new(memory: &GuestMemory, count: usize, room: usize) -> Result<Self> {
        let stride = ((LINE + room).div_ceil(LINE) | 1) * LINE;
        let memory = memory.alloc(count * stride, 4096)?;
        memory.fill(1);
        Ok(Self { memory, stride, count })
    }

    /// Where the frame in the `number`th buffer starts, round and round.
    fn at(&self, number: u64) -> usize {
        (number % self.count as u64) as usize * self.stride + LINE
    }
}

/// A guest's transmit buffers, another's receive buffers, and the numbers of the next of each.
struct Way {
    from: Buffers,
    to: Buffers,
    next_from: u64,
    next_to: u64,
}

impl Way {
    fn copy(&mut self, len: usize, room: usize) {
        let start = self.from.at(self.next_from);
        self.next_from += 1;
        for done in (0..len).step_by(room) {
            let part = room.min(len - done);
            self.to.memory.copy_from(self.to.at(self.next_to), &self.from.memory, start + done, part);
            self.next_to += 1;
        }
    }
}

/// Copies the longest frames of `config` both ways between two guests of the same memory, rings and buffers as
/// [`super::Load`]'s, in bursts, on processor `cpu`. Gives what was copied in `time`, as if received; busy cycles are those of
/// copying, and there are no others.
///
/// # Errors
/// If memory or processor cannot be had, or on an interruption.
pub fn copy_frames(config: &LoadConfig, cpu: usize, time: Duration) -> Result<Sample> {
    let bytes = guest_memory(config);
    let hugepages = hugepages(2 * bytes);
    let memory = || GuestMemory::new(&[RegionSpec { gpa: 0, len: bytes }], hugepages);
    let (guests, ring) = ([memory()?, memory()?], usize::from(config.ring));
    let (len, room) = (config.traffic.sizes.longest(), receive_room(config));
    let way = |from: usize, to: usize| {
        let from = Buffers::new(&guests[from], ring, len)?;
        Ok(Way { from, to: Buffers::new(&guests[to], ring, room)?, next_from: 0, next_to: 0 })
    };
    let ways: Vec<Way> = [way(0, 1), way(1, 0)].into_iter().collect::<Result<_>>()?;
    let burst = u32::from(config.burst);
    let work = move || -> Result<Sample> {
        bind(cpu)?;
        let mut ways = ways;
        let mut copy_for = |time: Duration| -> Result<(u64, u64, f64)> {
            let (mut frames, mut busy, start) = (0, 0, Instant::now());
            while start.elapsed() < time {
                host::check_interrupt()?;
                let before = cycles();
                for way in &mut ways {
                    (0..burst).for_each(|_| way.copy(len, room));
                    frames += u64::from(burst);
                }
                busy += cycles() - before;
            }
            Ok((frames, busy, start.elapsed().as_secs_f64()))
        };
        copy_for(time / 3)?;
        let (frames, busy_cycles, seconds) = copy_for(time)?;
        let bytes = frames * len as u64;
        Ok(Sample { seconds, sent: frames, received: frames, bytes, refused: 0, busy_cycles, idle_cycles: 0 })
    };
    let thread = std::thread::Builder::new().name("copy".into()).spawn(work)?;
    thread.join().ok().context("copying panicked")?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_arrives_in_parts_in_the_next_receive_buffers() {
        const LEN: usize = 5000;
        const ROOM: usize = 2048;
        let guests = [0, 1].map(|_| GuestMemory::new(&[RegionSpec::mib(0, 1)], false).unwrap());
        let from = Buffers::new(&guests[0], 4, LEN).unwrap();
        let to = Buffers::new(&guests[1], 8, ROOM).unwrap();
        let mut way = Way { from, to, next_from: 0, next_to: 0 };
        // The rings begin anew in the midst of it.
        for number in 0..5 {
            let frame: Vec<u8> = (0..LEN).map(|i| (i * 7 + number) as u8).collect();
            way.from.memory.write(way.from.at(number as u64), &frame);
            way.copy(LEN, ROOM);
            let mut received = vec![0; LEN];
            for (part, bytes) in received.chunks_mut(ROOM).enumerate() {
                way.to.memory.read(way.to.at((3 * number + part) as u64), bytes);
            }
            assert!(received == frame, "frame {number}");
        }
    }
}
