//! DPDK's virtio-user: a front-end without a guest, whose driver is DPDK's, and `dpdk-testpmd` on it, which sends every frame
//! back with its addresses exchanged.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::{BULK, DEADLINE, PINGS, Row, Subject};
use crate::daemon::{DaemonConfig, PortConfig};
use crate::frontend::packet::{Mac, Packet};
use crate::host::{WorkDir, wait_for};
use crate::net::{Net, SOON};
use crate::testpmd::{Testpmd, any_cores};

const MAC: Mac = [2, 0, 0, 0, 0, 0x77];
/// Frames under way at a time.
const AT_ONCE: usize = 32;

/// Which of its functions the driver takes to receive and to send ("Virtio Poll Mode Driver" in DPDK's guide): by kind of rings,
/// and whether its device is to be used in order, with mergeable buffers, or by vector instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "they say what they are")]
pub enum Path {
    Split,
    SplitMergeable,
    SplitInOrder,
    SplitInOrderMergeable,
    SplitVectorized,
    Packed,
    PackedMergeable,
    PackedInOrder,
    PackedInOrderMergeable,
    PackedVectorized,
}

impl Path {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Split,
        Self::SplitMergeable,
        Self::SplitInOrder,
        Self::SplitInOrderMergeable,
        Self::SplitVectorized,
        Self::Packed,
        Self::PackedMergeable,
        Self::PackedInOrder,
        Self::PackedInOrderMergeable,
        Self::PackedVectorized,
    ];

    /// In words: the rings, the device's arguments, and what the driver says that it takes to receive and to send.
    fn parts(self) -> (&'static str, &'static str, [&'static str; 2]) {
        const STANDARD: [&str; 2] =
            ["using packed ring standard Rx path", "using packed ring standard Tx path"];
        match self {
            Self::Split => {
                ("split", "mrg_rxbuf=0,in_order=0", ["using standard Rx path", "using standard Tx path"])
            }
            Self::SplitMergeable => (
                "split, mergeable",
                "mrg_rxbuf=1,in_order=0",
                ["using mergeable buffer Rx path", "using standard Tx path"],
            ),
            Self::SplitInOrder => (
                "split, in order",
                "mrg_rxbuf=0,in_order=1",
                ["using inorder Rx path", "using inorder Tx path"],
            ),
            Self::SplitInOrderMergeable => (
                "split, in order, mergeable",
                "mrg_rxbuf=1,in_order=1",
                ["using inorder Rx path", "using inorder Tx path"],
            ),
            Self::SplitVectorized => (
                "split, vectorized",
                "mrg_rxbuf=0,in_order=0,vectorized=1",
                ["using vectorized Rx path", "using standard Tx path"],
            ),
            Self::Packed => ("packed", "packed_vq=1,mrg_rxbuf=0,in_order=0", STANDARD),
            Self::PackedMergeable => (
                "packed, mergeable",
                "packed_vq=1,mrg_rxbuf=1,in_order=0",
                ["using packed ring mergeable buffer Rx path", STANDARD[1]],
            ),
            Self::PackedInOrder => ("packed, in order", "packed_vq=1,mrg_rxbuf=0,in_order=1", STANDARD),
            Self::PackedInOrderMergeable => (
                "packed, in order, mergeable",
                "packed_vq=1,mrg_rxbuf=1,in_order=1",
                ["using packed ring mergeable buffer Rx path", STANDARD[1]],
            ),
            Self::PackedVectorized => (
                "packed, vectorized",
                "packed_vq=1,mrg_rxbuf=0,in_order=1,vectorized=1",
                match has_vectors() {
                    true => ["using packed ring vectorized Rx path", "using packed ring vectorized Tx path"],
                    // The driver does without, and says so.
                    false => STANDARD,
                },
            ),
        }
    }

    /// The kind of rings, in words.
    pub fn rings(self) -> &'static str {
        self.parts().0
    }
}

/// Whether this machine has the instructions that the driver wants for packed rings.
fn has_vectors() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        std::arch::is_x86_feature_detected!("avx512f")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// A port with `dpdk-testpmd`, and another one with a guest that talks to it.
pub(super) struct Echo {
    net: Net,
    port: PortConfig,
    path: Path,
    testpmd: Testpmd,
}

impl Echo {
    pub(super) fn start(row: &Row, path: Path) -> Result<Self> {
        ensure!(Testpmd::is_available(), "dpdk-testpmd is not installed (Debian: dpdk-dev)");
        let dir = WorkDir::new()?;
        let port = row.port("p1", &dir);
        let mode = row.mode();
        let more = format!(
            "\n[[port]]\nname = \"p1\"\nsocket = {:?}\nmode = {mode:?}\nqueues = {}\n",
            port.socket, port.queues
        );
        let config = DaemonConfig { more, ..DaemonConfig::new([PortConfig::server("p2", &dir)]) };
        let net = Net::start(dir, config, |_, builder| builder)?;
        let testpmd = launch(&port, path, &net.dir)?;
        let mut echo = Self { net, port, path, testpmd };
        echo.wait()?;
        Ok(echo)
    }

