//! Events, as the kernel sends them, to a source that is connected to a kernel without a datapath.

use super::*;

const IDS: [u16; 3] = [30, 31, 32];
const IFINDEX: u32 = 7;

fn source() -> KernelSource {
    let family = |id| Family { id, version: 1, group: 0 };
    KernelSource {
        datapath: "dp0".into(),
        receive_buffer: 1 << 16,
        requests: Requests::open().unwrap(),
        events: Events::open(&[], 1 << 16).unwrap(),
        families: IDS.map(family),
        ifindex: Some(IFINDEX),
        vports: GOLDEN_DATA.0.clone(),
        seed: RandomState::new(),
        left_out: HashSet::new(),
    }
}

/// An event of the family at this place, with these attributes.
fn event(source: &mut KernelSource, family: usize, command: u8, ifindex: u32, attrs: &[u8]) -> Vec<Change> {
    let message = Request::new(IDS[family], command, 1, 0).raw(&ifindex.to_ne_bytes()).raw(attrs).finish(0);
    let mut changes = Vec::new();
    let message = Message::take(&mut &message[..]).unwrap().unwrap();
    source.event(message, &Names, &mut changes).unwrap();
    changes
}

fn golden_flow(text: &str) -> &'static [u8] {
    let (_, flows) = &*GOLDEN_DATA;
    &flows.iter().find(|(_, flow)| flow.contains(text)).unwrap().0[OVS_HEADER..]
}

#[test]
fn flows_come_and_go() {
    let mut source = source();
    let flow = golden_flow("ufid:01234567-89ab-cdef-0123-456789abcdef");
    let id = Ufid(0x0123456789abcdef0123456789abcdef);
    for command in [NEW, SET] {
        let changes = event(&mut source, 2, command, IFINDEX, flow);
        assert!(
            matches!(&changes[..], [Change::Put(flow)] if flow.id == id && flow.flow.is_ok()),
            "{changes:?}"
        );
    }
    // Another datapath's.
    assert_eq!(event(&mut source, 2, NEW, IFINDEX + 1, flow), []);
    assert_eq!(event(&mut source, 2, DEL, IFINDEX + 1, flow), []);
    // Deleted by its UFID alone.
    let ufid = Attrs(flow).find(flow_attr::UFID).unwrap().unwrap();
    assert_eq!(
        event(&mut source, 2, DEL, IFINDEX, &attrs(&[(flow_attr::UFID, ufid.data)])),
        [Change::Delete(id)]
    );
    // One without UFID, by its key.
    let flow = golden_flow("icmp(type=8,code=0)");
    let [Change::Put(put)] = &event(&mut source, 2, NEW, IFINDEX, flow)[..] else { panic!() };
    let key = Attrs(flow).find(flow_attr::KEY).unwrap().unwrap();
    let deleted = event(&mut source, 2, DEL, IFINDEX, &attrs(&[(flow_attr::KEY, key.data)]));
    assert_eq!(deleted, [Change::Delete(put.id)]);
}

#[test]
fn what_an_event_lacks_is_asked_for_and_a_flow_that_is_gone_is_nothing() {
    let mut source = source();
    let flow = FlowMessage::decode(golden_flow("ufid:01234567")).unwrap();
    let (ufid, key) = (flow.ufid.unwrap(), flow.key.unwrap());
    // Without its mask it is not an exact flow; the kernel has no such family, so it cannot say more.
    let without_mask = attrs(&[(flow_attr::UFID, ufid), (flow_attr::KEY, key), (flow_attr::ACTIONS, &[])]);
    assert_eq!(event(&mut source, 2, NEW, IFINDEX, &without_mask), []);
    assert_eq!(event(&mut source, 2, SET, IFINDEX, &attrs(&[(flow_attr::UFID, ufid)])), []);
}

#[test]
fn flows_of_foreign_ports_are_left_out_until_they_go() {
    let mut source = source();
    let flow = golden_flow("in_port(gre_sys)");
    assert_eq!(event(&mut source, 2, NEW, IFINDEX, flow), []);
    assert_eq!(source.left_out.len(), 1);
    assert_eq!(event(&mut source, 2, DEL, IFINDEX, flow), []);
    assert!(source.left_out.is_empty());
}

