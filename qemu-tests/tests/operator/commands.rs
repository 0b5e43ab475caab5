//! What the commands say, to whom, and that they only say it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use qemu_tests::daemon::{binary, refusal};
use qemu_tests::net::{Net, SOON};
use serde_json::Value;

use crate::{flows, says, text};

fn pointwork(net: &Net, words: &[&str]) -> Result<Output> {
    let mut command = Command::new("timeout");
    command.arg("30").arg(binary("pointwork")?).arg("--control").arg(net.daemon.control());
    Ok(command.args(words).stdin(Stdio::null()).output()?)
}

/// The layers of a trace and what they say, and the outcome as the last of them.
fn trace(net: &Net, packet: &str) -> Result<Vec<(String, String)>> {
    let answer = net.daemon.ctl(&["trace", "p1", packet])?;
    let string = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let steps = answer["steps"].as_array().context("no steps")?;
    let mut steps: Vec<_> =
        steps.iter().map(|step| (string(&step["layer"]), string(&step["text"]))).collect();
    steps.push(("outcome".into(), string(&answer["outcome"])));
    Ok(steps)
}

/// Layers of a trace in order, each saying something.
fn traces(net: &Net, packet: &str, expected: &[(&str, &[&str])]) -> Result<()> {
    let steps = trace(net, packet)?;
    let layers: Vec<&str> = steps.iter().map(|(layer, _)| layer.as_str()).collect();
    ensure!(layers == expected.iter().map(|(layer, _)| *layer).collect::<Vec<_>>(), "{steps:#?}");
    for ((_, text), (_, parts)) in steps.iter().zip(expected) {
        says(text, parts).with_context(|| format!("{steps:#?}"))?;
    }
    Ok(())
}

#[test]
fn trace_tells_each_layer_and_changes_nothing() -> Result<()> {
    let mut net = Net::plain(3)?;
    net.greet()?;
    let known = net.packet(0, 1).udp(1000, 53).payload_len(20);
    let hex: String = known.build().iter().map(|byte| format!("{byte:02x}")).collect();
    let odp = "eth(src=02:00:00:00:00:01,dst=02:00:00:00:00:02),eth_type(0x0800),\
               ipv4(src=10.0.0.1,dst=10.0.0.2,proto=17),udp(src=1000,dst=53)";
    let punted =
        "eth(src=02:00:00:00:00:01,dst=02:00:00:00:00:02),eth_type(0x0800),ipv4(proto=6),tcp(dst=80)";
    let stranger = "eth(src=02:00:00:00:00:01,dst=02:00:00:00:09:09),eth_type(0x88b5)";
    let dropped = "eth(src=02:00:00:00:00:01,dst=02:00:00:00:00:02),eth_type(0x88cc)";
    net.daemon.ctl(&[
        "add-flow",
        "in_port(p1),eth_type(0x0800),ipv4(proto=6),tcp(dst=80)",
        "ct(commit),p2",
    ])?;
    net.daemon.ctl(&["add-flow", "in_port(p1),eth_type(0x88cc)", "drop"])?;
    // The greetings are sent and counted.
    let counters = |net: &Net| -> Result<Value> {
        let stats = net.daemon.ctl(&["stats"])?;
        Ok(serde_json::json!([stats["ports"], stats["paths"], flows(&net.daemon, "learned")?]))
    };
    net.daemon.balanced_stats()?;
    let before = counters(&net)?;

    for packet in [odp, &hex] {
        traces(
            &net,
            packet,
            &[
                ("parse", &["ipv4(src=10.0.0.1,dst=10.0.0.2", "udp(src=1000,dst=53)"]),
                ("L1", &["no entry"]),
                ("L2", &["no flow"]),
                ("host", &["the bridge would answer: p2"]),
                ("outcome", &["to the host: no flow"]),
            ],
        )?;
    }
    let host = &trace(&net, stranger)?[3];
    says(&host.1, &["the bridge would answer: ", "p2", "p3"])?;
    traces(
        &net,
        punted,
        &[
            ("parse", &["tcp("]),
            ("L1", &["no entry"]),
            ("L2", &["tcp(dst=80)", "actions:ct(commit),p2", "punt: "]),
            ("host", &["the bridge would answer: p2"]),
            ("outcome", &["the flow cannot be carried out here"]),
        ],
    )?;
    traces(
        &net,
        dropped,
        &[("parse", &[]), ("L1", &[]), ("L2", &["actions:drop"]), ("outcome", &["dropped: flow_drop"])],
    )?;
    // A runt has nothing to look up.
    says(&trace(&net, "0200")?.last().context("no outcome")?.1, &["dropped: runt"])?;
    ensure!(counters(&net)? == before, "a trace has changed something: {before:#} {:#}", counters(&net)?);

    // After the packet itself: the first asks the host, the second finds the flow in L2, the third is a hit.
    for _ in 0..3 {
        net.reaches(0, &known, &[1])?;
    }
    net.daemon.balanced_stats()?;
    let before = counters(&net)?;
    for packet in [odp, &hex] {
        traces(
            &net,
            packet,
            &[
                ("parse", &[]),
                ("L1", &["hit: 1 flow"]),
                ("L2", &["eth(src=02:00:00:00:00:01,dst=02:00:00:00:00:02)", "actions:p2"]),
                ("output", &["p2, ", "bytes: 020000000002020000000001"]),
                ("outcome", &["sent to p2"]),
            ],
        )?;
    }
    says(&trace(&net, &hex)?[3].1, &[&hex])?;
    ensure!(counters(&net)? == before, "a trace has changed something");
    for guest in &mut net.guests {
        guest.expect_nothing()?;
    }
    Ok(())
}

