//! `[[nic]]` of the configuration file: NICs that the daemon drives itself.

use crate::nic::{FlowSettings, NicConfig};
use crate::port_config::{Invalid, MAX_QUEUES, check_name};
use serde::Deserialize;

/// `[[nic]]` as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table of NIC settings")]
pub(super) struct NicTable {
    name: String,
    pci: String,
    #[serde(default = "one")]
    queues: u16,
    #[serde(default = "yes")]
    offload: bool,
    #[serde(default)]
    ignore_fragments: bool,
    max_rules: Option<u32>,
}

fn one() -> u16 {
    1
}

fn yes() -> bool {
    true
}

/// The NICs, or which is not acceptable, counted from 0, and why.
pub(super) fn check(tables: Vec<NicTable>) -> Result<Vec<NicConfig>, (usize, Invalid)> {
    let mut nics: Vec<NicConfig> = Vec::with_capacity(tables.len());
    for (index, table) in tables.into_iter().enumerate() {
        nics.push(table.check(&nics).map_err(|invalid| (index, invalid))?);
    }
    Ok(nics)
}

impl NicTable {
    fn check(self, others: &[NicConfig]) -> Result<NicConfig, Invalid> {
        let name = self.name.escape_debug().to_string();
        let bad = |key: &'static str, reason: String| {
            Err(Invalid { key, reason: format!("nic '{name}': {reason}") })
        };
        if let Err(reason) = check_name(&self.name) {
            return bad("name", reason);
        }
        let pci = match self.pci.parse() {
            Ok(pci) => pci,
            Err(reason) => return bad("pci", format!("pci: {reason}")),
        };
        if others.iter().any(|other| other.name == self.name) {
            return bad("name", "there is a NIC of this name already".into());
        }
        if let Some(other) = others.iter().find(|other| other.pci == pci) {
            return bad("pci", format!("{pci} belongs to NIC '{}' already", other.name));
        }
        if let Some(max) = self.max_rules.filter(|max| !(1..=1 << 20).contains(max)) {
            return bad("max_rules", format!("max_rules = {max}: must be 1 to 1048576"));
        }
        let queues = match u8::try_from(self.queues) {
            Ok(queues) if (1..=MAX_QUEUES).contains(&self.queues) => queues,
            _ => return bad("queues", format!("queues = {}: must be 1 to {MAX_QUEUES}", self.queues)),
        };
        let flows = FlowSettings { ignore_fragments: self.ignore_fragments, max_rules: self.max_rules };
        Ok(NicConfig { name: self.name, pci, queues, offload: self.offload, flows })
    }
}

#[cfg(test)]
mod tests {
    use crate::config::Config;
    use std::path::Path;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("f")).map_err(|error| error.to_string())
    }

    #[test]
    fn every_key_is_read() {
        let read = |text: &str| parse(text).unwrap().nics.remove(0);
        let plain = read("[[nic]]\nname = 'n'\npci = '0000:01:00.0'\n");
        assert!(
            plain.queues == 1
                && plain.offload
                && !plain.flows.ignore_fragments
                && plain.flows.max_rules.is_none()
        );
        let keys = "queues = 4\noffload = false\nignore_fragments = true\nmax_rules = 9\n";
        let all = read(&format!("[[nic]]\nname = 'n'\npci = 'qtest:/t@05.0'\n{keys}"));
        assert!(
            all.queues == 4 && !all.offload && all.flows.ignore_fragments && all.flows.max_rules == Some(9)
        );
        assert_eq!((all.name.as_str(), all.pci.to_string().as_str()), ("n", "qtest:/t@05.0"));
    }

    #[test]
    fn complaints_name_the_nic_and_the_line() {
        const NIC: &str = "[[nic]]\nname = 'n'\npci = '0000:01:00.0'\n";
        for (text, said) in [
            (format!("{NIC}rules = 1"), "f:4: unknown key 'rules'"),
            (NIC.replace("'n'", "'n n'"), "f:2: nic 'n n': ' ' in the name"),
            (format!("{NIC}{NIC}"), "f:5: nic 'n': there is a NIC of this name already"),
            (
                format!("{NIC}{}", NIC.replace("'n'", "'m'")),
                "f:6: nic 'm': 0000:01:00.0 belongs to NIC 'n' already",
            ),
            (format!("{NIC}queues = 9"), "f:4: nic 'n': queues = 9: must be 1 to 8"),
            (format!("{NIC}max_rules = 0"), "f:4: nic 'n': max_rules = 0: must be 1 to 1048576"),
        ] {
            let error = parse(&text).unwrap_err();
            assert!(error.starts_with(said), "{error}");
        }
    }
}