#[test]
fn ports_are_followed() {
    let mut source = source();
    let port = |number: u32, name: &str| {
        attrs(&[(1, &number.to_ne_bytes()), (3, name.as_bytes()), (8, &[9, 0, 0, 0])])
    };
    assert_eq!(event(&mut source, 1, NEW, IFINDEX, &port(40, "tap0\0")), [Change::Resync]);
    assert_eq!(source.datapath_ports()["tap0"], (40, u32::from_ne_bytes([9, 0, 0, 0])));
    assert_eq!(event(&mut source, 1, SET, IFINDEX, &port(40, "tap1\0")), [Change::Resync]);
    assert!(!source.datapath_ports().contains_key("tap0"));
    assert_eq!(event(&mut source, 1, DEL, IFINDEX, &port(40, "tap1\0")), [Change::Resync]);
    assert!(!source.datapath_ports().contains_key("tap1"));
    assert_eq!(event(&mut source, 1, NEW, IFINDEX + 1, &port(41, "x\0")), []);
    assert!(!source.datapath_ports().contains_key("x"));
}

#[test]
fn the_datapath_may_go_and_come_back() {
    let mut source = source();
    let name = attrs(&[(DP_NAME, b"dp0\0")]);
    let other = attrs(&[(DP_NAME, b"dp1\0")]);
    assert_eq!(event(&mut source, 0, DEL, IFINDEX + 1, &other), []);
    assert_eq!(event(&mut source, 0, SET, IFINDEX, &name), [Change::Resync]);
    assert_eq!(event(&mut source, 0, DEL, IFINDEX, &name), [Change::Resync]);
    assert_eq!((source.ifindex, source.datapath_ports().len()), (None, 0));
    assert_eq!(event(&mut source, 2, DEL, IFINDEX, golden_flow("ufid:01234567")), []);
    assert!(!source.dump_ids(&mut |_| panic!("there are none")).unwrap());
    assert_eq!(event(&mut source, 0, NEW, 12, &name), [Change::Resync]);
    assert_eq!(source.ifindex, Some(12));
}

#[test]
fn a_ring_ends_the_wait() {
    let mut source = source();
    let waker = Waker::new().unwrap();
    waker.ring();
    let (start, mut changes) = (Instant::now(), Vec::new());
    source.wait(&Names, &waker, Duration::from_secs(60), &mut changes).unwrap();
    assert!(changes.is_empty() && start.elapsed() < Duration::from_secs(30));
    source.wait(&Names, &waker, Duration::from_millis(1), &mut changes).unwrap();
    assert!(changes.is_empty());
}

proptest! {
    #[test]
    fn mangled_messages_do_no_harm(
        which in any::<prop::sample::Index>(),
        family in 0usize..3,
        command in 0u8..6,
        cut in prop::option::of(any::<prop::sample::Index>()),
        mangled in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
    ) {
        let (vports, flows) = &*GOLDEN_DATA;
        let (flow, _) = which.get(flows);
        let mut bytes = Request::new(IDS[family], command, 1, 0).raw(flow).finish(0);
        for (at, value) in mangled {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let mut rest = &bytes[..];
        while let Some(message) = Message::take(&mut rest) {
            let Ok(Ok((_, body))) = message.map(|message| message.generic()) else { continue };
            if let Some(Ok(flow)) = body.get(OVS_HEADER..).map(FlowMessage::decode) {
                let _ = flow.to_flow(&Ports::new(vports, &Names));
                let _ = flow.id();
            }
            let _ = body.get(OVS_HEADER..).map(|attrs| Vport::decode(Attrs(attrs)));
        }
    }
}

#[test]
fn every_event_that_is_cut_short_is_an_error_or_nothing() {
    let mut source = source();
    // A request for what an event lacks would go to a family that is none.
    source.requests = Requests::open().unwrap();
    let flow = golden_flow("ct_label");
    let whole = Request::new(IDS[2], NEW, 1, 0).raw(&IFINDEX.to_ne_bytes()).raw(flow).finish(0);
    for length in wire::MESSAGE_HEADER..whole.len() {
        let mut cut = whole[..length].to_vec();
        cut[..4].copy_from_slice(&(length as u32).to_ne_bytes());
        let message = Message::take(&mut &cut[..]).unwrap().unwrap();
        let mut changes = Vec::new();
        let _ = source.event(message, &Names, &mut changes);
        assert!(!changes.iter().any(|change| matches!(change, Change::Delete(_))));
    }
}
