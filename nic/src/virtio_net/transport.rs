//! Virtio over PCI: where the device's structures are, features, status, and queues (virtio 1.2 §4.1).

use std::time::{Duration, Instant};

use crate::io::NicError;
use crate::pci::{BadAccess, Bar, PciError, PciFunction, Width, config};

use super::regs::{NO_VECTOR, cap, common, status};
use super::ring::Ring;

/// How long a reset may take.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often the configuration is read before it is taken for one that never rests.
const READS: usize = 16;

/// A structure of the device: a part of a BAR.
#[derive(Clone, Debug)]
pub(super) struct Window {
    bar: Bar,
    base: u64,
    len: u64,
}

impl Window {
    fn at(&self, offset: u64, width: u64) -> Result<u64, PciError> {
        match offset.checked_add(width) {
            Some(end) if end <= self.len => Ok(self.base + offset),
            _ => {
                let (offset, width, len) = (offset as usize, width as usize, self.len as usize);
                Err(BadAccess { offset, width, len }.into())
            }
        }
    }

    pub fn read8(&self, offset: u64) -> Result<u8, PciError> {
        self.bar.read8(self.at(offset, 1)?)
    }

    pub fn read16(&self, offset: u64) -> Result<u16, PciError> {
        self.bar.read16(self.at(offset, 2)?)
    }

    pub fn read32(&self, offset: u64) -> Result<u32, PciError> {
        self.bar.read32(self.at(offset, 4)?)
    }

    fn write8(&self, offset: u64, value: u8) -> Result<(), PciError> {
        self.bar.write8(self.at(offset, 1)?, value)
    }

    pub fn write16(&self, offset: u64, value: u16) -> Result<(), PciError> {
        self.bar.write16(self.at(offset, 2)?, value)
    }

    fn write32(&self, offset: u64, value: u32) -> Result<(), PciError> {
        self.bar.write32(self.at(offset, 4)?, value)
    }

    /// 64 bits, as two halves: the only width of which all devices are sure.
    fn write64(&self, offset: u64, value: u64) -> Result<(), PciError> {
        self.write32(offset, value as u32)?;
        self.write32(offset + 4, (value >> 32) as u32)
    }
}

/// The structures of a device. Interrupts come by MSI-X, so the one for the line interrupt is not among them.
#[derive(Debug)]
pub(super) struct Transport {
    common: Window,
    notify: Window,
    multiplier: u64,
    device: Window,
}

impl Transport {
    /// Finds the structures by the function's capabilities: the first of each kind that can be (virtio 1.2 §4.1.4.1).
    pub fn find(function: &mut dyn PciFunction) -> Result<Transport, NicError> {
        let capabilities = config::capabilities(function)?;
        let mut found: [Option<(Window, u16)>; 5] = Default::default();
        for (id, at) in capabilities {
            if id != config::CAP_VENDOR {
                continue;
            }
            let mut byte = |offset| Ok::<_, PciError>(function.config_read(at + offset, Width::One)? as u8);
            let (len, kind, bar) = (byte(cap::LEN)?, byte(cap::TYPE)?, byte(cap::BAR)?);
            let needed = if kind == cap::NOTIFY { cap::MULTIPLIER + 4 } else { cap::MULTIPLIER };
            let Some(place) = found.get_mut(usize::from(kind)).filter(|place| place.is_none()) else {
                continue;
            };
            // The list of capabilities ends with configuration space, and a BAR above 5 is reserved.
            if u16::from(len) < needed || at + needed > 0x100 || bar > 5 {
                continue;
            }
            let offset = u64::from(function.config_read(at + cap::OFFSET, Width::Four)?);
            let len = u64::from(function.config_read(at + cap::LENGTH, Width::Four)?);
            let Ok(bar) = function.bar(bar) else { continue };
            if offset + len <= bar.size() {
                *place = Some((Window { bar, base: offset, len }, at));
            }
        }
        let mut take = |kind: u8, what: &str, len: u64| {
            let window = found.get_mut(usize::from(kind)).and_then(Option::take);
            let window = window.filter(|(window, _)| window.len >= len);
            window.ok_or_else(|| NicError::Device(format!("has no {what}")))
        };
        let (common, _) = take(cap::COMMON, "common configuration", common::LEN)?;
        let (device, _) = take(cap::DEVICE, "configuration of a network device", 0)?;
        let (notify, at) = take(cap::NOTIFY, "doorbells", 2)?;
        let multiplier = u64::from(function.config_read(at + cap::MULTIPLIER, Width::Four)?);
        Ok(Transport { common, notify, multiplier, device })
    }

