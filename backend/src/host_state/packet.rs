//! Which devices are read by packet sockets, and how (`packet(7)`, `linux/packet_diag.h`).

use super::netlink::{Malformed, Request, Requests, attributes, u32_at};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use std::collections::BTreeSet;
use std::io;

/// `SOCK_DIAG_BY_FAMILY`.
const BY_FAMILY: u16 = 20;
/// Bytes of `struct packet_diag_msg`, which begins each answer.
const HEADER: usize = 16;
/// `PACKET_SHOW_INFO | PACKET_SHOW_RING_CFG`.
const SHOW: u32 = 0x1 | 0x4;
/// `PACKET_DIAG_INFO`.
const INFO: u16 = 0;
/// `PACKET_DIAG_RX_RING`.
const RX_RING: u16 = 2;

/// Indexes of the devices in the thread's network namespace that packet sockets read by system calls. Those that read from a ring
/// in shared memory, as `tcpdump` and all others with libpcap do, do not count.
///
/// # Errors
/// The kernel does not tell (`CONFIG_PACKET_DIAG`), or not us.
pub fn read_by_calls() -> io::Result<BTreeSet<u32>> {
    let mut request = [0; 20];
    request[0] = libc::AF_PACKET as u8;
    request[8..12].copy_from_slice(&SHOW.to_ne_bytes());
    let devices = Requests::open(NETLINK_SOCK_DIAG)?.ask(&Request::dump(BY_FAMILY, &request), device)?;
    Ok(devices.into_iter().collect())
}

/// The device that a socket is bound to; none if it has a ring. Of one whose device is gone it is none's index.
fn device(socket: &[u8]) -> Result<Option<u32>, Malformed> {
    let mut device = None;
    for attribute in attributes(socket.get(HEADER..).ok_or(Malformed)?) {
        match attribute? {
            (INFO, info) => device = Some(u32_at(info, 0)?),
            (RX_RING, _) => return Ok(None),
            _ => {}
        }
    }
    Ok(device)
}

#[cfg(test)]
mod tests {
    use super::super::tests::in_namespace;
    use super::*;

    /// What Linux 6.18 answered about a socket that is bound to device 1.
    const PLAIN: &str = "11030300 79ef1204 0f000000 00000000 \
                         1c000000 010000000000000000000000000000000000000001000000 08000500 00000000";
    /// The same with a ring of four blocks.
    const RING: &str = "20000200 00100000040000000008000008000000000000000000000000000000";

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: Vec<char> = hex.chars().filter(|digit| !digit.is_whitespace()).collect();
        digits
            .chunks(2)
            .map(|pair| u8::from_str_radix(&pair.iter().collect::<String>(), 16).unwrap())
            .collect()
    }

    #[test]
    fn a_ring_is_not_read_by_calls() {
        let plain = bytes(PLAIN);
        assert_eq!(device(&plain), Ok(Some(1)));
        assert_eq!(device(&bytes(&format!("{PLAIN}{RING}"))), Ok(None));
        for cut in [15, 17, 30] {
            assert_eq!(device(&plain[..cut]), Err(Malformed), "{cut}");
        }
    }

    #[test]
    fn the_kernel_tells() {
        in_namespace(|| assert_eq!(read_by_calls().unwrap(), BTreeSet::new()));
    }
}
