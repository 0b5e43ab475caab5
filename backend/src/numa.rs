//! NUMA nodes: which one a processor belongs to, and where the pages of a mapping are (numa(7)).

use std::collections::BTreeMap;
use std::path::Path;

const SYSFS: &str = "/sys/devices/system";

/// Bytes by node.
pub type Bytes = BTreeMap<u32, u64>;

/// The node of a processor; `None` where the system has no nodes, or no such processor.
pub fn node_of(cpu: usize) -> Option<u32> {
    numbers(&Path::new(SYSFS).join(format!("cpu/cpu{cpu}")), "node").next()
}

/// Whether there is more than one node.
pub fn has_several() -> bool {
    numbers(&Path::new(SYSFS).join("node"), "node").nth(1).is_some()
}

/// The numbers of a directory's entries with that name and a number.
fn numbers(directory: &Path, name: &str) -> impl Iterator<Item = u32> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(move |entry| entry.file_name().to_str()?.strip_prefix(name)?.parse().ok())
}

/// Where the pages of our mappings are that we have used, by the mappings' addresses; empty if the kernel does not say.
pub fn own_mappings() -> BTreeMap<usize, Bytes> {
    parse(&std::fs::read_to_string("/proc/self/numa_maps").unwrap_or_default())
}

/// Reads numa_maps (proc_pid_numa_maps(5)); what is not understood is left out.
fn parse(text: &str) -> BTreeMap<usize, Bytes> {
    let mapping = |line: &str| {
        let mut words = line.split_whitespace();
        let start = usize::from_str_radix(words.next()?, 16).ok()?;
        let pages: Vec<(u32, u64)> = words
            .clone()
            .filter_map(|word| {
                let (node, pages) = word.strip_prefix('N')?.split_once('=')?;
                Some((node.parse().ok()?, pages.parse().ok()?))
            })
            .collect();
        let size: u64 = words.find_map(|word| word.strip_prefix("kernelpagesize_kB=")?.parse().ok())?;
        Some((start, pages.into_iter().map(|(node, pages)| (node, pages * size * 1024)).collect::<Bytes>()))
    };
    text.lines().filter_map(mapping).collect()
}

/// The node that has most of it; `None` of nothing.
pub fn mostly(bytes: &Bytes) -> Option<u32> {
    bytes.iter().filter(|(_, bytes)| **bytes > 0).max_by_key(|(_, bytes)| **bytes).map(|(node, _)| *node)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_read_as_the_kernel_writes_them() {
        let text = "\
7f1c40000000 default file=/memfd:pc.ram\\040(deleted) mapped=300 N0=44 N1=256 kernelpagesize_kB=4
7f1d00000000 bind:1 file=/dev/hugepages/vm2 huge dirty=3 N1=3 kernelpagesize_kB=2048
7f1d80000000 default
nonsense
";
        let seen = parse(text);
        assert_eq!(seen[&0x7f1c_4000_0000], Bytes::from([(0, 44 << 12), (1, 256 << 12)]));
        assert_eq!(seen[&0x7f1d_0000_0000], Bytes::from([(1, 3 << 21)]));
        assert_eq!(seen.len(), 2);
        assert_eq!(mostly(&seen[&0x7f1c_4000_0000]), Some(1));
        assert_eq!(mostly(&Bytes::new()), None);
    }

    #[test]
    fn a_processor_that_does_not_exist_has_no_node() {
        assert_eq!(node_of(usize::MAX), None);
        if Path::new(SYSFS).join("node/node0").exists() {
            assert!(node_of(0).is_some());
            assert!(!own_mappings().is_empty());
        }
    }
}
