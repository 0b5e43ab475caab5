//! A real QEMU inside the node, on a port of the node's `pointworkd`.
//!
//! Emulation inside emulation takes minutes to boot Linux. The guest is therefore iPXE, which QEMU's own boot ROM brings: it has a
//! virtio driver and a TCP of its own, asks for its address, and runs a script that it fetches.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use qemu_tests::host::wait_for;
use qemu_tests::image::qemu;

use crate::bench::{Bench, DEADLINE, VM2};

/// Seconds on an idle machine.
const BOOT: Duration = Duration::from_secs(180);
/// What QEMU needs of its data.
const FIRMWARE: [&str; 3] = ["bios-256k.bin", "kvmvapic.bin", "pxe-virtio.rom"];
const GUEST: &str = "10.1.0.3";
/// Lines of the script, 4 KiB each.
const LINES: u32 = 256;

/// Copies this machine's QEMU to `dir`, with its firmware, its libraries and their loader.
pub fn copy_qemu(dir: &Path) -> Result<()> {
    let said = |command: &mut Command| -> Result<String> {
        let output = command.output().with_context(|| format!("{command:?}"))?;
        ensure!(output.status.success(), "{command:?}: {output:?}");
        Ok(String::from_utf8(output.stdout)?)
    };
    let program =
        PathBuf::from(said(Command::new("sh").args(["-c", "command -v \"$0\"", qemu()?]))?.trim_end());
    std::fs::create_dir(dir)?;
    std::fs::copy(&program, dir.join("qemu"))?;
    for line in said(Command::new("ldd").arg(&program))?.lines() {
        // "libc.so.6 => /lib/…/libc.so.6 (0x…)"; the loader has no arrow, and the kernel's own library no path.
        let path = line.split_whitespace().find(|word| word.starts_with('/'));
        let Some(path) = path.map(Path::new) else { continue };
        let name =
            if line.contains("=>") { path.file_name().context("a library")? } else { "loader".as_ref() };
        std::fs::copy(path, dir.join(name))?;
    }
    let places = said(Command::new(&program).args(["-L", "help"]))?;
    for name in FIRMWARE {
        let mut found = places.lines().map(|place| Path::new(place).join(name));
        let path = found.find(|path| path.exists()).with_context(|| format!("QEMU has no {name}"))?;
        std::fs::copy(path, dir.join(name))?;
    }
    Ok(())
}

/// The guest gets its address by DHCP and a megabyte by TCP from `vm2`, which the workers forward, and answers `vm1`.
pub fn guest(bench: &Bench) -> Result<String> {
    let node = &bench.node;
    let socket = "/run/pointwork/vm3.sock";
    bench.vsctl(&format!("add-port br0 vm3 -- set Interface vm3 external_ids:pointwork-socket={socket}"))?;
    let there = format!("test -S {socket}");
    wait_for("the socket of vm3", DEADLINE, || Ok((node.run(&there, DEADLINE)?.status == 0).then_some(())))?;
    // A script of mostly remarks: its last line is reached when all of it has come.
    node.sh(&format!(
        "mkdir -p /run/nested/www && cd /run/nested && touch leases && \
         {{ printf '#!ipxe\\n'; yes \"# $(head -c 4093 /dev/zero | tr '\\0' x)\" | head -n {LINES}; \
         printf 'echo The script has come whole.\\nsleep 3600\\n'; }} >www/script && \
         printf 'start {GUEST}\\nend {GUEST}\\nmax_leases 1\\ninterface eth0\\nlease_file /run/nested/leases\\n\
         pidfile /run/nested/udhcpd.pid\\nboot_file http://{VM2}/script\\nopt subnet 255.255.255.0\\n' >udhcpd.conf"
    ))?;
    let before = bench.paths()?;
    let server = |command: &str| node.spawn(&format!("exec ip netns exec vm2 {command}"));
    let dhcp = server("udhcpd -f /run/nested/udhcpd.conf")?;
    let http = server("httpd -f -p 80 -h /run/nested/www")?;
    let files = node.program("qemu");
    let emulator = node.spawn(&format!(
        "exec {files}/loader --library-path {files} {files}/qemu -L {files} -no-user-config -nodefaults -display none \
         -accel tcg,thread=single,tb-size=64 -cpu qemu64 -m 64M -object memory-backend-memfd,id=mem0,size=64M,share=on \
         -machine q35,memory-backend=mem0,graphics=off -serial file:/run/nested/console \
         -chardev socket,id=nic0,path={socket} -netdev vhost-user,id=net0,chardev=nic0 \
         -device virtio-net-pci,netdev=net0,mac=02:00:00:00:00:03,disable-legacy=on,romfile=pxe-virtio.rom,bootindex=0"
    ))?;
    let seen = || node.sh("tr -d '\\033' </run/nested/console | tail -n 12").unwrap_or_default();
    wait_for("the nested guest to have its script", BOOT, || {
        ensure!(emulator.running() && dhcp.running() && http.running(), "a program has ended: {}", seen());
        let found = node.run("grep -q 'has come whole' /run/nested/console", DEADLINE)?;
        Ok((found.status == 0).then_some(()))
    })
    .with_context(|| format!("{}\n{:#}", seen(), bench.pointwork("show").unwrap_or_default()))?;
    let ping = bench.ping(GUEST, 10)?;
    let (after, stats) = (bench.paths()?, bench.stats()?);
    for job in [emulator, http, dhcp] {
        job.kill()?;
    }
    bench.vsctl("del-port vm3")?;
    bench.wait_in_step(DEADLINE)?;
    node.sh("rm -r /run/nested")?;
    ensure!(ping.lost() <= 1, "{ping}");
    let fast = after.l1 + after.l2 - before.l1 - before.l2;
    let host = after.miss + after.punt - before.miss - before.punt;
    ensure!(fast > 4 * host, "{fast} packets fast, {host} by the host");
    let port = &stats.ports["vm3"];
    ensure!(port.rx_forwarded > 4 * port.rx_to_host, "{port:#?}");
    Ok(format!("{fast} packets fast, {host} by the host; {} frames to it; {ping}", port.tx_packets))
}
