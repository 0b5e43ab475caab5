//! What `set-port` has written to the database, until the database says so itself.

use crate::ovs::ports::OvsPort;
use crate::spread::Millis;
use std::collections::BTreeMap;

/// How long a snapshot may still say something else: beyond, somebody has changed it again.
const STALE: Millis = 2_000;

/// Workers of ports, as they were written and when. A snapshot that is older says what was before: it must not take queues back,
/// and whoever has asked is not told that they are there while such a snapshot may come.
#[derive(Default, Debug)]
pub struct Pins(BTreeMap<String, (Option<Vec<u16>>, Millis)>);

impl Pins {
    /// These workers were written for a port. `known` is what the last snapshot says of it: if it is the same, nothing has
    /// changed, and none will come.
    pub fn written(&mut self, name: &str, workers: Option<Vec<u16>>, known: Option<&OvsPort>, now: Millis) {
        let is_known = known.is_some_and(|port| port.config.as_ref().is_ok_and(|c| c.workers == workers));
        match is_known {
            true => self.0.remove(name),
            false => self.0.insert(name.to_owned(), (workers, now)),
        };
    }

    /// Gives up what was written too long ago; whether there was such, and the last snapshot is to be looked at again.
    pub fn expire(&mut self, now: Millis) -> bool {
        let before = self.0.len();
        self.0.retain(|_, (_, since)| now.saturating_sub(*since) < STALE);
        self.0.len() < before
    }

    /// Corrects what a snapshot says, as far as it is older than what was written.
    pub fn correct(&mut self, ours: &mut BTreeMap<String, OvsPort>) {
        self.0.retain(|name, (workers, _)| {
            let config = ours.get_mut(name).and_then(|port| port.config.as_mut().ok());
            // One that does not have the port, or not in order, is older too, for it was there to be written to.
            config.is_none_or(|config| {
                let is_older = config.workers != *workers;
                config.workers.clone_from(workers);
                is_older
            })
        });
    }

    /// Whether a port's workers have been written that no snapshot has had yet.
    pub fn is_open(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// When [`Pins::expire`] has something to do.
    pub fn due(&self) -> Option<Millis> {
        self.0.values().map(|(_, since)| since + STALE).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::port_config::{Kind, PortConfig, Socket};

    fn snapshot(workers: Option<&[u16]>) -> BTreeMap<String, OvsPort> {
        let kind = Kind::VhostUser(Socket::new("/run/vm1.sock"));
        let config = PortConfig { workers: workers.map(<[u16]>::to_vec), ..PortConfig::of("vm1", kind) };
        let (bridge, datapath_type) = ("br0".into(), "netdev".into());
        let port =
            OvsPort { config: Ok(config), bridge, datapath_type, ingress: None, egress: None, error: None };
        BTreeMap::from([("vm1".into(), port)])
    }

    /// What a snapshot's port is taken for.
    fn taken(pins: &mut Pins, workers: Option<&[u16]>) -> Option<Vec<u16>> {
        let mut ours = snapshot(workers);
        pins.correct(&mut ours);
        ours["vm1"].config.as_ref().unwrap().workers.clone()
    }

    #[test]
    fn an_older_snapshot_does_not_undo_what_was_written() {
        let mut pins = Pins::default();
        pins.written("vm1", Some(vec![1]), snapshot(None).get("vm1"), 100);
        assert!(pins.is_open("vm1") && pins.due() == Some(100 + STALE));
        assert_eq!(taken(&mut pins, None), Some(vec![1]));
        pins.correct(&mut BTreeMap::new());
        assert!(pins.is_open("vm1"), "older still");
        assert_eq!(taken(&mut pins, Some(&[1])), Some(vec![1]));
        assert!(!pins.is_open("vm1") && pins.due().is_none());
        assert_eq!(taken(&mut pins, Some(&[0])), Some(vec![0]), "somebody has changed it again");
        // The other way round.
        pins.written("vm1", None, snapshot(Some(&[0])).get("vm1"), 500);
        assert_eq!(taken(&mut pins, Some(&[0])), None);
        assert!(pins.is_open("vm1") && taken(&mut pins, None).is_none() && !pins.is_open("vm1"));
    }

    #[test]
    fn the_database_is_believed_in_the_end() {
        let mut pins = Pins::default();
        pins.written("vm1", Some(vec![1]), None, 100);
        assert!(!pins.expire(99 + STALE));
        assert_eq!(taken(&mut pins, Some(&[2])), Some(vec![1]));
        assert!(pins.expire(100 + STALE) && !pins.is_open("vm1"));
        assert_eq!(taken(&mut pins, Some(&[2])), Some(vec![2]));
        // What the database has already makes no snapshot to wait for.
        pins.written("vm1", Some(vec![1]), snapshot(Some(&[1])).get("vm1"), 5000);
        assert!(!pins.is_open("vm1"));
    }
}
