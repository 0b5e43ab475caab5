//! The transport and the drivers on real functions.

use anyhow::{Context, Result, ensure};
use qemu_tests::host::wait_for;
use qemu_tests::nics::SwitchRule;

use crate::bench::{Bench, DEADLINE, IGB, PORTS, frame};

const A: u64 = 0x0200_0000_000a;
/// Where the switch forwards to, if it does.
const B: u64 = 0x0200_0000_000b;
const OTHER: u64 = 0x0200_0000_000c;

/// What the transport promises is asked of each function, with pages of both sizes.
pub fn transport(bench: &Bench) -> Result<String> {
    let program = bench.node.program("vfio-nic");
    bench.node.sh("echo 64 >/proc/sys/vm/nr_hugepages")?;
    for function in [&bench.rocker, &bench.igb, &bench.virtio] {
        let said = bench.node.sh(&format!("{program} probe {function}"))?;
        ensure!(said.ends_with("\nok\n") && said.contains("a second owner: "), "{said}");
        ensure!(!bench.masters(function)?, "{function} may master the bus when nobody has it");
    }
    bench.node.sh(&format!("{program} probe --huge {}", bench.rocker))?;
    ensure!(bench.faults()?.is_empty(), "{}", bench.faults()?);
    Ok("three functions, pages of both sizes".into())
}

/// Frames of many lengths come back on the cable that they went in by.
fn echoed(bench: &Bench, cable: usize, lengths: &[usize]) -> Result<()> {
    for &len in lengths {
        let payload = vec![len as u8; len];
        bench.cables[cable].send(&frame(OTHER, A, &payload))?;
        let got = bench.cables[cable].receive().with_context(|| format!("{len} bytes"))?;
        ensure!(got == frame(A, OTHER, &payload), "{len} bytes: {got:02x?}");
    }
    Ok(())
}

/// Pulls and plugs a cable; the server sees both.
fn replugged(bench: &Bench, cable: usize, port: u32) -> Result<()> {
    for (up, word) in [(false, "down"), (true, "up")] {
        let line = format!("port {port} {word}\n");
        let before = bench.log()?.matches(&line).count();
        bench.set_link(cable, up)?;
        wait_for("the link", DEADLINE, || Ok((bench.log()?.matches(&line).count() > before).then_some(())))?;
    }
    Ok(())
}

/// Ends the server by a frame, and gives what it says at its end.
fn stopped(bench: &Bench, server: qemu_tests::agent::Job<'_>, cable: usize) -> Result<String> {
    bench.cables[cable].send(&frame(OTHER, A, b"stop"))?;
    let output = server.wait(DEADLINE)?;
    let said = bench.log()?;
    ensure!(output.status == 0 && said.ends_with("\n0 frames without an interrupt\n"), "{said}");
    bench.cables[cable].receive()?;
    Ok(said)
}

pub fn rocker(bench: &Bench) -> Result<String> {
    let server = bench.serve(&bench.rocker, PORTS)?;
    for cable in 0..PORTS {
        echoed(bench, cable, &[1, 64, 1000, 1500, 9000])?;
        replugged(bench, cable, cable as u32 + 1)?;
        echoed(bench, cable, &[100; 20])?;
    }
    let said = stopped(bench, server, 0)?;
    ensure!(bench.entries("sw")? == 0, "the switch has entries when its driver is gone");
    ensure!(bench.faults()?.is_empty(), "{}", bench.faults()?);
    Ok(said.lines().last().unwrap_or_default().to_owned())
}

pub fn igb(bench: &Bench) -> Result<String> {
    let server = bench.serve(&bench.igb, 1)?;
    echoed(bench, IGB, &[1, 64, 1000, 1500])?;
    replugged(bench, IGB, 0)?;
    echoed(bench, IGB, &[100; 60])?;
    let said = stopped(bench, server, IGB)?;
    ensure!(bench.faults()?.is_empty(), "{}", bench.faults()?);
    Ok(said.lines().last().unwrap_or_default().to_owned())
}

/// Flows that the switch carries out, and what is left of them when the process is killed: nothing.
pub fn killed(bench: &Bench) -> Result<String> {
    let server = bench.serve(&format!("{} --forward 1:2 --forward 2:3", bench.rocker), PORTS)?;
    for cable in &bench.cables {
        cable.drain()?;
    }
    for round in 0..20u8 {
        let sent = frame(B, A, &[round; 80]);
        for (from, to) in [(0, 1), (1, 2)] {
            bench.cables[from].send(&sent)?;
            let got = bench.cables[to].receive()?;
            ensure!(got == sent, "{got:02x?}");
        }
        // What no rule is for goes to the server.
        echoed(bench, 0, &[80])?;
    }
    let mut rules = bench.rules("sw")?;
    rules.sort_unstable_by_key(|rule| rule.from);
    let expected = [1, 2].map(|from| SwitchRule { from, to: Some(from + 1), hits: 20 });
    ensure!(rules == expected, "{rules:?}");
    ensure!(bench.masters(&bench.rocker)?);
    server.kill()?;
    server.wait(DEADLINE)?;
    wait_for("the function to be given back", DEADLINE, || {
        Ok((!bench.masters(&bench.rocker)?).then_some(()))
    })?;
    ensure!(bench.entries("sw")? == 0, "{} entries are left", bench.entries("sw")?);
    // Frames for the dead find neither rules nor rings.
    for cable in 0..PORTS {
        bench.cables[cable].send(&frame(B, A, &[7; 80]))?;
        bench.cables[cable].send(&frame(OTHER, A, &[7; 80]))?;
    }
    let server = bench.serve(&bench.rocker, PORTS)?;
    echoed(bench, 1, &[200])?;
    for cable in &bench.cables {
        ensure!(cable.try_receive()?.is_none(), "a frame was forwarded after the end");
    }
    stopped(bench, server, 1)?;
    ensure!(bench.faults()?.is_empty(), "{}", bench.faults()?);
    Ok(format!("{} rules", rules.len()))
}

/// An igb is reset by the kernel when its process is killed in the middle of traffic, and what comes then goes nowhere.
pub fn igb_killed(bench: &Bench) -> Result<String> {
    let server = bench.serve(&bench.igb, 1)?;
    echoed(bench, IGB, &[100; 10])?;
    ensure!(bench.masters(&bench.igb)?);
    for _ in 0..5 {
        bench.cables[IGB].send(&frame(OTHER, A, &[7; 1000]))?;
    }
    server.kill()?;
    server.wait(DEADLINE)?;
    wait_for("the function to be given back", DEADLINE, || Ok((!bench.masters(&bench.igb)?).then_some(())))?;
    for _ in 0..5 {
        bench.cables[IGB].send(&frame(OTHER, A, &[8; 1000]))?;
    }
    let said = bench.nic(&format!("reset {}", bench.igb))?;
    ensure!(bench.faults()?.is_empty(), "{}", bench.faults()?);
    ensure!(said["reset"][0]["by"] == "by the kernel", "{said}");
    Ok("reset by the kernel".into())
}
