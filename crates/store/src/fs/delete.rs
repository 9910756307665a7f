//! Deleting a tree.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, SeekFrom, Stat};
use rustix::io::Errno;

use super::{OPEN_DIRECTORY, below, by_descriptor, list, open_parent};
use crate::Error;

/// How deep the recursion goes. What lies deeper is moved up and deleted from there, so that neither the stack nor the
/// open descriptors grow with what a builder made.
const MAX_RECURSION: usize = 64;

/// What deleting a tree did for the disk.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Freed {
    /// Bytes that are free now.
    pub bytes: u64,
    /// Bytes of files that one more name keeps: in an optimised store the one in the pool of identical files.
    pub kept_by_one: u64,
}

/// Deletes the tree at `path`, whatever its modes and depth, if it is there. Returns the bytes of disk that became
/// free (hard links elsewhere keep theirs). Never follows a symlink and never leaves the tree, whatever happens to it
/// meanwhile.
pub fn delete(path: &Path) -> Result<u64, Error> {
    delete_counting(path).map(|freed| freed.bytes)
}

/// As [`delete`], but also tells of what is free only once another name is gone.
pub(crate) fn delete_counting(path: &Path) -> Result<Freed, Error> {
    let mut freed = Freed::default();
    let (parent, name) = match open_parent(path) {
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => return Ok(freed),
        other => other?,
    };
    let Some(stat) = examine(parent.as_fd(), name).map_err(Error::sys("examine", path))? else {
        return Ok(freed);
    };
    if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
        let top = open(parent.as_fd(), name, path)?;
        let mut deletion = Deletion { top: &top, path, freed: &mut freed, moved: 0 };
        deletion.run()?;
        unlink(parent.as_fd(), name, AtFlags::REMOVEDIR).map_err(Error::sys("delete the directory", path))?;
    } else {
        unlink(parent.as_fd(), name, AtFlags::empty()).map_err(Error::sys("delete", path))?;
    }
    freed.count(&stat);
    Ok(freed)
}

impl Freed {
    /// A name of this file is gone.
    fn count(&mut self, stat: &Stat) {
        let bytes = u64::try_from(stat.st_blocks).unwrap_or(0) * 512;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory || stat.st_nlink == 1 {
            self.bytes += bytes;
        } else if stat.st_nlink == 2 {
            self.kept_by_one += bytes;
        }
    }
}

struct Deletion<'a> {
    top: &'a OwnedFd,
    path: &'a Path,
    freed: &'a mut Freed,
    /// Directories that were moved up to `top` so far.
    moved: u64,
}

impl Deletion<'_> {
    /// Empties `top`, in as many passes as it takes until nothing is moved up to it any more.
    fn run(&mut self) -> Result<(), Error> {
        loop {
            let before = self.moved;
            self.empty(self.top.as_fd(), 0)?;
            if self.moved == before {
                return Ok(());
            }
            rustix::fs::seek(self.top, SeekFrom::Start(0)).map_err(Error::sys("list again", self.path))?;
        }
    }

    fn empty(&mut self, directory: BorrowedFd<'_>, depth: usize) -> Result<(), Error> {
        for (name, _) in list(directory, self.path)? {
            self.entry(directory, &name, depth).map_err(|error| match error {
                Error::Io { act, source, .. } => {
                    Error::Io { act, path: below(self.path, name.as_bytes()), source }
                }
                other => other,
            })?;
        }
        Ok(())
    }

    fn entry(&mut self, directory: BorrowedFd<'_>, name: &OsStr, depth: usize) -> Result<(), Error> {
        let Some(stat) = examine(directory, name).map_err(Error::sys("examine", self.path))? else {
            return Ok(());
        };
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            unlink(directory, name, AtFlags::empty()).map_err(Error::sys("delete", self.path))?;
            self.freed.count(&stat);
            return Ok(());
        }
        let child = open(directory, name, self.path)?;
        if depth == MAX_RECURSION {
            return self.move_up(directory, name);
        }
        self.empty(child.as_fd(), depth + 1)?;
        unlink(directory, name, AtFlags::REMOVEDIR).map_err(Error::sys("delete the directory", self.path))?;
        self.freed.count(&stat);
        Ok(())
    }

    fn move_up(&mut self, directory: BorrowedFd<'_>, name: &OsStr) -> Result<(), Error> {
        loop {
            let new_name = OsString::from(format!(".drover-delete-{}", self.moved));
            self.moved += 1;
            let flags = rustix::fs::RenameFlags::NOREPLACE;
            match rustix::fs::renameat_with(directory, name, self.top, &new_name, flags) {
                Ok(()) => return Ok(()),
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(Error::sys("move", self.path)(errno)),
            }
        }
    }
}