#[test]
fn every_command_says_it_in_json_too() -> Result<()> {
    let mut net = Net::plain(2)?;
    net.greet()?;
    let socket = text(&net.dir.path("p3.sock"));
    let commands: [(&[&str], &[&str]); 13] = [
        (&["show"], &["/ports/0/name", "/workers/0/id", "/version", "/warnings"]),
        (&["stats"], &["/ports/p1/rx_drops/miss_rate", "/paths/l1", "/workers/0/packets"]),
        (&["stats", "p1", "--all"], &["/ports/p1/tx_packets"]),
        (&["stats", "--watch", "0.1", "--count", "1"], &["/ports/p2"]),
        (&["dump-flows", "--more"], &["/flows/0/handling"]),
        (&["add-port", "p3", "--socket", &socket], &["/ok"]),
        (&["add-flow", "in_port(p3)", "p1"], &["/id", "/flow"]),
        (&["dump-flows", "p3", "--source", "explicit"], &["/flows/0/actions"]),
        (&["del-flow", "in_port(p3)"], &["/deleted"]),
        (&["trace", "p1", "eth()"], &["/steps/0/layer", "/outcome"]),
        (&["sync"], &["/flows"]),
        (&["del-port", "p3"], &["/ok"]),
        (&["version"], &["/version", "/protocol"]),
    ];
    for json in [true, false] {
        for (words, fields) in &commands {
            let words = if json { [&["--json"], *words].concat() } else { words.to_vec() };
            let output = pointwork(&net, &words)?;
            let said = String::from_utf8(output.stderr)?;
            ensure!(output.status.success() && said.is_empty(), "{words:?}: {} {said}", output.status);
            let printed = String::from_utf8(output.stdout)?;
            if json {
                let value: Value =
                    serde_json::from_str(&printed).with_context(|| format!("{words:?}: {printed}"))?;
                for field in *fields {
                    ensure!(value.pointer(field).is_some(), "{words:?}: no {field} in {value:#}");
                }
            } else {
                // A list of flows may be empty.
                let whole = printed.ends_with('\n') || words[0] == "dump-flows";
                ensure!(whole && !printed.starts_with('{'), "{words:?}: {printed}");
            }
        }
    }
    for command in
        ["show", "stats", "dump-flows", "add-flow", "del-flow", "add-port", "del-port", "trace", "sync"]
    {
        let output = pointwork(&net, &[command, "--help"])?;
        ensure!(output.status.success(), "{command}");
        says(&String::from_utf8(output.stdout)?, &["Examples:", &format!("pointwork {command}")])?;
    }
    // Nobody there, a file, and a socket of something else.
    std::fs::write(net.dir.path("file"), "")?;
    for path in [net.dir.path("nobody.sock"), net.dir.path("file"), net.dir.path("no/dir.sock")] {
        let output = Command::new(binary("pointwork")?).args(["--control", &text(&path), "show"]).output()?;
        says(&refusal("pointwork show", &output)?, &[&text(&path)])?;
    }
    Ok(())
}

