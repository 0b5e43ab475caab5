//! The Internet checksum (RFC 1071) and its incremental update (RFC 1624).
//!
//! Sums are kept unfolded in a `u64` of 16-bit words in network order; `fold` ends the sum, and its complement is what
//! a header carries.

/// Adds `bytes` (an odd last byte is padded with zero) to an unfolded sum.
pub fn add(mut sum: u64, bytes: &[u8]) -> u64 {
    let (chunks, rest) = bytes.as_chunks::<4>();
    for chunk in chunks {
        sum += u32::from_be_bytes(*chunk) as u64;
    }
    let mut last = [0u8; 4];
    last[..rest.len()].copy_from_slice(rest);
    sum + u32::from_be_bytes(last) as u64
}

/// Folds a sum to 16 bits; not complemented.
pub fn fold(mut sum: u64) -> u16 {
    sum = (sum >> 32) + (sum & 0xffff_ffff);
    sum = (sum >> 32) + (sum & 0xffff_ffff);
    sum = (sum >> 16) + (sum & 0xffff);
    sum = (sum >> 16) + (sum & 0xffff);
    ((sum >> 16) + (sum & 0xffff)) as u16
}

/// The checksum of `bytes`: the complement of their folded sum.
pub fn checksum(bytes: &[u8]) -> u16 {
    !fold(add(0, bytes))
}

/// The unfolded sum of an IPv4 pseudo-header (RFC 793, 768): addresses, protocol, transport length.
pub fn pseudo_v4(src: u32, dst: u32, proto: u8, len: u32) -> u64 {
    src as u64 + dst as u64 + proto as u64 + len as u64
}

/// The unfolded sum of an IPv6 pseudo-header (RFC 8200 §8.1).
pub fn pseudo_v6(src: &[u8; 16], dst: &[u8; 16], proto: u8, len: u32) -> u64 {
    add(add(proto as u64 + len as u64, src), dst)
}

/// The checksum field after `old` bytes became `new` ones at an even offset of what it covers: `HC' = ~(~HC + ~m + m')`
/// (RFC 1624, equation 3). Both slices have the same, even length.
pub fn update(check: u16, old: &[u8], new: &[u8]) -> u16 {
    let removed = !fold(add(0, old));
    !fold(add(!check as u64 + removed as u64, new))
}

/// [`update`] for one 16-bit word.
#[inline(always)]
pub fn update_word(check: u16, old: u16, new: u16) -> u16 {
    let sum = !check as u32 + !old as u32 + new as u32;
    let sum = (sum >> 16) + (sum & 0xffff);
    !((sum >> 16) + sum) as u16
}

/// A partial (pseudo-header) sum, as `VIRTIO_NET_HDR_F_NEEDS_CSUM` keeps it in the checksum field: not complemented.
pub fn update_partial(sum: u16, old: &[u8], new: &[u8]) -> u16 {
    !update(!sum, old, new)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn rfc1071_example() {
        assert_eq!(fold(add(0, &[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7])), 0xddf2);
    }

    fn plain(bytes: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            sum += (pair[0] as u32) << 8 | *pair.get(1).unwrap_or(&0) as u32;
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    proptest! {
        #[test]
        fn equals_the_plain_sum(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert_eq!(checksum(&bytes), plain(&bytes));
        }

        #[test]
        fn update_equals_recomputation(mut bytes in proptest::collection::vec(any::<u8>(), 20), new: [u8; 4], at in 0usize..8) {
            bytes[19] |= 1; // a sum of all zeroes has two representations
            let before = checksum(&bytes);
            let old = bytes[at * 2..at * 2 + 4].to_vec();
            bytes[at * 2..at * 2 + 4].copy_from_slice(&new);
            prop_assert_eq!(update(before, &old, &new), checksum(&bytes));
        }

        #[test]
        fn a_word_is_updated_like_any_bytes(check: u16, old: u16, new: u16) {
            let expected = update(check, &old.to_be_bytes(), &new.to_be_bytes());
            prop_assert_eq!(update_word(check, old, new), expected);
        }
    }
}
