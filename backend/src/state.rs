//! What `add-port`, `del-port`, `add-flow` and `del-flow` changed at run time, kept in a file across restarts.
//!
//! The file is JSON and always whole: each change writes a new one beside it, syncs it, and renames it into place. A change
//! that could not be saved is not remembered here either, so memory and file agree.
//!
//! Ports are those of the configuration, without the ones deleted at run time, with the ones added at run time. Where both
//! name a port or a socket, the configuration wins and a warning says so. Under Open vSwitch its database is what keeps ports; the
//! file has what was there last, for a start without it.

use crate::port_config::PortConfig;
use log::warn;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Version of the file's layout that this program writes. It reads the older ones too:
///
/// 1. Ports of guests, explicit flows.
/// 2. Ports may be devices; ports that Open vSwitch's database had.
/// 3. Ports may be pinned to workers.
const VERSION: u32 = 3;
/// How long to wait for another daemon to let go of the file: one that was killed takes a moment to be gone.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often it is tried meanwhile.
const RETRY: Duration = Duration::from_millis(20);

/// Why the state cannot be read or kept, in one line that names the file.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Not what we wrote. We refuse to start rather than to forget what was configured.
    #[error(
        "{}: damaged ({}); repair it, or start with the configuration file alone after: mv {} {}.damaged",
        .0.display(), .1, .0.display(), .0.display()
    )]
    Damaged(PathBuf, String),
    /// Written by a later version.
    #[error(
        "{}: was written by a later pointworkd (layout {}, this one reads up to {VERSION}); install that one again, or start with \
         the configuration file alone after: mv {} {}.later",
        .0.display(), .1, .0.display(), .0.display()
    )]
    Version(PathBuf, u64),
    /// Another daemon keeps its state there.
    #[error("{}: another pointworkd keeps its state there; give each daemon a 'state' of its own", .0.display())]
    InUse(PathBuf),
    /// The file exists and cannot be read.
    #[error("{}: cannot be read: {}", .0.display(), .1)]
    Read(PathBuf, io::Error),
    /// The change could not be saved, and was not made.
    #[error("{}: cannot be saved: {}", .0.display(), .1)]
    Save(PathBuf, String),
}

/// The content of the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    version: u32,
    /// Ports that are not in the configuration, or differ from it.
    ports_added: Vec<PortConfig>,
    /// Ports of the configuration that were deleted.
    ports_deleted: BTreeSet<String>,
    /// Explicit flows: match and actions in ODP text.
    flows: BTreeMap<String, String>,
    /// Ports that Open vSwitch's database had, and not the configuration.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    ports_in_database: Vec<PortConfig>,
    /// Workers of ports as they are configured, where `set-port` has changed them; an empty list means automatic.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    workers: BTreeMap<String, Vec<u16>>,
}

/// The run-time state of a daemon. Holds a lock on the file while it lives.
#[derive(Debug)]
pub struct State {
    path: PathBuf,
    configured: Vec<PortConfig>,
    saved: Saved,
    /// The lock, or why nothing can be saved.
    lock: Result<File, String>,
}

impl State {
    /// Reads the state at `path`, or starts an empty one if there is no file; `configured` are the configuration's ports.
    ///
    /// A directory in which nothing can be written is a warning here and an error for each change. Waits for 5 s at most if
    /// another daemon has the file.
    pub fn open(path: &Path, configured: &[PortConfig]) -> Result<State, StateError> {
        State::open_within(PATIENCE, path, configured, || {
            warn!("{}: waiting for another pointworkd to let go of it", path.display());
        })
    }

    /// As [`State::open`]; `waiting` is called when it begins to wait.
    fn open_within(
        patience: Duration,
        path: &Path,
        configured: &[PortConfig],
        waiting: impl FnOnce(),
    ) -> Result<State, StateError> {
        let mut locked = lock(path);
        if matches!(locked, Err(TryLockError::WouldBlock)) {
            waiting();
            let deadline = Instant::now() + patience;
            while matches!(locked, Err(TryLockError::WouldBlock)) && Instant::now() < deadline {
                std::thread::sleep(RETRY);
                locked = lock(path);
            }
        }
        let lock = match locked {
            Ok(file) => Ok(file),
            Err(TryLockError::WouldBlock) => return Err(StateError::InUse(path.to_owned())),
            Err(TryLockError::Error(error)) => Err(error.to_string()),
        };
        let saved = read(path)?;
        let mut state = State { path: path.to_owned(), configured: configured.to_vec(), saved, lock };
        state.forget_deletions_without_port()?;
        Ok(state)
    }

