//! `pointwork nic`: which PCI NICs this machine has, and giving them to drivers of ours. It works on the machine itself, without
//! the daemon.

use super::print;
use super::table::{Align::Left, Align::Right, Table};
use anyhow::{Context, Result, bail, ensure};
use nic::host::{Bound, Function, Host, Obstacle, PciAddress, Unbound, VFIO};
use serde_json::{Value, json};
use std::fmt::Write;
use std::path::PathBuf;
use toml::Table as Toml;

/// What to do with NICs.
#[derive(Debug, clap::Subcommand)]
pub enum NicCommand {
    /// List NICs that a driver of Pointwork knows, and what keeps it from them
    #[command(after_help = "\
Examples:
  pointwork nic list
  pointwork nic list --all                                            all network functions
  pointwork --json nic list | jq '.nics[] | select(.ready) | .address'

STATE is 'ready' when the daemon can open the NIC, 'in use' when a program has it; else what stands in the way, and
below the table what to do about it.")]
    List {
        /// All network functions
        #[arg(long)]
        all: bool,
    },
    /// Give a function to vfio-pci, from which the daemon takes it
    #[command(after_help = "\
Examples:
  pointwork nic bind 0000:01:00.0
  pointwork nic bind 01:00.0 --force       although the host uses it: it loses that interface

Nothing is remembered: after a boot it is to be done again, before the daemon starts.")]
    Bind {
        /// PCI address
        #[arg(value_parser = address)]
        address: PciAddress,
        /// Take it even if the host uses it, or if it is no network function
        #[arg(long)]
        force: bool,
    },
    /// Give a function back to the kernel's driver
    #[command(after_help = "\
Examples:
  pointwork nic unbind 0000:01:00.0")]
    Unbind {
        /// PCI address
        #[arg(value_parser = address)]
        address: PciAddress,
    },
    /// End what a NIC does for a daemon that is dead: its DMA and its rules
    #[command(after_help = "\
Examples:
  pointwork nic reset 0000:01:00.0
  pointwork nic reset --config /etc/pointwork/pointwork.toml      all NICs of a configuration, those that are bound

A function that a program has is left alone. The service does this for its NICs when it was killed.")]
    Reset {
        /// PCI addresses
        #[arg(value_name = "ADDRESS", value_parser = address, required_unless_present = "config")]
        addresses: Vec<PciAddress>,
        /// The NICs that this configuration of the daemon names, but for those that are not bound to vfio-pci
        #[arg(long, value_name = "FILE", conflicts_with = "addresses")]
        config: Option<PathBuf>,
    },
}

fn address(text: &str) -> Result<PciAddress, String> {
    text.parse().map_err(|error: nic::host::HostError| error.to_string())
}

/// Does it.
pub fn run(command: &NicCommand, as_json: bool) -> Result<()> {
    let host = Host::default();
    let (value, text) = match command {
        NicCommand::List { all } => list(&host, *all)?,
        NicCommand::Bind { address, force } => bound(*address, &host.bind(*address, *force)?),
        NicCommand::Unbind { address } => unbound(*address, &host.unbind(*address)?),
        NicCommand::Reset { addresses, config: None } => reset(&host, addresses)?,
        NicCommand::Reset { config: Some(file), .. } => {
            let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
            let mut addresses = configured(&text).with_context(|| file.display().to_string())?;
            addresses.retain(|&address| host.is_bound(address));
            reset(&host, &addresses)?
        }
    };
    print(&if as_json { format!("{value:#}\n") } else { text })
}

fn list(host: &Host, all: bool) -> Result<(Value, String)> {
    let mut functions = host.functions()?;
    functions.retain(|function| function.model.is_some() || all && function.is_network());
    let functions: Vec<(Function, Vec<Obstacle>)> = functions
        .into_iter()
        .map(|function| {
            let obstacles = host.obstacles(&function);
            (function, obstacles)
        })
        .collect();
    let nics: Vec<Value> =
        functions.iter().map(|(function, obstacles)| described(function, obstacles)).collect();
    Ok((json!({ "nics": nics }), table(&functions)))
}

