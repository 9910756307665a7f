//! Store objects as files: dumping and restoring NARs, canonical metadata, deleting trees.
//!
//! Trees may be hostile: made by a builder or by an archive. So everything goes by directory descriptors, never
//! through a symlink, and never deeper than a NAR may nest (but for deleting, which copes with any depth). Nothing here
//! knows of the database or of locks.

mod canonicalise;
mod crew;
mod delete;
mod dump;
mod feed;
mod restore;

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, RawDir, Timespec, Timestamps};
use rustix::io::Errno;

use crate::Error;

pub use canonicalise::{SeenInodes, canonicalise};
pub use delete::delete;
pub(crate) use delete::{Freed, delete_counting};
pub use dump::{dump, with_nar, with_stream};
pub(crate) use dump::{dump_in, dump_to};
pub(crate) use restore::{Destination, restore_exactly};
pub use restore::{Restored, restore};

/// Mode of a file that may be executed, and of every directory.
const EXECUTABLE: Mode = Mode::from_raw_mode(0o555);
/// Mode of every other file.
const PLAIN: Mode = Mode::from_raw_mode(0o444);

/// One second after the epoch as the time of modification; that of access stays (Nix: posix-fs-canonicalise.cc).
const CANONICAL_TIMES: Timestamps = Timestamps {
    last_access: Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT },
    last_modification: Timespec { tv_sec: 1, tv_nsec: 0 },
};

const OPEN_DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Paths of files in a store are shorter, with their final NUL (Linux: PATH_MAX). Nix, which goes by paths, could not even
/// verify a store with others in it.
const MAX_PATH_LEN: usize = 4096;

/// Bytes for one call that lists a directory.
const LISTING_BUFFER: usize = 32 << 10;

/// Whether files made below `directory` by this process get just the mode that they are made with, as far as that is one
/// of store objects. If so, setting it again can be left out.
pub(crate) fn modes_hold(directory: &Path) -> bool {
    // Asking by the system call would change it for all threads.
    let umask = std::fs::read_to_string("/proc/self/status").ok().and_then(|status| {
        u32::from_str_radix(status.lines().find_map(|l| l.strip_prefix("Umask:"))?.trim(), 8).ok()
    });
    let inherits = rustix::fs::getxattr(directory, "system.posix_acl_default", &mut [0; 0][..]);
    umask.is_some_and(|umask| umask & EXECUTABLE.as_raw_mode() == 0)
        && matches!(inherits, Err(Errno::NODATA | Errno::OPNOTSUPP))
}

/// The directory that `path` is in, opened, and the name of `path` in it.
fn open_parent(path: &Path) -> Result<(OwnedFd, &OsStr), Error> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        let why = "it does not name a file in a directory".into();
        return Err(Error::BadFile { path: path.into(), why });
    };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    // The way to the store is the administrator's and may have symlinks; what is below it may not.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd =
        rustix::fs::open(parent, flags, Mode::empty()).map_err(Error::sys("open the directory", parent))?;
    Ok((fd, name))
}

/// The names in an open directory, with their types as far as the file system says them, in no order.
fn list(directory: BorrowedFd<'_>, path: &Path) -> Result<Vec<(OsString, FileType)>, Error> {
    let mut buffer: Vec<u8> = Vec::with_capacity(LISTING_BUFFER);
    let mut entries = RawDir::new(directory, buffer.spare_capacity_mut());
    let mut names = Vec::new();
    while let Some(entry) = entries.next() {
        let entry = entry.map_err(Error::sys("list", path))?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push((OsString::from_vec(name.to_vec()), entry.file_type()));
        }
    }
    Ok(names)
}

/// A name for an open file that system calls without a descriptor form can use. Following it leads to that very file,
/// whatever became of its name meanwhile.
fn by_descriptor(fd: impl AsFd) -> PathBuf {
    use std::os::fd::AsRawFd as _;
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()))
}

/// Of a path that has [`MAX_PATH_LEN`] bytes; only its beginning is worth reading.
fn too_long(path: &Path) -> Error {
    let why = format!("its path has {MAX_PATH_LEN} bytes or more, which most programs cannot open");
    Error::BadFile { path: path.iter().take(8).collect(), why }
}

/// For messages: `path` and a name that may be any bytes.
fn below(path: &Path, name: &[u8]) -> PathBuf {
    path.join(OsStr::from_bytes(name))
}
