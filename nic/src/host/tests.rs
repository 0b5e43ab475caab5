//! On a made-up tree, whose files are answered as the kernel would.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

use tempfile::TempDir;

use super::*;

/// A machine: two NICs with a group each, one of them a network interface, and a third that shares its group.
struct Tree {
    directory: TempDir,
    host: Host,
}

const ROCKER: &str = "0000:01:00.0";
const IGB: &str = "0000:02:00.0";
const SHARED: &str = "0000:04:01.0";
const NEIGHBOUR: &str = "0000:04:02.0";
const DISK: &str = "0000:00:1f.2";
const BRIDGE_PORT: &str = "0000:00:05.0";

fn put(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

fn at(text: &str) -> PciAddress {
    text.parse().unwrap()
}

/// Moves a function as the kernel does when it is told to in sysfs.
fn kernel(path: &Path, text: &str) -> io::Result<()> {
    let root = path.ancestors().find(|above| above.ends_with("sys")).unwrap().parent().unwrap();
    let pci = root.join("sys/bus/pci");
    let function = |address: &str| pci.join("devices").join(address);
    match path.file_name().unwrap().to_str().unwrap() {
        "driver_override" => fs::write(path, if text == "\n" { "(null)\n" } else { text }),
        "unbind" => fs::remove_file(function(text).join("driver")),
        "drivers_probe" => {
            let function = function(text);
            if function.join("driver").exists() {
                return Ok(());
            }
            let wanted = fs::read_to_string(function.join("driver_override"))?;
            let own = fs::read_to_string(function.join("own_driver")).unwrap_or_default();
            let driver = if wanted.trim() == "(null)" { own.trim() } else { wanted.trim() };
            if driver.is_empty() || function.join("refuses").exists() && driver == VFIO {
                return Ok(());
            }
            symlink(pci.join("drivers").join(driver), function.join("driver"))
        }
        other => panic!("{other} was written"),
    }
}

impl Tree {
    fn new() -> Tree {
        let directory = tempfile::tempdir().unwrap();
        let tree = Tree { host: Host { root: directory.path().to_owned(), write: kernel }, directory };
        for driver in ["vfio-pci", "igb", "virtio-pci", "pcieport", "ahci"] {
            fs::create_dir_all(tree.path("sys/bus/pci/drivers").join(driver)).unwrap();
        }
        fs::create_dir_all(tree.path("sys/module/vfio_iommu_type1/parameters")).unwrap();
        tree.put("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "N\n");
        tree.function(BRIDGE_PORT, "0x1b36 0x000c 0x060400", Some("pcieport"), Some(3));
        tree.function(DISK, "0x8086 0x2922 0x010601", Some("ahci"), Some(7));
        tree.function(ROCKER, "0x1b36 0x0006 0x028000", None, Some(9));
        tree.function(IGB, "0x8086 0x10c9 0x020000", Some("igb"), Some(10));
        tree.function(SHARED, "0x1b36 0x0006 0x028000", None, Some(3));
        tree.function(NEIGHBOUR, "0x1af4 0x1000 0x020000", Some("virtio-pci"), Some(3));
        tree.put(&format!("sys/bus/pci/devices/{ROCKER}/reset_method"), "bus\n");
        tree
    }

    fn path(&self, path: &str) -> std::path::PathBuf {
        self.directory.path().join(path)
    }

    fn put(&self, path: &str, text: &str) {
        put(&self.path(path), text);
    }

    fn function(&self, address: &str, ids: &str, driver: Option<&str>, group: Option<u32>) {
        let path = self.path("sys/bus/pci/devices").join(address);
        for (file, value) in ["vendor", "device", "class"].iter().zip(ids.split(' ')) {
            put(&path.join(file), &format!("{value}\n"));
        }
        put(&path.join("driver_override"), "(null)\n");
        put(&path.join("own_driver"), driver.unwrap_or_default());
        if let Some(driver) = driver {
            symlink(self.path("sys/bus/pci/drivers").join(driver), path.join("driver")).unwrap();
        }
        if let Some(group) = group {
            let members = self.path(&format!("sys/kernel/iommu_groups/{group}/devices"));
            fs::create_dir_all(&members).unwrap();
            symlink(&path, members.join(address)).unwrap();
            symlink(members.parent().unwrap(), path.join("iommu_group")).unwrap();
        }
    }

    /// An interface of a function, as virtio has it: of a device below the function.
    fn interface(&self, name: &str, address: &str, flags: &str, uppers: &[&str]) {
        let device = self.path(&format!("sys/bus/pci/devices/{address}/virtio0"));
        fs::create_dir_all(&device).unwrap();
        let path = self.path("sys/class/net").join(name);
        put(&path.join("flags"), flags);
        symlink(device, path.join("device")).unwrap();
        for upper in uppers {
            symlink("..", path.join(format!("upper_{upper}"))).unwrap();
        }
    }

    /// A process that has a file open.
    fn process(&self, pid: u32, name: &str, file: &str) {
        self.put(&format!("proc/{pid}/comm"), &format!("{name}\n"));
        fs::create_dir_all(self.path(&format!("proc/{pid}/fd"))).unwrap();
        symlink(self.path(file), self.path(&format!("proc/{pid}/fd/5"))).unwrap();
    }

    fn get(&self, address: &str) -> Function {
        self.host.function(at(address)).unwrap()
    }

    fn driver(&self, address: &str) -> Option<String> {
        self.get(address).driver
    }

    /// What stands in the way, but for the limit of whoever runs this.
    fn obstacles(&self, address: &str) -> Vec<String> {
        let mut obstacles = self.host.obstacles(&self.get(address));
        obstacles.retain(|obstacle| !matches!(obstacle, Obstacle::LockedMemory(_)));
        obstacles.iter().map(|obstacle| format!("{obstacle}: {}", obstacle.remedy(at(address)))).collect()
    }

    /// Binding fails, with this in its one line, and leaves everything as it was.
    fn refuses(&self, address: &str, force: bool, reason: &str) {
        let before = self.driver(address);
        let error = self.host.bind(at(address), force).unwrap_err().to_string();
        assert!(error.contains(reason) && error.contains(address) && !error.contains('\n'), "{error}");
        assert_eq!(self.driver(address), before);
        let overriding = self.path(&format!("sys/bus/pci/devices/{address}/driver_override"));
        assert_eq!(fs::read_to_string(overriding).unwrap(), "(null)\n");
    }
}

#[test]
fn addresses_are_read_and_nothing_else() {
    assert_eq!(at("01:00.0").to_string(), "0000:01:00.0");
    assert_eq!(at("0000:FF:1f.7").to_string(), "0000:ff:1f.7");
    assert_eq!(at("10000:e1:00.0").to_string(), "10000:e1:00.0");
    for wrong in [
        "",
        "01:00",
        "1:0:0",
        "01:20.0",
        "01:00.8",
        "../01:00.0",
        "01:00.0/",
        "+1:00.0",
        "000000000:01:00.0",
        "01:.0",
    ] {
        let error = wrong.parse::<PciAddress>().unwrap_err().to_string();
        assert!(error.contains("0000:01:00.0"), "{error}");
    }
}

#[test]
fn functions_are_what_sysfs_says() {
    let tree = Tree::new();
    let all: Vec<String> =
        tree.host.functions().unwrap().iter().map(|function| function.address.to_string()).collect();
    assert_eq!(all, [BRIDGE_PORT, DISK, ROCKER, IGB, SHARED, NEIGHBOUR]);
    let rocker = tree.get(ROCKER);
    assert_eq!((rocker.vendor, rocker.device, rocker.class), (0x1b36, 6, 0x028000));
    assert_eq!(rocker.model, Some(Model { name: "QEMU rocker", driver: "rocker" }));
    assert_eq!((rocker.group, rocker.driver, rocker.reset_methods), (Some(9), None, vec!["bus".to_owned()]));
    let igb = tree.get(IGB);
    assert_eq!(igb.model.map(|model| model.driver), Some("igb"));
    assert!(igb.is_network() && !igb.is_bound() && igb.companions.is_empty());
    assert!(!tree.get(DISK).is_network() && tree.get(NEIGHBOUR).model.is_none());
    // A bridge of the group is nobody's companion.
    let shared = tree.get(SHARED).companions;
    assert_eq!(shared, [Companion { address: at(NEIGHBOUR), driver: Some("virtio-pci".into()) }]);
    assert!(matches!(tree.host.function(at("0000:09:00.0")), Err(HostError::NoFunction(_))));
}

#[test]
fn virtual_functions_are_known() {
    let tree = Tree::new();
    tree.function("0000:02:10.0", "0x8086 0x10ca 0x020000", None, Some(11));
    let (physical, function) =
        (tree.path(&format!("sys/bus/pci/devices/{IGB}")), tree.path("sys/bus/pci/devices/0000:02:10.0"));
    symlink(&function, physical.join("virtfn0")).unwrap();
    symlink(&physical, function.join("physfn")).unwrap();
    assert_eq!(tree.get("0000:02:10.0").physical, Some(at(IGB)));
    assert_eq!(tree.get(IGB).virtual_functions, 1);
    tree.refuses(IGB, false, "its 1 virtual functions would go");
    assert!(tree.host.bind(at(IGB), true).is_ok());
}

#[test]
fn a_function_is_bound_once_and_given_back() {
    let tree = Tree::new();
    assert_eq!(tree.obstacles(IGB), ["bound to igb: pointwork nic bind 0000:02:00.0"]);
    assert!(!tree.host.is_bound(at(IGB)) && !tree.host.is_bound("0000:77:00.0".parse().unwrap()));
    let bound = tree.host.bind(at(IGB), false).unwrap();
    assert_eq!((bound.already, bound.from.as_deref()), (false, Some("igb")));
    assert!(tree.host.is_bound(at(IGB)));
    assert_eq!(tree.driver(IGB).as_deref(), Some(VFIO));
    assert!(tree.obstacles(IGB).is_empty());
    assert!(tree.host.bind(at(IGB), false).unwrap().already);
    let unbound = tree.host.unbind(at(IGB)).unwrap();
    assert_eq!(unbound, Unbound { already: false, driver: Some("igb".into()) });
    assert!(tree.host.unbind(at(IGB)).unwrap().already);
    assert_eq!(tree.driver(IGB).as_deref(), Some("igb"));
    // One that the kernel has no driver for.
    tree.host.bind(at(ROCKER), false).unwrap();
    assert_eq!(tree.host.unbind(at(ROCKER)).unwrap(), Unbound { already: false, driver: None });
    assert_eq!(tree.host.unbind(at(ROCKER)).unwrap(), Unbound { already: true, driver: None });
}

#[test]
fn what_the_host_uses_is_taken_only_by_force() {
    for (flags, uppers, reason) in [
        ("0x1003\n", &[][..], "eth1 is up;"),
        ("0x1002\n", &["ovs-system"][..], "eth1 belongs to ovs-system;"),
        ("0x1003\n", &["br0", "eth1.5"][..], "eth1 belongs to br0, eth1 belongs to eth1.5, eth1 is up;"),
    ] {
        let tree = Tree::new();
        tree.interface("eth1", IGB, flags, uppers);
        tree.refuses(IGB, false, reason);
        assert!(tree.obstacles(IGB)[0].contains("--force"), "{:?}", tree.obstacles(IGB));
        assert!(tree.host.bind(at(IGB), true).is_ok());
        assert_eq!(tree.driver(IGB).as_deref(), Some(VFIO));
    }
    let tree = Tree::new();
    tree.interface("eth1", IGB, "0x1002\n", &[]);
    tree.interface("eth2", NEIGHBOUR, "0x1003\n", &[]);
    assert_eq!(tree.get(IGB).uses(), None, "the interface of another function");
    tree.put("proc/net/route", "Iface\tDestination\neth1\t0001010A\n");
    tree.refuses(IGB, false, "eth1 has addresses");
    tree.put("proc/net/route", "");
    let link = "fe800000000000000000000000000001 02 40 20 80     eth1\n";
    tree.put("proc/net/if_inet6", link);
    assert_eq!(tree.get(IGB).uses(), None, "every interface has such an address");
    tree.put("proc/net/if_inet6", &format!("{link}fd000000000000000000000000000001 02 40 00 80     eth1\n"));
    tree.refuses(IGB, false, "eth1 has addresses");
    tree.refuses(DISK, false, "no network function (class 010601)");
    tree.refuses(BRIDGE_PORT, true, "is a bridge");
}

#[test]
fn what_stands_in_the_way_is_named_with_its_remedy() {
    let tree = Tree::new();
    let shared = tree.obstacles(SHARED);
    assert_eq!(shared.len(), 2, "{shared:?}");
    assert!(shared[0].starts_with("not bound to vfio-pci: pointwork nic bind 0000:04:01.0"), "{shared:?}");
    assert!(shared[1].contains("group 3 is shared with 0000:04:02.0 (virtio-pci)"), "{shared:?}");
    assert!(shared[1].contains("'pointwork nic bind 0000:04:02.0'"), "{shared:?}");
    let left = tree.host.bind(at(SHARED), false).unwrap().left;
    assert!(left.iter().any(|obstacle| matches!(obstacle, Obstacle::Group { group: 3, .. })), "{left:?}");
    tree.host.bind(at(NEIGHBOUR), false).unwrap();
    assert!(tree.obstacles(SHARED).is_empty(), "with both bound");
    assert!(tree.obstacles(NEIGHBOUR)[0].starts_with("no driver of Pointwork knows it"));

    let no_iommu = "0000:05:00.0";
    tree.function(no_iommu, "0x1b36 0x0006 0x028000", None, None);
    assert!(tree.obstacles(no_iommu)[0].contains("intel_iommu=on"));
    tree.refuses(no_iommu, true, "no IOMMU");

    let ecap = format!("sys/bus/pci/devices/{ROCKER}/iommu/intel-iommu/ecap");
    tree.put(&ecap, "f00f5a\n");
    tree.host.bind(at(ROCKER), false).unwrap();
    assert!(tree.obstacles(ROCKER).is_empty());
    tree.put(&ecap, "f00f52\n");
    assert!(tree.obstacles(ROCKER)[0].contains("allow_unsafe_interrupts"));
    tree.put("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "Y\n");
    assert!(tree.obstacles(ROCKER).is_empty());
    tree.put(&ecap, "f00f5a\n");

    fs::remove_dir_all(tree.path("sys/module/vfio_iommu_type1")).unwrap();
    tree.refuses(IGB, false, "module vfio_iommu_type1 is not loaded: modprobe vfio_iommu_type1");
    tree.put("dev/iommu", "");
    assert!(tree.obstacles(ROCKER).is_empty(), "iommufd does as well");
    fs::remove_dir(tree.path("sys/bus/pci/drivers/vfio-pci")).unwrap();
    tree.refuses(IGB, false, "module vfio-pci is not loaded: modprobe vfio-pci");
}

#[test]
fn a_function_that_vfio_does_not_take_goes_back() {
    let tree = Tree::new();
    tree.put(&format!("sys/bus/pci/devices/{IGB}/refuses"), "");
    let error = tree.host.bind(at(IGB), false).unwrap_err().to_string();
    assert!(error.contains("vfio-pci does not take the function"), "{error}");
    assert_eq!(tree.driver(IGB).as_deref(), Some("igb"));
    tree.refuses(IGB, false, "does not take");
}

#[test]
fn what_a_program_has_stays_its_own() {
    let tree = Tree::new();
    tree.host.bind(at(ROCKER), false).unwrap();
    tree.put("dev/vfio/9", "");
    tree.process(321, "pointworkd", "dev/vfio/9");
    tree.process(322, "other", "dev/vfio/90");
    assert_eq!(tree.get(ROCKER).holder, Some(Holder { pid: Some(321), name: "pointworkd".into() }));
    assert_eq!(tree.get(IGB).holder, None);
    for error in [tree.host.unbind(at(ROCKER)).unwrap_err(), tree.host.reset(at(ROCKER)).unwrap_err()] {
        assert!(error.to_string().contains("in use by pointworkd (process 321)"), "{error}");
    }
    assert!(tree.get(ROCKER).is_bound());
    let error = tree.host.reset(at(IGB)).unwrap_err().to_string();
    assert!(error.contains("not bound to vfio-pci"), "{error}");
    // By iommufd it is another file.
    tree.host.bind(at(IGB), false).unwrap();
    fs::create_dir_all(tree.path(&format!("sys/bus/pci/devices/{IGB}/vfio-dev/vfio0"))).unwrap();
    tree.process(323, "third", "dev/vfio/devices/vfio0");
    assert_eq!(tree.get(IGB).holder.map(|holder| holder.name), Some("third".into()));
}

#[test]
fn devices_are_reset_by_what_they_have() {
    use crate::pci::fake::Fake;
    use std::collections::HashMap;
    use std::sync::mpsc;

    let reset = |id: u32| {
        let (written, writes) = mpsc::channel();
        let hook = Box::new(move |_: &mut HashMap<u64, u64>, _: &_, offset, value| {
            written.send((offset, value)).unwrap();
        });
        let mut function = Fake::new(id, 8192, HashMap::new(), hook);
        let by = super::reset::reset(&mut function).unwrap();
        drop(function);
        (by, writes.into_iter().collect::<Vec<_>>())
    };
    assert_eq!(reset(0x0006_1b36), (Some(ResetBy::Register), vec![(0x300, 1)]));
    assert_eq!(reset(0x10c9_8086), (Some(ResetBy::Register), vec![(0, 1 << 26)]));
    assert_eq!(reset(0x1041_1af4), (None, vec![]));
}
