//! What a person should know about a device that was opened through AF_XDP.

use super::XdpMode;
use super::device::Device;
use super::socket::HEADROOM;

/// What the warnings depend on.
pub(super) struct Warned<'a> {
    pub device: &'a Device,
    pub mode: XdpMode,
    pub multi_buffer: bool,
    /// Whether some packets stay the kernel's.
    pub selective: bool,
    /// Bytes.
    pub frame_size: u32,
    /// Queues that were opened.
    pub queues: u32,
    /// Why better modes did not work.
    pub failures: &'a [String],
}

impl Warned<'_> {
    /// All warnings, a line each.
    pub(super) fn list(&self) -> Vec<String> {
        let Device { name, mtu, kind, .. } = self.device;
        let has = |feature| self.device.has(feature);
        let mut list = vec![];
        let mut warn = |applies: bool, text: String| {
            if applies {
                list.push(format!("{name}: {text}"));
            }
        };
        let generic = self.mode == XdpMode::Generic;
        let why = self.failures.join("; ");
        warn(!self.device.up, format!("the device is down: 'ip link set {name} up'"));
        warn(
            generic,
            format!(
                "generic mode: the kernel makes a buffer for each packet first and copies it after, which costs several times what native mode does ({why})"
            ),
        );
        warn(
            self.mode == XdpMode::Copy,
            format!("no zero copy: the kernel copies each packet, and sends in the worker's time ({why})"),
        );
        let room = self.frame_size - HEADROOM;
        warn(
            !self.multi_buffer && mtu.saturating_add(super::LINK_HEADER) > room,
            format!("MTU {mtu} without multi-buffer: packets above {room} bytes are lost; lower the MTU"),
        );
        for (feature, option, effect) in [
            ("rx-lro", "lro", "packets are merged before we see them, which cannot be undone"),
            ("rx-gro-hw", "rx-gro-hw", "packets are merged before we see them, which cannot be undone"),
            ("rx-fcs", "rx-fcs", "packets end with their checksum of four bytes"),
            ("rx-all", "rx-all", "packets come that were damaged on the way"),
        ] {
            warn(has(feature), format!("{option} is on: {effect}: 'ethtool -K {name} {option} off'"));
        }
        warn(
            generic && has("rx-gro"),
            format!(
                "gro is on: in generic mode packets are merged before we see them: 'ethtool -K {name} gro off'"
            ),
        );
        if let Some(why) = self.device.hides_tags() {
            warn(
                true,
                match self.selective {
                    true => {
                        format!("what it receives stays the kernel's, because VLAN tags are not seen: {why}")
                    }
                    false => format!("VLAN tags are not seen, and tagged packets look untagged: {why}"),
                },
            );
        }
        let (open, has_queues) = (self.queues, self.device.queues);
        warn(
            open < has_queues,
            format!(
                "{open} of {has_queues} queues are open: what the device puts into the others stays with the kernel: 'ethtool -L {name} combined {open}', or open all"
            ),
        );
        warn(
            kind == "veth",
            "packets from a host at the other end of the veth may come without complete checksums: turn its 'tx' offload off with ethtool -K".into(),
        );
        list
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(device: &Device, mode: XdpMode, multi_buffer: bool) -> Vec<String> {
        let (selective, frame_size, queues) = (false, 4096, 2);
        Warned { device, mode, multi_buffer, selective, frame_size, queues, failures: &["why".into()] }.list()
    }

    #[test]
    fn each_trouble_is_one_line_and_a_sound_device_has_none() {
        let features = Some(vec![]);
        let sound =
            Device { name: "eth0".into(), mtu: 1500, up: true, queues: 2, features, ..Device::default() };
        assert_eq!(list(&sound, XdpMode::ZeroCopy, false), [""; 0]);
        let features =
            ["rx-lro", "rx-gro", "rx-fcs", "rx-vlan-hw-parse", "tx-checksum-ipv4"].map(String::from);
        let features = Some(features.to_vec());
        let troubled = Device { mtu: 9000, up: false, queues: 4, features, ..sound };
        let native = list(&troubled, XdpMode::ZeroCopy, false);
        for word in ["down", "MTU 9000", "lro", "rx-fcs off", "rxvlan off", "2 of 4 queues"] {
            assert_eq!(native.iter().filter(|line| line.contains(word)).count(), 1, "{word}: {native:?}");
        }
        assert_eq!(native.len(), 6, "{native:?}");
        assert!(list(&troubled, XdpMode::ZeroCopy, true).iter().all(|line| !line.contains("MTU")));
        let generic = list(&troubled, XdpMode::Generic, true);
        assert!(generic.iter().any(|line| line.contains("generic mode") && line.contains("(why)")));
        assert!(generic.iter().any(|line| line.contains("gro off")));
        assert!(generic.iter().all(|line| !line.contains('\n')));
    }
}
