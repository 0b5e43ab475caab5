//! The network tools of a guest, with their results read.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::guest::Guest;

/// What `ping` saw.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ping {
    /// Requests sent.
    pub sent: u32,
    /// Answers that came.
    pub received: u32,
    /// Round trips in milliseconds: the fastest, the mean and the slowest; none without an answer.
    pub times: Option<(f64, f64, f64)>,
}

impl Ping {
    /// Requests without an answer.
    pub fn lost(&self) -> u32 {
        self.sent - self.received
    }

    /// Reads the summary that `ping -q` prints (iputils).
    pub fn parse(text: &str) -> Result<Self> {
        let counts = text.lines().find(|line| line.contains("packets transmitted")).context("no summary")?;
        let number = |word: &str| -> Result<u32> {
            let field =
                counts.split(", ").find(|field| field.contains(word)).context("a count is missing")?;
            Ok(field.split_whitespace().next().context("a count is missing")?.parse()?)
        };
        let times = text.lines().find_map(|line| line.strip_prefix("rtt min/avg/max/mdev = ")).map(|times| {
            let mut times = times.split(['/', ' ']).map(str::parse::<f64>);
            let mut next = || Ok::<_, anyhow::Error>(times.next().context("a round trip time is missing")??);
            Ok::<_, anyhow::Error>((next()?, next()?, next()?))
        });
        Ok(Self { sent: number("transmitted")?, received: number("received")?, times: times.transpose()? })
    }
}

impl std::fmt::Display for Ping {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} sent, {} lost", self.sent, self.lost())?;
        if let Some((min, avg, max)) = self.times {
            write!(f, ", {min:.2}/{avg:.2}/{max:.2} ms")?;
        }
        Ok(())
    }
}

/// How `iperf3` is to run.
#[derive(Debug, Clone)]
pub struct IperfOptions {
    /// UDP instead of TCP.
    pub udp: bool,
    /// The server sends.
    pub reverse: bool,
    /// How long, in seconds.
    pub seconds: u32,
    /// Connections at the same time.
    pub parallel: u32,
    /// Limit in bits per second of each connection, as iperf3 writes it (`10M`); none for TCP unless given.
    pub bitrate: Option<String>,
}

impl Default for IperfOptions {
    fn default() -> Self {
        Self { udp: false, reverse: false, seconds: 3, parallel: 1, bitrate: None }
    }
}

/// What `iperf3` measured, over all connections.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Iperf {
    /// What arrived, in bits of payload per second.
    pub bits_per_second: f64,
    /// TCP: segments sent again, where the sender's system counts them.
    pub retransmits: Option<u64>,
    /// UDP: datagrams lost and sent.
    pub datagrams: Option<(u64, u64)>,
}

impl Iperf {
    /// Reads what `iperf3 -J` prints.
    pub fn parse(text: &str) -> Result<Self> {
        let report: Value = serde_json::from_str(text).with_context(|| format!("not JSON: {text:.200}"))?;
        if let Some(error) = report["error"].as_str() {
            anyhow::bail!("iperf3: {error}");
        }
        let end = &report["end"];
        let number =
            |value: &Value, what: &str| value.as_f64().with_context(|| format!("no {what} in {end}"));
        if report["start"]["test_start"]["protocol"] == "UDP" {
            let sum = &end["sum"];
            let lost = number(&sum["lost_packets"], "lost_packets")?;
            let sent = number(&sum["packets"], "packets")?;
            // `sum` is the sender's rate.
            let arrived = if sent > 0.0 { 1.0 - lost / sent } else { 0.0 };
            let bits_per_second = number(&sum["bits_per_second"], "bits_per_second")? * arrived;
            Ok(Self { bits_per_second, retransmits: None, datagrams: Some((lost as u64, sent as u64)) })
        } else {
            let bits_per_second = number(&end["sum_received"]["bits_per_second"], "bits_per_second")?;
            Ok(Self {
                bits_per_second,
                retransmits: end["sum_sent"]["retransmits"].as_u64(),
                datagrams: None,
            })
        }
    }

    /// Millions of bits per second.
    pub fn megabits(&self) -> f64 {
        self.bits_per_second / 1e6
    }
}

impl Guest {
    /// Sends `count` echo requests, one each `interval`, and waits 2 s for the last answers.
    pub fn ping(&self, to: IpAddr, count: u32, interval: Duration) -> Result<Ping> {
        let total = interval * count + Duration::from_secs(30);
        let seconds = interval.as_secs_f64();
        let output = self.run(&format!("ping -n -q -c {count} -i {seconds} -W 2 {to}"), total)?;
        // Status 1 is "no answer", which is a result.
        ensure!(output.status <= 1, "guest {}: ping {to}: {}{}", self.name(), output.stdout, output.stderr);
        Ping::parse(&output.stdout)
            .with_context(|| format!("guest {}: ping {to}: {}", self.name(), output.stdout))
    }

