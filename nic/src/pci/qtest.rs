//! QEMU's device models as PCI functions, through the qtest socket (QEMU, docs/devel/testing/qtest.rst): no guest, no
//! kernel, no IOMMU. It is for tests.
//!
//! The machine is a `q35` whose processor halts at once and whose memory is a file that this process maps too, so that
//! DMA memory is plain memory on both sides and an IOVA is a guest-physical address. A message-signalled interrupt is a
//! write like any other: vectors are pointed at words of that memory, and a thread turns what is written there into
//! eventfds.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::OwnedFd;

use super::{Bar, DmaMemory, Mapping, PciError, PciFunction, Ranges, Registers, Width, config};

/// Where BARs are put: below the chipset's own devices, above the machine's memory.
const WINDOW: (u64, u64) = (0xe000_0000, 0xfe9f_ffff);
/// The first MiB is left to what a machine expects there.
const FIRST_IOVA: u64 = 1 << 20;

/// A machine, by its qtest socket. Several functions may share it.
#[derive(Debug)]
pub struct Qtest {
    socket: Mutex<BufReader<UnixStream>>,
    memory: Arc<Mapping>,
    iovas: Mutex<Ranges>,
    window: Mutex<Ranges>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Qtest {
    /// Speaks qtest on `socket` to a machine whose memory begins with all of `memory`.
    pub fn new(socket: UnixStream, memory: Mapping) -> Result<Arc<Qtest>, PciError> {
        let timeout = Some(Duration::from_secs(60));
        socket.set_read_timeout(timeout).map_err(|cause| PciError::transport("qtest socket", cause))?;
        let iovas = Ranges::new([(FIRST_IOVA, memory.len() as u64 - 1)]);
        Ok(Arc::new(Qtest {
            socket: Mutex::new(BufReader::new(socket)),
            memory: Arc::new(memory),
            iovas: Mutex::new(iovas),
            window: Mutex::new(Ranges::new([WINDOW])),
        }))
    }

    /// Sends one command and returns the words after `OK`.
    pub fn command(&self, command: &str) -> Result<String, PciError> {
        let failed = |cause: io::Error| PciError::transport(format!("qtest: {command}"), cause);
        let mut socket = lock(&self.socket);
        socket.get_mut().write_all(format!("{command}\n").as_bytes()).map_err(failed)?;
        loop {
            let mut line = String::new();
            if socket.read_line(&mut line).map_err(failed)? == 0 {
                return Err(failed(io::ErrorKind::UnexpectedEof.into()));
            }
            match line.trim_end().split_once(' ').unwrap_or((line.trim_end(), "")) {
                ("OK", rest) => return Ok(rest.to_owned()),
                // An intercepted interrupt line changed.
                ("IRQ", _) => {}
                _ => return Err(failed(io::Error::other(line.trim_end().to_owned()))),
            }
        }
    }

    fn value(&self, command: &str) -> Result<u64, PciError> {
        let answer = self.command(command)?;
        u64::from_str_radix(answer.trim_start_matches("0x"), 16)
            .map_err(|_| PciError::transport(format!("qtest: {command}"), io::Error::other(answer)))
    }

    fn read(&self, address: u64, width: Width) -> Result<u64, PciError> {
        let letter = ["b", "w", "l", "q"][(width as u8).trailing_zeros() as usize & 3];
        self.value(&format!("read{letter} {address:#x}"))
    }

    fn write(&self, address: u64, width: Width, value: u64) -> Result<(), PciError> {
        let letter = ["b", "w", "l", "q"][(width as u8).trailing_zeros() as usize & 3];
        let value = if width == Width::Eight { value } else { value & ((1 << (8 * width as u32)) - 1) };
        self.command(&format!("write{letter} {address:#x} {value:#x}")).map(drop)
    }

    fn allocate(self: &Arc<Self>, len: usize) -> Result<DmaMemory, PciError> {
        let size = len.checked_next_multiple_of(4096).filter(|&size| size > 0);
        let size = size.ok_or(PciError::NoDmaSpace(len))?;
        let iova = lock(&self.iovas).allocate(size as u64, 4096).ok_or(PciError::NoDmaSpace(len))?;
        let machine = self.clone();
        let release = Box::new(move |iova| {
            lock(&machine.iovas).release(iova);
        });
        let memory = DmaMemory::new(self.memory.clone(), iova as usize, len, iova, release);
        memory.clear()?;
        Ok(memory)
    }
}

/// A PCI function of a [`Qtest`] machine.
#[derive(Debug)]
pub struct QtestFunction {
    machine: Arc<Qtest>,
    /// Bus, device and function as configuration mechanism #1 wants them.
    address: u32,
    /// Where each BAR is, and its size.
    bars: [Option<(u64, u64)>; 6],
    watch: Option<Watch>,
}

impl QtestFunction {
    /// Takes device `device`, function `function` of bus 0 up: its BARs get addresses.
    pub fn new(machine: Arc<Qtest>, device: u8, function: u8) -> Result<QtestFunction, PciError> {
        let address = 1 << 31 | u32::from(device & 31) << 11 | u32::from(function & 7) << 8;
        let mut function = QtestFunction { machine, address, bars: [None; 6], watch: None };
        if function.id()?.0 == 0xffff {
            return Err(PciError::transport("configuration space", io::ErrorKind::NotFound));
        }
        let mut index = 0;
        while index < 6 {
            index += function.place(index)?;
        }
        Ok(function)
    }

