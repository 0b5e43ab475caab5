//! Serves a port's control queue (virtio 1.2, 5.1.6.5), if the front-end hands it over. QEMU, DPDK's virtio-user and Cloud
//! Hypervisor serve it themselves; who passes all queues of a device on, as User-Mode Linux does (`virtio_uml`), hands it over.
//!
//! What a driver says of receive modes, addresses and VLANs is heard and not followed: all that the switch has for the port is
//! delivered. A device may do so (these filters are "best-effort", 5.1.6.5.1), and a filter that is ours alone would drop what the
//! switch has decided to deliver. The number of queue pairs is followed.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use virtio_bindings::virtio_net::*;

use crate::quiesce::Quiescence;
use crate::virtio::{ControlRing, RingError, has_feature};

/// Bytes of an Ethernet address.
const MAC: usize = 6;
/// Commands in a round. There is a pause after each: a flood of commands, or of kicks without any, is not for the workers'
/// processors to bear, and a driver waits for one answer at a time.
const AT_ONCE: usize = 8;
const PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
/// The pause after a command that has changed what workers do, which ends its round: each of them was woken for it.
const LONG_PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
/// The time between two looks at the queue of a guest that does not kick.
const POLL: Timespec = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };

/// The queue pairs by which the driver wants to receive.
#[derive(Clone)]
pub(super) struct ActivePairs {
    count: Arc<AtomicUsize>,
    /// Whether features were negotiated since the control queue was started.
    negotiated: Arc<AtomicBool>,
    quiescence: Arc<Quiescence>,
}

impl ActivePairs {
    /// All that the front-end has enabled.
    pub(super) fn all(quiescence: Arc<Quiescence>) -> Self {
        let count = Arc::new(AtomicUsize::new(usize::MAX));
        ActivePairs { count, negotiated: Arc::default(), quiescence }
    }

    /// Their number; at least all of them if nobody has said it.
    pub(super) fn count(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    fn are_known(&self) -> bool {
        self.count() != usize::MAX
    }

    /// Nobody says how many; workers see it when they take up the next change.
    pub(super) fn forget(&self) {
        self.count.store(usize::MAX, Ordering::Release);
    }

    /// Features were negotiated while the control queue did not run: by another driver, or by a front-end that starts the device
    /// anew for the same one.
    pub(super) fn negotiated(&self) {
        self.negotiated.store(true, Ordering::Release);
    }

    /// The control queue is started, at the position where rings begin or at another one.
    ///
    /// A driver has one pair until it asks for more (5.1.6.5.6.1). One that has done so does not say it again, and of what it said on
    /// another connection we know nothing: by the first pair it receives in any case. A new driver has negotiated features, and its
    /// ring begins. Neither is enough: a guest that was halted goes on after the former, and a ring comes by its beginning again and
    /// again.
    fn begin(&self, at_start: bool) {
        let negotiated = self.negotiated.swap(false, Ordering::AcqRel);
        if !self.are_known() || (negotiated && at_start) {
            self.apply(1);
        }
    }

    /// Sets their number, and returns when no worker sends to others. Whether it was another one.
    fn apply(&self, count: usize) -> bool {
        let is_change = self.count.swap(count, Ordering::AcqRel) != count;
        if is_change {
            self.quiescence.barrier();
        }
        is_change
    }
}

/// What a device of a port is, as far as commands are concerned.
#[derive(Clone, Copy, Debug)]
pub(super) struct Device {
    /// Negotiated virtio features.
    pub features: u64,
    /// Queue pairs that it has.
    pub pairs: usize,
}

impl Device {
    /// The index of the control queue's ring, if there is one (virtio 1.2, 5.1.2).
    pub(super) fn control_ring(self) -> Option<usize> {
        let pairs = if has_feature(self.features, VIRTIO_NET_F_MQ) { self.pairs } else { 1 };
        has_feature(self.features, VIRTIO_NET_F_CTRL_VQ).then_some(2 * pairs)
    }

    /// Answers a command; `set_pairs` is called if it sets the number of queue pairs.
    fn answer(self, command: &[u8], set_pairs: impl FnOnce(usize)) -> u8 {
        let is_done = match command {
            [class, command, data @ ..] => {
                self.execute(u32::from(*class), u32::from(*command), data, set_pairs)
            }
            _ => false,
        };
        (if is_done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR }) as u8
    }

