//! Unix sockets that listen at a path: a live one is never stolen, a stale one is replaced, ours goes when we go.

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Why nothing listens at a path, in one line that names the path.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another process answers there.
    #[error("{}: another process listens there (is a daemon already running?)", .0.display())]
    Live(PathBuf),
    /// A file that we did not make.
    #[error("{}: exists and is not a socket; remove it or choose another path", .0.display())]
    NotASocket(PathBuf),
    /// Another process is making a socket in the same directory.
    #[error("{}: its directory stays locked by another process; try again", .0.display())]
    Busy(PathBuf),
    /// The group is not known.
    #[error("{}: no group '{}' in /etc/group", .0.display(), .1)]
    NoGroup(PathBuf, String),
    /// The system refused.
    #[error("{}: {} failed: {}", .0.display(), .1, .2)]
    Io(PathBuf, &'static str, io::Error),
}

/// A socket file that we made; removed on drop, unless somebody put another file in its place.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    inode: (u64, u64),
}

impl SocketFile {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|found| (found.dev(), found.ino()) == self.inode)
            && let Err(error) = fs::remove_file(&self.path)
        {
            log::warn!("{}: cannot be removed: {error}", self.path.display());
        }
    }
}

/// Listens at `path`, with permission bits `mode` and, if given, owned by `group` (a name of `/etc/group` or a number).
///
/// The listener blocks; the caller may change that. Between bind and the change of mode the file has the permissions that
/// the umask leaves, which under a usual umask lets only the owner connect.
pub fn listen(
    path: &Path,
    mode: u32,
    group: Option<&str>,
) -> Result<(UnixListener, SocketFile), ListenError> {
    let failed = |what| move |error| ListenError::Io(path.to_owned(), what, error);
    let gid = match group {
        None => None,
        Some(group) => {
            Some(group_id(group).ok_or_else(|| ListenError::NoGroup(path.to_owned(), group.to_owned()))?)
        }
    };
    // Two daemons that both find a stale file would otherwise remove each other's new one.
    let _lock = lock_directory_of(path)?;
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            remove_stale(path)?;
            UnixListener::bind(path)
        }
        other => other,
    }
    .map_err(failed("bind"))?;
    let made = fs::symlink_metadata(path).map_err(failed("stat"))?;
    let file = SocketFile { path: path.to_owned(), inode: (made.dev(), made.ino()) };
    if gid.is_some() {
        std::os::unix::fs::chown(path, None, gid).map_err(failed("chown"))?;
    }
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(failed("chmod"))?;
    Ok((listener, file))
}

/// Removes a socket file that nobody listens on; anything else is an error.
fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let failed = |what| move |error| ListenError::Io(path.to_owned(), what, error);
    if !fs::symlink_metadata(path).map_err(failed("stat"))?.file_type().is_socket() {
        return Err(ListenError::NotASocket(path.to_owned()));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
        Ok(_) => return Err(ListenError::Live(path.to_owned())),
        Err(error) => return Err(ListenError::Io(path.to_owned(), "probe of the old socket", error)),
    }
    fs::remove_file(path).map_err(failed("removal of the old socket"))
}

/// Holds the directory's lock while the returned file lives.
fn lock_directory_of(path: &Path) -> Result<File, ListenError> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let file = File::open(directory)
        .map_err(|error| ListenError::Io(path.to_owned(), "opening its directory", error))?;
    // Others hold it for microseconds; one that keeps it must not hold up the whole daemon.
    let deadline = Instant::now() + Duration::from_millis(200);
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(error)) => {
                return Err(ListenError::Io(path.to_owned(), "locking its directory", error));
            }
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(TryLockError::WouldBlock) => return Err(ListenError::Busy(path.to_owned())),
        }
    }
}

/// The number of a group given by number or by its name in `/etc/group`.
pub fn group_id(group: &str) -> Option<u32> {
    let known = || {
        let text = fs::read_to_string("/etc/group").ok()?;
        text.lines().map(group_entry).find_map(|entry| entry.filter(|(name, _)| *name == group)?.1.into())
    };
    group.parse().ok().or_else(known)
}

/// The name of a group in `/etc/group`, or its number.
pub fn group_name(gid: u32) -> String {
    let text = fs::read_to_string("/etc/group").unwrap_or_default();
    let name =
        text.lines().filter_map(group_entry).find(|&(_, id)| id == gid).map(|(name, _)| name.to_owned());
    name.unwrap_or_else(|| gid.to_string())
}

/// Name and number of a line of `/etc/group` (group(5)).
fn group_entry(line: &str) -> Option<(&str, u32)> {
    let mut fields = line.split(':');
    let name = fields.next()?;
    Some((name, fields.nth(1)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_live_socket_is_refused_and_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (first, file) = listen(&path, 0o660, None).unwrap();
        assert!(matches!(listen(&path, 0o660, None), Err(ListenError::Live(_))));
        first.accept().unwrap(); // the probe
        UnixStream::connect(&path).unwrap();
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let (_listener, _file) = listen(&path, 0o600, None).unwrap();
        UnixStream::connect(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn other_files_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        fs::write(&path, "precious").unwrap();
        let error = listen(&path, 0o660, None).unwrap_err();
        assert!(matches!(error, ListenError::NotASocket(_)));
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }

    #[test]
    fn the_file_of_a_successor_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (listener, file) = listen(&path, 0o660, None).unwrap();
        // The successor's inode must differ: the first one stays alive under another name.
        fs::rename(&path, dir.path().join("old")).unwrap();
        let (_successor, _its_file) = listen(&path, 0o660, None).unwrap();
        drop((listener, file));
        assert!(path.exists());
    }

    #[test]
    fn groups_by_name_and_number() {
        assert_eq!(group_id("root"), Some(0));
        assert_eq!(group_id("1234567"), Some(1_234_567));
        assert_eq!(group_id("no such group"), None);
        assert_eq!(group_name(0), "root");
        assert_eq!(group_name(4_294_967_000), "4294967000");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let error = listen(&path, 0o660, Some("no such group")).unwrap_err();
        assert!(error.to_string().contains("no group 'no such group'"));
        assert!(!path.exists());
        let own = fs::metadata(dir.path()).unwrap().gid();
        listen(&path, 0o660, Some(&own.to_string())).unwrap();
    }

    #[test]
    fn a_locked_directory_does_not_block_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let lock = File::open(dir.path()).unwrap();
        lock.lock().unwrap();
        assert!(matches!(listen(&dir.path().join("s"), 0o660, None), Err(ListenError::Busy(_))));
    }
}
