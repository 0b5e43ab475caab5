//! What is measured: a row of the table each.

use qemu_tests::load::{Order, Rules, Sizes, Traffic};
use qemu_tests::overlay::Kind;

/// What is done to packets that go through a tunnel, one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// They come from a guest, and leave encapsulated by the uplink, which is another vhost-user port.
    Encapsulate,
    /// They come encapsulated from the uplink, and go to a guest.
    Decapsulate,
}

/// A row.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// What a person calls it, and picks it by.
    pub name: &'static str,
    /// What is sent in each direction.
    pub traffic: Traffic,
    /// What the switches are told.
    pub rules: Rules,
    /// Entries of our exact-match table; by default enough for all flows.
    pub l1_entries: Option<usize>,
    /// Packets a second in all, for latencies; by default as many as go.
    pub rate: Option<f64>,
    /// Our exact-match table is so small that the masked one has to find nearly all packets.
    pub masked: bool,
    /// Rings are packed, with every switch.
    pub packed: bool,
    /// Packets go through a tunnel.
    pub tunnel: Option<(Kind, Way)>,
}

impl Row {
    const fn flows(name: &'static str, flows: u32) -> Self {
        let traffic = Traffic { flows, order: Order::Walk, sizes: Sizes::Fixed(64), classes: 1 };
        Self {
            name,
            traffic,
            rules: Rules::Routes,
            l1_entries: None,
            rate: None,
            masked: false,
            packed: false,
            tunnel: None,
        }
    }

    const fn sized(self, sizes: Sizes) -> Self {
        Self { traffic: Traffic { sizes, ..self.traffic }, ..self }
    }

    /// The size of our exact-match table for it.
    pub fn table(&self) -> usize {
        // One port may have three quarters of it.
        let needed = 4 * self.traffic.flows as usize;
        self.l1_entries.unwrap_or(needed.next_power_of_two().max(1 << 16))
    }

    /// Whether super-frames have to arrive whole.
    pub fn needs_tso(&self) -> bool {
        self.traffic.sizes == Sizes::Tso
    }

    /// Whether the exact-match table has to hold exactly the flows of both directions.
    pub fn fits(&self) -> bool {
        self.l1_entries.is_none() && self.tunnel.is_none()
    }
}

/// All rows, in the order in which they are run.
pub fn all() -> Vec<Row> {
    let port = |name| Row { rules: Rules::Port, ..Row::flows(name, 64) };
    let classes = |row: Row, classes| Row { traffic: Traffic { classes, ..row.traffic }, ..row };
    let random = |row: Row| Row { traffic: Traffic { order: Order::Random, ..row.traffic }, ..row };
    let packed = |row: Row| Row { packed: true, ..row };
    // The smallest table that can be configured.
    let masked = |row: Row| random(Row { l1_entries: Some(1024), masked: true, ..classes(row, 16) });
    // As the overlay has them: by their port alone.
    let tunnel = |name, kind, way, len| {
        let row = Row { rules: Rules::Port, tunnel: Some((kind, way)), ..Row::flows(name, 64) };
        row.sized(Sizes::Fixed(len))
    };
    let super_frames = Row::flows("64 KiB TSO, 64 flows", 64);
    vec![
        port("64 B, port to port"),
        Row::flows("64 B, 64 flows", 64),
        Row::flows("64 B, 4,096 flows", 4096),
        Row::flows("64 B, 65,536 flows", 65_536),
        Row::flows("64 B, 1,000,000 flows", 1_000_000),
        classes(Row::flows("64 B, 65,536 flows, 16 masks", 65_536), 16),
        random(Row {
            l1_entries: Some(65_536),
            ..Row::flows("64 B, 1,000,000 at random, L1 of 65,536", 1_000_000)
        }),
        masked(Row::flows("64 B, 1,000,000 random, 16 masks, L2 only", 1_000_000)),
        Row::flows("IMIX, 4,096 flows", 4096).sized(Sizes::Imix),
        port("1518 B, port to port").sized(Sizes::Fixed(1518)),
        Row::flows("1518 B, 64 flows", 64).sized(Sizes::Fixed(1518)),
        packed(port("64 B, port to port, packed")),
        packed(Row::flows("64 B, 64 flows, packed", 64)),
        packed(Row::flows("64 B, 65,536 flows, packed", 65_536)),
        packed(Row::flows("1518 B, 64 flows, packed", 64).sized(Sizes::Fixed(1518))),
        Row { rate: Some(1e6), ..Row::flows("64 B, 64 flows, 1 Mpps", 64) },
        // Last: Open vSwitch has to be started anew for each kind, and for super-frames.
        tunnel("64 B into VXLAN", Kind::Vxlan, Way::Encapsulate, 64),
        tunnel("64 B out of VXLAN", Kind::Vxlan, Way::Decapsulate, 64),
        tunnel("1518 B into VXLAN", Kind::Vxlan, Way::Encapsulate, 1518),
        tunnel("1518 B out of VXLAN", Kind::Vxlan, Way::Decapsulate, 1518),
        tunnel("64 B into GENEVE", Kind::Geneve, Way::Encapsulate, 64),
        tunnel("64 B out of GENEVE", Kind::Geneve, Way::Decapsulate, 64),
        tunnel("1518 B into GENEVE", Kind::Geneve, Way::Encapsulate, 1518),
        tunnel("1518 B out of GENEVE", Kind::Geneve, Way::Decapsulate, 1518),
        super_frames.sized(Sizes::Tso),
    ]
}