    /// Whether the driver may say this, of features that it has accepted, and has said it as it should.
    fn execute(self, class: u32, command: u32, data: &[u8], set_pairs: impl FnOnce(usize)) -> bool {
        let has = |feature| has_feature(self.features, feature);
        match (class, command, data) {
            (VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC..=VIRTIO_NET_CTRL_RX_ALLMULTI, [_]) => {
                has(VIRTIO_NET_F_CTRL_RX)
            }
            (VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLUNI..=VIRTIO_NET_CTRL_RX_NOBCAST, [_]) => {
                has(VIRTIO_NET_F_CTRL_RX_EXTRA)
            }
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET, tables) => {
                has(VIRTIO_NET_F_CTRL_RX) && are_two_tables(tables)
            }
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET, mac) => {
                has(VIRTIO_NET_F_CTRL_MAC_ADDR) && mac.len() == MAC
            }
            (VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD | VIRTIO_NET_CTRL_VLAN_DEL, &[low, high]) => {
                has(VIRTIO_NET_F_CTRL_VLAN) && u16::from_le_bytes([low, high]) < 4096
            }
            (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, []) => has(VIRTIO_NET_F_GUEST_ANNOUNCE),
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, &[low, high]) => {
                let pairs = usize::from(u16::from_le_bytes([low, high]));
                let is_done = has(VIRTIO_NET_F_MQ) && (1..=self.pairs).contains(&pairs);
                if is_done {
                    set_pairs(pairs);
                }
                is_done
            }
            _ => false,
        }
    }
}

/// Whether this is a table of unicast addresses and one of multicast addresses, each behind its number of entries.
fn are_two_tables(bytes: &[u8]) -> bool {
    let behind_one = |bytes: &[u8]| -> Option<usize> {
        let entries = u32::from_le_bytes(*bytes.first_chunk()?);
        let len = usize::try_from(entries).ok()?.checked_mul(MAC)?.checked_add(4)?;
        (len <= bytes.len()).then_some(len)
    };
    behind_one(bytes)
        .and_then(|first| Some(first + behind_one(&bytes[first..])?))
        .is_some_and(|end| end == bytes.len())
}

