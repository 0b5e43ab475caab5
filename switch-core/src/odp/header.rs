//! The header of `tnl_push(…)`, as the userspace datapath has it ready (`format_odp_tnl_push_header` of OVS's `lib/odp-util.c`).

use super::cursor::Cursor;
use super::error::OdpError;
use super::tunnel::parse_geneve_opt;
use crate::key::{ETH_P_IP, ETH_P_IPV6, ipproto};
use crate::tunnel::{
    ETH_P_TEB, Encapsulation, GRE_CHECKSUM_PRESENT, GRE_KEY_PRESENT, Gbp, Link, Origin, OuterSpec, UdpPorts,
    write_options,
};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

/// Bits of VXLAN's first word: a VNI, and a group policy with its flags and id.
const VXLAN_VNI: u32 = 0x0800_0000;
const VXLAN_GBP: u32 = 0x8000_0000;
const GBP_FLAGS: u32 = 0x0048_0000;
/// "Don't fragment", in IPv4's fragment field.
const IPV4_DF: u128 = 0x4000;

/// Reads what is in the parentheses of `tnl_push`.
pub(super) fn parse(c: &mut Cursor<'_>, src_ports: RangeInclusive<u16>) -> Result<OuterSpec, OdpError> {
    c.expect("tnl_port(")?;
    c.take_while(super::cursor::is_port_char);
    c.expect("),header(size=")?;
    c.number(32)?;
    c.expect(",type=")?;
    c.number(32)?;
    c.expect(",eth(dst=")?;
    let dst = mac(c)?;
    c.expect(",src=")?;
    let link = Link { dst, src: mac(c)?, vlan: None };
    let eth_type = named(c, ",dl_type=", 16)? as u16;
    c.expect("),")?;
    let at = c.at();
    let network = match eth_type {
        ETH_P_IP => ipv4(c)?,
        ETH_P_IPV6 => ipv6(c)?,
        _ => return Err(c.error_at(at, "IPv4 or IPv6 expected")),
    };
    c.expect(",")?;
    let (encapsulation, checksum) = match network.proto {
        ipproto::UDP => udp(c, src_ports)?,
        ipproto::GRE => gre(c)?,
        _ => return Err(c.error_at(at, "UDP or GRE expected")),
    };
    c.expect("),out_port(")?;
    c.take_while(super::cursor::is_port_char);
    c.expect(")")?;
    let Network { src, dst, tos, ttl, df, .. } = network;
    Ok(OuterSpec {
        link,
        src,
        dst,
        // That of the packet inside is part of the flow's match, if Open vSwitch can see it.
        tos: Origin::Exact(tos),
        ttl: Origin::Set(ttl),
        df,
        checksum,
        encapsulation,
    })
}

struct Network {
    src: IpAddr,
    dst: IpAddr,
    tos: u8,
    ttl: u8,
    df: bool,
    proto: u8,
}

fn mac(c: &mut Cursor<'_>) -> Result<[u8; 6], OdpError> {
    let [_, _, mac @ ..] = (c.mac()? as u64).to_be_bytes();
    Ok(mac)
}

/// A number of `bits` bits behind `name`.
fn named(c: &mut Cursor<'_>, name: &str, bits: u32) -> Result<u128, OdpError> {
    c.expect(name)?;
    c.number(bits)
}

fn ipv4(c: &mut Cursor<'_>) -> Result<Network, OdpError> {
    let address = |bits: u128| IpAddr::V4(Ipv4Addr::from_bits(bits as u32));
    c.expect("ipv4(src=")?;
    let src = address(c.ipv4()?);
    c.expect(",dst=")?;
    let dst = address(c.ipv4()?);
    let proto = named(c, ",proto=", 8)? as u8;
    let tos = named(c, ",tos=", 8)? as u8;
    let ttl = named(c, ",ttl=", 8)? as u8;
    c.expect(",frag=")?;
    let at = c.at();
    let fragment = c.number(16)?;
    if fragment & !IPV4_DF != 0 {
        return Err(c.error_at(at, "0 or 0x4000 expected"));
    }
    c.expect(")")?;
    Ok(Network { src, dst, tos, ttl, df: fragment != 0, proto })
}

