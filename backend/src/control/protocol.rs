//! Requests and answers.
//!
//! A request is `{"v":1,"cmd":"add-port","port":{…}}`: the protocol's version, the command, and its arguments. Unknown
//! commands and arguments are refused. An answer is the object of the command's type below, or `{"error":"one line"}`.
//! Answers may gain fields without a new version, so readers ignore those that they do not know.

mod show;
mod stats;

pub use show::{
    FlowCounts, HostPathShow, LastMove, MAX_PUNTS, MemoryShow, NicPortShow, NicShow, OffloadShow, OvsShow,
    PolledQueue, PortShow, PortState, Punted, Show, SpreadShow, TunnelShow, WorkerShow,
};
pub use stats::{OffloadStats, Paths, PortStats, QueueStats, Stats, WorkerStats, drops};

use crate::port_config::PortConfig;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::time::Duration;

/// Version of the protocol.
pub const VERSION: u64 = 1;

/// What a client asks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// State of the daemon and its ports: [`Show`].
    Show {},
    /// Counters: [`Stats`].
    Stats {
        /// Of this port only.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        port: Option<String>,
    },
    /// Flows: [`Flows`].
    DumpFlows {
        /// Of this ingress port only.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        port: Option<String>,
        /// Of this source only.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        source: Option<FlowSource>,
    },
    /// Adds an explicit flow, in ODP text: [`FlowAdded`].
    AddFlow {
        /// Match.
        flow: String,
        /// Actions.
        actions: String,
    },
    /// Deletes explicit flows and answers when no worker uses them any more: [`FlowsDeleted`].
    DelFlow {
        /// Which.
        which: FlowSelector,
    },
    /// Adds a port: [`Done`].
    AddPort {
        /// Its settings.
        port: PortConfig,
    },
    /// Changes settings of a port and answers when they are in force: [`Done`].
    SetPort {
        /// Its name.
        name: String,
        /// Workers that its queues are pinned to, as [`PortConfig::workers`]; none: chosen automatically.
        workers: Vec<u16>,
    },
    /// Deletes a port and answers when no worker uses it any more: [`Done`].
    DelPort {
        /// Its name.
        name: String,
    },
    /// What would happen to a packet: [`Trace`].
    Trace {
        /// The port that it comes from.
        port: String,
        /// The packet as bytes in hex, or as a flow in ODP text.
        packet: String,
    },
    /// Reads the source of flows in full and answers when every worker has them: [`Synced`].
    Sync {
        /// Seconds until this fails.
        timeout: f64,
    },
    /// Which version runs: [`Version`].
    Version {},
}

/// Longest time that a `sync` may ask for.
pub const MAX_SYNC: Duration = Duration::from_secs(3600);

/// Which explicit flows to delete.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FlowSelector {
    /// The one with this match, in ODP text.
    Flow(String),
    /// The one with this `id` of [`Flow`], or `ufid:…`.
    Id(String),
    /// All explicit ones.
    All,
}

/// Who gave a flow; [`switch_core::flow::Source`] on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum FlowSource {
    /// `add-flow`.
    Explicit,
    /// The embedded bridge or Open vSwitch.
    Learned,
}

impl From<switch_core::flow::Source> for FlowSource {
    fn from(source: switch_core::flow::Source) -> FlowSource {
        match source {
            switch_core::flow::Source::Explicit => FlowSource::Explicit,
            switch_core::flow::Source::Learned => FlowSource::Learned,
        }
    }
}

impl Request {
    /// Reads a line; the error is one line for the client.
    pub fn parse(line: &[u8]) -> Result<Request, String> {
        let value: Value = serde_json::from_slice(line).map_err(|error| format!("not JSON: {error}"))?;
        let Value::Object(mut object) = value else {
            return Err("a request is a JSON object".into());
        };
        match object.remove("v") {
            Some(version) if version == VERSION => {}
            Some(version) => {
                return Err(format!("protocol version {version} is not spoken here, {VERSION} is"));
            }
            None => return Err(format!("a request needs \"v\":{VERSION}")),
        }
        let request = Request::deserialize(Value::Object(object)).map_err(|error| error.to_string())?;
        if let Request::Sync { timeout } = request
            && !(0.0..=MAX_SYNC.as_secs_f64()).contains(&timeout)
        {
            return Err(format!("timeout {timeout}: must be 0 to {} seconds", MAX_SYNC.as_secs()));
        }
        Ok(request)
    }

    /// The request as a line, newline included.
    pub fn to_line(&self) -> serde_json::Result<String> {
        #[derive(Serialize)]
        struct Versioned<'a> {
            v: u64,
            #[serde(flatten)]
            request: &'a Request,
        }
        let mut line = serde_json::to_string(&Versioned { v: VERSION, request: self })?;
        line.push('\n');
        Ok(line)
    }
}