/// A thread that serves a control queue; it ends when this is dropped.
pub(super) struct Server {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Begins to serve `ring` of port `name`. `on_fault` is told once if it is malformed.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn start(
        name: &str,
        ring: ControlRing,
        device: Device,
        active: ActivePairs,
        on_fault: impl Fn(RingError) + Send + 'static,
    ) -> io::Result<Server> {
        if has_feature(device.features, VIRTIO_NET_F_MQ) {
            active.begin(ring.is_at_start());
        }
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let stopped = stop.clone();
        let thread = thread::Builder::new()
            .name(format!("vu-{name}-cq"))
            .spawn(move || serve(ring, device, &active, &stopped, on_fault))?;
        Ok(Server { stop, thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // An error means that the counter is full: it is being told already.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            log::error!("a thread that serves a control queue has panicked");
        }
    }
}

fn serve(
    mut ring: ControlRing,
    device: Device,
    active: &ActivePairs,
    stop: &OwnedFd,
    on_fault: impl Fn(RingError),
) {
    let is_stopped = |kick: Option<BorrowedFd<'_>>, time: Option<&Timespec>| {
        let mut fds = vec![PollFd::new(stop, PollFlags::IN)];
        fds.extend(kick.map(|kick| PollFd::from_borrowed_fd(kick, PollFlags::IN)));
        // Interrupted is as good as woken.
        let _ = poll(&mut fds, time);
        !fds[0].revents().is_empty()
    };
    loop {
        let mut pause = &PAUSE;
        for _ in 0..AT_ONCE {
            let mut is_change = false;
            match ring.serve(|command| device.answer(command, |pairs| is_change = active.apply(pairs))) {
                Ok(true) if is_change => {
                    pause = &LONG_PAUSE;
                    break;
                }
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => on_fault(error),
            }
        }
        if is_stopped(None, Some(pause)) {
            return;
        }
        let may_sleep = ring.arm();
        let time = match ring.kick_fd() {
            Some(_) if may_sleep => None,
            Some(_) => Some(&PAUSE),
            None => Some(&POLL),
        };
        if is_stopped(ring.kick_fd().filter(|_| may_sleep), time) {
            return;
        }
        ring.disarm();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u64 = 1 << VIRTIO_NET_F_CTRL_VQ
        | 1 << VIRTIO_NET_F_CTRL_RX
        | 1 << VIRTIO_NET_F_CTRL_RX_EXTRA
        | 1 << VIRTIO_NET_F_CTRL_VLAN
        | 1 << VIRTIO_NET_F_CTRL_MAC_ADDR
        | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE
        | 1 << VIRTIO_NET_F_MQ;

    fn answer(features: u64, command: &[u8]) -> (u8, Option<usize>) {
        let mut pairs = None;
        let answer = Device { features, pairs: 4 }.answer(command, |count| pairs = Some(count));
        (answer, pairs)
    }

    #[test]
    fn the_ring_s_index_depends_on_what_was_negotiated() {
        let ring = |features| Device { features, pairs: 4 }.control_ring();
        assert_eq!(ring(ALL), Some(8));
        assert_eq!(ring(ALL & !(1 << VIRTIO_NET_F_MQ)), Some(2));
        assert_eq!(ring(ALL & !(1 << VIRTIO_NET_F_CTRL_VQ)), None);
    }

    #[test]
    fn workers_are_troubled_by_changes_only() {
        let quiescence = Arc::new(Quiescence::new());
        let active = ActivePairs::all(quiescence.clone());
        // Raises the version once itself.
        let mut changes = {
            let mut last = quiescence.publish();
            move || {
                let now = quiescence.publish();
                now - std::mem::replace(&mut last, now) - 1
            }
        };
        assert!(active.apply(2) && changes() == 1);
        assert!((0..100).all(|_| !active.apply(2)) && changes() == 0);
        assert!(active.apply(1) && changes() == 1);
    }

    #[test]
    fn a_new_driver_has_one_pair_and_one_that_goes_on_keeps_its_own() {
        let active = ActivePairs::all(Arc::new(Quiescence::new()));
        let begin = |negotiated: bool, at_start: bool| {
            active.apply(4);
            if negotiated {
                active.negotiated();
            }
            active.begin(at_start);
            active.count()
        };
        assert_eq!(begin(true, true), 1, "a new driver");
        assert_eq!(begin(false, true), 4, "a ring that has come round is started anew");
        assert_eq!(begin(true, false), 4, "a guest goes on");
        assert_eq!(begin(false, true), 4, "that is over when it has gone on");
        active.forget();
        active.begin(false);
        assert_eq!(active.count(), 1, "another connection");
    }

    #[test]
    fn commands_are_answered_if_they_are_well_formed_and_negotiated() {
        let mac = [2, 0, 0, 0, 0, 1];
        let table = [&[1, 0][..], &[1, 0, 0, 0], &mac, &[0, 0, 0, 0]].concat();
        let good: [&[u8]; 10] = [
            &[0, 0, 1],
            &[0, 1, 0],
            &[0, 5, 1],
            &table,
            &[1, 1, 2, 0, 0, 0, 0, 1],
            &[2, 0, 0xff, 0x0f],
            &[2, 1, 7, 0],
            &[3, 0],
            &[4, 0, 1, 0],
            &[4, 0, 4, 0],
        ];
        for command in good {
            assert_eq!(answer(ALL, command).0, 0, "{command:?}");
            assert_eq!(answer(1 << VIRTIO_NET_F_CTRL_VQ, command), (1, None), "not negotiated: {command:?}");
            // Cut short, or longer.
            assert_eq!(answer(ALL, &command[..command.len() - 1]), (1, None), "{command:?}");
            assert_eq!(answer(ALL, &[command, &[0]].concat()), (1, None), "{command:?}");
        }
        assert_eq!(answer(ALL, &[4, 0, 3, 0]), (0, Some(3)));
        let bad: [&[u8]; 10] = [
            &[],
            &[0],
            &[0, 6, 1],
            &[1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0],
            &[1, 0, 0, 0, 0, 0, 1, 0, 0, 0],
            &[2, 0, 0, 0x10],
            &[4, 0, 0, 0],
            &[4, 0, 5, 0],
            &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &[255, 255],
        ];
        for command in bad {
            assert_eq!(answer(ALL, command), (1, None), "{command:?}");
        }
    }
}