fn ipv6(c: &mut Cursor<'_>) -> Result<Network, OdpError> {
    let address = |bits: u128| IpAddr::V6(Ipv6Addr::from_bits(bits));
    c.expect("ipv6(src=")?;
    let src = address(c.ipv6()?);
    c.expect(",dst=")?;
    let dst = address(c.ipv6()?);
    c.expect(",label=")?;
    let at = c.at();
    if c.number(20)? != 0 {
        return Err(c.error_at(at, "no flow label expected"));
    }
    let proto = named(c, ",proto=", 8)? as u8;
    let tos = named(c, ",tclass=", 8)? as u8;
    let ttl = named(c, ",hlimit=", 8)? as u8;
    c.expect(")")?;
    Ok(Network { src, dst, tos, ttl, df: false, proto })
}

/// UDP and what is behind it. The source port is a packet's own.
fn udp(c: &mut Cursor<'_>, src: RangeInclusive<u16>) -> Result<(Encapsulation, bool), OdpError> {
    named(c, "udp(src=", 16)?;
    let ports = UdpPorts { src, dst: named(c, ",dst=", 16)? as u16 };
    // Some value stands there if one is to be made.
    let checksum = named(c, ",csum=", 16)? != 0;
    c.expect("),")?;
    let at = c.at();
    if c.eat("vxlan(") {
        let flags = named(c, "flags=", 32)? as u32;
        let vni = named(c, ",vni=", 24)? as u32;
        c.expect(")")?;
        let gbp = match flags {
            VXLAN_VNI => None,
            _ if flags & !(GBP_FLAGS | 0xffff) == VXLAN_VNI | VXLAN_GBP => {
                Some(Gbp { id: flags as u16, flags: (flags >> 16) as u8 & 0x48 })
            }
            _ => return Err(c.error_at(at, "flags that are not known")),
        };
        return Ok((Encapsulation::Vxlan { vni, gbp, ports }, checksum));
    }
    c.expect("geneve(")?;
    let oam = c.eat("oam,");
    c.eat("crit,"); // as the options say too
    let vni = named(c, "vni=", 24)? as u32;
    let mut list = Vec::new();
    if c.eat(",options(") {
        while c.sees("{") {
            list.push(parse_geneve_opt(c)?);
        }
        c.expect(")")?;
    }
    c.expect(")")?;
    let options = write_options(&list).ok_or_else(|| c.error_at(at, "malformed options"))?;
    Ok((Encapsulation::Geneve { vni, oam, options, ports }, checksum))
}

