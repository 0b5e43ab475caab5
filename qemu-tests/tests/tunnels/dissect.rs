//! What the first node sends on the wire, as Wireshark's dissectors see it: all checksums, lengths and headers.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use qemu_tests::host::{Process, WorkDir, wait_for};
use qemu_tests::netns::Namespace;
use qemu_tests::overlay::{DEVICE, Kind, Site, text};

use crate::bed::{Bed, LATE, MTU};

/// Frames of a device, both ways, written to a file by `dumpcap`.
struct Capture {
    process: Process,
    file: PathBuf,
}

impl Capture {
    fn start(namespace: &Namespace, dir: &WorkDir, name: &str) -> Result<Self> {
        let (file, log) = (dir.path(&format!("{name}.pcap")), dir.path(&format!("{name}.log")));
        let configure = |command: &mut Command| {
            command
                .arg(format!("--net={}", namespace.path().display()))
                .args(["--", "dumpcap", "-P", "-i", DEVICE]);
            // It makes its file as whoever owns the directory.
            command.args(["-B", "64", "-w"]).arg(&file);
        };
        let mut process = Process::spawn("dumpcap", Path::new("nsenter"), configure, &log)?;
        wait_for("dumpcap to capture", LATE, || {
            process.check()?;
            Ok(process.log_tail(10).contains("File:").then_some(()))
        })?;
        Ok(Self { process, file })
    }

    /// Ends it; gives the file.
    fn stop(mut self) -> Result<PathBuf> {
        self.process.signal("INT")?;
        self.process.wait(LATE)?;
        let said = self.process.log_tail(10);
        // Frames that were lost here would be missed below.
        ensure!(said.contains("dropped on interface"), "{said}");
        Ok(self.file)
    }
}

/// A line for each frame of a capture that this display filter lets pass.
fn frames(file: &Path, filter: &str) -> Result<Vec<String>> {
    let mut command = Command::new("tshark");
    command.arg("-n").arg("-r").arg(file).args(["-Y", filter]);
    for protocol in ["ip", "udp", "tcp"] {
        command.args(["-o", &format!("{protocol}.check_checksum:TRUE")]);
    }
    let output = command.stdin(Stdio::null()).output().context("tshark")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "tshark -Y '{filter}': {said}");
    Ok(String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect())
}

#[test]
fn wireshark_has_nothing_to_say_against_what_leaves() -> Result<()> {
    let bed = Bed::new(MTU)?;
    let dir = WorkDir::new()?;
    let ours = format!("eth.src == {}", text(Site(1).mac()));
    for kind in Kind::ALL {
        for six in [false, true] {
            bed.tunnel(kind, six)?;
            // What is captured is sent by workers, super-frames cut by them too.
            bed.bulk(0, false, 1 << 20)?;
            let what = format!("{kind} over IPv{}", if six { 6 } else { 4 });
            let capture = Capture::start(bed.nodes.ovs[1].namespace(), &dir, &format!("{kind}-{six}"))?;
            for inner_six in [false, true] {
                bed.bulk(0, inner_six, 1 << 20)?;
                bed.bulk(1, inner_six, 1 << 18)?;
            }
            let file = capture.stop()?;
            let network = match kind {
                Kind::Vxlan => "vxlan.vni == 42",
                Kind::Geneve => "geneve.vni == 42",
                Kind::Gre => "gre.key == 42",
            };
            for inner in ["ip.version == 4", "ipv6.version == 6"] {
                let carried = frames(&file, &format!("{ours} && {network} && tcp && {inner}"))?;
                ensure!(carried.len() > 500, "{what}: only {} frames with {inner}", carried.len());
                println!("{what}: {} frames with {inner}", carried.len());
            }
            let full = 14 + MTU;
            ensure!(
                !frames(&file, &format!("{ours} && {network} && frame.len == {full}"))?.is_empty(),
                "{what}: none is full"
            );
            let wrong = [
                "_ws.malformed".to_owned(),
                "_ws.expert.severity == error".to_owned(),
                "ip.checksum.status == 0 || udp.checksum.status == 0 || tcp.checksum.status == 0".to_owned(),
                format!("frame.len > {full}"),
                // Whatever goes to the other end at all goes by the tunnel.
                "tcp && !(vxlan || geneve || gre)".to_owned(),
            ];
            for filter in wrong {
                let found = frames(&file, &format!("{ours} && ({filter})"))?;
                ensure!(
                    found.is_empty(),
                    "{what}: {} frames with {filter}, such as {}",
                    found.len(),
                    found[0]
                );
            }
        }
    }
    bed.finish()
}
