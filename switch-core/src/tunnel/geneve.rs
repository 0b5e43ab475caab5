//! Options of GENEVE (RFC 8926 §3.5): 16 bits of class, 8 of type, 3 reserved, 5 of length in words of 4 bytes; then the value.
//!
//! A flow can match what fits in [`Field::TunOptions`]: the options of a packet as they stand in it, up to eight bytes. That is
//! one option with a value of four bytes, as OVN has it. As in Linux (`genev_tun_opt_from_nlattr`) whoever matches an option
//! says how long all options are. A packet with more of them is not for the tables.

use crate::action::GeneveOpt;
use crate::flow::Match;
use crate::key::Field;

/// Bytes of options that a flow can match.
pub const MAX_MATCHED_OPTIONS: usize = 8;
/// Options that may be critical and are understood, by class and type: OVN's (`OVN_GENEVE_CLASS`, `OVN_GENEVE_TYPE`). Of any
/// other the host has to say whether it knows it (RFC 8926 §3.5: a packet with an unknown one is dropped).
pub const KNOWN_CRITICAL: [(u16, u8); 1] = [(0x0102, 0x80)];

/// In an option's type: who does not know it must not take the packet.
const CRITICAL: u8 = 0x80;
/// Bytes of an option without its value.
const HEADER: usize = 4;
const LENGTH: u8 = 0x1f;

/// The options of a packet as [`Field::TunOptions`] has them, 0 if there are none. `None` if they are malformed, too long, or
/// critical and not known.
pub(super) fn read_options(mut bytes: &[u8]) -> Option<u64> {
    if bytes.len() > MAX_MATCHED_OPTIONS {
        return None;
    }
    let mut word = [0; MAX_MATCHED_OPTIONS];
    let mut at = 0;
    while let Some(&[c, d, kind, last]) = bytes.first_chunk::<HEADER>() {
        let class = u16::from_be_bytes([c, d]);
        let length = HEADER + (last & LENGTH) as usize * 4;
        let option = bytes.get(..length)?;
        // A header of zeros would look as if there were no option.
        let is_known = kind & CRITICAL == 0 || KNOWN_CRITICAL.contains(&(class, kind));
        if !is_known || [c, d, kind, last & LENGTH] == [0; HEADER] {
            return None;
        }
        word[at..at + length].copy_from_slice(option);
        word[at + 3] &= LENGTH;
        (at, bytes) = (at + length, &bytes[length..]);
    }
    bytes.is_empty().then_some(u64::from_be_bytes(word))
}

/// Options as they stand in a header, masks left aside.
///
/// # Errors
/// `None` if a value is not a multiple of 4 bytes, at most 124.
pub fn write_options(options: &[GeneveOpt]) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    for GeneveOpt { class, kind, value, .. } in options {
        let words = value.len() / 4;
        if value.len() % 4 != 0 || words > LENGTH as usize {
            return None;
        }
        bytes.extend(class.0.to_be_bytes());
        bytes.extend([kind.0, words as u8]);
        bytes.extend(value);
    }
    Some(bytes)
}

