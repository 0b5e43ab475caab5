//! What the daemon says to a user who may not.

use anyhow::{Result, ensure};

use crate::bench::{Bench, DEADLINE};

/// A user without capabilities is told at once what is missing: one line, and the status 1.
pub fn none(bench: &Bench) -> Result<String> {
    let dir = "/tmp/unprivileged";
    bench.node.sh(&format!(
        "mkdir -m 777 {dir} && sed 's#/run/pointwork#{dir}#' /run/pointwork/pointwork.toml >{dir}/pointwork.toml && \
         echo 'nobody:x:65534:65534:nobody:/:/bin/sh' >>/etc/passwd && echo 'nogroup:x:65534:' >>/etc/group"
    ))?;
    let program = bench.node.program("pointworkd");
    let run = format!(
        "timeout 20 start-stop-daemon -S -u nobody -c nobody:nogroup -x {program} -- --config {dir}/pointwork.toml"
    );
    let output = bench.node.run(&run, DEADLINE)?;
    bench.node.sh(&format!("rm -r {dir} && sed -i '/^nobody:/d' /etc/passwd && rm /etc/group"))?;
    let said = output.stderr.lines().filter(|line| line.starts_with("pointworkd: ")).collect::<Vec<_>>();
    let [line] = said[..] else { anyhow::bail!("{output:?}") };
    ensure!(output.status == 1 && output.stderr.trim_end().ends_with(line), "{output:?}");
    ensure!(line.contains("'vm1'") && line.contains("CAP_NET_ADMIN"), "{line}");
    Ok(line.into())
}