    /// The ports to run.
    pub fn ports(&self) -> Vec<PortConfig> {
        let mut ports: Vec<PortConfig> = self.configured_and_kept().map(|port| self.as_set(port)).collect();
        for added in &self.saved.ports_added {
            if added.check_unique(&ports).is_ok() {
                ports.push(added.clone());
            }
        }
        ports
    }

    /// The explicit flows: match and actions in ODP text.
    pub fn flows(&self) -> impl Iterator<Item = (&str, &str)> {
        self.saved.flows.iter().map(|(flow, actions)| (&**flow, &**actions))
    }

    /// What an administrator should know now, one line each: that nothing can be kept, and where the ports that run are
    /// not those of the configuration file.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if let Err(reason) = &self.lock {
            warnings.push(format!(
                "{}: changes at run time are refused, they could not be kept: {reason}",
                self.path.display()
            ));
        }
        for port in self.configured_and_kept() {
            if self.as_set(port).workers != port.workers {
                warnings.push(format!(
                    "port '{}': its workers were set at run time, the configuration file says otherwise",
                    port.name
                ));
            }
        }
        let mut ports: Vec<&PortConfig> = self.configured_and_kept().collect();
        for added in &self.saved.ports_added {
            match added.check_unique(ports.iter().copied()) {
                Ok(()) => ports.push(added),
                Err(clash) => warnings.push(format!(
                    "{clash}: the port added at run time is left out, the configuration file counts"
                )),
            }
        }
        for name in &self.saved.ports_deleted {
            let replaced = self.saved.ports_added.iter().any(|added| added.name == *name);
            warnings.push(match replaced {
                true => {
                    format!("port '{name}': was replaced at run time, the configuration file says otherwise")
                }
                false => format!("port '{name}': is in the configuration file but was deleted at run time"),
            });
        }
        warnings
    }

    /// Whether the configuration file has a port of that name.
    pub fn is_configured(&self, name: &str) -> bool {
        self.configured.iter().any(|port| port.name == name)
    }

    /// Remembers a port that was added. The caller has checked it against the ports that run.
    pub fn record_add_port(&mut self, port: &PortConfig) -> Result<(), StateError> {
        let as_configured = self.configured.contains(port);
        self.change(|saved| {
            saved.workers.remove(&port.name);
            saved.ports_added.retain(|added| added.name != port.name);
            if as_configured {
                saved.ports_deleted.remove(&port.name);
            } else {
                saved.ports_added.push(port.clone());
            }
        })
    }

    /// Remembers that a port was deleted.
    pub fn record_del_port(&mut self, name: &str) -> Result<(), StateError> {
        let configured = self.configured.iter().any(|port| port.name == name);
        self.change(|saved| {
            saved.workers.remove(name);
            saved.ports_added.retain(|added| added.name != name);
            if configured {
                saved.ports_deleted.insert(name.to_owned());
            }
        })
    }

    /// Remembers the workers of a port that runs; `None` means automatic.
    pub fn record_set_workers(&mut self, name: &str, workers: Option<&[u16]>) -> Result<(), StateError> {
        let configured = self.configured_and_kept().find(|port| port.name == name).cloned();
        self.change(|saved| match configured {
            Some(port) if port.workers.as_deref() == workers => drop(saved.workers.remove(name)),
            Some(_) => drop(saved.workers.insert(name.to_owned(), workers.unwrap_or_default().to_vec())),
            None => {
                for added in saved.ports_added.iter_mut().filter(|added| added.name == name) {
                    added.workers = workers.map(<[u16]>::to_vec);
                }
            }
        })
    }

    /// The ports that Open vSwitch's database had last, besides those of the configuration.
    pub fn ports_in_database(&self) -> &[PortConfig] {
        &self.saved.ports_in_database
    }

    /// Remembers which ports the database has.
    pub fn record_ports_in_database(
        &mut self,
        ports: impl Iterator<Item = PortConfig>,
    ) -> Result<(), StateError> {
        // One that was deleted by command and made again in the database is the database's.
        let run = self.ports();
        let ports = ports.filter(|port| run.iter().all(|other| other.name != port.name)).collect();
        self.change(|saved| saved.ports_in_database = ports)
    }

    /// Remembers an explicit flow; a flow with the same match is replaced. Give the text as the switch prints it, so that
    /// the same match has the same text.
    pub fn record_add_flow(&mut self, flow: &str, actions: &str) -> Result<(), StateError> {
        self.change(|saved| {
            saved.flows.insert(flow.to_owned(), actions.to_owned());
        })
    }

    /// Forgets explicit flows by their matches.
    pub fn record_del_flows<'a>(
        &mut self,
        flows: impl IntoIterator<Item = &'a str>,
    ) -> Result<(), StateError> {
        self.change(|saved| {
            for flow in flows {
                saved.flows.remove(flow);
            }
        })
    }

    /// Forgets every explicit flow.
    pub fn record_del_all_flows(&mut self) -> Result<(), StateError> {
        self.change(|saved| saved.flows.clear())
    }

    /// Applies `change` and saves the result; in case of an error nothing has changed.
    fn change(&mut self, change: impl FnOnce(&mut Saved)) -> Result<(), StateError> {
        let mut next = self.saved.clone();
        change(&mut next);
        if next == self.saved {
            return Ok(());
        }
        if let Err(reason) = &self.lock {
            return Err(StateError::Save(self.path.clone(), reason.clone()));
        }
        write(&self.path, &next).map_err(|error| StateError::Save(self.path.clone(), error.to_string()))?;
        self.saved = next;
        Ok(())
    }

    fn configured_and_kept(&self) -> impl Iterator<Item = &PortConfig> {
        self.configured.iter().filter(|port| !self.saved.ports_deleted.contains(&port.name))
    }

    /// A configured port with what `set-port` has changed.
    fn as_set(&self, port: &PortConfig) -> PortConfig {
        let workers = match self.saved.workers.get(&port.name) {
            None => port.workers.clone(),
            Some(set) => (!set.is_empty()).then(|| set.clone()),
        };
        PortConfig { workers, ..port.clone() }
    }

    /// A port that has left the configuration and comes back to it later must not stay deleted.
    fn forget_deletions_without_port(&mut self) -> Result<(), StateError> {
        let names: BTreeSet<String> = self.configured.iter().map(|port| port.name.clone()).collect();
        if self.lock.is_err() {
            self.saved.ports_deleted.retain(|name| names.contains(name));
            self.saved.workers.retain(|name, _| names.contains(name));
            return Ok(());
        }
        self.change(|saved| {
            saved.ports_deleted.retain(|name| names.contains(name));
            saved.workers.retain(|name, _| names.contains(name));
        })
    }
}

