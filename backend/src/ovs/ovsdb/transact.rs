//! Changes of the database: adding and removing a port, as `ovs-vsctl` does it.

use super::rows::{self, Row};
use super::{DATABASE, MESSAGE_LIMIT};
use crate::ovs::jsonrpc::{Connection, Remote, RpcError, describe_error};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// How long to connect, and to be answered.
const ANSWER: Duration = Duration::from_secs(3);
/// How often a change is tried anew because somebody else was faster.
const TRIES: usize = 20;
/// What a `wait` gives whose condition does not hold (RFC 7047 §5.2.6).
const TIMED_OUT: &str = "timed out";

/// A port to be added, with one interface of the same name: a device of the system.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortRow {
    /// The name of the port, its interface and the device.
    pub name: String,
    /// Pairs to be put among the interface's `external_ids`.
    pub external_ids: BTreeMap<String, String>,
    /// The access or native VLAN; none leaves it as it is.
    pub tag: Option<u16>,
    /// The VLANs to trunk; none leaves them as they are.
    pub trunks: Vec<u16>,
    /// `access`, `trunk` and so on; none leaves it as it is.
    pub vlan_mode: Option<String>,
    /// The MTU in bytes that ovs-vswitchd is to set; none leaves it as it is.
    pub mtu_request: Option<u32>,
}

/// Why the database was not changed: one line.
#[derive(Debug, thiserror::Error)]
pub enum TransactError {
    /// The server cannot be asked.
    #[error(transparent)]
    Rpc(#[from] RpcError),
    /// There is no such bridge.
    #[error("Open vSwitch has no bridge '{0}' (ovs-vsctl add-br {0})")]
    NoBridge(String),
    /// The port exists elsewhere.
    #[error("port '{port}' exists on bridge '{found}' and not on '{wanted}' (ovs-vsctl del-port {port})")]
    OtherBridge {
        /// The port.
        port: String,
        /// Where it is.
        found: String,
        /// Where it was to be.
        wanted: String,
    },
    /// A port of that name has other interfaces.
    #[error("port '{0}' exists on its bridge as a bond of other interfaces")]
    Bond(String),
    /// It is the bridge's local port.
    #[error("'{0}' is the local port of the bridge of that name, which stays as long as the bridge")]
    Local(String),
    /// Others change the port all the time.
    #[error("port '{0}' is being changed by others all the time; try again")]
    Busy(String),
    /// The server refuses the change.
    #[error("the database refuses: {0}")]
    Refused(String),
}

/// The way to change a database. Each change has a connection of its own.
#[derive(Clone, Debug)]
pub struct Database {
    remote: Remote,
}

/// What the database says about a port that is to be changed.
struct Found {
    bridges: Vec<Row>,
    port: Option<Row>,
    interface: Option<Row>,
}

impl Found {
    /// The bridge that has the port.
    fn home(&self) -> Option<&Row> {
        let port = uuid(self.port.as_ref()?)?;
        self.bridges.iter().find(|bridge| rows::uuids(bridge, "ports").any(|found| found == port))
    }

    fn bridge(&self, name: &str) -> Option<&Row> {
        self.bridges.iter().find(|bridge| bridge_name(bridge) == name)
    }
}

impl Database {
    /// The database at `remote`. Nothing is asked yet.
    pub fn new(remote: Remote) -> Database {
        Database { remote }
    }

    /// Adds a port to `bridge`, as `ovs-vsctl --may-exist add-port BRIDGE NAME -- set Interface NAME external_ids:…` does,
    /// but without waiting for ovs-vswitchd: the interface gets its `ofport` later. If the bridge has the port already,
    /// only what `port` gives is set. Takes milliseconds, and at most 12 s of a server that hardly answers.
    pub fn add_port(&self, bridge: &str, port: &PortRow) -> Result<(), TransactError> {
        self.change(&port.name, |found| {
            let target = found.bridge(bridge).ok_or_else(|| TransactError::NoBridge(bridge.to_owned()))?;
            let mut operations = match (&found.port, found.home()) {
                (Some(existing), Some(home)) if uuid(home) == uuid(target) => {
                    let own = |row: &&Row| rows::uuids(existing, "interfaces").eq(uuid(row));
                    let interface = found.interface.as_ref().filter(own);
                    let interface = interface.ok_or_else(|| TransactError::Bond(port.name.clone()))?;
                    let mut operations =
                        vec![still_on(home, existing), still("Port", existing, "interfaces")];
                    operations.extend(port.set(existing, interface));
                    operations
                }
                (Some(_), Some(home)) => {
                    return Err(TransactError::OtherBridge {
                        port: port.name.clone(),
                        found: bridge_name(home).to_owned(),
                        wanted: bridge.to_owned(),
                    });
                }
                // Ports that no bridge has do not exist between transactions.
                _ => {
                    let named = json!([["name", "==", port.name]]);
                    let mut operations =
                        vec![still("Bridge", target, "name"), wait("Port", named, "name", json!([]))];
                    operations.extend(port.insert(target));
                    operations
                }
            };
            operations.push(comment(format!("add-port {bridge} {}", port.name)));
            Ok(Some(operations))
        })?;
        Ok(())
    }