/// What the daemon answers; on the wire it is the object inside.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Response {
    /// To `show`.
    Show(Box<Show>),
    /// To `stats`.
    Stats(Box<Stats>),
    /// To `dump-flows`.
    Flows(Flows),
    /// To `add-flow`.
    FlowAdded(FlowAdded),
    /// To `del-flow`.
    FlowsDeleted(FlowsDeleted),
    /// To `add-port`, `set-port` and `del-port`.
    Done(Done),
    /// To `trace`.
    Trace(Trace),
    /// To `sync`.
    Synced(Synced),
    /// To `version`.
    Version(Version),
}

/// Answer to `dump-flows`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Flows {
    /// The flows.
    pub flows: Vec<Flow>,
}

/// A flow with its counters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Flow {
    /// What `del-flow` takes.
    pub id: String,
    /// The flow's name in Open vSwitch, as `ovs-dpctl dump-flows -m` prints it behind `ufid:`; `null` if it has none.
    #[serde(default)]
    pub ufid: Option<String>,
    /// Who gave it.
    pub source: FlowSource,
    /// Match in ODP text.
    pub flow: String,
    /// Actions in ODP text.
    pub actions: String,
    /// `fast`, or `punt: ` and the reason.
    pub handling: String,
    /// Packets that used it.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// TCP flags seen, or-ed: FIN is 1.
    pub tcp_flags: u16,
    /// Seconds since it was last used; `null` if never.
    pub used_seconds: Option<f64>,
    /// Where flows are put into NICs: `yes`, `waiting`, or `no (reason)`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offloaded: Option<String>,
    /// Whether some of its packets or bytes were estimated, because they were carried by a NIC that does not count them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub estimated: bool,
}

/// Answer to `add-flow`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowAdded {
    /// The flow's `id`.
    pub id: String,
    /// The match as the switch understood it, prerequisites completed.
    pub flow: String,
}

/// Answer to `del-flow`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowsDeleted {
    /// Number of flows deleted.
    pub deleted: u64,
}

/// Answer to what has nothing to tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// Always true.
    pub ok: bool,
}

impl From<Done> for Response {
    fn from(done: Done) -> Response {
        Response::Done(done)
    }
}

/// Answer to `sync`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Synced {
    /// Number of flows that the source has.
    pub flows: u64,
}

/// Answer to `trace`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trace {
    /// What each layer does, in order.
    pub steps: Vec<TraceStep>,
    /// Where the packet ends, in one line.
    pub outcome: String,
}

/// A step of [`Trace`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceStep {
    /// `parse`, `L1`, `L2`, `actions`, `host` …
    pub layer: String,
    /// What happens there, one or several lines.
    pub text: String,
}

/// Answer to `version`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// Version of the daemon.
    pub version: String,
    /// Version of the protocol.
    pub protocol: u64,
}

