//! A Linux network device as a port, through AF_XDP (Documentation/networking/af_xdp.rst).
//!
//! [`XdpPort::open`] puts an XDP program on the device and opens a socket for each of its queues. The program hands us
//! the [classes](Class) of packets that we ask for; everything else takes its usual way through the kernel, so the
//! device stays the host's. A queue has a receive side with one owner, [`XdpRx`], and a send side that workers share,
//! [`XdpTx`]; they have the shapes of a guest's rings ([`GuestTx`](crate::virtio::GuestTx),
//! [`GuestRx`](crate::virtio::GuestRx)).
//!
//! ```text
//!            device ──► XDP program ──class──► rx ring ──► XdpRx::receive ──► Burst ──► XdpRx::complete ─┐
//!                            │                    ▲                                                      │
//!                            └─other─► kernel     └────────────── driver ◄── fill ring ◄─────────────────┘
//!            device ◄── tx ring ◄── XdpTx::send (workers)          device ──► completion ring ──► XdpTx
//! ```
//! Nothing here keeps the device from working once we are gone: program and sockets end with the process.

mod device;
mod netlink;
mod program;
mod ring;
mod rx;
mod selection;
mod socket;
#[cfg(test)]
mod tests;
mod tx;
mod umem;
mod warnings;

pub use netlink::LinkNews;
pub use program::{Class, Classes};
pub use rx::{XdpLosses, XdpRx};
pub use selection::{MAX_CLASSES, Selection};
pub use tx::XdpTx;
pub(crate) use umem::Umem;

use device::Device;
use program::{AttachError, Program};
use rustix::net::xdp::SocketAddrXdpFlags;
use rx::SocketParts;
use socket::{HEADROOM, Layout, Socket};
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tx::{Limits, MAX_PIECES};
use warnings::Warned;

/// Queues that are opened if nobody says how many.
const DEFAULT_QUEUES: u32 = 8;
/// What a frame has beside the bytes that the MTU counts: the Ethernet header and two VLAN tags.
const LINK_HEADER: u32 = 22;
/// How long a device or queue is waited for that somebody has.
const PATIENCE: Duration = Duration::from_secs(1);
const SMALL_FRAME: u32 = 2048;
const LARGE_FRAME: u32 = 4096;

/// How packets get from the device to us, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum XdpMode {
    /// The driver runs the program, and the device reads and writes our memory.
    ZeroCopy,
    /// The driver runs the program; packets are copied.
    Copy,
    /// The kernel runs the program on its own packet buffers, which every device allows; packets are copied.
    Generic,
}

impl fmt::Display for XdpMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            XdpMode::ZeroCopy => "zero-copy",
            XdpMode::Copy => "copy",
            XdpMode::Generic => "generic",
        })
    }
}

/// What to open.
#[derive(Debug, Clone)]
pub struct XdpConfig {
    /// Name of the device, in the thread's network namespace.
    pub device: String,
    /// Queues to open, from 0 on. `None`: all that the device uses, at most 8.
    pub queues: Option<u32>,
    /// `None`: the best that works.
    pub mode: Option<XdpMode>,
    /// Whether only [classes](Class) of its packets are wanted, and the others stay the kernel's.
    pub selective: bool,
    /// UMEM frames of each queue that receive, those that the driver holds included; a power of two, 64 to 32768.
    pub rx_frames: u32,
    /// UMEM frames of each queue that send; a power of two, 64 to 32768.
    pub tx_frames: u32,
}

impl XdpConfig {
    /// The device with all that is usual: 12 MiB a queue, or 24 MiB with jumbo frames.
    pub fn new(device: impl Into<String>) -> XdpConfig {
        let (rx_frames, tx_frames) = (4096, 2048);
        XdpConfig { device: device.into(), queues: None, mode: None, selective: false, rx_frames, tx_frames }
    }
}