    /// Gives BAR `index` an address and returns how many registers it takes.
    fn place(&mut self, index: u16) -> Result<u16, PciError> {
        let register = config::BAR0 + 4 * index;
        let kind = self.config_read(register, Width::Four)?;
        self.config_write(register, Width::Four, u32::MAX)?;
        let low = self.config_read(register, Width::Four)?;
        // Bit 0: I/O space, which nobody uses. Bits 1 and 2: 64 bits wide.
        if low == 0 || kind & 1 != 0 {
            return Ok(1);
        }
        let wide = kind & 0b110 == 0b100;
        let size = u64::from(!(low & !0xf)) + 1;
        let base = lock(&self.machine.window)
            .allocate(size, size)
            .ok_or_else(|| PciError::transport("placing a BAR", io::ErrorKind::OutOfMemory))?;
        self.config_write(register, Width::Four, base as u32)?;
        if wide {
            self.config_write(register + 4, Width::Four, (base >> 32) as u32)?;
        }
        if let Some(bar) = self.bars.get_mut(usize::from(index)) {
            *bar = Some((base, size));
        }
        Ok(if wide { 2 } else { 1 })
    }

    /// The MSI-X table as registers, and the number of vectors (PCI Local Bus Specification 3.0, 6.8.2).
    fn msix(&mut self) -> Result<(Bar, u16), PciError> {
        let capabilities = config::capabilities(self)?;
        let missing = PciError::Interrupts { asked: 1, available: 0 };
        let (_, at) = capabilities.into_iter().find(|&(id, _)| id == config::CAP_MSIX).ok_or(missing)?;
        let vectors = (self.config_read(at + 2, Width::Two)? & 0x7ff) as u16 + 1;
        let table = self.config_read(at + 4, Width::Four)?;
        let (bar, offset) = ((table & 7) as u8, u64::from(table & !7));
        let (base, size) = self.place_of(bar)?;
        let left = size.checked_sub(offset).ok_or(PciError::NoBar(bar))?;
        let window = Window { machine: self.machine.clone(), base: base + offset, size: left };
        Ok((Bar::new(Arc::new(window)), vectors))
    }

    fn place_of(&self, index: u8) -> Result<(u64, u64), PciError> {
        self.bars.get(usize::from(index)).copied().flatten().ok_or(PciError::NoBar(index))
    }

    fn enable_msix(&mut self, on: bool) -> Result<(), PciError> {
        for (id, at) in config::capabilities(self)? {
            if id == config::CAP_MSIX {
                let control = self.config_read(at + 2, Width::Two)?;
                let control = control & !0xc000 | if on { 0x8000 } else { 0 };
                self.config_write(at + 2, Width::Two, control)?;
            }
        }
        Ok(())
    }
}

impl PciFunction for QtestFunction {
    fn config_read(&mut self, offset: u16, width: Width) -> Result<u32, PciError> {
        let letter = match width {
            Width::One => "b",
            Width::Two => "w",
            _ => "l",
        };
        let address = self.address | u32::from(offset & 0xfc);
        self.machine.command(&format!("outl 0xcf8 {address:#x}"))?;
        Ok(self.machine.value(&format!("in{letter} {:#x}", 0xcfc + (offset & 3)))? as u32)
    }

