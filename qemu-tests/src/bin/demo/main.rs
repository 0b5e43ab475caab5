//! Two guests talk through `pointworkd`, for a person to watch.

mod nic;
mod operator;
mod tunnel;

use std::net::{IpAddr, Ipv4Addr};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Parser;

use qemu_tests::daemon::{Daemon, DaemonConfig, PortConfig, Stats, binary};
use qemu_tests::guest::{Guest, GuestConfig, Nic};
use qemu_tests::host::{WorkDir, interrupted, run_to_end};
use qemu_tests::image::{Accelerator, Image, ImageKind};
use qemu_tests::ovs::Ovs;
use qemu_tests::report::{Table, step};
use qemu_tests::tools::{Iperf, IperfOptions, Ping};

const ADDRESSES: [&str; 2] = ["10.0.0.1/24", "10.0.0.2/24"];
const SECOND: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2));

/// Starts pointworkd with two ports, boots two QEMU guests on them, and measures.
///
/// Exits with 0 only if everything worked. Everything it started is gone afterwards, after Ctrl-C too.
#[derive(Parser)]
#[command(name = "scripts/demo")]
struct Options {
    /// Leave all running until Ctrl-C, and say what can be done with it.
    #[arg(long)]
    keep: bool,
    /// Let a stock Open vSwitch of the demo's own decide, and not the embedded bridge.
    #[arg(long)]
    ovs: bool,
    /// Boot a compute node with Open vSwitch and a NIC that has tables instead, and show how a flow climbs into it.
    #[arg(long, conflicts_with_all = ["keep", "ovs"])]
    nic: bool,
    /// Build two nodes with a guest each and a tunnel between them instead.
    #[arg(long, conflicts_with_all = ["keep", "ovs", "nic"])]
    tunnel: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    run_to_end(|| run(&options))
}

fn run(options: &Options) -> Result<()> {
    if options.nic {
        return nic::run();
    }
    if options.tunnel {
        return tunnel::run();
    }
    let dir = WorkDir::new()?;
    step("guest image (Debian packages)", |_| "ready".into(), || Image::get(ImageKind::Guest))?;
    step("accelerator", Accelerator::to_string, Accelerator::best)?;

    let ports = ["vm1", "vm2"].map(|name| PortConfig::server(name, &dir));
    let ovs = if options.ovs {
        Some(step(
            "Open vSwitch, userspace datapath",
            |ovs: &Ovs| ovs.namespace().name().into(),
            || Ovs::start(&dir),
        )?)
    } else {
        None
    };
    let config = match &ovs {
        // Its ports come from the database.
        Some(ovs) => DaemonConfig::under(ovs, []),
        None => DaemonConfig::new(ports.clone()),
    };
    let mut daemon =
        step("pointworkd", |d: &Daemon| format!("pid {}", d.pid()), || Daemon::start(&config, &dir))?;
    let outcome = show_all(&ports, ovs.as_ref(), &daemon, &dir);
    if outcome.is_err() && !interrupted() {
        eprintln!("--- pointworkd's last words ---\n{}", daemon.log_tail(20));
    }
    let guests = outcome?;
    if options.keep {
        // Its end is Ctrl-C, after which nothing is waited for.
        return keep(&guests, ovs.as_ref(), &daemon, &dir);
    }
    guests.into_iter().try_for_each(Guest::quit)?;
    daemon.terminate()
}

/// All that there is to see, on a daemon that runs.
fn show_all(
    ports: &[PortConfig; 2],
    ovs: Option<&Ovs>,
    daemon: &Daemon,
    dir: &WorkDir,
) -> Result<[Guest; 2]> {
    if let Some(ovs) = ovs {
        operator::add_ports(ovs, daemon, ports)?;
    }
    let (guests, table) = measure(ports, daemon, dir)?;
    println!("\n{table}");
    if let Some(ovs) = ovs {
        operator::look(ovs, daemon)?;
        operator::drop_and_pass(ovs, daemon, &guests[0], SECOND)?;
    }
    Ok(guests)
}