/// Why a device is not open, or a class not taken.
#[derive(Debug, thiserror::Error)]
pub enum XdpError {
    /// There is no such device in this network namespace.
    #[error("no network device '{0}'")]
    NoDevice(String),
    /// The kernel does not tell about the device.
    #[error("{device}: the kernel does not tell about it: {error}")]
    Ask {
        /// Name.
        device: String,
        /// The kernel's word.
        error: io::Error,
    },
    /// AF_XDP cannot serve the device.
    #[error("{device}: {reason}")]
    Unfit {
        /// Name.
        device: String,
        /// What is in the way, and what to do.
        reason: String,
    },
    /// Somebody else's program is there.
    #[error(
        "{device}: there is an XDP program on it already (id {program}); it has to go first: 'ip link set {device} xdp off', or end who has put it there"
    )]
    Occupied {
        /// Name.
        device: String,
        /// The kernel's number of the program, 0 if it does not tell.
        program: u32,
    },
    /// Rights are missing.
    #[error("AF_XDP needs the capabilities CAP_NET_RAW, CAP_NET_ADMIN, CAP_BPF and CAP_PERFMON")]
    Permission,
    /// The number of queues is impossible.
    #[error("{device}: {wanted} queues wanted, but it uses {has}")]
    Queues {
        /// Name.
        device: String,
        /// As configured.
        wanted: u32,
        /// Receive queues of the device.
        has: u32,
    },
    /// A number of frames is impossible.
    #[error("{0} UMEM frames: it must be a power of two from 64 to 32768")]
    Frames(u32),
    /// Another socket has the queue.
    #[error("{device}: another AF_XDP socket has queue {queue}")]
    QueueBusy {
        /// Name.
        device: String,
        /// Number.
        queue: u32,
    },
    /// The limit of locked memory.
    #[error(
        "{device}: UMEM is more memory than may be locked: raise LimitMEMLOCK, or lower the number of frames"
    )]
    LockedMemory {
        /// Name.
        device: String,
    },
    /// No mode works.
    #[error("{device}: cannot be opened: {reasons}")]
    NoMode {
        /// Name.
        device: String,
        /// What each mode failed with.
        reasons: String,
    },
    /// The program was not taken.
    #[error("XDP program: {0}")]
    Program(String),
    /// The kernel refused a change of the classes.
    #[error("classes of packets: {0}")]
    Classes(String),
    /// There is no such VLAN.
    #[error("VLAN {0}: it must be at most 4095")]
    Vlan(u16),
}

/// A device at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// Index in its network namespace, which no other device gets after it.
    pub index: u32,
    /// Bytes of a packet at most, without the link header.
    pub mtu: u32,
    /// Whether packets can go: it is up, and somebody is at the other end.
    pub up: bool,
}

impl Link {
    /// Looks at the device called `name`, in the thread's network namespace.
    ///
    /// # Errors
    /// [`XdpError::NoDevice`], [`XdpError::Ask`].
    pub fn look(name: &str) -> Result<Link, XdpError> {
        let device = Device::look(name)?;
        Ok(Link { index: device.index, mtu: device.mtu, up: device.up && device.carrier })
    }
}

/// An open device. Dropping it gives all packets back to the kernel; the sides of its queues end when they are dropped.
pub struct XdpPort {
    device: Device,
    mode: XdpMode,
    multi_buffer: bool,
    frame_size: u32,
    rx: Vec<Option<XdpRx>>,
    tx: Vec<Arc<XdpTx>>,
    classes: Arc<Mutex<Classes>>,
    selective: bool,
    /// Why better modes did not work.
    failures: Vec<String>,
    warnings: Vec<String>,
    /// On the device for as long as this exists.
    program: Program,
}

/// A way to open the device.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Attempt {
    mode: XdpMode,
    multi_buffer: bool,
}

/// All ways to try, best first. For frames larger than ours, taking them at all is worth more than taking them fast; for
/// others several buffers are of use where packets may come in merged, and cost nothing where they are copied anyway.
fn attempts(wanted: Option<XdpMode>, jumbo: bool) -> Vec<Attempt> {
    const MODES: [XdpMode; 3] = [XdpMode::ZeroCopy, XdpMode::Copy, XdpMode::Generic];
    let with = |multi_buffer| MODES.map(|mode| Attempt { mode, multi_buffer });
    let mut all = match jumbo {
        true => [with(true), with(false)].concat(),
        false => {
            std::iter::zip(with(true), with(false)).flat_map(|(many, one)| [many, one]).skip(1).collect()
        }
    };
    all.retain(|attempt| wanted.is_none_or(|mode| mode == attempt.mode));
    all
}

