//! Whether OVS's userspace datapath reads the representors that there are.
//!
//! It reads a device by a packet socket, which is bound to the device of that moment. When a TAP is deleted and made again under
//! its name, the socket stays bound to what is gone: OVS shows the port, with all that belongs to it, and reads nothing. So
//! each new device is looked for among those that packet sockets are bound to, without a ring: OVS reads by system calls, and
//! who looks on, as `tcpdump` does, has a ring. (A kernel that does not tell has `/proc/net/packet`, where all are the same.)
//! One that has a port in the datapath, and no socket, is taken out there (`dpctl/del-if`); OVS puts in what its configuration
//! has and the datapath lacks as soon as any link of the host changes. The kernel's datapath needs nothing of that.

use super::unixctl::{DATAPATH, Ending, Unixctl, UnixctlError};
use crate::host::tap;
use crate::host_state;
use crate::wake::AbortOnPanic;
use log::{debug, info, warn};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long OVS may take to open a new device by itself, and how often it is looked after until it has.
const PATIENCE: Duration = Duration::from_millis(1500);
/// How often a device is taken out, in a time that doubles from [`PATIENCE`].
const TRIES: u32 = 4;
/// Steps after which one that is out is left alone.
const MAX_ANNOUNCEMENTS: u32 = 6;

/// Devices of ports that are in the userspace datapath: index by name.
pub type Devices = BTreeMap<String, u32>;

/// A thread that looks after it. It sleeps unless there is a new device. It ends when this is dropped.
pub struct Takeup {
    devices: Option<Sender<Devices>>,
    ending: Arc<Ending>,
    thread: Option<JoinHandle<()>>,
}

impl Takeup {
    /// Starts the thread, for devices of the caller's network namespace; none until [`Takeup::watch`].
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn spawn(unixctl: Unixctl) -> io::Result<Takeup> {
        let (devices, orders) = channel();
        let ending = Arc::<Ending>::default();
        let host = Ovs { unixctl, ending: ending.clone() };
        let thread = std::thread::Builder::new().name("ovs-takeup".into()).spawn(move || {
            let _alarm = AbortOnPanic("what looks after representors");
            follow(&orders, &host);
        })?;
        Ok(Takeup { devices: Some(devices), ending, thread: Some(thread) })
    }

    /// Which devices there are now. One that was among them before, with the same index, is not looked after again.
    pub fn watch(&self, devices: Devices) {
        if let Some(orders) = &self.devices {
            // It ends with this only.
            let _ = orders.send(devices);
        }
    }
}

impl Drop for Takeup {
    fn drop(&mut self) {
        self.devices = None;
        self.ending.end();
        if let Some(thread) = self.thread.take() {
            // A panic of it has ended the process.
            let _ = thread.join();
        }
    }
}

