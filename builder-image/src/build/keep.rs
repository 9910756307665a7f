//! Directories of failed builds that are kept to be looked at (Nix: `keep-failed`): they become the store owner's, with
//! everything in them, and nobody else can write to any of it (CVE-2025-52992).
//!
//! Nix leaves them with the build's user, who is the user of a later build as well.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, Uid};

use crate::error::Error;

/// Deepest tree that is kept: each level has a descriptor open. What is deeper was made to be in the way.
const MAX_DEPTH: usize = 200;
/// What nobody but the owner may have: the right to write, and what makes programs run as someone else.
const TAKEN: u32 = 0o7022;

/// Makes a directory and all below it the caller's own.
///
/// A build with network access may have handed a directory's descriptor to somebody outside, so names are never followed
/// twice: each file is held by a descriptor, and changed through that.
pub(super) fn take_over(top: &Path) -> Result<(), Error> {
    let name =
        CString::new(top.as_os_str().as_bytes()).map_err(|error| Error::file("keep", top)(error.into()))?;
    let owner = (rustix::process::geteuid(), rustix::process::getegid());
    node(CWD, &name, owner, 0).map_err(Error::file("keep what the build left in", top))
}

fn node(parent: BorrowedFd<'_>, name: &CStr, owner: (Uid, Gid), depth: usize) -> io::Result<()> {
    if depth > MAX_DEPTH {
        return Err(io::Error::other(format!("there are more than {MAX_DEPTH} levels of directories")));
    }
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(parent, name, flags, Mode::empty())?;
    let stat = rustix::fs::fstat(&file)?;
    // First, since only the owner may change the mode; and it takes setuid away.
    if (stat.st_uid, stat.st_gid) != (owner.0.as_raw(), owner.1.as_raw()) {
        rustix::fs::chownat(&file, "", Some(owner.0), Some(owner.1), AtFlags::EMPTY_PATH)?;
    }
    let kind = FileType::from_raw_mode(stat.st_mode);
    if kind == FileType::Symlink {
        return Ok(());
    }
    let is_dir = kind == FileType::Directory;
    // What the owner may not enter could not be deleted either.
    let entered = if is_dir { 0o700 } else { 0 };
    let mode = (stat.st_mode & 0o7777 & !TAKEN) | entered;
    if mode != stat.st_mode & 0o7777 {
        rustix::fs::chmod(through(&file), Mode::from_raw_mode(mode))?;
    }
    if !is_dir {
        return Ok(());
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(through(&file), flags, Mode::empty())?;
    drop(file);
    for entry in Dir::read_from(&dir)? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            node(dir.as_fd(), entry.file_name(), owner, depth + 1)?;
        }
    }
    Ok(())
}

/// A name for the very file that a descriptor holds, for calls that do not take one.
fn through(file: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

    use super::*;

    #[test]
    fn nothing_stays_writable_for_others() {
        let dir = tempfile::tempdir().unwrap();
        let (top, outside) = (dir.path().join("top"), dir.path().join("outside"));
        fs::create_dir_all(top.join("build/closed")).unwrap();
        fs::create_dir(top.join("tmp")).unwrap();
        fs::write(&outside, "").unwrap();
        fs::write(top.join("build/closed/file"), "evidence").unwrap();
        fs::write(top.join("build/program"), "").unwrap();
        let set = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        set(&outside, 0o666);
        std::os::unix::fs::symlink(&outside, top.join("build/link")).unwrap();
        for (name, mode) in [
            ("build/closed/file", 0o666),
            ("build/closed", 0o000),
            ("build/program", 0o6777),
            ("build", 0o777),
            ("tmp", 0o1777),
        ] {
            set(&top.join(name), mode);
        }
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::lchown(top.join("build"), Some(30_001), Some(30_000)).unwrap();
            std::os::unix::fs::lchown(top.join("build/link"), Some(30_001), Some(30_000)).unwrap();
        }
        take_over(&top).unwrap();
        let me = rustix::process::geteuid().as_raw();
        for (name, mode) in [
            ("", 0o755),
            ("build", 0o755),
            ("build/closed", 0o700),
            ("build/closed/file", 0o644),
            ("build/program", 0o755),
            ("tmp", 0o755),
        ] {
            let metadata = fs::symlink_metadata(top.join(name)).unwrap();
            assert_eq!((metadata.uid(), metadata.mode() & 0o7777), (me, mode), "{name}");
        }
        assert_eq!(fs::symlink_metadata(top.join("build/link")).unwrap().uid(), me);
        assert_eq!(fs::metadata(&outside).unwrap().mode() & 0o7777, 0o666, "a link is not followed");
        assert_eq!(fs::read(top.join("build/closed/file")).unwrap(), b"evidence");
    }

    #[test]
    fn bottomless_trees_are_not_kept() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("d/".repeat(MAX_DEPTH + 1))).unwrap();
        let error = take_over(&dir.path().join("d")).map(|()| "it fits");
        assert_eq!(error.unwrap(), "it fits");
        fs::create_dir(dir.path().join("d/".repeat(MAX_DEPTH + 2))).unwrap();
        let error = take_over(&dir.path().join("d")).unwrap_err();
        assert!(error.to_string().contains("levels"), "{error}");
    }
}