/// A function as JSON.
fn described(function: &Function, obstacles: &[Obstacle]) -> Value {
    let address = function.address;
    let interfaces: Vec<Value> = function
        .interfaces
        .iter()
        .map(|interface| {
            json!({ "name": interface.name, "up": interface.up, "uppers": interface.uppers, "addressed": interface.addressed })
        })
        .collect();
    let companions: Vec<Value> = function
        .companions
        .iter()
        .map(|other| json!({ "address": other.address.to_string(), "driver": other.driver }))
        .collect();
    let obstacles: Vec<Value> = obstacles
        .iter()
        .map(|obstacle| json!({ "what": obstacle.to_string(), "remedy": obstacle.remedy(address) }))
        .collect();
    json!({
        "address": address.to_string(),
        "vendor": format!("{:04x}", function.vendor),
        "device": format!("{:04x}", function.device),
        "model": function.model.map(|model| model.name),
        "driver": function.model.map(|model| model.driver),
        "bound_to": function.driver,
        "iommu_group": function.group,
        "companions": companions,
        "interfaces": interfaces,
        "reset_methods": function.reset_methods,
        "physical_function": function.physical.map(|address| address.to_string()),
        "virtual_functions": function.virtual_functions,
        "in_use_by": function.holder.as_ref().map(ToString::to_string),
        "ready": obstacles.is_empty() && function.holder.is_none(),
        "obstacles": obstacles,
    })
}

fn table(functions: &[(Function, Vec<Obstacle>)]) -> String {
    if functions.is_empty() {
        return "no NIC that a driver of Pointwork knows ('pointwork nic list --all' lists all network functions)\n".into();
    }
    let mut table = Table::new([
        ("ADDRESS", Left),
        ("MODEL", Left),
        ("DRIVER", Left),
        ("BOUND TO", Left),
        ("INTERFACES", Left),
        ("GROUP", Right),
        ("STATE", Left),
    ]);
    let mut remedies = String::new();
    let or_none = |text: Option<String>| text.filter(|text| !text.is_empty()).unwrap_or_else(|| "-".into());
    for (function, obstacles) in functions {
        let state = match (&function.holder, obstacles.first()) {
            (Some(holder), _) => format!("in use by {holder}"),
            (None, Some(first)) if obstacles.len() > 1 => format!("{first}, and more"),
            (None, Some(first)) => first.to_string(),
            (None, None) => "ready".into(),
        };
        let interfaces: Vec<String> = function
            .interfaces
            .iter()
            .map(|interface| format!("{} ({})", interface.name, if interface.up { "up" } else { "down" }))
            .collect();
        let address = function.address;
        table.row([
            address.to_string(),
            function.model.map_or_else(
                || format!("{:04x}:{:04x}", function.vendor, function.device),
                |model| model.name.to_owned(),
            ),
            or_none(function.model.map(|model| model.driver.to_owned())),
            or_none(function.driver.clone()),
            or_none(Some(interfaces.join(" "))),
            or_none(function.group.map(|group| group.to_string())),
            state,
        ]);
        for obstacle in obstacles {
            let _ = writeln!(remedies, "{address}: {obstacle}: {}", obstacle.remedy(address));
        }
    }
    let gap = if remedies.is_empty() { "" } else { "\n" };
    format!("{table}{gap}{remedies}")
}

fn bound(address: PciAddress, bound: &Bound) -> (Value, String) {
    let left: Vec<Value> = bound
        .left
        .iter()
        .map(|obstacle| json!({ "what": obstacle.to_string(), "remedy": obstacle.remedy(address) }))
        .collect();
    let value = json!({ "address": address.to_string(), "already": bound.already, "from": bound.from, "obstacles": left });
    let mut text = match (bound.already, &bound.from) {
        (true, _) => format!("{address} is bound to {VFIO} already\n"),
        (false, Some(from)) => format!("{address} taken from {from}, bound to {VFIO}\n"),
        (false, None) => format!("{address} bound to {VFIO}\n"),
    };
    for obstacle in &bound.left {
        let _ = writeln!(text, "not ready yet: {obstacle}: {}", obstacle.remedy(address));
    }
    (value, text)
}