/// `path` with `suffix` behind its name.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// The lock is a file of its own because the state file is replaced by each change.
fn lock(path: &Path) -> Result<File, TryLockError> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).map_err(TryLockError::Error)?;
    }
    let options = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).to_owned();
    let file = options.open(beside(path, ".lock")).map_err(TryLockError::Error)?;
    file.try_lock()?;
    Ok(file)
}

fn read(path: &Path) -> Result<Saved, StateError> {
    let damaged = |reason: String| StateError::Damaged(path.to_owned(), reason.replace('\n', " "));
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Ok(Saved {
                version: VERSION,
                ports_added: Vec::new(),
                ports_deleted: BTreeSet::new(),
                flows: BTreeMap::new(),
                ports_in_database: Vec::new(),
                workers: BTreeMap::new(),
            });
        }
        Err(error) => return Err(StateError::Read(path.to_owned(), error)),
    };
    // The version first: the layout of a later one is not known here.
    let value: serde_json::Value = serde_json::from_slice(&bytes).map_err(|e| damaged(e.to_string()))?;
    match value.get("version").and_then(serde_json::Value::as_u64) {
        Some(version) if (1..=VERSION.into()).contains(&version) => {}
        Some(0) => return Err(damaged("version 0".into())),
        Some(version) => return Err(StateError::Version(path.to_owned(), version)),
        None => return Err(damaged("no version".into())),
    }
    let mut saved: Saved = serde_json::from_value(value).map_err(|e| damaged(e.to_string()))?;
    saved.version = VERSION;
    // They are a copy: the database has the truth, and a port that is not valid is named when that is read.
    saved.ports_in_database.retain(|port| port.validate().is_ok());
    for (index, port) in saved.ports_added.iter().enumerate() {
        port.validate()
            .and_then(|()| port.check_unique(&saved.ports_added[..index]))
            .map_err(|bad| damaged(bad.reason))?;
    }
    Ok(saved)
}

