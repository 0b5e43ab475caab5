//! A flow in as little memory as it can be compared with and restored from: the mirror keeps one of each of the datapath's.

use switch_core::action::{Action, TunnelOpts};
use switch_core::flow::{FlowSpec, Match, Ufid};
use switch_core::key::{Field, Key, Mask, WORDS};

/// A [`FlowSpec`], of whose key only the words are kept that it looks at.
#[derive(Debug, PartialEq, Eq)]
pub struct Packed {
    /// Slot of the port whose packets it matches.
    in_port: u32,
    has_ufid: bool,
    /// Which words, as bits.
    looked_at: u64,
    /// Value and mask of each.
    words: Box<[[u64; 2]]>,
    tunnel: Option<Box<TunnelOpts>>,
    actions: Box<[Action]>,
    held: Option<Box<str>>,
}

const _: () = assert!(WORDS <= u64::BITS as usize);

impl Packed {
    /// The flow, which has the identity of the datapath's if any.
    pub fn new(spec: FlowSpec) -> Packed {
        let FlowSpec { matches: Match { key, mask, tunnel }, actions, ufid, held } = spec;
        let pairs = key.words.iter().zip(&mask.0.words).enumerate().filter(|(_, (_, mask))| **mask != 0);
        Packed {
            in_port: key.get(Field::InPort) as u32,
            has_ufid: ufid.is_some(),
            looked_at: pairs.clone().fold(0, |bits, (at, _)| bits | 1 << at),
            words: pairs.map(|(_, (&key, &mask))| [key, mask]).collect(),
            tunnel: (tunnel != TunnelOpts::default()).then(|| Box::new(tunnel)),
            actions: actions.into_boxed_slice(),
            held: held.map(String::into_boxed_str),
        }
    }

    /// The flow again; `id` is its identity.
    pub fn unpack(&self, id: Ufid) -> FlowSpec {
        let (mut key, mut mask) = (Key::default(), Mask::EMPTY);
        let places = (0..WORDS).filter(|at| self.looked_at >> at & 1 != 0);
        for (at, &[value, bits]) in places.zip(&self.words) {
            (key.words[at], mask.0.words[at]) = (value, bits);
        }
        let tunnel = self.tunnel.as_deref().cloned().unwrap_or_default();
        FlowSpec {
            matches: Match { key, mask, tunnel },
            actions: self.actions.to_vec(),
            ufid: self.has_ufid.then_some(id),
            held: self.held.as_deref().map(str::to_owned),
        }
    }

    /// Whether it matches just what the other does.
    pub fn has_match_of(&self, other: &Packed) -> bool {
        self.looked_at == other.looked_at && self.words == other.words && self.tunnel == other.tunnel
    }

    /// Slot of the port whose packets it matches.
    pub fn in_port(&self) -> u32 {
        self.in_port
    }

    /// What it does.
    pub fn actions(&self) -> &[Action] {
        &self.actions
    }

    /// Why the source has the host carry it out, if so.
    pub fn held(&self) -> Option<&str> {
        self.held.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use switch_core::action::PortRef;

    proptest! {
        #[test]
        fn a_flow_comes_out_as_it_went_in(
            words in prop::collection::vec((any::<u64>(), prop_oneof![Just(0), Just(u64::MAX), any::<u64>()]), WORDS),
            changed in 0..WORDS,
            slot in any::<u32>(),
            other in any::<bool>(),
            held in prop::option::of("[a-z ]*"),
            ufid in prop::option::of(any::<u128>()),
        ) {
            let mut spec = FlowSpec { matches: Match::default(), actions: vec![Action::PopVlan], ufid: ufid.map(Ufid), held };
            let Match { key, mask, tunnel } = &mut spec.matches;
            for (at, (value, bits)) in words.into_iter().enumerate() {
                (key.words[at], mask.0.words[at]) = (value & bits, bits);
            }
            key.set(Field::InPort, slot as u128);
            mask.set_exact(Field::InPort);
            tunnel.other = other.then(|| "erspan()".into());
            let id = ufid.map_or(Ufid(7), Ufid);
            let packed = Packed::new(spec.clone());
            prop_assert_eq!(packed.unpack(id), spec.clone());
            prop_assert_eq!(packed.in_port(), slot);
            let mut done = spec.clone();
            done.actions.push(Action::Output(PortRef::Foreign("x".into())));
            let done = Packed::new(done);
            prop_assert!(done != packed && done.has_match_of(&packed));
            // Any bit counts, of the mask and of what is under it.
            let mut far = spec.clone();
            far.matches.mask.0.words[changed] ^= 1;
            far.matches.key.words[changed] &= !1;
            prop_assert!(!Packed::new(far).has_match_of(&packed));
            if spec.matches.mask.0.words[changed] != 0 {
                let mut far = spec;
                far.matches.key.words[changed] ^= 1;
                prop_assert!(!Packed::new(far).has_match_of(&packed));
            }
        }
    }
}
