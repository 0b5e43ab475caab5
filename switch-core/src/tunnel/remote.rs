//! `set(tunnel(…))`: what a flow says of the outer headers of packets that it then outputs to a tunnel's port.

use super::{Encapsulation, GBP_FLAGS, Gbp, Kind, Link, MAX_VNI, Origin, OuterSpec, UdpPorts, write_options};
use crate::action::{FieldSet, TunnelOpts};
use crate::key::{Field, TUN_CSUM, TUN_DF, TUN_KEY, TUN_OAM};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

/// The other end of a tunnel, and what the outer header says.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Remote {
    /// VNI or GRE key, if the tunnel has one.
    pub id: Option<u64>,
    /// Our address, if the flow says it; else the host's routes do.
    pub src: Option<IpAddr>,
    /// The other end's address.
    pub dst: IpAddr,
    /// TOS or traffic class.
    pub tos: u8,
    /// TTL or hop limit; 0 leaves it to the host.
    pub ttl: u8,
    /// UDP destination port; `None` is the tunnel port's own.
    pub port: Option<u16>,
    /// "Don't fragment".
    pub df: bool,
    /// The outer header has a checksum.
    pub checksum: bool,
    /// A control packet.
    pub oam: bool,
    /// Group policy.
    pub gbp: Option<Gbp>,
    /// GENEVE options as they stand in the header.
    pub options: Vec<u8>,
}

/// What the host adds to a [`Remote`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Underlay {
    /// What kind of tunnel the port is.
    pub kind: Kind,
    /// The link to the next hop.
    pub link: Link,
    /// Our address on the way there, if the flow does not say it.
    pub src: IpAddr,
    /// TTL if the flow does not say it.
    pub ttl: u8,
    /// UDP destination port of the tunnel's port.
    pub port: u16,
    /// UDP source ports.
    pub src_ports: RangeInclusive<u16>,
}

impl Remote {
    /// What the fields and options of one `set(tunnel(…))` say; it replaces all that an earlier one has said.
    ///
    /// # Errors
    /// What in it is not understood.
    pub fn new(sets: &[FieldSet], opts: &TunnelOpts) -> Result<Remote, &'static str> {
        let mut remote = Remote {
            id: None,
            src: None,
            dst: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            tos: 0,
            ttl: 0,
            port: None,
            df: false,
            checksum: false,
            oam: false,
            gbp: None,
            options: write_options(&opts.geneve).ok_or("malformed options")?,
        };
        if opts.other.is_some() {
            return Err("erspan or gtpu");
        }
        let v4 = |value: u128| IpAddr::V4(Ipv4Addr::from_bits(value as u32));
        let v6 = |value: u128| IpAddr::V6(Ipv6Addr::from_bits(value));
        let (mut id, mut flags) = (0, 0);
        let mut gbp = Gbp::default();
        for &FieldSet { field, value, .. } in sets {
            match field {
                Field::TunId => id = value as u64,
                Field::TunIpv4Src if value != 0 => remote.src = Some(v4(value)),
                Field::TunIpv6Src if value != 0 => remote.src = Some(v6(value)),
                Field::TunIpv4Dst if value != 0 => remote.dst = v4(value),
                Field::TunIpv6Dst if value != 0 => remote.dst = v6(value),
                Field::TunIpv4Src | Field::TunIpv6Src | Field::TunIpv4Dst | Field::TunIpv6Dst => {}
                Field::TunTos => remote.tos = value as u8,
                Field::TunTtl => remote.ttl = value as u8,
                // Chosen by the packet, as Linux does whatever the flow says.
                Field::TunTpSrc => {}
                Field::TunTpDst => remote.port = Some(value as u16).filter(|&port| port != 0),
                Field::TunGbpId => gbp.id = value as u16,
                Field::TunGbpFlags => gbp.flags = value as u8,
                Field::TunFlags => flags = value as u16,
                _ => return Err(field.name()),
            }
        }
        if remote.dst.is_unspecified() || remote.dst.is_multicast() {
            return Err("no single destination");
        }
        if gbp.flags & !GBP_FLAGS != 0 {
            return Err("flags of a group policy");
        }
        // A policy of zero is none (`vxlan_build_gbp_hdr` of Linux).
        remote.gbp = Some(gbp).filter(|gbp| *gbp != Gbp::default());
        remote.id = (flags & TUN_KEY != 0).then_some(id);
        (remote.df, remote.checksum, remote.oam) =
            (flags & TUN_DF != 0, flags & TUN_CSUM != 0, flags & TUN_OAM != 0);
        Ok(remote)
    }

    /// The outer header, on the way that the host has found.
    ///
    /// # Errors
    /// What this kind of tunnel cannot say.
    pub fn outer(&self, underlay: &Underlay) -> Result<OuterSpec, &'static str> {
        let ports = || UdpPorts { src: underlay.src_ports.clone(), dst: self.port.unwrap_or(underlay.port) };
        let vni = || match self.id {
            Some(id) if id <= MAX_VNI => Ok(id as u32),
            Some(_) => Err("a VNI of more than 24 bits"),
            None => Ok(0), // as Linux has it
        };
        if underlay.kind != Kind::Geneve && (self.oam || !self.options.is_empty())
            || underlay.kind != Kind::Vxlan && self.gbp.is_some()
        {
            return Err("options of another kind of tunnel");
        }
        let encapsulation = match underlay.kind {
            Kind::Vxlan => Encapsulation::Vxlan { vni: vni()?, gbp: self.gbp, ports: ports() },
            Kind::Geneve => {
                let options = self.options.clone();
                Encapsulation::Geneve { vni: vni()?, oam: self.oam, options, ports: ports() }
            }
            Kind::Gre => {
                let key =
                    self.id.map(u32::try_from).transpose().map_err(|_| "a GRE key of more than 32 bits")?;
                Encapsulation::Gre { key }
            }
        };
        Ok(OuterSpec {
            link: underlay.link,
            src: self.src.unwrap_or(underlay.src),
            dst: self.dst,
            tos: Origin::Set(self.tos),
            ttl: Origin::Set(if self.ttl == 0 { underlay.ttl } else { self.ttl }),
            df: self.df,
            checksum: self.checksum,
            encapsulation,
        })
    }
}
