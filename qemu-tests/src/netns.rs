//! Network namespaces of our own: what happens in one reaches nobody else on this machine.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use anyhow::{Context, Result, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// A named network namespace (ip-netns(8)) without IPv6 of its own, so that nothing is sent in it unasked. Deleted on
/// drop; it lives on until the last process in it has ended.
#[derive(Debug)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// Makes one, with its loopback interface down.
    pub fn new() -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("pointwork-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        ip(&["netns", "add", &name])?;
        let namespace = Self { name };
        namespace.run(|| {
            for which in ["all", "default"] {
                let file = format!("/proc/sys/net/ipv6/conf/{which}/disable_ipv6");
                // A kernel without IPv6 has nothing to silence.
                if std::fs::exists(&file)? {
                    std::fs::write(&file, "1").context(file)?;
                }
            }
            Ok(())
        })?;
        Ok(namespace)
    }

    /// Its name, as `ip netns` lists it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that stands for it.
    pub fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// Runs `work` on a thread inside; the files and sockets that it opens stay inside.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let file = File::open(self.path())?;
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
                    .with_context(|| format!("entering the namespace {}", self.name))?;
                work()
            });
            inside.join().map_err(|panic| std::panic::resume_unwind(panic))?
        })
    }

    /// `ip` (ip(8)) with these arguments, inside.
    pub fn ip(&self, arguments: &[&str]) -> Result<()> {
        ip(&[&["-netns", &self.name], arguments].concat())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(error) = ip(&["netns", "delete", &self.name]) {
            eprintln!("the namespace {} is left behind: {error:#}", self.name);
        }
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(arguments).stdin(Stdio::null()).output().context("ip")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {}: {said}", arguments.join(" "));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_has_its_own_interfaces_and_ends() {
        let namespace = Namespace::new().unwrap();
        namespace.ip(&["link", "add", "only-here", "type", "bridge"]).unwrap();
        let inside = namespace.run(|| Ok(std::fs::read_to_string("/proc/thread-self/net/dev")?)).unwrap();
        let outside = std::fs::read_to_string("/proc/self/net/dev").unwrap();
        assert!(inside.contains("only-here") && !outside.contains("only-here"));
        let path = namespace.path();
        drop(namespace);
        assert!(!path.exists());
    }
}