    /// Removes a port from its bridge; tells whether there was one. Takes as long as [`Database::add_port`].
    pub fn del_port(&self, name: &str) -> Result<bool, TransactError> {
        self.change(name, |found| {
            let (Some(port), Some(home)) = (&found.port, found.home()) else { return Ok(None) };
            if bridge_name(home) == name {
                return Err(TransactError::Local(name.to_owned()));
            }
            Ok(Some(vec![
                still_on(home, port),
                // Its row and its interface's go with the last reference to them.
                mutate("Bridge", home, json!([["ports", "delete", port.get("_uuid")]])),
                comment(format!("del-port {name}")),
            ]))
        })
    }

    /// Sets a key of the `external_ids` of a port's interface, or takes it out; tells whether there is such an interface. Takes
    /// as long as [`Database::add_port`].
    pub fn set_external_id(&self, name: &str, key: &str, value: Option<&str>) -> Result<bool, TransactError> {
        self.change(name, |found| {
            let Some(interface) = &found.interface else { return Ok(None) };
            let delete = json!(["external_ids", "delete", ["set", [key]]]);
            let insert = value.map(|value| json!(["external_ids", "insert", ["map", [[key, value]]]]));
            // Inserting alone leaves alone a key that exists.
            let mutations: Vec<Value> = [delete].into_iter().chain(insert).collect();
            Ok(Some(vec![
                mutate("Interface", interface, json!(mutations)),
                comment(format!("set-port {name}")),
            ]))
        })
    }

    /// Takes all that begins with `prefix` out of the `external_ids` of a port's interface, which stays with all else; tells
    /// whether there was one. Takes as long as [`Database::add_port`].
    pub fn release_port(&self, name: &str, prefix: &str) -> Result<bool, TransactError> {
        self.change(name, |found| {
            let Some(interface) = &found.interface else { return Ok(None) };
            let mut keys: Vec<String> = rows::map(interface, "external_ids").into_keys().collect();
            keys.retain(|key| key.starts_with(prefix));
            Ok(Some(vec![
                still("Interface", interface, "external_ids"),
                mutate("Interface", interface, json!([["external_ids", "delete", ["set", keys]]])),
                comment(format!("release port {name}")),
            ]))
        })
    }

    /// Carries out the operations that `plan` gives for what there is about port `name`, and tells whether there were any;
    /// plans anew when it has changed meanwhile.
    fn change(
        &self,
        name: &str,
        plan: impl Fn(&Found) -> Result<Option<Vec<Value>>, TransactError>,
    ) -> Result<bool, TransactError> {
        let mut connection = Connection::connect(&self.remote, ANSWER, MESSAGE_LIMIT)?;
        let start = Instant::now();
        for _ in 0..TRIES {
            if start.elapsed() > ANSWER {
                break;
            }
            let found = find(&mut connection, name)?;
            let Some(mut operations) = plan(&found)? else { return Ok(false) };
            operations.push(json!({
                "op": "mutate", "table": "Open_vSwitch", "where": [], "mutations": [["next_cfg", "+=", 1]],
            }));
            match transact(&mut connection, operations) {
                Err(TransactError::Refused(reason)) if reason.starts_with(TIMED_OUT) => {}
                done => return done.map(|_| true),
            }
        }
        Err(TransactError::Busy(name.to_owned()))
    }
}

impl PortRow {
    /// The operations that add it to `bridge`.
    fn insert(&self, bridge: &Row) -> Vec<Value> {
        let (mut port, mut interface) = (self.port_columns(), self.interface_columns());
        port.insert("name".to_owned(), json!(self.name));
        port.insert("interfaces".to_owned(), json!(["named-uuid", "interface"]));
        interface.insert("name".to_owned(), json!(self.name));
        interface.insert("external_ids".to_owned(), self.pairs());
        vec![
            json!({"op": "insert", "table": "Interface", "uuid-name": "interface", "row": interface}),
            json!({"op": "insert", "table": "Port", "uuid-name": "port", "row": port}),
            mutate("Bridge", bridge, json!([["ports", "insert", ["named-uuid", "port"]]])),
        ]
    }