impl Version {
    /// This program's.
    pub fn own() -> Version {
        Version { version: env!("CARGO_PKG_VERSION").into(), protocol: VERSION }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use switch_core::drop::DropReason;

    #[test]
    fn requests_on_the_wire() {
        let flow = || "in_port(vm1)".to_string();
        let cases = [
            (Request::Show {}, json!({"v":1,"cmd":"show"})),
            (Request::Stats { port: None }, json!({"v":1,"cmd":"stats"})),
            (Request::Stats { port: Some("a".into()) }, json!({"v":1,"cmd":"stats","port":"a"})),
            (
                Request::DumpFlows { port: None, source: Some(FlowSource::Learned) },
                json!({"v":1,"cmd":"dump-flows","source":"learned"}),
            ),
            (
                Request::AddFlow { flow: flow(), actions: "vm2".into() },
                json!({"v":1,"cmd":"add-flow","flow":"in_port(vm1)","actions":"vm2"}),
            ),
            (Request::DelFlow { which: FlowSelector::All }, json!({"v":1,"cmd":"del-flow","which":"all"})),
            (
                Request::DelFlow { which: FlowSelector::Flow(flow()) },
                json!({"v":1,"cmd":"del-flow","which":{"flow":"in_port(vm1)"}}),
            ),
            (
                Request::DelFlow { which: FlowSelector::Id("3.1".into()) },
                json!({"v":1,"cmd":"del-flow","which":{"id":"3.1"}}),
            ),
            (
                Request::AddPort { port: PortConfig::new("a", "/a") },
                json!({"v":1,"cmd":"add-port","port":{"name":"a","socket":"/a","mode":"server","queues":1,
                    "max_masks":256,"miss_rate":10000}}),
            ),
            (Request::DelPort { name: "a".into() }, json!({"v":1,"cmd":"del-port","name":"a"})),
            (
                Request::Trace { port: "a".into(), packet: "00 11".into() },
                json!({"v":1,"cmd":"trace","port":"a","packet":"00 11"}),
            ),
            (Request::Sync { timeout: 1.5 }, json!({"v":1,"cmd":"sync","timeout":1.5})),
            (Request::Version {}, json!({"v":1,"cmd":"version"})),
        ];
        for (request, wire) in cases {
            let line = request.to_line().unwrap();
            assert_eq!(line.find('\n'), Some(line.len() - 1));
            assert_eq!(serde_json::from_str::<Value>(&line).unwrap(), wire);
            assert_eq!(Request::parse(line.as_bytes()), Ok(request));
        }
    }

    #[test]
    fn bad_requests_are_one_line_errors() {
        for (line, reason) in [
            ("", "not JSON: EOF"),
            ("{", "not JSON"),
            ("[1]", "a request is a JSON object"),
            (r#"{"cmd":"show"}"#, "needs \"v\":1"),
            (r#"{"v":2,"cmd":"show"}"#, "protocol version 2 is not spoken here"),
            (r#"{"v":"1","cmd":"show"}"#, "protocol version \"1\""),
            (r#"{"v":1}"#, "missing field `cmd`"),
            (r#"{"v":1,"cmd":"halt"}"#, "unknown variant `halt`"),
            (r#"{"v":1,"cmd":"show","extra":1}"#, "unknown field `extra`"),
            (r#"{"v":1,"cmd":"del-port"}"#, "missing field `name`"),
            (r#"{"v":1,"cmd":"del-port","name":3}"#, "expected a string"),
            (r#"{"v":1,"cmd":"sync","timeout":-1}"#, "must be 0 to 3600"),
            (r#"{"v":1,"cmd":"sync","timeout":1e30}"#, "must be 0 to 3600"),
            (r#"{"v":1,"cmd":"add-port","port":{"name":"a","socket":"/a","x":1}}"#, "unknown field `x`"),
            (r#"{"v":1,"cmd":"del-flow","which":"some"}"#, "unknown variant `some`"),
        ] {
            let error = Request::parse(line.as_bytes()).expect_err(line);
            assert!(error.contains(reason), "'{error}' does not say '{reason}'");
            assert!(!error.contains('\n'));
        }
        let deep = "[".repeat(60_000);
        Request::parse(deep.as_bytes()).expect_err("nesting is limited");
        Request::parse(b"\xff\xfe").expect_err("not UTF-8");
    }

    #[test]
    fn answers_on_the_wire() {
        let mut counters = [0; DropReason::COUNT];
        counters[DropReason::MissRate as usize] = 7;
        let mut stats = Stats::default();
        stats.ports.insert("vm1".into(), PortStats { rx_drops: drops(&counters), ..PortStats::default() });
        let wire = serde_json::to_value(Response::Stats(Box::new(stats))).unwrap();
        assert_eq!(wire["ports"]["vm1"]["rx_drops"]["miss_rate"], 7);
        assert_eq!(wire["ports"]["vm1"]["rx_drops"]["runt"], 0);
        for key in [
            "rx_packets",
            "rx_bytes",
            "tx_packets",
            "tx_bytes",
            "rx_forwarded",
            "rx_to_host",
            "tx_drops",
            "fast_copies",
            "host_copies",
        ] {
            assert!(wire["ports"]["vm1"].get(key).is_some(), "{key} is missing");
        }
        assert_eq!(wire["paths"], json!({"l1":0,"l2":0,"miss":0,"punt":0,"keepalive":0}));
        assert_eq!(wire["workers"], json!([]));

        let show =
            Show { ports: vec![PortShow { name: "vm1".into(), ..PortShow::default() }], ..Show::default() };
        let wire = serde_json::to_value(Response::Show(Box::new(show))).unwrap();
        assert_eq!(wire["ports"][0]["name"], "vm1");
        assert_eq!(wire["ports"][0]["link"], false);
        assert_eq!(wire["ports"][0]["state"], "waiting");
        assert_eq!(wire["flows"], json!({"explicit":0,"learned":0}));

        let wire = |response| serde_json::to_value::<Response>(response).unwrap();
        assert_eq!(wire(Response::Done(Done { ok: true })), json!({"ok":true}));
        assert_eq!(wire(Response::FlowsDeleted(FlowsDeleted { deleted: 2 })), json!({"deleted":2}));
        assert_eq!(wire(Response::Flows(Flows::default())), json!({"flows":[]}));
    }

    #[test]
    fn readers_ignore_fields_of_later_versions() {
        let stats: PortStats = serde_json::from_value(json!({"rx_packets": 3, "colour": "red"})).unwrap();
        assert_eq!(stats, PortStats { rx_packets: 3, ..PortStats::default() });
    }
}
