//! Drives a PCI NIC of the machine that it runs in through the kernel's VFIO, which its function must be bound to: it asks the
//! function itself (`probe`), or serves its ports with the NIC's driver (`serve`). A test looks on from outside.

use std::collections::HashSet;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, Subcommand};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;

use nic::igb::{self, Igb};
use nic::io::{PacketIo, PortEvent};
use nic::offload::{Event, FlowOffload, FlowRule, PortMap, RuleId, Token};
use nic::pci::vfio::{Interface, Options, VfioFunction};
use nic::pci::{Bar, PciError, PciFunction, Width, config};
use nic::rocker;
use switch_core::action::{Action, PortRef};
use switch_core::flow::Match;
use switch_core::key::Field;
use switch_core::packet::{Offload, PortId};

/// Vendor and device of QEMU's switch.
const ROCKER: (u16, u16) = (0x1b36, 0x0006);
/// Longer than anything here takes on a busy machine.
const DEADLINE: Duration = Duration::from_secs(10);
/// How long a server sleeps when no interrupt comes.
const SLEEP: Timespec = Timespec { tv_sec: 2, tv_nsec: 0 };
/// Where forwarded frames go, and what is in them (802, local experimental).
const STATION: u64 = 0x0200_0000_000b;
const EXPERIMENT: u16 = 0x88b5;
/// The payload of a frame that ends the server.
const STOP: &[u8] = b"stop";

#[derive(Parser)]
#[command(about = "Drives a PCI NIC through the kernel's VFIO")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Ask the function by all that the transport offers, and say what it does
    Probe {
        /// PCI address
        address: String,
        /// Use DMA memory of 2 MiB pages
        #[arg(long)]
        huge: bool,
    },
    /// Send each frame back where it came from, its addresses swapped, until one says to stop
    Serve {
        /// PCI address
        address: String,
        /// Have the switch itself forward frames to 02:00:00:00:00:0b that come in by port FROM to port TO
        #[arg(long, value_name = "FROM:TO", value_parser = pair)]
        forward: Vec<(u32, u32)>,
    },
}