#[test]
fn one_client_s_garbage_is_no_other_client_s_trouble() -> Result<()> {
    let net = Net::plain(1)?;
    let mut watch = Command::new("timeout");
    watch.arg("30").arg(binary("pointwork")?).arg("--control").arg(net.daemon.control());
    watch.args(["--json", "stats", "--watch", "0.1", "--count", "15"]);
    let start = Instant::now();
    let watch = watch.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;

    let connect = || -> Result<UnixStream> {
        let client = UnixStream::connect(net.daemon.control())?;
        client.set_read_timeout(Some(SOON))?;
        Ok(client)
    };
    // What is answered with an error and the end of the connection.
    let long = vec![b'x'; 70 << 10];
    let deep = [vec![b'['; 60_000], b"\n".to_vec()].concat();
    let nonsense: [&[u8]; 8] = [
        b"\xff\xfe\n",
        b"\n",
        b"{}\n",
        b"{\"v\":1,\"cmd\":\"reboot\"}\n",
        b"{\"v\":9,\"cmd\":\"show\"}\n",
        b"{\"v\":1,\"cmd\":\"stats\",\"port\":7}\n",
        &deep,
        &long,
    ];
    let mut slow = Vec::new();
    for round in 0..3 {
        for bytes in nonsense {
            let mut client = connect()?;
            // It may be turned away before it has said everything.
            let _ = client.write_all(bytes);
            let mut answer = String::new();
            let read = client.read_to_string(&mut answer);
            let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(40)]).into_owned();
            // What was not read when the connection was closed makes a reset of its end.
            let reset = |error: &std::io::Error| error.kind() == std::io::ErrorKind::ConnectionReset;
            ensure!(read.as_ref().is_ok() || read.as_ref().is_err_and(reset), "{shown}: {read:?}");
            let line: Option<Value> = answer.lines().next().and_then(|line| serde_json::from_str(line).ok());
            let error = line.and_then(|line| Some(line["error"].as_str()?.to_owned()));
            ensure!(error.is_some_and(|error| !error.is_empty()), "round {round}: {shown} got '{answer}'");
        }
        // Half a request, and no more; a request whose answer nobody reads; a client that is gone at once.
        let mut client = connect()?;
        client.write_all(b"{\"v\":1,\"cmd\"")?;
        slow.push(client);
        let mut client = connect()?;
        client.write_all(b"{\"v\":1,\"cmd\":\"show\"}\n")?;
        slow.push(client);
        let mut client = connect()?;
        client.write_all(b"{\"v\":1,\"cmd\":\"sync\",\"timeout\":5}\n")?;
        drop(client);
    }
    let output = watch.wait_with_output()?;
    let took = start.elapsed();
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines = String::from_utf8(output.stdout)?;
    ensure!(lines.lines().count() == 15, "{lines}");
    for line in lines.lines() {
        let sample: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
        ensure!(sample.pointer("/ports/p1/rx_packets").is_some(), "{line}");
    }
    ensure!(took < Duration::from_secs(10), "15 samples at 0.1 s took {took:?}");
    drop(slow);
    ensure!(net.daemon.show()?.len() == 1);
    Ok(())
}