/// Boots the guests and lets them talk; what came of it is in the table.
fn measure(ports: &[PortConfig; 2], daemon: &Daemon, dir: &WorkDir) -> Result<([Guest; 2], Table)> {
    let configs = ports.each_ref().map(|port| GuestConfig::new(&port.name, Nic::connect(&port.socket)));
    let guests = step(
        "two guests",
        |_| "up".into(),
        || {
            let guests = Guest::start_all(configs, dir)?;
            for (guest, address) in guests.iter().zip(ADDRESSES) {
                guest.address(address)?;
            }
            daemon.wait_link(&["vm1", "vm2"], true, Duration::from_secs(10))?;
            Ok(guests)
        },
    )?;
    let [first, second] = &guests;
    let mut table = Table::default();

    let ping = step("ping", Ping::to_string, || {
        first.wait_reachable(SECOND, Duration::from_secs(20))?;
        first.ping(SECOND, 50, Duration::from_millis(20))
    })?;
    ensure!(ping.lost() == 0, "{} of {} pings were lost", ping.lost(), ping.sent);
    table.row("ping", format!("{} of {} lost", ping.lost(), ping.sent));
    if let Some((min, avg, max)) = ping.times {
        table.row("ping latency, min/avg/max", format!("{min:.2}/{avg:.2}/{max:.2} ms"));
    }

    second.iperf3_server()?;
    for (arrow, reverse) in [("vm1 -> vm2", false), ("vm2 -> vm1", true)] {
        let tcp = IperfOptions { reverse, ..Default::default() };
        let tcp = step(&format!("TCP {arrow}"), speed, || first.iperf3(SECOND, &tcp))?;
        ensure!(tcp.bits_per_second > 0.0, "no TCP payload arrived");
        table.row(&format!("TCP {arrow}"), speed(&tcp));
        let udp = IperfOptions { udp: true, reverse, bitrate: Some("50M".into()), ..Default::default() };
        let udp = step(&format!("UDP {arrow}, 50 Mbit/s offered"), speed, || first.iperf3(SECOND, &udp))?;
        ensure!(udp.bits_per_second > 0.0, "no UDP payload arrived");
        table.row(&format!("UDP {arrow}"), speed(&udp));
    }

    let (stats, flows) =
        step("counters", |_| "balance".into(), || Ok((daemon.balanced_stats()?, daemon.flows()?)))?;
    report_paths(&stats, flows, &mut table);
    Ok((guests, table))
}

/// What a transfer has measured, in words.
fn speed(iperf: &Iperf) -> String {
    let mut text = format!("{:.0} Mbit/s", iperf.megabits());
    if let Some((lost, sent)) = iperf.datagrams {
        text += &format!(", {lost} of {sent} datagrams lost");
    }
    text
}

fn report_paths(stats: &Stats, flows: usize, table: &mut Table) {
    let paths = stats.paths;
    table.row("packets by exact match (L1)", paths.l1);
    table.row("packets by masked match (L2)", paths.l2);
    table.row("packets that missed", paths.miss);
    table.row("packets punted", paths.punt);
    table.row("flows", flows);
    for (what, count) in stats.drops() {
        table.row(&format!("dropped: {what}"), count);
    }
}

/// Says what can be done now, and waits for Ctrl-C.
fn keep(guests: &[Guest; 2], ovs: Option<&Ovs>, daemon: &Daemon, dir: &WorkDir) -> Result<()> {
    let pointwork = format!("{} --control {}", binary("pointwork")?.display(), daemon.control().display());
    println!("\nRunning until Ctrl-C. In another terminal:\n");
    for guest in guests {
        println!("  console of {} (leave it with Ctrl-]):", guest.name());
        println!("    socat -,raw,echo=0,escape=0x1d unix-connect:{}", guest.console().display());
    }
    println!("  add a port for a third guest:");
    println!("    {pointwork} add-port vm3 --socket {}", dir.path("vm3.sock").display());
    if let Some(ovs) = ovs {
        println!("  use this Open vSwitch with its own tools:");
        println!("    export OVS_RUNDIR={}", ovs.rundir().display());
        for command in ["ovs-vsctl show", "ovs-ofctl dump-flows br0", "ovs-appctl dpctl/dump-flows --names"] {
            println!("    {command}");
        }
        println!("  see the representors: ip -netns {} -detail link", ovs.namespace().name());
    }
    println!("  look at ports, flows and counters:");
    for command in ["show", "dump-flows", "stats"] {
        println!("    {pointwork} {command}");
    }
    println!("  follow the daemon's log:\n    tail -f {}\n", daemon.log().display());
    while !interrupted() {
        std::thread::sleep(Duration::from_millis(100));
    }
    println!("\nending");
    Ok(())
}