fn unbound(address: PciAddress, unbound: &Unbound) -> (Value, String) {
    let value =
        json!({ "address": address.to_string(), "already": unbound.already, "driver": unbound.driver });
    let text = match (&unbound.driver, unbound.already) {
        (Some(driver), true) => format!("{address} is with {driver} already\n"),
        (Some(driver), false) => format!("{address} given back to {driver}\n"),
        (None, _) => format!("{address} has no driver: no module that the kernel has loaded knows it\n"),
    };
    (value, text)
}

/// Resets all at the same time: a bus takes a second, several times, and a service has few. All are tried.
fn reset(host: &Host, addresses: &[PciAddress]) -> Result<(Value, String)> {
    let (mut text, mut done, mut failed) = (String::new(), Vec::new(), Vec::new());
    let outcomes: Vec<_> = std::thread::scope(|scope| {
        let started: Vec<_> =
            addresses.iter().map(|&address| (address, scope.spawn(move || host.reset(address)))).collect();
        started.into_iter().map(|(address, thread)| (address, thread.join())).collect()
    });
    for (address, outcome) in outcomes {
        let Ok(outcome) = outcome else { bail!("{address}: the reset has panicked") };
        match outcome {
            Ok(by) => {
                let _ = writeln!(text, "{address} reset {by}");
                done.push(json!({ "address": address.to_string(), "by": by.to_string() }));
            }
            Err(error) => failed.push(error.to_string()),
        }
    }
    ensure!(failed.is_empty(), "{}", failed.join("; "));
    Ok((json!({ "reset": done }), text))
}

