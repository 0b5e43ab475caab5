//! Two connected guests with nothing to say to each other cost next to nothing.

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use qemu_tests::daemon::{Daemon, DaemonConfig, PortConfig};
use qemu_tests::guest::{Guest, GuestConfig, Nic};
use qemu_tests::host::{WorkDir, run_time};
use qemu_tests::ovs::Ovs;
use qemu_tests::tools::IperfOptions;

const B: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2));
/// The longest that guests may take to be up, to reach each other and to fall silent.
const DEADLINE: Duration = Duration::from_secs(90);
/// Of how long the share is taken.
const WINDOW: Duration = Duration::from_secs(4);
/// Of one core.
const SHARE: f64 = 0.01;

/// Boots two guests, lets them talk for a moment, so that workers have had something to do, and waits until the daemon has
/// used less than its share over a whole window. What guests send of their own accord after they have booted is over by then.
fn two_guests_fall_silent(daemon: &Daemon, ports: [PortConfig; 2], dir: &WorkDir) -> Result<()> {
    let guest = |port: &PortConfig| GuestConfig::new(&port.name, Nic::connect(&port.socket));
    let [a, b] = Guest::start_all([guest(&ports[0]), guest(&ports[1])], dir)?;
    a.address("10.0.0.1/24")?;
    b.address("10.0.0.2/24")?;
    a.wait_reachable(B, DEADLINE)?;
    b.iperf3_server()?;
    a.iperf3(B, &IperfOptions { seconds: 1, ..IperfOptions::default() })?;
    let moved = |daemon: &Daemon| -> Result<u64> {
        Ok(daemon.stats()?.workers.iter().map(|worker| worker.packets).sum::<u64>())
    };
    ensure!(moved(daemon)? > 100, "the guests have not talked through the daemon");
    let begin = Instant::now();
    loop {
        let (start, then) = (Instant::now(), run_time(daemon.pid())?);
        std::thread::sleep(WINDOW);
        let share = (run_time(daemon.pid())? - then).as_secs_f64() / start.elapsed().as_secs_f64();
        println!("{:.3} % of a core", 100.0 * share);
        if share < SHARE {
            break;
        }
        ensure!(begin.elapsed() < DEADLINE, "idle, the daemon uses {:.2} % of a core", 100.0 * share);
    }
    // They are still connected.
    a.wait_reachable(B, DEADLINE)?;
    daemon.balanced_stats()?;
    Ok(())
}

fn ports(dir: &WorkDir) -> [PortConfig; 2] {
    ["vm1", "vm2"].map(|name| PortConfig::server(name, dir))
}

#[test]
fn on_the_embedded_bridge_with_two_workers() -> Result<()> {
    let (dir, cpus) = (WorkDir::new()?, vec![0, 1]);
    let daemon = Daemon::start(&DaemonConfig { cpus, ..DaemonConfig::new(ports(&dir)) }, &dir)?;
    two_guests_fall_silent(&daemon, ports(&dir), &dir)
}

#[test]
fn under_open_vswitch() -> Result<()> {
    let (dir, ovs_dir) = (WorkDir::new()?, WorkDir::new()?);
    let ovs = Ovs::start(&ovs_dir)?;
    ovs.ofctl(&["add-flow", qemu_tests::ovs::BRIDGE, "actions=NORMAL"])?;
    let daemon = Daemon::start(&DaemonConfig::under(&ovs, ports(&dir)), &dir)?;
    two_guests_fall_silent(&daemon, ports(&dir), &dir)
}