    pub fn status(&self) -> Result<u8, PciError> {
        self.common.read8(common::STATUS)
    }

    /// Sets bits of the status; none are ever taken back but by [`Transport::reset`].
    pub fn add_status(&self, bits: u8) -> Result<(), PciError> {
        self.common.write8(common::STATUS, self.status()? | bits)
    }

    /// Resets the device and waits for it.
    pub fn reset(&self) -> Result<(), NicError> {
        self.common.write8(common::STATUS, 0)?;
        let deadline = Instant::now() + PATIENCE;
        while self.status()? != 0 {
            if Instant::now() >= deadline {
                return Err(NicError::Device("does not come out of reset".into()));
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    /// The features that the device offers.
    pub fn offered(&self) -> Result<u64, PciError> {
        let mut features = 0;
        for half in [0, 1] {
            self.common.write32(common::DEVICE_FEATURE_SELECT, half)?;
            features |= u64::from(self.common.read32(common::DEVICE_FEATURE)?) << (32 * half);
        }
        Ok(features)
    }

    /// Takes these features.
    pub fn accept(&self, features: u64) -> Result<(), NicError> {
        for half in [0, 1] {
            self.common.write32(common::DRIVER_FEATURE_SELECT, half)?;
            self.common.write32(common::DRIVER_FEATURE, (features >> (32 * half)) as u32)?;
        }
        self.add_status(status::FEATURES_OK)?;
        match self.status()? & status::FEATURES_OK {
            0 => Err(NicError::Device(format!("does not agree to features {features:#x} of its own"))),
            _ => Ok(()),
        }
    }

    /// Reads fields of the configuration that belong together.
    pub fn configuration<T>(&self, read: impl Fn(&Window) -> Result<T, PciError>) -> Result<T, NicError> {
        for _ in 0..READS {
            let before = self.common.read8(common::GENERATION)?;
            let value = read(&self.device)?;
            if self.common.read8(common::GENERATION)? == before {
                return Ok(value);
            }
        }
        Err(NicError::Device("changes its configuration all the time".into()))
    }

    /// Sets the vector of changes of the configuration.
    pub fn set_config_vector(&self, vector: u16) -> Result<(), NicError> {
        self.common.write16(common::CONFIG_VECTOR, vector)?;
        check_vector(self.common.read16(common::CONFIG_VECTOR)?)
    }

    /// The most slots that queue `index` can have.
    pub fn queue_size(&self, index: u16) -> Result<u16, NicError> {
        if self.common.read16(common::QUEUES)? <= index {
            return Err(NicError::Device(format!("has no queue {index}")));
        }
        self.common.write16(common::QUEUE_SELECT, index)?;
        Ok(self.common.read16(common::QUEUE_SIZE)?)
    }

    /// Gives an empty ring to the device as queue `index`.
    pub fn enable(&self, index: u16, ring: &mut Ring, vector: u16) -> Result<(), NicError> {
        let common = &self.common;
        let most = self.queue_size(index)?;
        if ring.size() > most {
            return Err(NicError::Device(format!("has room for {most} slots in queue {index} now")));
        }
        common.write16(common::QUEUE_SIZE, ring.size())?;
        common.write16(common::QUEUE_VECTOR, vector)?;
        check_vector(common.read16(common::QUEUE_VECTOR)?)?;
        let [descriptors, available, used] = ring.places();
        common.write64(common::QUEUE_DESCRIPTORS, descriptors)?;
        common.write64(common::QUEUE_AVAILABLE, available)?;
        common.write64(common::QUEUE_USED, used)?;
        // At most 32 bits times 16, so there is no overflow; what is beyond the structure is found by the first ring.
        let doorbell = u64::from(common.read16(common::QUEUE_NOTIFY)?) * self.multiplier;
        self.notify.at(doorbell, 2)?;
        ring.set_doorbell(self.notify.clone(), doorbell, index);
        common.write16(common::QUEUE_ENABLE, 1)?;
        Ok(())
    }
}

fn check_vector(vector: u16) -> Result<(), NicError> {
    match vector {
        NO_VECTOR => Err(NicError::Device("has no interrupt vector left".into())),
        _ => Ok(()),
    }
}
