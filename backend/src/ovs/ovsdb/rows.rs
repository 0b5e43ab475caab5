//! Rows of the database as they come over the wire, and the values in them (RFC 7047 §5.1).

use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, HashMap};

/// A row: its columns by name.
pub(super) type Row = Map<String, Value>;

/// The columns that are monitored, as far as the server has them.
const COLUMNS: [(&str, &[&str]); 5] = [
    ("Open_vSwitch", &["bridges", "other_config", "ovs_version"]),
    ("Bridge", &["name", "ports", "datapath_type", "mirrors", "sflow", "ipfix", "netflow"]),
    ("Port", &["name", "interfaces", "tag", "trunks", "vlan_mode", "qos"]),
    (
        "Interface",
        &[
            "name",
            "type",
            "options",
            "external_ids",
            "ofport",
            "error",
            "ingress_policing_rate",
            "ingress_policing_kpkts_rate",
            "mtu",
            "mtu_request",
            "ifindex",
        ],
    ),
    ("QoS", &["type"]),
];

/// What to ask `monitor` for, of a server with `schema` (RFC 7047 §3.2): servers refuse what they do not know.
pub(super) fn monitor_requests(schema: &Value) -> Value {
    let mut requests = Map::new();
    for (table, columns) in COLUMNS {
        if let Some(Value::Object(known)) = schema.pointer(&format!("/tables/{table}/columns")) {
            let columns: Vec<&str> =
                columns.iter().copied().filter(|&name| known.contains_key(name)).collect();
            requests.insert(table.to_owned(), json!({"columns": columns}));
        }
    }
    Value::Object(requests)
}

/// All rows that are monitored.
#[derive(Default)]
pub(super) struct Rows {
    tables: HashMap<String, HashMap<String, Row>>,
}

impl Rows {
    /// Applies `<table-updates>` (RFC 7047 §4.1.6).
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn apply(&mut self, updates: Value) -> Result<(), String> {
        for (name, changed) in object(updates)? {
            let table = self.tables.entry(name).or_default();
            for (uuid, change) in object(changed)? {
                match object(change)?.remove("new") {
                    Some(new) => {
                        let own = json!(["uuid", uuid]);
                        let row = table.entry(uuid).or_default();
                        row.extend(object(new)?);
                        row.insert("_uuid".to_owned(), own);
                    }
                    None => drop(table.remove(&uuid)),
                }
            }
        }
        Ok(())
    }

    /// The rows of a table.
    pub fn all(&self, table: &str) -> impl Iterator<Item = &Row> {
        self.tables.get(table).into_iter().flat_map(HashMap::values)
    }

    /// The rows that a column refers to, as far as they are there.
    pub fn referred(&self, table: &str, row: &Row, column: &str) -> impl Iterator<Item = &Row> {
        let rows = self.tables.get(table);
        uuids(row, column).filter_map(move |uuid| rows?.get(uuid))
    }
}

fn object(value: Value) -> Result<Map<String, Value>, String> {
    match value {
        Value::Object(map) => Ok(map),
        other => Err(format!("an object expected in an update, not {:.60}", other.to_string())),
    }
}

/// The atoms of a column: of a set, or the only one. A column that is not there is the empty set.
pub(super) fn atoms<'a>(row: &'a Row, column: &str) -> impl Iterator<Item = &'a Value> {
    let atoms = row.get(column).map_or(&[][..], |value| match tagged(value, "set") {
        Some(Value::Array(atoms)) => atoms,
        _ => std::slice::from_ref(value),
    });
    atoms.iter()
}

/// What follows `tag` in a pair such as `["set", […]]`.
fn tagged<'a>(value: &'a Value, tag: &str) -> Option<&'a Value> {
    match value.as_array().map(Vec::as_slice) {
        Some([name, rest]) if name == tag => Some(rest),
        _ => None,
    }
}

/// The UUIDs of a column.
pub(super) fn uuids<'a>(row: &'a Row, column: &str) -> impl Iterator<Item = &'a str> {
    atoms(row, column).filter_map(|atom| tagged(atom, "uuid")?.as_str())
}

/// The string of a column; none if it is empty or not there.
pub(super) fn string(row: &Row, column: &str) -> Option<String> {
    let text = atoms(row, column).next()?.as_str()?;
    (!text.is_empty()).then(|| text.to_owned())
}

/// The number of a column; none if it is not there, or beyond `T` (a negative one too).
pub(super) fn number<T: TryFrom<i64>>(row: &Row, column: &str) -> Option<T> {
    T::try_from(atoms(row, column).next()?.as_i64()?).ok()
}

/// The pairs of a column that maps strings to strings.
pub(super) fn map(row: &Row, column: &str) -> BTreeMap<String, String> {
    let pairs = row.get(column).and_then(|value| tagged(value, "map")).and_then(Value::as_array);
    let pair = |pair: &Value| match pair.as_array().map(Vec::as_slice) {
        Some([Value::String(key), Value::String(value)]) => Some((key.clone(), value.clone())),
        _ => None,
    };
    pairs.into_iter().flatten().filter_map(pair).collect()
}
