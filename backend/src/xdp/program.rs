//! The XDP program of a port and the classes of packets that it takes (its source is program.c).

use super::XdpError;
use aya::maps::{Array, HashMap, MapData, MapError, XskMap};
use aya::programs::links::FdLink;
use aya::programs::{ProgramError, Xdp, XdpMode};
use aya::{Ebpf, EbpfLoader};
use rustix::fd::{AsFd, OwnedFd};
use std::io;
use std::net::IpAddr;

/// program.c, compiled by scripts/build-xdp.
static OBJECT: &[u8] = include_bytes!("program.o");

/// Queues that the program can have sockets for.
pub(super) const MAX_QUEUES: u32 = 64;

const NO_VLAN: u16 = 0xffff;
const IPV4: [u8; 2] = [0x08, 0x00];
const IPV6: [u8; 2] = [0x86, 0xdd];

/// Packets that the device hands to us instead of to the kernel. A VLAN of `None` means packets without a tag; of
/// packets with several, the outer one counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// Those to a hardware address.
    Mac {
        /// Destination.
        mac: [u8; 6],
        /// VLAN id.
        vlan: Option<u16>,
    },
    /// Those of an ethertype, which is the one behind the first tag.
    Ethertype {
        /// The ethertype.
        ethertype: u16,
        /// VLAN id.
        vlan: Option<u16>,
    },
    /// UDP to an endpoint of a tunnel. Fragments, and packets with IPv4 options or IPv6 extension headers, stay the
    /// kernel's.
    Tunnel {
        /// Destination address.
        address: IpAddr,
        /// UDP destination port.
        port: u16,
        /// VLAN id.
        vlan: Option<u16>,
    },
}

/// A class as the program looks for it: `struct mac_key`, `ethertype_key`, `tunnel_key`.
#[derive(Debug, PartialEq)]
enum Key {
    Mac([u8; 8]),
    Ethertype([u8; 4]),
    Tunnel([u8; 24]),
}

/// The bytes `parts`, one after the other, and zeroes to the end.
fn join<const N: usize>(parts: &[&[u8]]) -> [u8; N] {
    let mut key = [0; N];
    for (to, from) in key.iter_mut().zip(parts.iter().copied().flatten()) {
        *to = *from;
    }
    key
}

fn vlan_bytes(vlan: Option<u16>) -> [u8; 2] {
    vlan.unwrap_or(NO_VLAN).to_ne_bytes()
}

fn vlan_of(bytes: [u8; 2]) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes)).filter(|&vlan| vlan != NO_VLAN)
}

impl Class {
    fn key(&self) -> Result<Key, XdpError> {
        let (Class::Mac { vlan, .. } | Class::Ethertype { vlan, .. } | Class::Tunnel { vlan, .. }) = *self;
        if let Some(vlan) = vlan.filter(|&vlan| vlan > 4095) {
            return Err(XdpError::Vlan(vlan));
        }
        let vlan = vlan_bytes(vlan);
        Ok(match self {
            Class::Mac { mac, .. } => Key::Mac(join(&[mac, &vlan])),
            Class::Ethertype { ethertype, .. } => Key::Ethertype(join(&[&ethertype.to_be_bytes(), &vlan])),
            Class::Tunnel { address, port, .. } => {
                let (bytes, ethertype): ([u8; 16], _) = match address {
                    IpAddr::V4(v4) => (join(&[&v4.octets()]), IPV4),
                    IpAddr::V6(v6) => (v6.octets(), IPV6),
                };
                Key::Tunnel(join(&[&bytes, &port.to_be_bytes(), &vlan, &ethertype]))
            }
        })
    }

    fn from_mac_key([a, b, c, d, e, f, v, w]: [u8; 8]) -> Class {
        Class::Mac { mac: [a, b, c, d, e, f], vlan: vlan_of([v, w]) }
    }

    fn from_ethertype_key([e, f, v, w]: [u8; 4]) -> Class {
        Class::Ethertype { ethertype: u16::from_be_bytes([e, f]), vlan: vlan_of([v, w]) }
    }

    fn from_tunnel_key(key: [u8; 24]) -> Class {
        let (address, rest) = (join::<16>(&[&key]), join::<6>(&[&key[16..]]));
        let [p, q, v, w, ethertype @ ..] = rest;
        let address = if ethertype == IPV4 { join::<4>(&[&address]).into() } else { IpAddr::from(address) };
        Class::Tunnel { address, port: u16::from_be_bytes([p, q]), vlan: vlan_of([v, w]) }
    }
}

