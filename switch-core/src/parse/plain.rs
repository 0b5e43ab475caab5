//! The parser's plain twin: the same rules, written from the protocols' specifications one byte after the other, without
//! the fast one's tricks. It sees the whole frame and names fields instead of words.

use crate::key::{Field, Key, shape};
use crate::packet::{Layout, NONE, PortId};

/// What the twin finds: `None` where the parser leaves the packet to the host because kernels do not agree.
pub fn extract(in_port: PortId, frame: &[u8]) -> Option<(Key, Layout)> {
    let mut twin =
        Twin { frame: frame.to_vec(), at: 0, key: Key::default(), layout: Layout::default(), shape: 0 };
    twin.key.set(Field::InPort, in_port.slot as u128);
    twin.ethernet()?;
    twin.key.set(Field::Shape, twin.shape as u128);
    Some((twin.key, twin.layout))
}

struct Twin {
    frame: Vec<u8>,
    at: usize,
    key: Key,
    layout: Layout,
    shape: u16,
}

impl Twin {
    fn left(&self) -> usize {
        self.frame.len().saturating_sub(self.at)
    }

    /// The number in the `n` bytes at `offset` from here.
    fn peek(&self, offset: usize, n: usize) -> u128 {
        (0..n).fold(0, |value, i| value << 8 | self.frame[self.at + offset + i] as u128)
    }

    fn take(&mut self, n: usize) -> u128 {
        let value = self.peek(0, n);
        self.at += n;
        value
    }

    fn ethernet(&mut self) -> Option<()> {
        let (dst, src) = (self.take(6), self.take(6));
        self.key.set(Field::EthDst, dst);
        self.key.set(Field::EthSrc, src);
        let vlan = [0x8100, 0x88a8];
        let mut tags = 0;
        while tags < 2 && vlan.contains(&self.peek(0, 2)) && self.left() >= 6 {
            let places = [(Field::VlanTpid, Field::VlanTci), (Field::CvlanTpid, Field::CvlanTci)];
            let (tpid, tci) = places[tags];
            let value = self.take(2);
            self.key.set(tpid, value);
            let value = self.take(2) | 0x1000;
            self.key.set(tci, value);
            tags += 1;
        }
        let mut eth_type = self.take(2);
        if vlan.contains(&eth_type) {
            self.shape |= if tags == 2 { shape::VLAN_DEEP } else { shape::L3_BAD };
        }
        if eth_type < 1536 {
            eth_type = 4;
            if self.left() >= 8 && self.peek(0, 2) == 0xaaaa && self.peek(3, 3) == 0 {
                self.at += 6;
                let inner = self.take(2);
                if inner >= 1536 {
                    eth_type = inner;
                }
            }
        }
        self.key.set(Field::EthType, eth_type);
        self.layout.l3 = self.at as u16;
        match eth_type {
            0x0800 => self.ipv4(),
            0x86dd => self.ipv6()?,
            0x0806 | 0x8035 => self.arp(),
            0x8847 | 0x8848 => self.mpls(),
            _ => {}
        }
        Some(())
    }

    fn bad_l3(&mut self) {
        self.shape |= shape::L3_BAD;
        self.layout.l3 = NONE;
    }

    fn ipv4(&mut self) {
        if self.left() < 20 {
            return self.bad_l3();
        }
        let ihl = 4 * (self.peek(0, 1) as usize % 16);
        if ihl < 20 || ihl > self.left() {
            return self.bad_l3();
        }
        let total = self.peek(2, 2) as usize;
        let honest = self.peek(0, 1) >> 4 == 4 && (ihl..=self.left()).contains(&total);
        self.shape |= if honest { shape::L3 } else { shape::L3_BAD };
        if ihl != 20 {
            self.shape |= shape::L3_OPTIONS;
        }
        let proto = self.peek(9, 1);
        self.key.set(Field::IpProto, proto);
        self.key.set(Field::IpTos, self.peek(1, 1));
        self.key.set(Field::IpTtl, self.peek(8, 1));
        self.key.set(Field::Ipv4Src, self.peek(12, 4));
        self.key.set(Field::Ipv4Dst, self.peek(16, 4));
        let (more, offset) = (self.peek(6, 2) & 0x2000 != 0, self.peek(6, 2) & 0x1fff);
        if offset != 0 {
            self.key.set(Field::IpFrag, 2);
            return;
        }
        self.key.set(Field::IpFrag, more as u128);
        self.at += ihl;
        if proto == 1 {
            self.icmp();
        } else {
            self.transport(proto);
        }
    }