fn gre(c: &mut Cursor<'_>) -> Result<(Encapsulation, bool), OdpError> {
    c.expect("gre((flags=")?;
    let at = c.at();
    let flags = c.number(16)? as u16;
    let proto = named(c, ",proto=", 16)? as u16;
    c.expect(")")?;
    if flags & !(GRE_CHECKSUM_PRESENT | GRE_KEY_PRESENT) != 0 || proto != ETH_P_TEB {
        return Err(c.error_at(at, "Ethernet with no more than a checksum and a key expected"));
    }
    let checksum = flags & GRE_CHECKSUM_PRESENT != 0;
    if checksum {
        named(c, ",csum=", 16)?;
    }
    let key = match flags & GRE_KEY_PRESENT {
        0 => None,
        _ => Some(named(c, ",key=", 32)? as u32),
    };
    c.expect(")")?;
    Ok((Encapsulation::Gre { key }, checksum))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ETH: &str = "eth(dst=f8:bc:12:44:34:b6,src=f8:bc:12:46:58:e0,dl_type=0x0800)";
    const IPV4: &str = "ipv4(src=1.1.2.88,dst=1.1.2.92,proto=17,tos=0x8,ttl=64,frag=0x4000)";

    fn read(inner: &str) -> Result<OuterSpec, OdpError> {
        let text = format!("tnl_port(6),header(size=50,type=4,{inner}),out_port(br0)");
        super::super::parse_header(&text, 1..=9)
    }

    /// The texts of OVS's `tests/odp.at`, but for tunnels that are not made here.
    #[test]
    fn headers_are_read_as_ovs_prints_them() {
        let spec =
            read(&format!("{ETH},{IPV4},udp(src=0,dst=4789,csum=0x0),vxlan(flags=0x8000000,vni=0x1c7)"))
                .unwrap();
        let ports = |dst| UdpPorts { src: 1..=9, dst };
        let link = Link {
            dst: [0xf8, 0xbc, 0x12, 0x44, 0x34, 0xb6],
            src: [0xf8, 0xbc, 0x12, 0x46, 0x58, 0xe0],
            vlan: None,
        };
        let expected = OuterSpec {
            link,
            src: "1.1.2.88".parse().unwrap(),
            dst: "1.1.2.92".parse().unwrap(),
            tos: Origin::Exact(8),
            ttl: Origin::Set(64),
            df: true,
            checksum: false,
            encapsulation: Encapsulation::Vxlan { vni: 0x1c7, gbp: None, ports: ports(4789) },
        };
        assert_eq!(spec, expected);
        let text = "udp(src=0,dst=6081,csum=0xffff),geneve(oam,vni=0x1c7,options({class=0xffff,type=0x80,len=4,0xa}))";
        let spec = read(&format!("{ETH},{IPV4},{text}")).unwrap();
        let options = vec![0xff, 0xff, 0x80, 1, 0, 0, 0, 10];
        assert!(spec.checksum);
        let encapsulation = Encapsulation::Geneve { vni: 0x1c7, oam: true, options, ports: ports(6081) };
        assert_eq!(spec.encapsulation, encapsulation);
        let ipv6 = "ipv6(src=2001:cafe::88,dst=2001:cafe::92,label=0,proto=47,tclass=0x0,hlimit=64)";
        let eth = ETH.replace("0800", "86dd");
        for (gre, key, checksum) in [
            ("gre((flags=0x0,proto=0x6558))", None, false),
            ("gre((flags=0x2000,proto=0x6558),key=0x1e241)", Some(0x1e241), false),
            ("gre((flags=0xa000,proto=0x6558),csum=0x0,key=0x1e241)", Some(0x1e241), true),
        ] {
            let spec = read(&format!("{eth},{ipv6},{gre}")).unwrap();
            assert_eq!((spec.encapsulation, spec.checksum), (Encapsulation::Gre { key }, checksum));
            assert_eq!(spec.dst, "2001:cafe::92".parse::<IpAddr>().unwrap());
        }
        let gbp = "udp(src=0,dst=4789,csum=0x0),vxlan(flags=0x88400012,vni=0x1c7)";
        let Encapsulation::Vxlan { gbp, .. } = read(&format!("{ETH},{IPV4},{gbp}")).unwrap().encapsulation
        else {
            panic!("VXLAN");
        };
        assert_eq!(gbp, Some(Gbp { id: 0x12, flags: 0x40 }));
    }

    #[test]
    fn other_headers_are_refused_where_they_differ() {
        for (text, message) in [
            (
                format!("{ETH},{IPV4},udp(src=0,dst=4789,csum=0x0),vxlan(flags=0xc000000,vni=0x1c7)"),
                "not known",
            ),
            (
                format!("{ETH},{IPV4},udp(src=0,dst=4789,csum=0x0),vxlan(flags=0x8000000,vni=0x1000000)"),
                "24 bits",
            ),
            (
                format!("{ETH},{},gre((flags=0x3000,proto=0x6558))", IPV4.replace("17", "47")),
                "a key expected",
            ),
            (format!("{ETH},{},esp()", IPV4.replace("17", "50")), "UDP or GRE"),
            (format!("{ETH},{}", IPV4.replace("0x4000", "0x2000")), "0x4000 expected"),
            (ETH.replace("0800", "0806") + ",arp()", "IPv4 or IPv6"),
            ("gre((flags=0x2000,proto=0x6558),key=0x1e241)".into(), "',eth(dst=' expected"),
        ] {
            let error = read(&text).unwrap_err();
            assert!(error.message.contains(message), "{error}");
        }
    }
}