    /// Waits until `to` answers.
    pub fn wait_reachable(&self, to: IpAddr, deadline: Duration) -> Result<()> {
        crate::host::wait_for(&format!("an answer from {to} to {}", self.name()), deadline, || {
            Ok((self.run(&format!("ping -n -q -c 1 -W 1 {to}"), Duration::from_secs(30))?.status == 0)
                .then_some(()))
        })
    }

    /// Starts an iperf3 server in the background.
    pub fn iperf3_server(&self) -> Result<()> {
        self.sh("pidof iperf3 >/dev/null || iperf3 -s -D").map(drop)
    }

    /// Runs iperf3 against the server at `to`; while that one does not listen yet, or is not done with the client before, it
    /// is asked again.
    pub fn iperf3(&self, to: IpAddr, options: &IperfOptions) -> Result<Iperf> {
        let mut command = format!("iperf3 -J -c {to} -t {} -P {}", options.seconds, options.parallel);
        command += if options.udp { " -u" } else { "" };
        command += if options.reverse { " -R" } else { "" };
        if let Some(bitrate) = &options.bitrate {
            let _ = write!(command, " -b {bitrate}");
        }
        let started = Instant::now();
        loop {
            let output = self.run(&command, Duration::from_secs(u64::from(options.seconds) + 40))?;
            let result = Iperf::parse(&output.stdout);
            let not_ready = result.as_ref().is_err_and(|error| is_not_ready(&error.to_string()));
            if !not_ready || started.elapsed() > SERVER_READY {
                return result
                    .with_context(|| format!("guest {}: `{command}`: {}", self.name(), output.stderr));
            }
            thread::sleep(Duration::from_millis(100));
        }
    }
}

/// How long a server may take until it listens, or listens again: it does not between two clients.
const SERVER_READY: Duration = Duration::from_secs(10);

/// Whether iperf3's error says that the server did not take up the test.
fn is_not_ready(error: &str) -> bool {
    error.contains("Connection refused") || error.contains("server is busy")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ping_summaries_are_read() {
        let text = "PING 10.0.0.2 (10.0.0.2) 56(84) bytes of data.\n\n--- 10.0.0.2 ping statistics ---\n\
                    5 packets transmitted, 4 received, 20% packet loss, time 805ms\n\
                    rtt min/avg/max/mdev = 0.410/0.522/0.774/0.130 ms\n";
        let ping = Ping::parse(text).unwrap();
        assert_eq!(ping, Ping { sent: 5, received: 4, times: Some((0.410, 0.522, 0.774)) });
        assert_eq!(ping.to_string(), "5 sent, 1 lost, 0.41/0.52/0.77 ms");
        let none = "3 packets transmitted, 0 received, +3 errors, 100% packet loss, time 2040ms\n";
        assert_eq!(Ping::parse(none).unwrap(), Ping { sent: 3, received: 0, times: None });
        assert!(Ping::parse("ping: connect: Network is unreachable").is_err());
    }

    #[test]
    fn iperf_reports_are_read() {
        let tcp = r#"{"start":{"test_start":{"protocol":"TCP"}},"end":{"sum_sent":{"bits_per_second":9.9e8,
            "retransmits":7},"sum_received":{"bits_per_second":9.5e8}}}"#;
        let expected = Iperf { bits_per_second: 9.5e8, retransmits: Some(7), datagrams: None };
        assert_eq!(Iperf::parse(tcp).unwrap(), expected);
        let udp = r#"{"start":{"test_start":{"protocol":"UDP"}},"end":{"sum":{"bits_per_second":1e7,
            "lost_packets":25,"packets":100}}}"#;
        let expected = Iperf { bits_per_second: 7.5e6, retransmits: None, datagrams: Some((25, 100)) };
        assert_eq!(Iperf::parse(udp).unwrap(), expected);
        let refused = r#"{"start":{},"error":"unable to connect to server: Connection refused"}"#;
        assert!(is_not_ready(&Iperf::parse(refused).unwrap_err().to_string()));
        let busy = r#"{"start":{},"error":"error - the server is busy running a test. try again later"}"#;
        assert!(is_not_ready(&Iperf::parse(busy).unwrap_err().to_string()));
        let broken = r#"{"start":{},"error":"error - control socket has closed unexpectedly"}"#;
        assert!(!is_not_ready(&Iperf::parse(broken).unwrap_err().to_string()));
    }
}
