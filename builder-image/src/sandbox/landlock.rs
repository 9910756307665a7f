//! Landlock (landlock(7)): rights that a process takes from itself, without any right of its own. The kernel's structures
//! are few and are written here by hand.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use super::linux::check;

/// Since the sixth version of the interface.
const SCOPE_ABSTRACT_UNIX_SOCKET: u64 = 1;

// Rights over files, by the version of the interface that they came with (linux/landlock.h). What devices answer to ioctl
// (version 5) is left to their owners and modes.
const EXECUTE: u64 = 1;
const WRITE_FILE: u64 = 1 << 1;
const READ_FILE: u64 = 1 << 2;
const READ_DIR: u64 = 1 << 3;
/// Making and removing entries of every kind, and all of the above.
const FIRST_RIGHTS: u64 = (1 << 13) - 1;
/// Moving from one directory to another, since version 2. What does not handle it forbids it.
const REFER: u64 = 1 << 13;
/// Since version 3.
const TRUNCATE: u64 = 1 << 14;
/// The rights that a file can have, rather than a directory.
const OF_FILES: u64 = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE;

#[repr(C)]
struct Ruleset {
    access_fs: u64,
    access_net: u64,
    scoped: u64,
}

/// Packed, as the kernel has it.
#[repr(C, packed)]
struct PathBeneath {
    allowed: u64,
    parent: i32,
}

/// Keeps the calling process from abstract sockets that were not made within the same restriction.
pub(crate) fn scope_abstract_sockets() -> io::Result<()> {
    let ruleset = Ruleset { access_fs: 0, access_net: 0, scoped: SCOPE_ABSTRACT_UNIX_SOCKET };
    restrict(&make(&ruleset, size_of::<Ruleset>())?)
}

/// Leaves the calling process what lies at and below these paths, and nothing else. `writable` has to be there.
pub(crate) fn confine(writable: &[PathBuf], readable: &[PathBuf]) -> io::Result<()> {
    let all = handled(version()?);
    let ruleset = Ruleset { access_fs: all, access_net: 0, scoped: 0 };
    // Kernels of the first versions know the first member only, and refuse others but zeros.
    let ruleset = make(&ruleset, size_of::<u64>())?;
    for path in writable {
        allow(&ruleset, path, all)
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
    }
    for path in readable {
        match allow(&ruleset, path, EXECUTE | READ_FILE | READ_DIR) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => {
                other.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?
            }
        }
    }
    restrict(&ruleset)
}

fn handled(version: libc::c_long) -> u64 {
    FIRST_RIGHTS | if version >= 2 { REFER } else { 0 } | if version >= 3 { TRUNCATE } else { 0 }
}

#[allow(unsafe_code)]
fn version() -> io::Result<libc::c_long> {
    const VERSION: libc::c_uint = 1;
    // SAFETY: with this flag the kernel takes no pointer and answers a number.
    check(unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<Ruleset>(), 0_usize, VERSION)
    })
}

#[allow(unsafe_code)]
fn make(ruleset: &Ruleset, size: usize) -> io::Result<OwnedFd> {
    // SAFETY: the struct lives across the call, and size is not beyond its end. The new descriptor is nobody else's; it
    // is closed on exec (landlock makes it so).
    unsafe {
        let descriptor = check(libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::from_ref(ruleset),
            size,
            0 as libc::c_uint,
        ))?;
        Ok(OwnedFd::from_raw_fd(i32::try_from(descriptor).map_err(io::Error::other)?))
    }
}

#[allow(unsafe_code)]
fn allow(ruleset: &OwnedFd, path: &Path, rights: u64) -> io::Result<()> {
    const PATH_BENEATH: libc::c_int = 1;
    let parent = File::options().read(true).custom_flags(libc::O_PATH | libc::O_CLOEXEC).open(path)?;
    let rights = if parent.metadata()?.is_dir() { rights } else { rights & OF_FILES };
    let rule = PathBeneath { allowed: rights, parent: parent.as_raw_fd() };
    // SAFETY: both descriptors and the struct live across the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_landlock_add_rule,
            ruleset.as_raw_fd(),
            PATH_BENEATH,
            &raw const rule,
            0 as libc::c_uint,
        )
    })
    .map(drop)
}

#[allow(unsafe_code)]
fn restrict(ruleset: &OwnedFd) -> io::Result<()> {
    // SAFETY: takes a descriptor and flags only.
    check(unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0 as libc::c_uint) })
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_right_is_asked_for_that_the_kernel_does_not_know() {
        assert_eq!(handled(1), 0x1fff);
        assert_eq!(handled(2), 0x3fff);
        assert_eq!((handled(3), handled(7)), (0x7fff, 0x7fff));
    }
}