fn pair(text: &str) -> Result<(u32, u32), String> {
    let pair = text.split_once(':').and_then(|(from, to)| Some((from.parse().ok()?, to.parse().ok()?)));
    pair.ok_or_else(|| "two port numbers with a colon between them expected".into())
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Probe { address, huge } => probe(&address, huge),
        Command::Serve { address, forward } => serve(&address, &forward),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn open(address: &str, huge_pages: bool) -> Result<VfioFunction> {
    let options = Options { interface: Interface::Auto, huge_pages };
    VfioFunction::open(address, options).with_context(|| address.to_owned())
}

/// Whether an interrupt has come.
fn fired(event: &OwnedFd) -> bool {
    rustix::io::read(event, &mut [0; 8]).is_ok()
}

fn probe(address: &str, huge: bool) -> Result<()> {
    let mut function = open(address, huge)?;
    let id = function.id()?;
    let again = open(address, huge);
    let refused = again.err().context("the function was opened twice")?;
    println!("a second owner: {refused:#}");

    // Configuration space: all widths agree, and what is not there is an error.
    let mut bytes = [0; 256];
    for (at, byte) in (0u16..).zip(&mut bytes) {
        *byte = function.config_read(at, Width::One)? as u8;
    }
    for at in (0..256u16).step_by(4) {
        let here = &bytes[usize::from(at)..][..4];
        let word = function.config_read(at, Width::Four)?;
        ensure!(word.to_le_bytes() == here, "{at:#x}: {word:#x} and {here:02x?}");
        let half = function.config_read(at + 2, Width::Two)?;
        ensure!(half == word >> 16, "{at:#x}: {half:#x} and {word:#x}");
    }
    ensure!(function.config_read(0xfffc, Width::Four).is_err(), "read beyond configuration space");
    ensure!(function.config_write(0xfffc, Width::Four, 0).is_err(), "written beyond configuration space");
    let capabilities = config::capabilities(&mut function)?;
    ensure!(capabilities.iter().any(|&(id, _)| id == config::CAP_MSIX), "{capabilities:x?}");
    println!("{:04x}:{:04x}, capabilities {capabilities:x?}", id.0, id.1);

    let bars: Vec<(u8, Bar)> = (0..6).filter_map(|index| Some((index, function.bar(index).ok()?))).collect();
    for (index, bar) in &bars {
        let past = bar.read32(bar.size());
        ensure!(matches!(past, Err(PciError::Access(_))), "BAR {index}: read beyond its end: {past:?}");
        println!("BAR {index}: {} bytes, begins with {:#x}", bar.size(), bar.read32(0)?);
    }
    ensure!(matches!(function.bar(6), Err(PciError::NoBar(6))), "a seventh BAR");

    memory(&mut function)?;
    let too_many = function.interrupts(u16::MAX).err().context("65535 interrupts")?;
    println!("interrupts: {too_many}");
    if id == ROCKER {
        self_test(&mut function, &bars.first().context("no BAR")?.1)?;
    }

    // A reset leaves a function that answers as before, and does nothing by itself.
    function.set_bus_master(true)?;
    function.interrupts(1)?;
    function.reset()?;
    ensure!(function.id()? == id, "the function does not answer after its reset");
    let command = function.config_read(config::COMMAND, Width::Two)?;
    ensure!(command & config::COMMAND_MASTER == 0, "bus mastering is on after a reset");
    let (index, bar) = bars.first().context("no BAR")?;
    println!("reset; BAR {index} begins with {:#x}", function.bar(*index)?.read32(0)?);
    ensure!(bar.read32(0)? == function.bar(*index)?.read32(0)?, "the old mapping is of something else");
    if id == ROCKER {
        self_test(&mut function, bar)?;
    }
    println!("ok");
    Ok(())
}

/// DMA memory: zeroed, page by page under an address of its own, given back in any order.
fn memory(function: &mut VfioFunction) -> Result<()> {
    let mut held = Vec::new();
    let mut starts = HashSet::new();
    for round in 0..64usize {
        let memory = function.dma_alloc(1 + round * 1500)?;
        ensure!(memory.iova() % 4096 == 0 && memory.iova() >= 1 << 32, "IOVA {:#x}", memory.iova());
        ensure!(memory.iova() + memory.len() as u64 <= 1 << 39, "IOVA {:#x}", memory.iova());
        ensure!(starts.insert(memory.iova()), "IOVA {:#x} twice", memory.iova());
        ensure!(memory.load_u8(round * 1500)? == 0, "not zeroed");
        held.push(memory);
        if round % 3 == 2 {
            starts.remove(&held.swap_remove(round / 3).iova());
        }
    }
    println!("DMA memory: {} pieces at once", held.len());
    Ok(())
}

/// Rocker's own tests: each interrupt alone, and DMA to memory that it reaches.
fn self_test(function: &mut VfioFunction, bar: &Bar) -> Result<()> {
    /// Fires a vector.
    const TEST_IRQ: u64 = 0x0020;
    const TEST_DMA_ADDRESS: u64 = 0x0028;
    const TEST_DMA_SIZE: u64 = 0x0030;
    const TEST_DMA_CONTROL: u64 = 0x0034;
    /// What DMA tests fire.
    const VECTOR: usize = 2;
    const PORTS: u64 = 0x0304;
    function.set_bus_master(true)?;
    let vectors = 4 + 2 * bar.read32(PORTS)?;
    let events = function.interrupts(vectors as u16)?;
    let wait = |vector: usize| -> Result<()> {
        let begin = Instant::now();
        while !fired(&events[vector]) {
            ensure!(begin.elapsed() < DEADLINE, "no interrupt {vector}");
            std::thread::yield_now();
        }
        let others: Vec<usize> = (0..events.len()).filter(|&other| fired(&events[other])).collect();
        ensure!(others.is_empty(), "interrupt {vector} came with {others:?}");
        Ok(())
    };
    for round in 0..3 * vectors {
        bar.write32(TEST_IRQ, round % vectors)?;
        wait((round % vectors) as usize)?;
    }
    // Across pages, and not from the start of one.
    let (offset, len) = (256usize, 60_000usize);
    let memory = function.dma_alloc(64 << 10)?;
    for (control, expected) in [(2, 0x96), (4, !0x96u8), (1, 0)] {
        bar.write64(TEST_DMA_ADDRESS, memory.iova() + offset as u64)?;
        bar.write32(TEST_DMA_SIZE, len as u32)?;
        bar.write32(TEST_DMA_CONTROL, control)?;
        wait(VECTOR)?;
        let mut bytes = vec![0; memory.len()];
        memory.read(0, &mut bytes)?;
        let right = |(at, &byte): (usize, &u8)| {
            byte == if (offset..offset + len).contains(&at) { expected } else { 0 }
        };
        ensure!(bytes.iter().enumerate().all(right), "DMA test {control} has gone wrong");
    }
    // Without bus mastering nothing is written.
    function.set_bus_master(false)?;
    bar.write32(TEST_DMA_CONTROL, 2)?;
    ensure!(memory.load_u8(offset)? == 0, "DMA without bus mastering");
    println!("self test: {vectors} interrupts, DMA");
    Ok(())
}

/// A NIC that is served.
struct Server {
    // It resets the switch when it goes; before that the rings of `io` are the switch's.
    flows: Option<Box<dyn FlowOffload>>,
    io: Box<dyn PacketIo>,
    /// Frames found after a sleep that no interrupt has ended.
    late: u64,
}

fn serve(address: &str, forward: &[(u32, u32)]) -> Result<()> {
    let mut function = open(address, false)?;
    let mut server = match function.id()? {
        ROCKER => {
            let (ports, flows) = rocker::open(Box::new(function), rocker::Config::default())?;
            Server { flows: Some(Box::new(flows)), io: Box::new(ports), late: 0 }
        }
        _ => {
            let igb = Igb::open(Box::new(function), igb::Config::default())?;
            Server { flows: None, io: Box::new(igb), late: 0 }
        }
    };
    for (number, &(from, to)) in (1..).zip(forward) {
        server.insert(number, from, to)?;
    }
    for port in server.io.ports() {
        said(port.number, port.link.up);
    }
    server.run()
}

fn said(port: u32, up: bool) {
    println!("port {port} {}", if up { "up" } else { "down" });
}

impl Server {
    /// Inserts a rule, and waits until the switch has it.
    fn insert(&mut self, number: u64, from: u32, to: u32) -> Result<()> {
        let flows = self.flows.as_mut().context("the device forwards nothing")?;
        let port = |number: u32| PortId { slot: number + 100, generation: 1 };
        let ports = PortMap::new(self.io.ports().iter().map(|known| (port(known.number), known.number)));
        let mut matches = Match::default();
        for (field, value) in [
            (Field::InPort, port(from).slot.into()),
            (Field::RecircId, 0),
            (Field::EthDst, u128::from(STATION)),
            (Field::EthType, EXPERIMENT.into()),
            (Field::VlanTci, 0),
            (Field::VlanTpid, 0),
        ] {
            matches.key.set(field, value);
            matches.mask.set_exact(field);
        }
        let actions = [Action::Output(PortRef::Ours(port(to)))];
        let rule = FlowRule { matches: &matches, actions: &actions, ports: &ports };
        let plan = flows.compile(&rule).map_err(|refusal| anyhow::anyhow!("{refusal}"))?;
        flows.insert(RuleId(number), plan, Token(number))?;
        let (begin, mut events) = (Instant::now(), Vec::new());
        while begin.elapsed() < DEADLINE {
            flows.kick(Instant::now());
            flows.poll(Instant::now(), &mut events);
            match events.pop() {
                None => {}
                Some(Event::Done { result, .. }) => return Ok(result?),
                Some(other) => bail!("{other:?}"),
            }
        }
        bail!("the switch does not take a rule")
    }

    fn run(mut self) -> Result<()> {
        let (mut events, mut answers) = (Vec::new(), Vec::new());
        let mut slept = false;
        loop {
            let mut stop = false;
            let count = self.io.receive(64, &mut |received| {
                let frame = received.frame;
                stop |= frame.get(14..14 + STOP.len()) == Some(STOP);
                let (addresses, rest) = frame.split_at(12);
                answers.push((received.port, [&addresses[6..], &addresses[..6], rest].concat()));
            })?;
            if std::mem::take(&mut slept) {
                self.late += count as u64;
            }
            for (port, frame) in answers.drain(..) {
                self.io.send(port, &[&frame], &Offload::default())?;
            }
            self.io.flush()?;
            self.io.poll_events(&mut events)?;
            for event in events.drain(..) {
                match event {
                    PortEvent::Link { number, link } => said(number, link.up),
                    PortEvent::Reset => println!("reset"),
                }
            }
            if let Some(flows) = &mut self.flows {
                flows.kick(Instant::now());
                flows.poll(Instant::now(), &mut Vec::new());
            }
            if stop {
                return self.end();
            }
            if count == 0 && self.io.arm()? {
                let waiting = self.io.interrupts();
                let mut polled: Vec<PollFd<'_>> =
                    waiting.iter().map(|event| PollFd::new(event, PollFlags::IN)).collect();
                poll(&mut polled, Some(&SLEEP))?;
                let came =
                    waiting.iter().filter(|event| rustix::io::read(event, &mut [0; 8]).is_ok()).count();
                slept = came == 0;
            }
        }
    }

    /// Says what has passed, once all that was given to the device is sent.
    fn end(mut self) -> Result<()> {
        let numbers: Vec<u32> = self.io.ports().iter().map(|port| port.number).collect();
        let begin = Instant::now();
        for number in numbers {
            loop {
                self.io.flush()?;
                let counters = self.io.counters(number).context("counters")?;
                if counters.sent == counters.received {
                    println!("port {number}: {counters:?}");
                    break;
                }
                ensure!(begin.elapsed() < DEADLINE, "port {number}: {counters:?}");
            }
        }
        println!("{} frames without an interrupt", self.late);
        Ok(())
    }
}