    fn config_write(&mut self, offset: u16, width: Width, value: u32) -> Result<(), PciError> {
        let letter = match width {
            Width::One => "b",
            Width::Two => "w",
            _ => "l",
        };
        let address = self.address | u32::from(offset & 0xfc);
        self.machine.command(&format!("outl 0xcf8 {address:#x}"))?;
        self.machine.command(&format!("out{letter} {:#x} {value:#x}", 0xcfc + (offset & 3))).map(drop)
    }

    fn bar(&mut self, index: u8) -> Result<Bar, PciError> {
        let (base, size) = self.place_of(index)?;
        let command = self.config_read(config::COMMAND, Width::Two)?;
        self.config_write(config::COMMAND, Width::Two, command | config::COMMAND_MEMORY)?;
        Ok(Bar::new(Arc::new(Window { machine: self.machine.clone(), base, size })))
    }

    fn dma_alloc(&mut self, len: usize) -> Result<DmaMemory, PciError> {
        self.machine.allocate(len)
    }

    fn interrupts(&mut self, vectors: u16) -> Result<Vec<OwnedFd>, PciError> {
        self.watch = None;
        let (table, available) = self.msix()?;
        if vectors > available {
            return Err(PciError::Interrupts { asked: vectors, available });
        }
        let command = self.config_read(config::COMMAND, Width::Two)?;
        self.config_write(config::COMMAND, Width::Two, command | config::COMMAND_MEMORY)?;
        let words = self.machine.allocate(usize::from(vectors).max(1) * 4)?;
        for vector in 0..available {
            let entry = u64::from(vector) * 16;
            if vector >= vectors {
                table.write32(entry + 12, 1)?;
                continue;
            }
            let address = words.iova() + u64::from(vector) * 4;
            table.write32(entry, address as u32)?;
            table.write32(entry + 4, (address >> 32) as u32)?;
            table.write32(entry + 8, 1)?;
            table.write32(entry + 12, 0)?;
        }
        self.enable_msix(true)?;
        let failed = |cause: io::Error| PciError::transport("eventfd", cause);
        let mut ours = Vec::new();
        let mut theirs = Vec::new();
        for _ in 0..vectors {
            let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
            let event = eventfd(0, flags).map_err(|cause| failed(cause.into()))?;
            theirs.push(event.try_clone().map_err(failed)?);
            ours.push(event);
        }
        self.watch = Some(Watch::start(words, ours).map_err(failed)?);
        Ok(theirs)
    }

    /// Conventional devices have no reset of their own here: QEMU's are reset through their registers.
    fn reset(&mut self) -> Result<(), PciError> {
        Err(PciError::NoReset)
    }
}

impl Drop for QtestFunction {
    fn drop(&mut self) {
        // The machine may be gone already, and then there is nothing to be done.
        let _ = self.enable_msix(false).and_then(|()| self.set_bus_master(false));
        for (base, _) in self.bars.into_iter().flatten() {
            lock(&self.machine.window).release(base);
        }
    }
}

/// A BAR, or a part of one.
#[derive(Debug)]
struct Window {
    machine: Arc<Qtest>,
    base: u64,
    size: u64,
}

impl Window {
    fn at(&self, offset: u64, width: Width) -> Result<u64, PciError> {
        let bytes = width as usize;
        match offset.checked_add(bytes as u64) {
            Some(end) if end <= self.size && offset.is_multiple_of(bytes as u64) => Ok(self.base + offset),
            _ => {
                let (offset, len) = (offset as usize, self.size as usize);
                Err(super::BadAccess { offset, width: bytes, len }.into())
            }
        }
    }
}

impl Registers for Window {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, width: Width) -> Result<u64, PciError> {
        self.machine.read(self.at(offset, width)?, width)
    }

    fn write(&self, offset: u64, width: Width, value: u64) -> Result<(), PciError> {
        self.machine.write(self.at(offset, width)?, width, value)
    }
}

/// The thread that makes eventfds of interrupts.
#[derive(Debug)]
struct Watch {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    fn start(words: DmaMemory, events: Vec<OwnedFd>) -> io::Result<Watch> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::Builder::new().name("qtest-irq".into()).spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                for (vector, event) in events.iter().enumerate() {
                    if words.swap_u32(vector * 4, 0).is_ok_and(|word| word != 0) {
                        // An eventfd whose count is full says all that there is to say.
                        let _ = rustix::io::write(event, &1u64.to_ne_bytes());
                    }
                }
                // Nobody says when a device writes to memory.
                std::thread::sleep(Duration::from_micros(200));
            }
        })?;
        Ok(Watch { stop, thread: Some(thread) })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
