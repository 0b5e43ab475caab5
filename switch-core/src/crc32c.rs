//! CRC32c (Castagnoli), the checksum of SCTP (RFC 9260, appendix A), and its incremental update.
//!
//! A CRC is linear: when some bytes of a message change, it changes by the CRC (without initial value and final
//! complement) of the difference followed by as many zeroes as there are bytes behind it. So what lies behind need not
//! be at hand. Bits are reflected: bit 31 is the coefficient of x^0.

const POLYNOMIAL: u32 = 0x82f6_3b78;

/// `a * b` modulo the polynomial.
const fn multiply(a: u32, mut b: u32) -> u32 {
    let mut product = 0;
    let mut bit = 1 << 31;
    while bit != 0 {
        if a & bit != 0 {
            product ^= b;
        }
        b = b >> 1 ^ if b & 1 != 0 { POLYNOMIAL } else { 0 };
        bit >>= 1;
    }
    product
}

/// `x^(8 * 2^k)`: what 2^k more bytes multiply by.
const SHIFTS: [u32; 32] = {
    let mut shifts = [0; 32];
    shifts[0] = 1 << (31 - 8);
    let mut k = 1;
    while k < 32 {
        shifts[k] = multiply(shifts[k - 1], shifts[k - 1]);
        k += 1;
    }
    shifts
};

/// Continues the bare remainder `state` over `bytes`.
fn remainder(state: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(state, |state, &byte| {
        (0..8).fold(state ^ byte as u32, |s, _| s >> 1 ^ if s & 1 != 0 { POLYNOMIAL } else { 0 })
    })
}

/// The CRC32c of `bytes`.
pub fn crc32c(bytes: &[u8]) -> u32 {
    !remainder(!0, bytes)
}

/// How the CRC32c of a message changes (by exclusive or) when the bytes `old` in it become `new`, which is as long, and
/// `behind` bytes follow them.
pub fn change(old: [u8; 4], new: [u8; 4], behind: u32) -> u32 {
    let difference = (u32::from_ne_bytes(old) ^ u32::from_ne_bytes(new)).to_ne_bytes();
    let state = remainder(0, &difference);
    (0..32).filter(|k| behind >> k & 1 != 0).fold(state, |state, k| multiply(state, SHIFTS[k]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn check_value() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa); // RFC 3720, appendix B.4
    }

    proptest! {
        #[test]
        fn change_equals_recomputation(
            mut bytes in proptest::collection::vec(any::<u8>(), 4..2000), at: proptest::sample::Index, new: [u8; 4],
        ) {
            let at = at.index(bytes.len() - 3);
            let before = crc32c(&bytes);
            let old: [u8; 4] = bytes[at..at + 4].try_into().unwrap();
            let behind = (bytes.len() - at - 4) as u32;
            bytes[at..at + 4].copy_from_slice(&new);
            prop_assert_eq!(before ^ change(old, new, behind), crc32c(&bytes));
        }
    }
}