/// The classes of packets that a device hands to us. What is not in here stays with the kernel.
pub struct Classes {
    everything: Array<MapData, u32>,
    macs: HashMap<MapData, [u8; 8], u8>,
    ethertypes: HashMap<MapData, [u8; 4], u8>,
    tunnels: HashMap<MapData, [u8; 24], u8>,
}

fn map_error(error: MapError) -> XdpError {
    XdpError::Classes(match error {
        MapError::SyscallError(error) => error.io_error.to_string(),
        other => other.to_string(),
    })
}

impl Classes {
    /// Takes a class; it does not matter if it was taken already. Packets change over at once.
    ///
    /// # Errors
    /// A VLAN id above 4095; or the map is full, at 65536 classes of a kind.
    pub fn insert(&mut self, class: Class) -> Result<(), XdpError> {
        match class.key()? {
            Key::Mac(key) => self.macs.insert(key, 1, 0),
            Key::Ethertype(key) => self.ethertypes.insert(key, 1, 0),
            Key::Tunnel(key) => self.tunnels.insert(key, 1, 0),
        }
        .map_err(map_error)
    }

    /// Leaves a class to the kernel again. Gives whether it was taken.
    ///
    /// # Errors
    /// A VLAN id above 4095.
    pub fn remove(&mut self, class: Class) -> Result<bool, XdpError> {
        let removed = match class.key()? {
            Key::Mac(key) => self.macs.remove(&key),
            Key::Ethertype(key) => self.ethertypes.remove(&key),
            Key::Tunnel(key) => self.tunnels.remove(&key),
        };
        match removed {
            Ok(()) => Ok(true),
            Err(error) if is_absent(&error) => Ok(false),
            Err(error) => Err(map_error(error)),
        }
    }

    /// The classes that are taken, sorted.
    ///
    /// # Errors
    /// The kernel does not let us read.
    pub fn list(&self) -> Result<Vec<Class>, XdpError> {
        let macs = self.macs.keys().map(|key| key.map(Class::from_mac_key));
        let ethertypes = self.ethertypes.keys().map(|key| key.map(Class::from_ethertype_key));
        let tunnels = self.tunnels.keys().map(|key| key.map(Class::from_tunnel_key));
        let mut list: Vec<Class> =
            macs.chain(ethertypes).chain(tunnels).collect::<Result<_, _>>().map_err(map_error)?;
        list.sort();
        Ok(list)
    }

    /// Takes every packet, or only the classes. Every packet is for a device that the host itself does not use.
    ///
    /// # Errors
    /// The kernel does not let us write.
    pub fn set_everything(&mut self, everything: bool) -> Result<(), XdpError> {
        self.everything.set(0, u32::from(everything), 0).map_err(map_error)
    }

    /// Whether every packet is taken.
    ///
    /// # Errors
    /// The kernel does not let us read.
    pub fn everything(&self) -> Result<bool, XdpError> {
        Ok(self.everything.get(&0, 0).map_err(map_error)? != 0)
    }
}

fn is_absent(error: &MapError) -> bool {
    match error {
        MapError::KeyNotFound | MapError::ElementNotFound => true,
        MapError::SyscallError(error) => error.io_error.raw_os_error() == Some(libc::ENOENT),
        _ => false,
    }
}

/// The loaded program. It is on its device while this exists, and no longer than the process.
pub(super) struct Program {
    /// Keeps the program, and those of its maps that are not taken out.
    ebpf: Ebpf,
    sockets: XskMap<MapData>,
    link: Option<FdLink>,
}

impl Program {
    /// Loads the program into the kernel, on no device yet, and gives it with its classes, of which it has none.
    ///
    /// # Errors
    /// [`XdpError::Permission`], or why the kernel does not take it.
    pub(super) fn load() -> Result<(Program, Classes), XdpError> {
        let mut loader = EbpfLoader::new();
        // The program uses no type of the kernel's, so there is no need to read them all.
        loader.btf(None);
        let mut ebpf = loader.load(OBJECT).map_err(|error| refused(&error))?;
        let mut take = |name: &str| {
            ebpf.take_map(name).ok_or_else(|| XdpError::Program(format!("the program has no map '{name}'")))
        };
        let sockets = XskMap::try_from(take("sockets")?).map_err(map_error)?;
        let classes = Classes {
            everything: take("everything")?.try_into().map_err(map_error)?,
            macs: take("macs")?.try_into().map_err(map_error)?,
            ethertypes: take("ethertypes")?.try_into().map_err(map_error)?,
            tunnels: take("tunnels")?.try_into().map_err(map_error)?,
        };
        let mut program = Program { ebpf, sockets, link: None };
        program.xdp()?.load().map_err(|error| refused(&error))?;
        Ok((program, classes))
    }