fn follow(orders: &Receiver<Devices>, host: &Ovs) {
    let mut doubts = Doubts::default();
    loop {
        let order = match doubts.next() {
            None => orders.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(next) => orders.recv_timeout(next.saturating_duration_since(Instant::now())),
        };
        match order {
            Ok(devices) => doubts.watch(devices, Instant::now()),
            Err(RecvTimeoutError::Timeout) => doubts.look(Instant::now(), host),
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// What is asked and done outside.
trait Host {
    /// Indexes of the devices that packet sockets read as OVS does.
    fn read_devices(&self) -> io::Result<BTreeSet<u32>>;
    /// Whether the datapath has a port of that name.
    fn has_port(&self, name: &str) -> Result<bool, UnixctlError>;
    /// Takes the port out of the datapath.
    fn take_out(&self, name: &str) -> Result<(), UnixctlError>;
    /// Has the kernel tell everybody of the device, and so OVS.
    fn announce(&self, index: u32) -> io::Result<()>;
}

/// A device that OVS has not been seen to read.
struct Doubt {
    index: u32,
    /// When it is looked after again.
    next: Instant,
    /// How often it was taken out.
    tries: u32,
}

#[derive(Default)]
struct Doubts {
    devices: Devices,
    doubts: BTreeMap<String, Doubt>,
}

impl Doubts {
    fn next(&self) -> Option<Instant> {
        self.doubts.values().map(|doubt| doubt.next).min()
    }

    fn watch(&mut self, devices: Devices, now: Instant) {
        self.doubts.retain(|name, doubt| devices.get(name) == Some(&doubt.index));
        for (name, &index) in &devices {
            if self.devices.get(name) != Some(&index) {
                self.doubts.insert(name.clone(), Doubt { index, next: now + PATIENCE, tries: 0 });
            }
        }
        self.devices = devices;
    }

    /// Looks after those whose time has come.
    fn look(&mut self, now: Instant, host: &impl Host) {
        self.doubts.retain(|name, doubt| {
            if doubt.next > now {
                return true;
            }
            doubt.next = now + PATIENCE * 2u32.pow(doubt.tries);
            match doubt.settle(name, host) {
                Ok(is_settled) => !is_settled,
                // OVS is away, or hangs: it opens all devices when it comes back, or is asked then.
                Err(_) => true,
            }
        });
    }
}

impl Doubt {
    /// Does what is to be done by now; whether that is all for good.
    fn settle(&mut self, name: &str, host: &impl Host) -> Result<bool, UnixctlError> {
        if self.is_read(host) {
            if self.tries > 0 {
                info!("port {name}: Open vSwitch reads its TAP again");
            }
            return Ok(true);
        }
        if !host.has_port(name)? {
            if self.tries == 0 {
                // It opens the device that there is when it puts the port in.
                return Ok(true);
            }
            if self.tries == MAX_ANNOUNCEMENTS {
                warn!("port {name}: Open vSwitch does not open its TAP again: see the log of ovs-vswitchd");
                return Ok(true);
            }
            self.tries += 1;
        } else if self.tries >= TRIES {
            warn!(
                "port {name}: Open vSwitch does not read its TAP although that was opened anew {TRIES} times: see the log of \
                 ovs-vswitchd"
            );
            return Ok(true);
        } else if !self.is_read(host) {
            // It answers after it has followed all changes of links, so this time it is sure.
            info!("port {name}: Open vSwitch still reads a TAP that is gone: it is made to open the new one");
            host.take_out(name)?;
            self.tries += 1;
        }
        if let Err(error) = host.announce(self.index) {
            debug!("device {name} cannot be announced: {error}");
        }
        Ok(false)
    }

    /// Without the kernel's list everything is taken to be well.
    fn is_read(&self, host: &impl Host) -> bool {
        host.read_devices().map_or_else(
            |error| {
                debug!("it is not known which devices Open vSwitch reads: {error}");
                true
            },
            |read| read.contains(&self.index),
        )
    }
}

/// The real ones.
struct Ovs {
    unixctl: Unixctl,
    ending: Arc<Ending>,
}

impl Host for Ovs {
    fn read_devices(&self) -> io::Result<BTreeSet<u32>> {
        host_state::read_by_calls().or_else(|error| {
            debug!("how packet sockets read is not known: {error}");
            Ok(bound(&std::fs::read_to_string("/proc/self/net/packet")?))
        })
    }

    fn has_port(&self, name: &str) -> Result<bool, UnixctlError> {
        Ok(shows_port(&self.unixctl.command_until(&self.ending, "dpctl/show", &[DATAPATH])?, name))
    }

    fn take_out(&self, name: &str) -> Result<(), UnixctlError> {
        self.unixctl.command_until(&self.ending, "dpctl/del-if", &[DATAPATH, name]).map(drop)
    }

    fn announce(&self, index: u32) -> io::Result<()> {
        tap::announce(index)
    }
}

/// The column `Iface` of `/proc/net/packet`; of a socket whose device is gone it is -1.
fn bound(packet: &str) -> BTreeSet<u32> {
    packet.lines().filter_map(|line| line.split_whitespace().nth(4)?.parse().ok()).collect()
}

/// Whether `dpctl/show` has a line `port NUMBER: NAME` or `port NUMBER: NAME (…)`.
fn shows_port(text: &str, name: &str) -> bool {
    text.lines().any(|line| {
        let port = line.trim().strip_prefix("port ").and_then(|port| port.split_once(": "));
        port.is_some_and(|(_, shown)| shown.split(' ').next() == Some(name))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    /// An OVS that opens a device when it hears of it, if `opens`.
    #[derive(Default)]
    struct Fake {
        ports: RefCell<BTreeMap<String, u32>>,
        device: u32,
        opens: bool,
        away: bool,
        deaf: bool,
        taken_out: RefCell<u32>,
    }

    impl Host for Fake {
        fn read_devices(&self) -> io::Result<BTreeSet<u32>> {
            match self.deaf {
                true => Err(io::ErrorKind::PermissionDenied.into()),
                false => Ok(self.ports.borrow().values().copied().collect()),
            }
        }

        fn has_port(&self, name: &str) -> Result<bool, UnixctlError> {
            match self.away {
                true => Err(UnixctlError::NoPid("pid".into(), "none".into())),
                false => Ok(self.ports.borrow().contains_key(name)),
            }
        }

        fn take_out(&self, name: &str) -> Result<(), UnixctlError> {
            *self.taken_out.borrow_mut() += 1;
            self.ports.borrow_mut().remove(name);
            Ok(())
        }

        fn announce(&self, index: u32) -> io::Result<()> {
            assert_eq!(index, self.device);
            let device = if self.opens { index } else { 0 };
            self.ports.borrow_mut().insert("vm1".into(), device);
            Ok(())
        }
    }

    /// Lets a minute pass; gives how often something was done.
    fn pass(doubts: &mut Doubts, from: Instant, host: &Fake) -> u32 {
        let before = *host.taken_out.borrow();
        (0..600).for_each(|tenth| doubts.look(from + Duration::from_millis(tenth * 100), host));
        *host.taken_out.borrow() - before
    }

    fn devices(index: u32) -> Devices {
        [("vm1".to_owned(), index)].into()
    }

    fn reading(ports: &[(&str, u32)], device: u32) -> Fake {
        let ports = ports.iter().map(|&(name, index)| (name.to_owned(), index)).collect();
        Fake { ports: RefCell::new(ports), device, opens: true, ..Fake::default() }
    }

    #[test]
    fn what_is_read_or_not_there_is_left_alone() {
        let now = Instant::now();
        for host in [reading(&[("vm1", 5)], 5), reading(&[("vm2", 6)], 5), reading(&[], 5)] {
            let mut doubts = Doubts::default();
            doubts.watch(devices(5), now);
            assert_eq!((pass(&mut doubts, now, &host), doubts.next()), (0, None));
        }
        // Nor is anything done on suspicion.
        let mut doubts = Doubts::default();
        doubts.watch(devices(5), now);
        let host = Fake { deaf: true, ..reading(&[("vm1", 4)], 5) };
        assert_eq!((pass(&mut doubts, now, &host), doubts.next()), (0, None));
    }

    #[test]
    fn a_port_that_reads_what_is_gone_is_taken_out_once() {
        let (now, host) = (Instant::now(), reading(&[("vm1", 4)], 5));
        let mut doubts = Doubts::default();
        doubts.watch(devices(5), now);
        doubts.look(now + PATIENCE / 2, &host);
        assert_eq!(*host.taken_out.borrow(), 0, "OVS had no time");
        assert_eq!((pass(&mut doubts, now, &host), doubts.next()), (1, None));
        assert_eq!(host.ports.borrow()["vm1"], 5);
        // The same device is not looked after again, the next is.
        doubts.watch(devices(5), now);
        assert_eq!(doubts.next(), None);
        doubts.watch(devices(6), now);
        let host = reading(&[("vm1", 5)], 6);
        assert_eq!((pass(&mut doubts, now, &host), doubts.next()), (1, None));
        // What is gone is forgotten.
        doubts.watch(devices(7), now);
        doubts.watch(Devices::new(), now);
        assert_eq!(doubts.next(), None);
    }

    #[test]
    fn what_does_not_help_ends() {
        let (now, host) = (Instant::now(), Fake { opens: false, ..reading(&[("vm1", 4)], 5) });
        let mut doubts = Doubts::default();
        doubts.watch(devices(5), now);
        assert_eq!((pass(&mut doubts, now, &host), doubts.next()), (TRIES, None));
        // One that is away is waited for.
        let away = Fake { away: true, ..reading(&[("vm1", 5)], 6) };
        doubts.watch(devices(6), now);
        assert_eq!(pass(&mut doubts, now, &away), 0);
        assert!(doubts.next().is_some());
        let host = reading(&[("vm1", 5)], 6);
        assert_eq!(pass(&mut doubts, now + Duration::from_secs(60), &host), 1);
    }

    #[test]
    fn texts_are_read() {
        let packet = "sk               RefCnt Type Proto  Iface R Rmem   User   Inode\n\
                      00000000e5081bb5 3      3    0003   5     1 0      0      35522542\n\
                      00000000ed4053ca 2      3    0003   -1    0 0      0      35478160\n";
        assert_eq!(bound(packet), BTreeSet::from([5]));
        let show = "netdev@ovs-netdev:\n  lookups: hit:0 missed:0 lost:0\n  flows: 0\n  port 0: ovs-netdev (tap)\n  \
                    port 2: vm1\n  port 3: vm10 (dpdk: configured_rx_queues=1)\n";
        for (name, is_there) in
            [("vm1", true), ("ovs-netdev", true), ("vm10", true), ("vm", false), ("2", false)]
        {
            assert_eq!(shows_port(show, name), is_there, "{name}");
        }
    }
}