/// The NICs that a configuration names. Whatever else is in it, right or wrong, is not looked at: a daemon that was killed has
/// read it.
fn configured(text: &str) -> Result<Vec<PciAddress>> {
    let document: Toml =
        text.parse().map_err(|error: toml::de::Error| anyhow::anyhow!("{}", error.message()))?;
    let Some(nics) = document.get("nic") else { return Ok(Vec::new()) };
    let Some(nics) = nics.as_array() else { bail!("'nic' is no list of tables") };
    let mut addresses = Vec::new();
    for nic in nics {
        let Some(place) = nic.get("pci").and_then(toml::Value::as_str) else {
            bail!("a [[nic]] without pci")
        };
        // QEMU's device models, in tests, are not this machine's.
        if !place.starts_with("qtest:") {
            addresses.push(place.parse()?);
        }
    }
    Ok(addresses)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nic::host::{Companion, Holder, Interface, Model};

    fn function(address: &str) -> Function {
        Function {
            address: address.parse().unwrap(),
            vendor: 0x8086,
            device: 0x10c9,
            class: 0x020000,
            model: Some(Model { name: "Intel 82576", driver: "igb" }),
            driver: Some("igb".into()),
            group: Some(10),
            companions: Vec::new(),
            reset_methods: vec!["flr".into()],
            interfaces: vec![Interface {
                name: "eth1".into(),
                up: true,
                uppers: vec!["br0".into()],
                addressed: false,
            }],
            physical: None,
            virtual_functions: 0,
            remaps_interrupts: Some(true),
            holder: None,
        }
    }

    #[test]
    fn what_stands_in_the_way_is_shown_with_what_to_do() {
        let not_bound = Obstacle::NotBound { driver: Some("igb".into()), uses: None };
        let with = vec![Companion { address: "0000:02:00.1".parse().unwrap(), driver: Some("e1000".into()) }];
        let shared = Obstacle::Group { group: 10, with };
        let mut ready = function("0000:01:00.0");
        (ready.driver, ready.interfaces) = (Some(VFIO.into()), Vec::new());
        let mut held = ready.clone();
        held.holder = Some(Holder { pid: Some(7), name: "pointworkd".into() });
        let mut unknown = function("0000:03:00.0");
        (unknown.model, unknown.driver, unknown.group) = (None, None, None);
        let functions = [
            (ready, vec![]),
            (held, vec![]),
            (function("0000:02:00.0"), vec![not_bound, shared]),
            (unknown, vec![Obstacle::Unknown]),
        ];
        let text = table(&functions);
        assert_eq!(
            text,
            "\
ADDRESS       MODEL        DRIVER  BOUND TO  INTERFACES  GROUP  STATE
0000:01:00.0  Intel 82576  igb     vfio-pci  -              10  ready
0000:01:00.0  Intel 82576  igb     vfio-pci  -              10  in use by pointworkd (process 7)
0000:02:00.0  Intel 82576  igb     igb       eth1 (up)      10  bound to igb, and more
0000:03:00.0  8086:10c9    -       -         eth1 (up)       -  no driver of Pointwork knows it

0000:02:00.0: bound to igb: pointwork nic bind 0000:02:00.0
0000:02:00.0: IOMMU group 10 is shared with 0000:02:00.1 (e1000): give them up too, by 'pointwork nic bind 0000:02:00.1', or put the NIC into another slot
0000:03:00.0: no driver of Pointwork knows it: see docs/adding-a-nic.md
"
        );
        let value = described(&functions[2].0, &functions[2].1);
        assert_eq!(value["ready"], false);
        assert_eq!(value["obstacles"][0]["remedy"], "pointwork nic bind 0000:02:00.0");
        assert_eq!(value["interfaces"][0]["uppers"][0], "br0");
        assert_eq!(described(&functions[0].0, &[])["ready"], true);
        assert_eq!(described(&functions[1].0, &[])["ready"], false, "somebody has it");
        assert!(table(&[]).contains("--all"));
    }

    #[test]
    fn configured_nics_are_read_whatever_else_there_is() {
        let nics =
            |text: &str| configured(text).map(|all| all.iter().map(ToString::to_string).collect::<Vec<_>>());
        let text = "unknown = 1\n[[nic]]\nname = \"a\"\npci = \"0000:01:00.0\"\n[[nic]]\npci = \"qtest:/tmp/q@5\"\n[[nic]]\npci = \"02:00.1\"\n";
        assert_eq!(nics(text).unwrap(), ["0000:01:00.0", "0000:02:00.1"]);
        assert_eq!(nics("[[port]]\nname = \"vm1\"\n").unwrap(), [""; 0]);
        for wrong in ["[[nic]]\nname = \"a\"\n", "nic = 3\n", "[[nic]]\npci = \"eth0\"\n", "[[nic"] {
            let error = format!("{:#}", nics(wrong).unwrap_err());
            assert!(!error.is_empty(), "{wrong}");
        }
    }

    #[test]
    fn changes_are_told_in_a_line() {
        let address = "0000:02:00.0".parse().unwrap();
        let (value, text) = bound(address, &Bound { already: false, from: Some("igb".into()), left: vec![] });
        assert_eq!(text, "0000:02:00.0 taken from igb, bound to vfio-pci\n");
        assert_eq!((&value["already"], &value["from"]), (&json!(false), &json!("igb")));
        let left = vec![Obstacle::Interrupts];
        let (value, text) = bound(address, &Bound { already: true, from: None, left });
        assert!(text.starts_with("0000:02:00.0 is bound to vfio-pci already\nnot ready yet: "), "{text}");
        assert_eq!(value["obstacles"].as_array().map(Vec::len), Some(1));
        let (_, text) = unbound(address, &Unbound { already: false, driver: Some("igb".into()) });
        assert_eq!(text, "0000:02:00.0 given back to igb\n");
        let (_, text) = unbound(address, &Unbound { already: false, driver: None });
        assert!(text.contains("has no driver"), "{text}");
    }
}