    fn xdp(&mut self) -> Result<&mut Xdp, XdpError> {
        let program = self.ebpf.program_mut("pointwork");
        let program = program.ok_or_else(|| XdpError::Program("the object has no program".into()))?;
        program.try_into().map_err(|error: ProgramError| XdpError::Program(error.to_string()))
    }

    /// Puts the program on a device, in native or generic mode, by a BPF link.
    ///
    /// # Errors
    /// What the kernel or driver says: `EBUSY` or `EEXIST` if there is a program already, `EOPNOTSUPP` if the driver
    /// has no native mode.
    pub(super) fn attach(&mut self, device: u32, native: bool) -> Result<(), AttachError> {
        let mode = if native { XdpMode::Driver } else { XdpMode::Skb };
        let xdp = self.xdp().map_err(AttachError::Program)?;
        let id = xdp.attach_to_if_index(device, mode).map_err(|error| match io_error(&error) {
            Some(error) => AttachError::Kernel(error),
            None => AttachError::Program(XdpError::Program(error.to_string())),
        })?;
        let link = xdp.take_link(id).and_then(|link| {
            // Anything else would outlive a process that dies. It is detached when dropped.
            FdLink::try_from(link).map_err(|error| ProgramError::IOError(io::Error::other(error)))
        });
        self.link = Some(link.map_err(|error| AttachError::Program(XdpError::Program(error.to_string())))?);
        Ok(())
    }

    /// Takes the program off its device.
    pub(super) fn detach(&mut self) {
        self.link = None;
    }

    /// Says which socket gets the packets of a queue.
    ///
    /// # Errors
    /// There is no such queue in the map, or the socket is not bound.
    pub(super) fn set_socket(&mut self, queue: u32, fd: &OwnedFd) -> Result<(), XdpError> {
        self.sockets.set(queue, fd.as_fd(), 0).map_err(map_error)
    }

    /// Leaves a queue's packets to the kernel.
    pub(super) fn unset_socket(&mut self, queue: u32) {
        // What fails is that there is none.
        let _ = self.sockets.unset(queue);
    }
}

/// Why a program is not on a device.
#[derive(Debug)]
pub(super) enum AttachError {
    /// The kernel's word.
    Kernel(io::Error),
    /// A defect of our own.
    Program(XdpError),
}

/// What the kernel has said, somewhere in the chain of errors.
fn io_error(error: &(dyn std::error::Error + 'static)) -> Option<io::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(code) = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
            return Some(io::Error::from_raw_os_error(code));
        }
        next = error.source();
    }
    None
}

fn refused(error: &(dyn std::error::Error + 'static)) -> XdpError {
    match io_error(error) {
        Some(error) if matches!(error.raw_os_error(), Some(libc::EPERM | libc::EACCES)) => {
            XdpError::Permission
        }
        Some(error) => XdpError::Program(format!("the kernel refuses the program: {error}")),
        None => XdpError::Program(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_hold_the_class() {
        let classes = [
            Class::Mac { mac: [2, 0, 0, 0, 0, 1], vlan: None },
            Class::Mac { mac: [2, 0, 0, 0, 0, 1], vlan: Some(0) },
            Class::Ethertype { ethertype: 0x88cc, vlan: Some(4095) },
            Class::Tunnel { address: "192.0.2.1".parse().unwrap(), port: 4789, vlan: None },
            Class::Tunnel { address: "2001:db8::1".parse().unwrap(), port: 6081, vlan: Some(7) },
            Class::Tunnel { address: "::".parse().unwrap(), port: 1, vlan: Some(7) },
        ];
        for class in classes {
            let back = match class.key().unwrap() {
                Key::Mac(key) => Class::from_mac_key(key),
                Key::Ethertype(key) => Class::from_ethertype_key(key),
                Key::Tunnel(key) => Class::from_tunnel_key(key),
            };
            assert_eq!(back, class);
        }
        assert!(matches!(classes[0].key(), Ok(Key::Mac([2, 0, 0, 0, 0, 1, 0xff, 0xff]))));
        assert!(Class::Ethertype { ethertype: 1, vlan: Some(4096) }.key().is_err());
    }

    /// The object was made from the source that is here: scripts/build-xdp puts that into it.
    #[test]
    fn the_object_is_of_this_source() {
        let source = include_bytes!("program.c");
        let found = OBJECT.windows(source.len()).any(|bytes| bytes == source);
        assert!(found, "program.c has changed: run scripts/build-xdp");
    }
}