    /// Waits until it is there with all its queues and forwards: the device starts once before, when it is found.
    fn wait(&mut self) -> Result<()> {
        let Self { net, port, path, testpmd } = self;
        wait_for("virtio-user", DEADLINE, || {
            testpmd.check()?;
            if !testpmd.log_tail(usize::MAX).contains("nb forwarding cores") {
                return Ok(None);
            }
            let shown = net.daemon.show()?;
            let up = |shown: &&crate::daemon::PortShow| shown.link && shown.active_queues == port.queues;
            Ok(shown.iter().filter(|shown| shown.name == "p1").find(up).map(drop))
        })?;
        let said = testpmd.log_tail(usize::MAX);
        for way in path.parts().2 {
            ensure!(said.contains(way), "the driver is not {way}:\n{said}");
        }
        Ok(())
    }

    /// Another one in place of it.
    fn launch_again(&mut self) -> Result<()> {
        self.testpmd.kill()?;
        if self.port.client {
            // It listens there, and minds what is left of the one before.
            std::fs::remove_file(&self.port.socket)?;
        }
        self.testpmd = launch(&self.port, self.path, &self.net.dir)?;
        self.wait()
    }

    /// So many frames there and back, some at a time.
    fn exchange(&mut self, frames: usize, at_once: usize) -> Result<()> {
        let guest = &mut self.net.guests[0];
        for first in (0..frames).step_by(at_once) {
            let numbers = first..frames.min(first + at_once);
            let frame = |number: usize| {
                let packet = Packet::eth(guest.mac, MAC).ipv4(guest.ip, [10, 0, 0, 77]);
                packet.udp(number as u16, 7).payload_len(number % 1400).build()
            };
            let sent: Vec<_> = numbers.map(frame).collect();
            for frame in &sent {
                guest.send(frame)?;
            }
            let mut came = Vec::new();
            while came.len() < sent.len()
                && let Some((_, _, mut frame)) = guest.receive(SOON)?
            {
                let (to, from) = frame[..12].split_at_mut(6);
                to.swap_with_slice(from);
                came.push(frame);
            }
            ensure!(came.len() == sent.len(), "{} of {} frames came back", came.len(), sent.len());
            // In order from each queue, but not from all of them together.
            let mut in_order = sent;
            if self.port.queues > 1 {
                in_order.sort();
                came.sort();
            }
            ensure!(in_order == came, "frames were changed");
        }
        Ok(())
    }
}

/// Starts `dpdk-testpmd` with one port of virtio-user. Its memory is a file of its own, without huge pages.
fn launch(port: &PortConfig, path: Path, dir: &WorkDir) -> Result<Testpmd> {
    let (queues, socket) = (port.queues, port.socket.display());
    let [a, b, c, d, e, f] = MAC;
    let server = if port.client { ",server=1" } else { "" };
    let device = format!(
        "--vdev=net_virtio_user0,path={socket},mac={a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x},queues={queues},{}{server}",
        path.parts().1
    );
    let environment = [
        "--no-huge".to_owned(),
        // Nothing of it is left behind.
        "--no-shconf".to_owned(),
        "-m".to_owned(),
        "128".to_owned(),
        any_cores()?,
        "--log-level=pmd.net.virtio.init:info".to_owned(),
        "--force-max-simd-bitwidth=512".to_owned(),
        device,
    ];
    let own = ["--auto-start", "--forward-mode=macswap", "--nb-cores=1", "--total-num-mbufs=4096"]
        .map(str::to_owned)
        .into_iter()
        .chain([format!("--rxq={queues}"), format!("--txq={queues}")]);
    Testpmd::start(&environment, &own.collect::<Vec<_>>(), dir)
}

impl Subject for Echo {
    fn ping(&mut self) -> Result<String> {
        self.exchange(PINGS, 1)?;
        Ok(format!("{PINGS} of {PINGS}"))
    }

    fn bulk(&mut self) -> Result<String> {
        self.exchange(BULK, AT_ONCE)?;
        Ok(format!("{BULK} frames"))
    }

    fn reconnect(&mut self) -> Result<Duration> {
        let start = Instant::now();
        self.launch_again()?;
        self.exchange(1, 1)?;
        Ok(start.elapsed())
    }

    /// As a client, virtio-user does not come back by itself; as a server it does.
    fn restart(&mut self) -> Result<Duration> {
        let start = Instant::now();
        self.net.daemon.kill()?;
        self.net.restart()?;
        if self.port.client {
            self.wait()?
        } else {
            self.launch_again()?
        }
        self.exchange(1, 1)?;
        Ok(start.elapsed())
    }

    fn finish(&mut self) -> Result<()> {
        self.testpmd.check()?;
        self.net.daemon.balanced_stats().map(drop)
    }
}