    /// The operations that bring an existing port to what is given.
    fn set(&self, port: &Row, interface: &Row) -> Vec<Value> {
        let keys: Vec<&String> = self.external_ids.keys().collect();
        // Inserting alone leaves alone the keys that exist.
        let mutations =
            json!([["external_ids", "delete", ["set", keys]], ["external_ids", "insert", self.pairs()]]);
        let mut operations = vec![mutate("Interface", interface, mutations)];
        for (table, row, columns) in
            [("Port", port, self.port_columns()), ("Interface", interface, self.interface_columns())]
        {
            if !columns.is_empty() {
                operations.push(json!({"op": "update", "table": table, "where": this(row), "row": columns}));
            }
        }
        operations
    }

    /// `external_ids` as a value of the database.
    fn pairs(&self) -> Value {
        json!(["map", self.external_ids.iter().collect::<Vec<_>>()])
    }

    /// What is given for the row of table Port.
    fn port_columns(&self) -> Row {
        let mut columns = Row::new();
        if let Some(tag) = self.tag {
            columns.insert("tag".to_owned(), json!(tag));
        }
        if !self.trunks.is_empty() {
            columns.insert("trunks".to_owned(), json!(["set", self.trunks]));
        }
        if let Some(mode) = &self.vlan_mode {
            columns.insert("vlan_mode".to_owned(), json!(mode));
        }
        columns
    }

    /// What is given for the row of table Interface, besides `external_ids`.
    fn interface_columns(&self) -> Row {
        self.mtu_request.map(|mtu| ("mtu_request".to_owned(), json!(mtu))).into_iter().collect()
    }
}

/// Reads what there is about port `name`.
fn find(connection: &mut Connection, name: &str) -> Result<Found, TransactError> {
    let named = json!([["name", "==", name]]);
    let selects = vec![
        json!({"op": "select", "table": "Bridge", "where": [], "columns": ["_uuid", "name", "ports"]}),
        json!({"op": "select", "table": "Port", "where": named, "columns": ["_uuid", "interfaces"]}),
        json!({"op": "select", "table": "Interface", "where": named, "columns": ["_uuid", "external_ids"]}),
    ];
    let mut results = transact(connection, selects)?.into_iter();
    let mut rows = || -> Result<Vec<Row>, TransactError> {
        let rows = results.next().and_then(|mut result| Some(result.get_mut("rows")?.take()));
        Ok(serde_json::from_value(rows.unwrap_or_default())
            .map_err(|error| connection.malformed(error.to_string()))?)
    };
    let (bridges, ports, interfaces) = (rows()?, rows()?, rows()?);
    Ok(Found { bridges, port: ports.into_iter().next(), interface: interfaces.into_iter().next() })
}

/// Carries out `operations`, all or none (RFC 7047 §4.1.3), and returns their results.
fn transact(connection: &mut Connection, operations: Vec<Value>) -> Result<Vec<Value>, TransactError> {
    let wanted = operations.len();
    let params: Vec<Value> = std::iter::once(json!(DATABASE)).chain(operations).collect();
    // Nothing is monitored here.
    let results = connection.call("transact", Value::Array(params), ANSWER, &mut |_| {})?;
    let Value::Array(results) = results else {
        return Err(connection.malformed("the result of a transaction is no array").into());
    };
    // The error is that of an operation, or follows all of them.
    if let Some(failed) = results.iter().find(|result| result.get("error").is_some()) {
        return Err(TransactError::Refused(describe_error(failed)));
    }
    if results.len() != wanted {
        return Err(connection.malformed("a transaction without a result for each operation").into());
    }
    Ok(results)
}

fn uuid(row: &Row) -> Option<&str> {
    rows::uuids(row, "_uuid").next()
}

fn bridge_name(row: &Row) -> &str {
    row.get("name").and_then(Value::as_str).unwrap_or_default()
}

/// The condition that a row is this one.
fn this(row: &Row) -> Value {
    json!([["_uuid", "==", row.get("_uuid")]])
}

/// The operation that fails unless the rows that `condition` selects have in `column` what `rows` has.
fn wait(table: &str, condition: Value, column: &str, rows: Value) -> Value {
    json!({
        "op": "wait", "timeout": 0, "table": table, "where": condition, "columns": [column],
        "until": "==", "rows": rows,
    })
}

/// The operation that fails unless a row is there with a column as it was read.
fn still(table: &str, row: &Row, column: &str) -> Value {
    wait(table, this(row), column, json!([{column: row.get(column)}]))
}

/// The operation that fails unless a bridge has a port. Other ports may come and go.
fn still_on(bridge: &Row, port: &Row) -> Value {
    let has = json!([["_uuid", "==", bridge.get("_uuid")], ["ports", "includes", port.get("_uuid")]]);
    wait("Bridge", has, "name", json!([{"name": bridge_name(bridge)}]))
}

fn mutate(table: &str, row: &Row, mutations: Value) -> Value {
    json!({"op": "mutate", "table": table, "where": this(row), "mutations": mutations})
}

/// The operation that leaves a line in the database's log.
fn comment(text: String) -> Value {
    json!({"op": "comment", "comment": format!("pointworkd: {text}")})
}