/// Puts the options that a flow matches into its key and mask; false if they do not fit, so that the flow cannot be one of the
/// tables. The list stays, for whoever shows the flow.
pub fn match_options(matches: &mut Match) -> bool {
    let options = &matches.tunnel.geneve;
    if options.is_empty() {
        return true;
    }
    let (mut value, mut mask) = ([0; MAX_MATCHED_OPTIONS], [0; MAX_MATCHED_OPTIONS]);
    let mut at = 0;
    for GeneveOpt { class, kind, value: bytes, mask: bits } in options {
        let end = at + HEADER + bytes.len();
        if end > MAX_MATCHED_OPTIONS || bytes.len() % 4 != 0 || bits.len() != bytes.len() {
            return false;
        }
        let words = (bytes.len() / 4) as u8;
        let [c, d] = class.0.to_be_bytes();
        let [m, n] = class.1.to_be_bytes();
        value[at..at + HEADER].copy_from_slice(&[c, d, kind.0, words]);
        mask[at..at + HEADER].copy_from_slice(&[m, n, kind.1, 0xff]);
        value[at + HEADER..end].copy_from_slice(bytes);
        mask[at + HEADER..end].copy_from_slice(bits);
        // What is looked at must tell the option from none.
        if (at..at + HEADER).all(|i| value[i] & mask[i] == 0) {
            return false;
        }
        at = end;
    }
    // Nothing comes behind them.
    mask[at..].fill(0xff);
    let (value, mask) = (u64::from_be_bytes(value), u64::from_be_bytes(mask));
    matches.key.set(Field::TunOptions, (value & mask) as u128);
    matches.mask.set(Field::TunOptions, mask as u128);
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn option(class: (u16, u16), kind: (u8, u8), value: &[u8], mask: &[u8]) -> GeneveOpt {
        GeneveOpt { class, kind, value: value.into(), mask: mask.into() }
    }

    fn word(options: &[GeneveOpt]) -> Option<(u64, u64)> {
        let mut matches = Match::default();
        matches.tunnel.geneve = options.to_vec();
        let fits = match_options(&mut matches);
        let get = |value: u128| value as u64;
        fits.then_some((get(matches.key.get(Field::TunOptions)), get(matches.mask.get(Field::TunOptions))))
    }

    /// What OVN sends: the ports' numbers in one option.
    const OVN: [u8; 8] = [1, 2, 0x80, 1, 0, 1, 0, 2];

    #[test]
    fn ovns_option_is_matched_under_its_mask() {
        let ovn = option((0x102, 0xffff), (0x80, 0xff), &[0, 1, 0, 2], &[0x7f, 0xff, 0xff, 0xff]);
        let (value, mask) = word(std::slice::from_ref(&ovn)).unwrap();
        assert_eq!((value, mask), (0x0102_8001_0001_0002, 0xffff_ffff_7fff_ffff));
        assert_eq!(write_options(&[ovn]).unwrap(), OVN);
        let seen = read_options(&OVN).unwrap();
        assert_eq!(seen & mask, value);
        // Another value, another type, and none at all are something else.
        for other in [[1, 2, 0x80, 1, 0, 1, 0, 3], [1, 2, 0x00, 1, 0, 1, 0, 2], [1, 2, 1, 1, 0, 1, 0, 2]] {
            assert_ne!(read_options(&other).unwrap() & mask, value);
        }
        assert_eq!(read_options(&[]), Some(0));
        assert_ne!(value, 0);
    }

    #[test]
    fn lengths_are_part_of_a_match() {
        let short = option((7, 0xffff), (1, 0xff), &[], &[]);
        let (value, mask) = word(std::slice::from_ref(&short)).unwrap();
        let of = |bytes: &[u8]| read_options(bytes).unwrap() & mask == value;
        assert!(of(&[0, 7, 1, 0]));
        assert!(!of(&[0, 7, 1, 0, 0, 7, 1, 0]));
        assert!(!of(&[0, 7, 1, 1, 0, 0, 0, 0]));
        assert_eq!(
            word(&[short.clone(), short.clone()]).map(|(value, _)| value),
            Some(0x0007_0100_0007_0100)
        );
        assert_eq!(word(&[short.clone(), short.clone(), short]), None);
        assert_eq!(word(&[option((7, 0), (1, 0), &[0; 8], &[0; 8])]), None);
        assert_eq!(word(&[option((7, 0), (1, 0), &[0; 3], &[0; 3])]), None);
        assert_eq!(word(&[option((7, 0), (1, 0), &[], &[])]), None, "it would match no option too");
    }

    #[test]
    fn what_is_malformed_long_or_not_known_is_not_read() {
        assert_eq!(read_options(&[0, 7, 1]), None);
        assert_eq!(read_options(&[0, 7, 1, 1]), None, "the value is missing");
        assert_eq!(read_options(&[0, 7, 1, 0, 0, 7]), None);
        assert_eq!(read_options(&[0, 7, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0]), None, "too long");
        assert_eq!(read_options(&[0; 4]), None, "it would be taken for none");
        // Reserved bits are not looked at.
        assert_eq!(read_options(&[0, 0, 0, 0xe0]), None);
        assert_eq!(read_options(&[0, 7, 1, 0, 0, 0, 0, 0]), None);
        assert_eq!(read_options(&[0, 7, 0x81, 0]), None, "critical");
        assert_eq!(read_options(&[1, 2, 0x81, 0]), None, "critical");
        // Reserved bits are ignored (RFC 8926 §3.5).
        assert_eq!(read_options(&[1, 2, 0x80, 0xe1, 0, 1, 0, 2]), read_options(&OVN));
    }
}
