//! Loads any vhost-user switch and says what came through.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Parser;
use serde_json::json;

use qemu_tests::host::{catch_signals, interrupted};
use qemu_tests::load::{Load, LoadConfig, Order, Sizes, Socket, Traffic};

/// Plays the guests of two or more ports of a vhost-user switch: a thread that sends prebuilt packets in pairs of ports, both
/// ways, and checks, counts and times what arrives. The switch must send what comes from the first port to the second
/// and back, from the third to the fourth and back, and so on.
#[derive(Parser)]
#[command(name = "pointwork-load")]
struct Options {
    /// The vhost-user socket of a port; `listen:PATH` if the switch is the one that connects (`dpdkvhostuserclient`).
    #[arg(long = "port", value_name = "[listen:]PATH", required = true)]
    ports: Vec<String>,
    /// Flows in each direction, each with UDP (or TCP) ports of its own.
    #[arg(long, default_value_t = 64)]
    flows: u32,
    /// Take the flows at random, not one after the other.
    #[arg(long)]
    random: bool,
    /// Deal the flows out to so many ranges of destination ports (0x2000/0xff00, 0x2100/0xff00, …), for rules with as many masks.
    #[arg(long, default_value_t = 1)]
    classes: u32,
    /// Bytes of a frame, 64 to 9000; `imix`: 64, 570 and 1518, 7:4:1; `tso`: TCP super-frames of almost 64 KiB.
    #[arg(long, default_value = "64")]
    size: Sizes,
    /// Packets a second in all; default: as many as go.
    #[arg(long, value_name = "PACKETS")]
    rate: Option<f64>,
    /// Only the first port of each pair sends.
    #[arg(long)]
    one_way: bool,
    /// Packets arrive routed: TTL 63 instead of 64, MAC addresses with 0xaa as their fifth byte.
    #[arg(long)]
    routed: bool,
    /// Descriptors of each ring.
    #[arg(long, default_value_t = 1024)]
    ring: u16,
    /// Do not negotiate mergeable receive buffers.
    #[arg(long)]
    no_mergeable: bool,
    /// Negotiate checksum and segmentation offloads, as a Linux guest does (`tso` does it by itself).
    #[arg(long)]
    offloads: bool,
    /// Negotiate packed rings.
    #[arg(long)]
    packed: bool,
    /// Packets sent at once.
    #[arg(long, default_value_t = 32)]
    burst: u16,
    /// Packets of a direction on their way at most; default: what the receive ring takes.
    #[arg(long, value_name = "PACKETS")]
    window: Option<u32>,
    /// Check one of so many packets; 1: all of them, as a guest that reads every packet.
    #[arg(long, value_name = "N", default_value_t = 32)]
    check_every: u32,
    /// Processor to run on.
    #[arg(long)]
    cpu: Option<usize>,
    /// Seconds before measuring.
    #[arg(long, default_value_t = 1.0)]
    warm_up: f64,
    /// Seconds to measure.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    match catch_signals().and_then(|()| run(options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) if interrupted() => ExitCode::from(130),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: Options) -> Result<()> {
    let sockets: Vec<Socket> = options
        .ports
        .iter()
        .map(|port| match port.strip_prefix("listen:") {
            Some(path) => Socket::listen(path),
            None => Socket::connect(port),
        })
        .collect();
    let seconds = |seconds: f64| -> Result<Duration> {
        ensure!((0.0..=86_400.0).contains(&seconds), "{seconds} seconds");
        Ok(Duration::from_secs_f64(seconds))
    };
    let (warm_up, measured) = (seconds(options.warm_up)?, seconds(options.seconds)?);
    let traffic = Traffic {
        flows: options.flows,
        order: if options.random { Order::Random } else { Order::Walk },
        sizes: options.size,
        classes: options.classes,
    };
    let defaults = LoadConfig::new(sockets, traffic);
    let mut load = Load::start(LoadConfig {
        one_way: options.one_way,
        routed: options.routed,
        ring: options.ring,
        mergeable: !options.no_mergeable,
        offloads: options.offloads || defaults.offloads,
        packed: options.packed,
        burst: options.burst,
        window: options.window,
        rate: options.rate,
        check_every: options.check_every,
        cpu: options.cpu,
        ..defaults
    })?;
    load.run_for(warm_up)?;
    load.forget_latencies();
    let before = load.sample();
    load.run_for(measured)?;
    let sample = load.sample().since(&before);
    let outcome = load.finish()?;
    if options.json {
        let rates = json!({
            "packets_per_second": sample.packets_per_second(),
            "bits_per_second": sample.bits_per_second(),
            "busy": sample.busy(),
        });
        println!("{:#}", json!({ "measured": sample, "rates": rates, "whole_run": outcome }));
    } else {
        let times = &outcome.latency;
        println!(
            "{:.3} Mpps, {:.2} Gbit/s; generator {:.0} % busy, {:.0} cycles a packet",
            sample.packets_per_second() / 1e6,
            sample.bits_per_second() / 1e9,
            100.0 * sample.busy(),
            sample.busy_cycles as f64 / sample.received.max(1) as f64,
        );
        println!(
            "{} sent, {} received, {} lost; {} checked, {} wrong, {} out of order",
            outcome.sent, outcome.received, outcome.lost, outcome.checked, outcome.wrong, outcome.disordered
        );
        println!(
            "on the way: median {:.1} µs, 90 % {:.1}, 99 % {:.1}, 99.9 % {:.1}, at most {:.1}",
            times.median, times.p90, times.p99, times.p999, times.max
        );
    }
    let first = outcome.first_wrong.unwrap_or_default();
    ensure!(outcome.wrong == 0 && outcome.disordered == 0, "packets were not as they should be: {first}");
    Ok(())
}