impl XdpPort {
    /// Opens a device. No packets come in before there are [`classes`](Self::classes). It may take a second if the device
    /// or a queue is not free.
    ///
    /// # Errors
    /// As [`XdpError`] lists; the device is then as it was.
    pub fn open(config: &XdpConfig) -> Result<XdpPort, XdpError> {
        for frames in [config.rx_frames, config.tx_frames] {
            if !frames.is_power_of_two() || !(64..=32768).contains(&frames) {
                return Err(XdpError::Frames(frames));
            }
        }
        let ask = || Device::ask(&config.device);
        let device = patiently(ask, |device| device.as_ref().is_ok_and(|device| device.program.is_some()))?;
        let name = || device.name.clone();
        if let Some(reason) = device.unfit() {
            return Err(XdpError::Unfit { device: name(), reason });
        }
        if let Some(program) = device.program {
            return Err(XdpError::Occupied { device: name(), program });
        }
        let queues = config.queues.unwrap_or(device.queues.min(DEFAULT_QUEUES));
        if queues == 0 || queues > device.queues.min(program::MAX_QUEUES) {
            return Err(XdpError::Queues { device: name(), wanted: queues, has: device.queues });
        }
        let max_len = device.mtu.saturating_add(LINK_HEADER);
        let frame_size = if max_len + HEADROOM <= SMALL_FRAME { SMALL_FRAME } else { LARGE_FRAME };
        let jumbo = max_len + HEADROOM > frame_size;
        let layout = Layout { frame_size, rx_frames: config.rx_frames, tx_frames: config.tx_frames };

        let (mut program, classes) = Program::load()?;
        let (attempt, sockets, failures) =
            open_sockets(&device, &mut program, queues, layout, &attempts(config.mode, jumbo))?;
        let zero_copy = attempt.mode == XdpMode::ZeroCopy;
        let max_pieces = match (attempt.multi_buffer, zero_copy) {
            (false, _) => 1,
            (true, false) => MAX_PIECES,
            (true, true) => device.zero_copy_pieces.min(MAX_PIECES),
        };
        let limits = Limits { max_len, max_pieces, zero_copy };
        let (mut rx, mut tx) = (vec![], vec![]);
        for (queue, socket) in (0..).zip(sockets) {
            program.set_socket(queue, &socket.fd)?;
            let parts = SocketParts::of(&socket, queue);
            let Socket { fill, completion, rx: received, tx: to_send, .. } = socket;
            let frames = layout.rx_frames..layout.rx_frames + layout.tx_frames;
            rx.push(Some(XdpRx::new(&parts, fill, received)));
            tx.push(Arc::new(XdpTx::new(&parts, frames, completion, to_send, limits)));
        }
        let Attempt { mode, multi_buffer } = attempt;
        let classes = Arc::new(Mutex::new(classes));
        let (selective, warnings) = (config.selective, vec![]);
        let mut port = XdpPort {
            device,
            mode,
            multi_buffer,
            frame_size,
            rx,
            tx,
            classes,
            selective,
            failures,
            warnings,
            program,
        };
        // The program has changed some of the device's settings.
        port.review()?;
        Ok(port)
    }

    /// Looks at the settings of the device again, which somebody may have changed; whether the
    /// [`warnings`](Self::warnings) have.
    ///
    /// # Errors
    /// [`XdpError::NoDevice`], [`XdpError::Ask`].
    pub fn review(&mut self) -> Result<bool, XdpError> {
        let now = Device::ask(&self.device.name)?;
        // These are as they were when it was opened.
        let Device { index, mac, mtu, .. } = self.device;
        self.device = Device { index, mac, mtu, ..now };
        let warned = Warned {
            device: &self.device,
            mode: self.mode,
            multi_buffer: self.multi_buffer,
            selective: self.selective,
            frame_size: self.frame_size,
            queues: self.queues(),
            failures: &self.failures,
        };
        let warnings = warned.list();
        let changed = warnings != self.warnings;
        self.warnings = warnings;
        Ok(changed)
    }

    /// Whether packets may have VLAN tags that nobody sees here.
    pub fn hides_tags(&self) -> bool {
        self.device.hides_tags().is_some()
    }

    /// Has the kernel keep all packets that come from now on.
    pub fn leave(&mut self) {
        (0..self.queues()).for_each(|queue| self.program.unset_socket(queue));
    }

    /// Which packets are taken: none, of a port that was just opened.
    pub fn classes(&mut self) -> MutexGuard<'_, Classes> {
        lock(&self.classes)
    }

    /// The same, for somebody else to change while the device is open.
    pub fn shared_classes(&self) -> Arc<Mutex<Classes>> {
        self.classes.clone()
    }

    /// Queues that are open.
    pub fn queues(&self) -> u32 {
        self.tx.len() as u32
    }

    /// The receive side of a queue, for whoever asks first.
    pub fn take_rx(&mut self, queue: u32) -> Option<XdpRx> {
        self.rx.get_mut(queue as usize)?.take()
    }

    /// The send side of a queue.
    pub fn tx(&self, queue: u32) -> Option<Arc<XdpTx>> {
        self.tx.get(queue as usize).cloned()
    }

    /// Name of the device.
    pub fn name(&self) -> &str {
        &self.device.name
    }

    /// Index of the device in its network namespace.
    pub fn index(&self) -> u32 {
        self.device.index
    }

    /// Hardware address of the device when it was opened.
    pub fn mac(&self) -> [u8; 6] {
        self.device.mac
    }

    /// Bytes of a packet at most, without the link header, when the device was opened. A change wants it opened anew.
    pub fn mtu(&self) -> u32 {
        self.device.mtu
    }

    /// How packets get to us.
    pub fn mode(&self) -> XdpMode {
        self.mode
    }

    /// Whether packets may be larger than a UMEM frame.
    pub fn multi_buffer(&self) -> bool {
        self.multi_buffer
    }

    /// What was chosen, in one line.
    pub fn describe(&self) -> String {
        let Self { mode, frame_size, .. } = self;
        let (queues, buffers) =
            (self.queues(), if self.multi_buffer { "multi-buffer" } else { "single-buffer" });
        let s = if queues == 1 { "" } else { "s" };
        format!(
            "{} by AF_XDP: {mode} mode, {queues} queue{s}, {frame_size}-byte frames, {buffers}",
            self.name()
        )
    }

    /// What is not as it should be, a line each: what was settled for, and settings of the device that AF_XDP cannot
    /// serve, with what to do about them. As it was when it was [looked at](Self::review) last.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

