//! A function without a device, for unit tests: registers are a table, and a test plays the device by its hook.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::OwnedFd;

use super::{Bar, DmaMemory, Mapping, PciError, PciFunction, Registers, Width};

/// What a test does when the driver writes a register: called with offset and value after the value was stored.
pub(crate) type Hook = Box<dyn FnMut(&mut HashMap<u64, u64>, &Memory, u64, u64) + Send>;

/// The memory that the fake device reaches: IOVAs are offsets.
#[derive(Clone, Debug)]
pub(crate) struct Memory(pub Arc<Mapping>);

struct State {
    registers: HashMap<u64, u64>,
    hook: Hook,
    /// The register that is another one at each look.
    restless: Option<u64>,
}

/// Registers of the fake device.
struct FakeRegisters {
    state: Mutex<State>,
    memory: Memory,
    size: u64,
}

impl std::fmt::Debug for FakeRegisters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FakeRegisters")
    }
}

/// The function.
#[derive(Debug)]
pub(crate) struct Fake {
    config: [u8; 256],
    registers: Arc<FakeRegisters>,
    memory: Memory,
    next: usize,
}

impl Fake {
    /// A function with `id` (device id above vendor id), a BAR of `size` bytes that reads 0 or what `registers` says, and 2 MiB of memory.
    pub(crate) fn new(id: u32, size: u64, registers: HashMap<u64, u64>, hook: Hook) -> Fake {
        let memory = Memory(Arc::new(Mapping::anonymous(2 << 20, false).unwrap()));
        let state = Mutex::new(State { registers, hook, restless: None });
        let registers = Arc::new(FakeRegisters { state, memory: memory.clone(), size });
        let mut config = [0; 256];
        config[..4].copy_from_slice(&id.to_le_bytes());
        Fake { config, registers, memory, next: 4096 }
    }

    /// With these bytes in its configuration space.
    pub(crate) fn with_config(mut self, at: usize, bytes: &[u8]) -> Fake {
        self.config[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    /// With a register that changes each time it is read.
    pub(crate) fn with_restless(self, offset: u64) -> Fake {
        self.registers.state.lock().unwrap().restless = Some(offset);
        self
    }

    /// The memory that the device reaches.
    pub(crate) fn memory(&self) -> Memory {
        self.memory.clone()
    }
}

impl Registers for FakeRegisters {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, _: Width) -> Result<u64, PciError> {
        let state = &mut *self.state.lock().unwrap();
        if state.restless == Some(offset) {
            *state.registers.entry(offset).or_default() += 1;
        }
        Ok(state.registers.get(&offset).copied().unwrap_or(0))
    }

    fn write(&self, offset: u64, _: Width, value: u64) -> Result<(), PciError> {
        let state = &mut *self.state.lock().unwrap();
        state.registers.insert(offset, value);
        (state.hook)(&mut state.registers, &self.memory, offset, value);
        Ok(())
    }
}

impl PciFunction for Fake {
    fn config_read(&mut self, offset: u16, width: Width) -> Result<u32, PciError> {
        let bytes = self.config.iter().skip(offset.into()).take(width as usize);
        Ok(bytes.rev().fold(0, |value, &byte| value << 8 | u32::from(byte)))
    }

    fn config_write(&mut self, _: u16, _: Width, _: u32) -> Result<(), PciError> {
        Ok(())
    }

    fn bar(&mut self, _: u8) -> Result<Bar, PciError> {
        Ok(Bar::new(self.registers.clone()))
    }

    fn dma_alloc(&mut self, len: usize) -> Result<DmaMemory, PciError> {
        let at = self.next;
        self.next += len.next_multiple_of(4096);
        if self.next > self.memory.0.len() {
            return Err(PciError::NoDmaSpace(len));
        }
        Ok(DmaMemory::new(self.memory.0.clone(), at, len, at as u64, Box::new(|_| {})))
    }

    fn interrupts(&mut self, vectors: u16) -> Result<Vec<OwnedFd>, PciError> {
        Ok((0..vectors).map(|_| eventfd(0, EventfdFlags::NONBLOCK).unwrap()).collect())
    }

    fn reset(&mut self) -> Result<(), PciError> {
        Err(PciError::NoReset)
    }
}