/// Opens a directory and sees to it that its owner may delete what is in it.
fn open(parent: BorrowedFd<'_>, name: &OsStr, path: &Path) -> Result<OwnedFd, Error> {
    let fd = open_forcibly(parent, name).map_err(Error::sys("open the directory", path))?;
    let stat = rustix::fs::fstat(&fd).map_err(Error::sys("examine", path))?;
    if !Mode::from_raw_mode(stat.st_mode).contains(Mode::RWXU) {
        rustix::fs::fchmod(&fd, Mode::RWXU).map_err(Error::sys("change the mode of", path))?;
    }
    Ok(fd)
}

/// Opens a directory for listing; where its mode forbids that to its owner, the mode is changed. Refuses (EXDEV) what
/// something is mounted on: a tree that a sandbox left mounted in ours would be emptied through it.
fn open_forcibly(parent: BorrowedFd<'_>, name: &OsStr) -> Result<OwnedFd, Errno> {
    match open_unmounted(parent, name) {
        Err(Errno::ACCESS) => {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let fd = rustix::fs::openat(parent, name, flags, Mode::empty())?;
            rustix::fs::chmod(by_descriptor(&fd), Mode::RWXU)?;
            open_unmounted(parent, name)
        }
        other => other,
    }
}

fn open_unmounted(parent: BorrowedFd<'_>, name: &OsStr) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS;
    match rustix::fs::openat2(parent, name, OPEN_DIRECTORY, Mode::empty(), resolve) {
        // Old kernels do not have this call, and some filters of system calls do not let it through.
        Err(Errno::NOSYS | Errno::PERM) => rustix::fs::openat(parent, name, OPEN_DIRECTORY, Mode::empty()),
        other => other,
    }
}

fn examine(directory: BorrowedFd<'_>, name: &OsStr) -> Result<Option<Stat>, Errno> {
    match rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// What is gone already is as good as deleted.
fn unlink(directory: BorrowedFd<'_>, name: &OsStr, flags: AtFlags) -> Result<(), Errno> {
    match rustix::fs::unlinkat(directory, name, flags) {
        Err(Errno::NOENT) => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn whatever_the_modes() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("t");
        std::fs::create_dir_all(tree.join("a/b")).unwrap();
        std::fs::write(tree.join("a/b/f"), vec![1; 100_000]).unwrap();
        for (name, mode) in [("a/b/f", 0o000), ("a/b", 0o000), ("a", 0o555), ("", 0o444)] {
            std::fs::set_permissions(tree.join(name), std::fs::Permissions::from_mode(mode)).unwrap();
        }
        assert!(delete(&tree).unwrap() >= 100_000);
        assert!(!tree.exists());
        assert_eq!(delete(&tree).unwrap(), 0);
        assert_eq!(delete(&tree.join("below/nothing")).unwrap(), 0);
    }

    #[test]
    fn symlinks_are_deleted_and_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let victim = dir.path().join("victim");
        std::fs::create_dir(&victim).unwrap();
        std::fs::write(victim.join("f"), "x").unwrap();
        let tree = dir.path().join("t");
        std::fs::create_dir(&tree).unwrap();
        std::os::unix::fs::symlink(&victim, tree.join("l")).unwrap();
        delete(&tree).unwrap();
        std::os::unix::fs::symlink(&victim, &tree).unwrap();
        delete(&tree).unwrap();
        assert!(victim.join("f").exists() && std::fs::symlink_metadata(&tree).is_err());
    }

    /// What somebody put in the place of a directory after it was looked at.
    #[test]
    fn a_symlink_is_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/tmp", dir.path().join("l")).unwrap();
        let parent = rustix::fs::open(dir.path(), OPEN_DIRECTORY, Mode::empty()).unwrap();
        let why = open_forcibly(parent.as_fd(), OsStr::new("l")).unwrap_err();
        assert!(matches!(why, Errno::LOOP | Errno::NOTDIR), "{why}");
    }

    #[test]
    fn what_is_mounted_is_not_entered() {
        let root = rustix::fs::open("/", OPEN_DIRECTORY, Mode::empty()).unwrap();
        assert_eq!(open_forcibly(root.as_fd(), OsStr::new("proc")).unwrap_err(), Errno::XDEV);
    }

    #[test]
    fn a_hard_link_elsewhere_keeps_its_space() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("kept"), vec![1; 100_000]).unwrap();
        std::fs::hard_link(dir.path().join("kept"), dir.path().join("gone")).unwrap();
        let freed = delete_counting(&dir.path().join("gone")).unwrap();
        assert!(freed.bytes == 0 && freed.kept_by_one >= 100_000, "{freed:?}");
        assert!(delete(&dir.path().join("kept")).unwrap() >= 100_000);
    }

    #[test]
    fn deeper_than_any_path_can_say() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("t");
        std::fs::create_dir(&tree).unwrap();
        let flags = OPEN_DIRECTORY;
        let mut here = rustix::fs::open(&tree, flags, Mode::empty()).unwrap();
        for _ in 0..5_000 {
            rustix::fs::mkdirat(&here, "d", Mode::RWXU).unwrap();
            here = rustix::fs::openat(&here, "d", flags, Mode::empty()).unwrap();
        }
        drop(here);
        delete(&tree).unwrap();
        assert!(!tree.exists());
    }
}
