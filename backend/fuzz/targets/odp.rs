//! ODP text, as `add-flow` takes it and `dpctl/dump-flows` gives it: no text makes the reader panic, and what it takes reads the same
//! when it is written again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use switch_core::flow::PortNames;
use switch_core::odp;
use switch_core::packet::PortId;

/// Ports `p0` to `p9`, in slots of these numbers.
struct Names;

impl PortNames for Names {
    fn by_name(&self, name: &str) -> Option<PortId> {
        let slot = name.strip_prefix('p').unwrap_or(name).parse().ok().filter(|&slot| slot < 10)?;
        Some(PortId { slot, generation: 1 })
    }

    fn name(&self, slot: u32) -> Option<String> {
        (slot < 10).then(|| format!("p{slot}"))
    }
}

fuzz_target!(|text: &str| {
    let names = &Names;
    if let Ok((matches, _)) = odp::parse_flow(text, names) {
        let again = odp::format_flow(&matches, names);
        assert_eq!(
            odp::parse_flow(&again, names).map(|(matches, _)| matches).as_ref(),
            Ok(&matches),
            "{again}"
        );
    }
    if let Ok(actions) = odp::parse_actions(text, names) {
        let again = odp::format_actions(&actions, names);
        assert_eq!(odp::parse_actions(&again, names).as_ref(), Ok(&actions), "{again}");
    }
    let _ = odp::parse_dump_line(text, names);
});