impl Drop for XdpPort {
    fn drop(&mut self) {
        // Workers may still have them, and a socket sends for as long as it is open.
        self.tx.iter().for_each(|tx| tx.stop());
        // The program goes with its last descriptor, which a child process may have until its `exec`. From here on it
        // leaves everything to the kernel.
        self.leave();
    }
}

/// A panic elsewhere has left whole values.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tries again for a while as long as the result is `busy`. What was just closed the kernel lets go of a moment later,
/// and a child process that had it too when it was started, at its `exec`.
fn patiently<T>(mut attempt: impl FnMut() -> T, busy: impl Fn(&T) -> bool) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let result = attempt();
        if !busy(&result) || Instant::now() > deadline {
            return result;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether `attach` has failed for a program that is there already.
fn is_occupied(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EEXIST))
}

/// Puts the program on the device and opens its queues, in the first way that works for all of them. Gives that, the
/// sockets, and why the better ways did not work.
fn open_sockets(
    device: &Device,
    program: &mut Program,
    queues: u32,
    layout: Layout,
    attempts: &[Attempt],
) -> Result<(Attempt, Vec<Socket>, Vec<String>), XdpError> {
    let name = || device.name.clone();
    let mut failures: Vec<String> = vec![];
    // Whether the program is on the device in native mode, in generic mode, or not at all.
    let (mut attached, mut no_native) = (None, false);
    for &attempt in attempts {
        let native = attempt.mode != XdpMode::Generic;
        if native && no_native {
            continue;
        }
        if attached != Some(native) {
            program.detach();
            attached = None;
            let busy = |result: &Result<(), AttachError>| matches!(result, Err(AttachError::Kernel(error)) if is_occupied(error));
            match patiently(|| program.attach(device.index, native), busy) {
                Ok(()) => attached = Some(native),
                Err(AttachError::Program(error)) => return Err(error),
                Err(AttachError::Kernel(error)) if is_occupied(&error) => {
                    return Err(XdpError::Occupied { device: name(), program: 0 });
                }
                Err(AttachError::Kernel(error)) => match error.raw_os_error() {
                    Some(libc::EPERM | libc::EACCES) => return Err(XdpError::Permission),
                    _ => {
                        failures.push(format!("{} XDP: {error}", if native { "native" } else { "generic" }));
                        no_native |= native;
                        continue;
                    }
                },
            }
        }
        let mut flags = SocketAddrXdpFlags::XDP_USE_NEED_WAKEUP;
        flags.set(SocketAddrXdpFlags::XDP_USE_SG, attempt.multi_buffer);
        flags |= match attempt.mode {
            XdpMode::ZeroCopy => SocketAddrXdpFlags::XDP_ZEROCOPY,
            XdpMode::Copy | XdpMode::Generic => SocketAddrXdpFlags::XDP_COPY,
        };
        let mut sockets = Vec::with_capacity(queues as usize);
        let failed = (0..queues).find_map(|queue| match Socket::open(device.index, queue, layout, flags) {
            Ok(socket) => {
                sockets.push(socket);
                None
            }
            Err(error) => Some((queue, error)),
        });
        let Some((queue, error)) = failed else { return Ok((attempt, sockets, failures)) };
        match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => return Err(XdpError::Permission),
            Some(libc::EBUSY) => return Err(XdpError::QueueBusy { device: name(), queue }),
            Some(libc::ENOBUFS) => return Err(XdpError::LockedMemory { device: name() }),
            _ => {
                let buffers = if attempt.multi_buffer { ", multi-buffer" } else { "" };
                failures.push(format!("{} mode{buffers}: {error}", attempt.mode));
            }
        }
    }
    Err(XdpError::NoMode { device: name(), reasons: failures.join("; ") })
}
