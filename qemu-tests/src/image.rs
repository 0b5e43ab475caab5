//! What the guests boot, and how fast this machine can run them.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::guest::{Guest, GuestConfig};
use crate::host::WorkDir;

/// Which of the two images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ImageKind {
    /// Of a guest: `scripts/guest-image`, small.
    #[default]
    Guest,
    /// Of a compute node with Open vSwitch: `scripts/node-image`.
    Node,
}

impl ImageKind {
    /// The variable that names an image that is known to be up to date, and the script that builds it.
    fn sources(self) -> (&'static str, &'static str) {
        match self {
            Self::Guest => ("POINTWORK_GUEST_IMAGE", "scripts/guest-image"),
            Self::Node => ("POINTWORK_NODE_IMAGE", "scripts/node-image"),
        }
    }
}

/// Debian's kernel and our initramfs, as the image's script left them.
#[derive(Debug, Clone)]
pub struct Image {
    dir: PathBuf,
}

impl Image {
    /// The image of that kind, built first if need be; the kind's variable names one that is known to be up to date.
    pub fn get(kind: ImageKind) -> Result<&'static Self> {
        static IMAGES: [OnceLock<Result<Image, String>>; 2] = [const { OnceLock::new() }; 2];
        let image =
            IMAGES[kind as usize].get_or_init(|| Self::find(kind).map_err(|error| format!("{error:#}")));
        image.as_ref().map_err(|error| anyhow::anyhow!("no image: {error}"))
    }

    fn find(kind: ImageKind) -> Result<Self> {
        let (variable, script) = kind.sources();
        if let Some(dir) = std::env::var_os(variable) {
            let dir = PathBuf::from(dir);
            ensure!(dir.join("initramfs").exists(), "{variable}: {} holds no image", dir.display());
            return Ok(Self { dir });
        }
        let script = project().join(script);
        let output = Command::new(&script)
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .with_context(|| script.display().to_string())?;
        ensure!(output.status.success(), "{} failed", script.display());
        let dir = PathBuf::from(String::from_utf8(output.stdout)?.trim_end());
        Ok(Self { dir })
    }

    /// The kernel.
    pub fn kernel(&self) -> PathBuf {
        self.dir.join("vmlinuz")
    }

    /// The initramfs.
    pub fn initramfs(&self) -> PathBuf {
        self.dir.join("initramfs")
    }
}

/// The root of the project's source.
pub fn project() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// QEMU's program for guests of this machine's own architecture.
pub fn qemu() -> Result<&'static str> {
    match std::env::consts::ARCH {
        "x86_64" => Ok("qemu-system-x86_64"),
        "aarch64" => Ok("qemu-system-aarch64"),
        other => bail!("guests are not prepared for {other}"),
    }
}

/// QEMU's version, major and minor.
pub fn qemu_version() -> Result<(u32, u32)> {
    static VERSION: OnceLock<Option<(u32, u32)>> = OnceLock::new();
    let qemu = qemu()?;
    let version = VERSION.get_or_init(|| {
        let output = Command::new(qemu).arg("--version").stdin(Stdio::null()).output().ok()?;
        parse_version(&String::from_utf8_lossy(&output.stdout))
    });
    version.with_context(|| format!("{qemu} is missing or does not run (scripts/test installs it)"))
}

fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.strip_prefix("QEMU emulator version ")?.split(['.', ' ', '\n']);
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// What executes a guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// The processor itself.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

impl Accelerator {
    fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    /// KVM where a guest really boots with it, which the presence of `/dev/kvm` does not promise; else TCG. Found out
    /// once each boot of this machine, and noted beside the guest images.
    pub fn best() -> Result<Self> {
        static BEST: OnceLock<Accelerator> = OnceLock::new();
        if let Some(&known) = BEST.get() {
            return Ok(known);
        }
        let image = Image::get(ImageKind::Guest)?;
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let note = image.dir.with_file_name("accelerator");
        let noted = std::fs::read_to_string(&note).unwrap_or_default();
        let found = match noted.strip_prefix(boot.trim()).map(str::trim) {
            Some("kvm") => Self::Kvm,
            Some("tcg") => Self::Tcg,
            _ => {
                let found = Self::probe()?;
                // Only a shortcut: the next process probes again if this cannot be written.
                let _ = std::fs::write(&note, format!("{} {}\n", boot.trim(), found.name()));
                found
            }
        };
        Ok(*BEST.get_or_init(|| found))
    }

    fn probe() -> Result<Self> {
        if std::fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
            return Ok(Self::Tcg);
        }
        let dir = WorkDir::new()?;
        let config =
            GuestConfig { name: "probe".into(), accelerator: Some(Self::Kvm), ..GuestConfig::default() };
        let booted = Guest::launch(config, &dir).and_then(|guest| guest.wait_ready(Duration::from_secs(10)));
        crate::host::check_interrupt()?;
        Ok(if booted.is_ok() { Self::Kvm } else { Self::Tcg })
    }
}

impl std::fmt::Display for Accelerator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Kvm => "KVM",
            Self::Tcg => "TCG (emulation: KVM runs no guest here)",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        let debian = "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright";
        assert_eq!(parse_version(debian), Some((10, 0)));
        assert_eq!(parse_version("QEMU emulator version 7.2\n"), Some((7, 2)));
        assert_eq!(parse_version("bash: not found"), None);
    }
}
