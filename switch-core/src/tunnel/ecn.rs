//! Congestion marks (RFC 3168, 6040): the lowest two bits of TOS and traffic class.

/// Where they are.
pub(super) const MASK: u8 = 3;
const ECT_1: u8 = 1;
const ECT_0: u8 = 2;
const CE: u8 = 3;

/// The outer TOS of a packet with `inner` inside: the mark is that of the packet inside, but congestion that it has met so far
/// is not the tunnel's. So Linux (`INET_ECN_encapsulate`) and OVS have it (RFC 3168 §9.1.1, "full functionality"); RFC 6040 §4.1
/// would copy the mark. Who decapsulates comes to the same packet.
pub fn encapsulate(outer: u8, inner: u8) -> u8 {
    let mark = if inner & MASK == CE { ECT_0 } else { inner & MASK };
    outer & !MASK | mark
}

/// The inner TOS of a packet that came out of a tunnel (RFC 6040 §4.2, figure 4); `None` if it must be dropped, since it met
/// congestion and cannot say so.
pub fn decapsulate(outer: u8, inner: u8) -> Option<u8> {
    match (outer & MASK, inner & MASK) {
        (CE, 0) => None,
        (_, 0 | CE) => Some(inner),
        (CE, _) => Some(inner | CE),
        (ECT_1, ECT_0) => Some(inner & !MASK | ECT_1),
        _ => Some(inner),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_combined_as_the_rfc_has_it() {
        // RFC 6040, figure 4: rows are inner Not-ECT, ECT(0), ECT(1), CE; columns are outer Not-ECT, ECT(0), ECT(1), CE.
        let order = [0, ECT_0, ECT_1, CE];
        let table = [
            [Some(0), Some(0), Some(0), None],
            [Some(ECT_0), Some(ECT_0), Some(ECT_1), Some(CE)],
            [Some(ECT_1), Some(ECT_1), Some(ECT_1), Some(CE)],
            [Some(CE), Some(CE), Some(CE), Some(CE)],
        ];
        for (row, inner) in table.iter().zip(order) {
            for (expected, outer) in row.iter().zip(order) {
                let result = decapsulate(0xf8 | outer, 0x50 | inner);
                assert_eq!(result, expected.map(|mark| 0x50 | mark), "outer {outer} inner {inner}");
            }
        }
    }

    #[test]
    fn what_goes_in_comes_out() {
        for inner in 0..=255 {
            let outer = encapsulate(0xff, inner);
            assert_eq!(outer & 0xfc, 0xfc);
            assert_eq!(decapsulate(outer, inner), Some(inner));
            // And what the tunnel marks arrives.
            let marked = decapsulate(outer | CE, inner);
            assert_eq!(marked, (inner & MASK != 0).then_some(inner | CE));
        }
    }
}