/// Replaces the file: after a crash at any point there is the old one or the new one, whole.
fn write(path: &Path, saved: &Saved) -> io::Result<()> {
    let temporary = beside(path, ".tmp");
    let mut text = serde_json::to_vec_pretty(saved)?;
    text.push(b'\n');
    let options = OpenOptions::new().write(true).create(true).truncate(true).mode(0o640).to_owned();
    let mut file = options.open(&temporary)?;
    file.write_all(&text)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    match path.parent() {
        Some(directory) => File::open(directory)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn port(name: &str) -> PortConfig {
        PortConfig::new(name, format!("/run/{name}"))
    }

    fn names(state: &State) -> Vec<String> {
        state.ports().into_iter().map(|port| port.name).collect()
    }

    #[test]
    fn changes_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/state.json");
        let configured = [port("vm1"), port("vm2")];
        let added = PortConfig { queues: Some(4), vlan: Some(7), ..port("vm3") };
        let mut state = State::open(&path, &configured).unwrap();
        assert_eq!(names(&state), ["vm1", "vm2"]);
        state.record_add_port(&added).unwrap();
        state.record_del_port("vm1").unwrap();
        state.record_add_flow("in_port(vm2)", "vm3").unwrap();
        state.record_add_flow("in_port(vm3)", "drop").unwrap();
        state.record_add_flow("in_port(vm3)", "vm2").unwrap();
        drop(state);

        let mut state = State::open(&path, &configured).unwrap();
        assert_eq!(state.ports(), [port("vm2"), added]);
        assert_eq!(Vec::from_iter(state.flows()), [("in_port(vm2)", "vm3"), ("in_port(vm3)", "vm2")]);
        assert_eq!(
            state.warnings(),
            ["port 'vm1': is in the configuration file but was deleted at run time"]
        );
        state.record_del_port("vm3").unwrap();
        state.record_add_port(&port("vm1")).unwrap();
        state.record_del_flows(["in_port(vm2)", "in_port(unknown)"]).unwrap();
        drop(state);

        let mut state = State::open(&path, &configured).unwrap();
        assert_eq!(names(&state), ["vm1", "vm2"]);
        assert_eq!(state.flows().count(), 1);
        assert!(state.warnings().is_empty());
        state.record_del_all_flows().unwrap();
        drop(state);
        assert_eq!(State::open(&path, &configured).unwrap().flows().count(), 0);
    }

    #[test]
    fn workers_that_were_set_come_back_for_every_kind_of_port() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        let pinned = PortConfig { workers: Some(vec![1]), ..port("vm2") };
        let configured = [port("vm1"), pinned];
        let workers = |state: &State| {
            let ports = state.ports();
            ports.iter().map(|port| port.workers.clone()).collect::<Vec<_>>()
        };
        let mut state = State::open(&path, &configured).unwrap();
        state.record_add_port(&port("vm3")).unwrap();
        state.record_set_workers("vm1", Some(&[0, 1])).unwrap();
        state.record_set_workers("vm2", None).unwrap();
        state.record_set_workers("vm3", Some(&[1])).unwrap();
        drop(state);
        let mut state = State::open(&path, &configured).unwrap();
        assert_eq!(workers(&state), [Some(vec![0, 1]), None, Some(vec![1])]);
        let said = |name| {
            format!("port '{name}': its workers were set at run time, the configuration file says otherwise")
        };
        assert_eq!(state.warnings(), [said("vm1"), said("vm2")]);
        // What is as configured is no change; what is deleted is forgotten.
        state.record_set_workers("vm2", Some(&[1])).unwrap();
        state.record_del_port("vm1").unwrap();
        state.record_add_port(&port("vm1")).unwrap();
        state.record_set_workers("vm3", None).unwrap();
        drop(state);
        let mut state = State::open(&path, &configured).unwrap();
        assert_eq!((workers(&state), state.warnings()), (vec![None, Some(vec![1]), None], vec![]));
        // A port that has left the configuration has left nothing.
        state.record_set_workers("vm1", Some(&[0])).unwrap();
        drop(state);
        drop(State::open(&path, &configured[1..]).unwrap());
        assert_eq!(workers(&State::open(&path, &configured).unwrap())[0], None);
    }

    #[test]
    fn what_a_database_had_is_kept_beside_the_ports_that_run() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        let mut state = State::open(&path, &[port("vm1")]).unwrap();
        state.record_ports_in_database([port("vm1"), port("vm2")].into_iter()).unwrap();
        assert!(fs::read_to_string(&path).unwrap().contains("ports_in_database"));
        drop(state);
        let mut state = State::open(&path, &[port("vm1")]).unwrap();
        assert_eq!((state.ports_in_database(), names(&state)), (&[port("vm2")][..], vec!["vm1".to_owned()]));
        // Without any the file is what it was before there were such ports.
        state.record_ports_in_database(std::iter::empty()).unwrap();
        assert!(!fs::read_to_string(&path).unwrap().contains("ports_in_database"));
        drop(state);
        assert!(State::open(&path, &[]).unwrap().ports_in_database().is_empty());
    }

    #[test]
    fn a_configured_port_can_be_replaced_at_run_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        let mut state = State::open(&path, &[port("vm1")]).unwrap();
        state.record_del_port("vm1").unwrap();
        state.record_add_port(&PortConfig { queues: Some(2), ..port("vm1") }).unwrap();
        drop(state);
        let state = State::open(&path, &[port("vm1")]).unwrap();
        assert_eq!(state.ports(), [PortConfig { queues: Some(2), ..port("vm1") }]);
        assert_eq!(state.warnings().len(), 1);
        assert!(state.warnings()[0].contains("was replaced at run time"));
    }

    #[test]
    fn the_configuration_wins_over_added_ports() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        let mut state = State::open(&path, &[]).unwrap();
        state.record_add_port(&PortConfig { queues: Some(2), ..port("vm1") }).unwrap();
        state.record_add_port(&PortConfig::new("vm2", "/run/other")).unwrap();
        drop(state);
        let configured = [port("vm1"), PortConfig::new("vm9", "/run/other")];
        let state = State::open(&path, &configured).unwrap();
        assert_eq!(state.ports(), configured);
        assert_eq!(state.warnings().len(), 2);
        assert!(
            state.warnings()[0]
                .starts_with("port 'vm1': there is a port of this name already: the port added")
        );
        assert!(state.warnings()[1].starts_with("port 'vm2': socket /run/other belongs to port 'vm9'"));
    }

    #[test]
    fn a_port_that_left_the_configuration_is_not_deleted_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        State::open(&path, &[port("vm1")]).unwrap().record_del_port("vm1").unwrap();
        assert!(names(&State::open(&path, &[port("vm1")]).unwrap()).is_empty());
        drop(State::open(&path, &[]).unwrap());
        assert_eq!(names(&State::open(&path, &[port("vm1")]).unwrap()), ["vm1"]);
    }

    #[test]
    fn damaged_files_are_refused_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        let port_without_queues = r#"{"version":1,"ports_added":[{"name":"a","socket":"/a","queues":0}],
            "ports_deleted":[],"flows":{}}"#;
        for (text, reason) in [
            ("", "EOF"),
            ("{\"version\":1,\"ports_ad", "EOF"),
            ("[]", "no version"),
            ("{\"version\":1}", "missing field"),
            ("{\"version\":1,\"ports_added\":[],\"ports_deleted\":[],\"flows\":{},\"x\":1}", "unknown field"),
            (port_without_queues, "port 'a': queues = 0"),
            ("\u{0}\u{0}\u{0}", "expected value"),
        ] {
            fs::write(&path, text).unwrap();
            let error = State::open(&path, &[]).unwrap_err().to_string();
            assert!(error.contains(reason), "'{error}' does not say '{reason}'");
            assert!(error.contains("state.json.damaged") && !error.contains('\n'), "{error}");
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        fs::write(&path, "{\"version\":4,\"new\":0}").unwrap();
        let error = State::open(&path, &[]).unwrap_err().to_string();
        assert!(error.contains("later pointworkd (layout 4, this one reads up to 3)"), "{error}");
        assert!(error.contains("state.json.later") && !error.contains('\n'), "{error}");
    }

    #[test]
    fn the_layout_before_is_read_and_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        let old = r#"{"version":1,"ports_added":[{"name":"vm1","socket":"/run/vm1","mode":"server","queues":1}],
            "ports_deleted":["vm2"],"flows":{"in_port(vm1)":"drop"}}"#;
        fs::write(&path, old).unwrap();
        let configured = [port("vm2")];
        let mut state = State::open(&path, &configured).unwrap();
        assert_eq!((names(&state), state.flows().count()), (vec!["vm1".to_owned()], 1));
        // Nothing has changed: a daemon of before can still be put back.
        assert_eq!(fs::read_to_string(&path).unwrap(), old);
        state.record_add_port(&PortConfig::wire("eth1", "eth1")).unwrap();
        assert!(fs::read_to_string(&path).unwrap().contains("\"version\": 3"));
        drop(state);
        assert_eq!(names(&State::open(&path, &configured).unwrap()), ["vm1", "eth1"]);
    }

    #[test]
    fn what_cannot_be_saved_is_not_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        let mut state = State::open(&path, &[]).unwrap();
        state.record_add_port(&port("vm1")).unwrap();
        fs::create_dir(beside(&path, ".tmp")).unwrap();
        let error = state.record_add_port(&port("vm2")).unwrap_err().to_string();
        assert!(error.contains("state.json: cannot be saved"), "{error}");
        assert_eq!(names(&state), ["vm1"]);
        drop(state);
        assert_eq!(names(&State::open(&path, &[]).unwrap()), ["vm1"]);
    }

    #[test]
    fn a_directory_that_cannot_be_made_is_a_warning_until_something_changes() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        let path = dir.path().join("file/state.json");
        // Reading below a file fails with ENOTDIR, which is not "no such file".
        assert!(matches!(State::open(&path, &[]), Err(StateError::Read(..))));
        let path = Path::new("/proc/pointwork/state.json");
        let mut state = State::open(path, &[port("vm1")]).unwrap();
        assert_eq!(names(&state), ["vm1"]);
        assert!(state.warnings()[0].contains("changes at run time are refused"));
        assert!(matches!(state.record_del_port("vm1"), Err(StateError::Save(..))));
        assert_eq!(names(&state), ["vm1"]);
    }

    #[test]
    fn two_daemons_do_not_share_a_state() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        let first = State::open(&path, &[]).unwrap();
        let mut waited = false;
        let second = State::open_within(RETRY, &path, &[], || waited = true);
        assert!(waited && matches!(second, Err(StateError::InUse(_))));
        // One that is about to end is waited for.
        State::open_within(Duration::from_secs(60), &path, &[], || drop(first)).unwrap();
        State::open_within(Duration::ZERO, &path, &[], || panic!("nobody has it")).unwrap();
    }

    #[test]
    fn a_killed_writer_leaves_a_whole_file() {
        const CHILD: &str = "POINTWORK_TEST_STATE";
        if let Some(path) = std::env::var_os(CHILD) {
            let mut state = State::open(Path::new(&path), &[]).unwrap();
            for round in 0.. {
                let actions = format!("{round},").repeat(2000);
                state.record_add_flow("in_port(vm1)", &actions).unwrap();
                if round == 0 {
                    println!("saved");
                }
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        // The temporary file of a crash does not disturb.
        fs::write(beside(&path, ".tmp"), "{\"vers").unwrap();
        for delay in [0, 1, 3, 7, 12] {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "state::tests::a_killed_writer_leaves_a_whole_file", "--nocapture"])
                .env(CHILD, &path)
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let saved = io::BufRead::lines(io::BufReader::new(child.stdout.take().unwrap()))
                .find(|line| line.as_ref().is_ok_and(|line| line.contains("saved")));
            assert!(saved.is_some(), "the child saved nothing");
            std::thread::sleep(Duration::from_millis(delay));
            child.kill().unwrap();
            child.wait().unwrap();
            let state = State::open(&path, &[]).unwrap();
            let (flow, actions) = state.flows().next().unwrap();
            assert_eq!(flow, "in_port(vm1)");
            assert_eq!(actions.matches(',').count(), 2000);
        }
    }
}