    fn ipv6(&mut self) -> Option<()> {
        if self.left() < 40 {
            self.bad_l3();
            return Some(());
        }
        let honest = self.peek(0, 1) >> 4 == 6 && self.peek(4, 2) as usize + 40 <= self.left();
        self.shape |= if honest { shape::L3 } else { shape::L3_BAD };
        self.key.set(Field::IpTos, self.peek(0, 2) >> 4);
        self.key.set(Field::Ipv6Label, self.peek(1, 3) & 0xfffff);
        self.key.set(Field::IpTtl, self.peek(7, 1));
        self.key.set(Field::Ipv6Src, self.peek(8, 16));
        self.key.set(Field::Ipv6Dst, self.peek(24, 16));
        let mut next = self.peek(6, 1);
        self.at += 40;
        let extension = |next| [0, 43, 44, 51, 60].contains(&next);
        let mut seen = 0;
        while extension(next) {
            self.shape |= shape::L3_OPTIONS;
            seen += 1;
            if seen > 12 {
                return None;
            }
            let least = if next == 43 || next == 44 { 4 } else { 2 };
            if next == 44 && self.left() >= 2 {
                self.key.set(Field::IpFrag, 1);
            }
            let broken =
                self.left() < least || next == 44 && self.peek(2, 2) >= 8 && extension(self.peek(0, 1));
            if broken {
                self.key.set(Field::IpProto, 59);
                self.shape = self.shape & !shape::L3 | shape::L3_BAD;
                return Some(());
            }
            if next == 44 && self.peek(2, 2) >= 8 {
                self.key.set(Field::IpFrag, 2);
                self.key.set(Field::IpProto, 44);
                return Some(());
            }
            let units = self.peek(1, 1) as usize;
            let len = match next {
                44 => 8,
                51 => 8 + 4 * units,
                _ => 8 + 8 * units,
            };
            if len > self.left() {
                return None;
            }
            next = self.peek(0, 1);
            self.at += len;
        }
        self.key.set(Field::IpProto, next);
        if next == 58 {
            self.icmpv6();
        } else {
            self.transport(next);
        }
        Some(())
    }

    /// A transport header of `len` bytes begins here and is whole.
    fn whole_l4(&mut self, len: usize) {
        self.shape |= shape::L4;
        self.layout.l4 = self.at as u16;
        self.layout.payload = (self.at + len) as u16;
    }

    fn transport(&mut self, proto: u128) {
        let least = match proto {
            6 => 20,
            17 => 8,
            132 => 12,
            _ => return,
        };
        if self.left() < least {
            return;
        }
        let mut len = least;
        if proto == 6 {
            len = 4 * (self.peek(12, 1) as usize >> 4);
            if len < 20 || len > self.left() {
                return;
            }
            self.key.set(Field::TcpFlags, self.peek(12, 2) & 0xfff);
        }
        self.key.set(Field::TpSrc, self.peek(0, 2));
        self.key.set(Field::TpDst, self.peek(2, 2));
        self.whole_l4(len);
    }

    fn icmp(&mut self) {
        if self.left() >= 8 {
            self.key.set(Field::TpSrc, self.peek(0, 1));
            self.key.set(Field::TpDst, self.peek(1, 1));
            self.whole_l4(8);
        }
    }

    fn icmpv6(&mut self) {
        self.icmp();
        let kind = [Field::TpSrc, Field::TpDst].map(|field| self.key.get(field));
        if self.left() < 24 || kind[1] != 0 || kind[0] != 135 && kind[0] != 136 {
            return;
        }
        self.key.set(Field::NdTarget, self.peek(8, 16));
        self.at += 24;
        while self.left() >= 8 {
            let (kind, len) = (self.peek(0, 1), 8 * self.peek(1, 1) as usize);
            if len == 0 || len > self.left() {
                return;
            }
            let field = match (kind, len) {
                (1, 8) => Some(Field::ArpSha),
                (2, 8) => Some(Field::ArpTha),
                _ => None,
            };
            if let Some(field) = field {
                if self.key.get(field) != 0 {
                    for field in [Field::NdTarget, Field::ArpSha, Field::ArpTha] {
                        self.key.set(field, 0);
                    }
                    return;
                }
                self.key.set(field, self.peek(2, 6));
            }
            self.at += len;
        }
    }

    fn arp(&mut self) {
        if self.left() < 28 {
            return self.bad_l3();
        }
        let ours =
            self.peek(0, 2) == 1 && self.peek(2, 2) == 0x0800 && self.peek(4, 1) == 6 && self.peek(5, 1) == 4;
        if !ours {
            return;
        }
        self.shape |= shape::L3;
        if self.peek(6, 2) < 256 {
            self.key.set(Field::IpProto, self.peek(6, 2));
        }
        self.key.set(Field::ArpSha, self.peek(8, 6));
        self.key.set(Field::Ipv4Src, self.peek(14, 4));
        self.key.set(Field::ArpTha, self.peek(18, 6));
        self.key.set(Field::Ipv4Dst, self.peek(24, 4));
    }

    fn mpls(&mut self) {
        let mut labels = Vec::new();
        let mut bottom = false;
        while !bottom && self.left() >= 4 {
            bottom = self.peek(2, 1) % 2 == 1;
            labels.push(self.take(4));
        }
        for (field, label) in [Field::Mpls0, Field::Mpls1, Field::Mpls2].into_iter().zip(&labels) {
            self.key.set(field, *label);
        }
        if bottom {
            self.shape |= shape::L3;
            self.key.set(Field::MplsCount, labels.len().min(3) as u128);
        } else {
            self.shape |= shape::L3_BAD;
            if labels.is_empty() {
                self.layout.l3 = NONE;
            }
        }
    }
}
