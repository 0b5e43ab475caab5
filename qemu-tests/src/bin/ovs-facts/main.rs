//! Asks the kernel's Open vSwitch and `ovs-vswitchd` of a compute node how they behave, and fails where they do not behave as
//! the design assumes (docs/ovs-facts.md). Runs as root in a machine of its own: it adds bridges and restarts daemons.

mod bench;
mod flows;
mod host;
mod netlink;
mod packets;
mod tap;

use std::process::ExitCode;

use anyhow::Result;

/// A fact: how it is called, and what shows it and says what it saw.
type Fact = (&'static str, fn() -> Result<String>);

const FACTS: &[Fact] = &[
    ("execute-without-recirculation", packets::execute_recirc_zero),
    ("execute-with-recirculation", packets::execute_recirc),
    ("execute-key", packets::execute_key),
    ("segmentation-offload", packets::segmentation_offload),
    ("partial-checksums", packets::partial_checksums),
    ("udp-segmentation", packets::udp_segmentation),
    ("mtu", packets::mtu),
    ("flow-events", flows::events),
    ("vlan", flows::vlan),
    ("second-tag", flows::second_tag),
    ("no-ethertype", flows::no_ethertype),
    ("port-goes", flows::port_goes),
    ("flush", flows::flush),
    ("looking", flows::looking),
    ("restart", flows::restart),
    ("expiry", flows::expiry),
    ("policing", host::policing),
    ("traffic-control", host::traffic_control),
    ("late-device", host::late_device),
];

fn main() -> ExitCode {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    if wanted.is_empty() {
        FACTS.iter().for_each(|(name, _)| println!("{name}"));
        return ExitCode::SUCCESS;
    }
    let mut status = ExitCode::SUCCESS;
    for name in wanted {
        match FACTS.iter().find(|(known, _)| *known == name) {
            Some((_, show)) => match show() {
                Ok(seen) => println!("{name}: {seen}"),
                Err(error) => {
                    eprintln!("{name}: NOT as assumed: {error:?}");
                    status = ExitCode::FAILURE;
                }
            },
            None => {
                eprintln!("no fact is called {name}");
                status = ExitCode::FAILURE;
            }
        }
    }
    status
}
