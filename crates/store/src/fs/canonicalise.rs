//! Canonical metadata for what a builder made (Nix: posix-fs-canonicalise.cc).

use std::collections::HashSet;
use std::ffi::OsStr;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use drover_nix::nar::MAX_DEPTH;
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Stat, Uid};
use rustix::io::Errno;

use super::{
    CANONICAL_TIMES, EXECUTABLE, MAX_PATH_LEN, PLAIN, below, by_descriptor, list, open_parent, too_long,
};
use crate::Error;

/// Most bytes of names of extended attributes of one file (Linux: XATTR_LIST_MAX).
const MAX_XATTR_NAMES: usize = 64 << 10;
/// Attributes that the file system or a security module owns, as Nix's `ignored-acls` has them.
const IGNORED_XATTRS: [&[u8]; 3] = [b"security.csm", b"security.selinux", b"system.nfs4_acl"];

/// Files that were canonicalised already, by device and inode: shared by all outputs of one build, so that hard links
/// between them are told from links to files of others.
pub type SeenInodes = HashSet<(u64, u64)>;

/// Gives a builder's output the metadata that store objects have: modes 0444 and 0555, mtime 1, no extended
/// attributes, owned by us. `uids`: who may own the files (else they are refused); None accepts all.
pub fn canonicalise(
    path: &Path,
    uids: Option<RangeInclusive<u32>>,
    seen: &mut SeenInodes,
) -> Result<(), Error> {
    let (parent, name) = open_parent(path)?;
    let mut walk = Walk { uids, seen, uid: rustix::process::geteuid(), gid: rustix::process::getegid() };
    walk.node(parent.as_fd(), name, path, 0)
}

struct Walk<'a> {
    uids: Option<RangeInclusive<u32>>,
    seen: &'a mut SeenInodes,
    uid: Uid,
    gid: Gid,
}

impl Walk<'_> {
    fn node(&mut self, parent: BorrowedFd<'_>, name: &OsStr, path: &Path, depth: usize) -> Result<(), Error> {
        if depth == MAX_DEPTH {
            let why = format!("it lies more than {MAX_DEPTH} levels deep, which no archive can hold");
            return Err(Error::BadFile { path: path.into(), why });
        }
        if path.as_os_str().len() >= MAX_PATH_LEN {
            return Err(too_long(path));
        }
        // A descriptor that gives no access, but holds on to this one file whatever becomes of its name.
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(parent, name, flags, Mode::empty()).map_err(Error::sys("open", path))?;
        let stat = rustix::fs::fstat(&fd).map_err(Error::sys("examine", path))?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if !matches!(kind, FileType::RegularFile | FileType::Directory | FileType::Symlink) {
            let why =
                "unsupported type: only regular files, directories and symlinks can be in a store".into();
            return Err(Error::BadFile { path: path.into(), why });
        }
        if self.done_before(&stat, kind, path)? {
            return Ok(());
        }
        self.one(&fd, &stat, kind, path)?;
        if kind == FileType::Directory {
            // Through the descriptor: this directory, and readable since it is ours now.
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let directory = rustix::fs::open(by_descriptor(&fd), flags, Mode::empty())
                .map_err(Error::sys("open the directory", path))?;
            for (name, _) in list(directory.as_fd(), path)? {
                self.node(directory.as_fd(), &name, &below(path, name.as_bytes()), depth + 1)?;
            }
        }
        Ok(())
    }

    /// Whether this is another name of a file that was done. Refuses files of others.
    fn done_before(&mut self, stat: &Stat, kind: FileType, path: &Path) -> Result<bool, Error> {
        let first = self.seen.insert((stat.st_dev, stat.st_ino));
        if !first && kind != FileType::Directory {
            return Ok(true);
        }
        match &self.uids {
            Some(uids) if !uids.contains(&stat.st_uid) => {
                let why = format!(
                    "invalid ownership: it belongs to user {}, not to the build's {} to {}",
                    stat.st_uid,
                    uids.start(),
                    uids.end()
                );
                Err(Error::BadFile { path: path.into(), why })
            }
            _ => Ok(false),
        }
    }

    fn one(&self, fd: &OwnedFd, stat: &Stat, kind: FileType, path: &Path) -> Result<(), Error> {
        let mode_changed = remove_xattrs(fd, stat, path)?;
        if stat.st_uid != self.uid.as_raw() {
            // Before the mode: a change of owner takes setuid away, and only the owner may change the mode.
            rustix::fs::chownat(fd, "", Some(self.uid), Some(self.gid), AtFlags::EMPTY_PATH)
                .map_err(Error::sys("take over", path))?;
        }
        let mode = match kind {
            FileType::Symlink => None,
            FileType::Directory => Some(EXECUTABLE),
            _ if Mode::from_raw_mode(stat.st_mode).contains(Mode::XUSR) => Some(EXECUTABLE),
            _ => Some(PLAIN),
        };
        if let Some(mode) = mode
            && (mode_changed || Mode::from_raw_mode(stat.st_mode & 0o7777) != mode)
        {
            rustix::fs::chmod(by_descriptor(fd), mode).map_err(Error::sys("change the mode of", path))?;
        }
        if (stat.st_mtime, stat.st_mtime_nsec) != (1, 0) {
            rustix::fs::utimensat(fd, "", &CANONICAL_TIMES, AtFlags::EMPTY_PATH)
                .map_err(Error::sys("change the time of", path))?;
        }
        Ok(())
    }
}

/// True if it had to change the file's mode for that.
fn remove_xattrs(fd: &OwnedFd, stat: &Stat, path: &Path) -> Result<bool, Error> {
    let act = "list the extended attributes of";
    let file = by_descriptor(fd);
    // Most files have none, which a call without a buffer tells.
    match rustix::fs::listxattr_query(&file) {
        Ok(0) | Err(Errno::OPNOTSUPP | Errno::NODATA) => return Ok(false),
        Ok(_) => {}
        Err(errno) => return Err(Error::sys(act, path)(errno)),
    }
    let mut mode_changed = false;
    let mut buffer = vec![0; MAX_XATTR_NAMES];
    let len = rustix::fs::listxattr(&file, &mut buffer[..]).map_err(Error::sys(act, path))?;
    for name in buffer[..len].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        if IGNORED_XATTRS.contains(&name) {
            continue;
        }
        let removed = match rustix::fs::removexattr(&file, name) {
            // `user.` attributes need the right to write, which even an owner may lack.
            Err(Errno::ACCESS | Errno::PERM) => {
                mode_changed = true;
                let writable = Mode::from_raw_mode(stat.st_mode & 0o7777) | Mode::WUSR;
                rustix::fs::chmod(&file, writable).and_then(|()| rustix::fs::removexattr(&file, name))
            }
            other => other,
        };
        removed.map_err(|errno| match errno {
            // A builder can give a file capabilities, in a user namespace of its own, that only root may take away.
            Errno::PERM | Errno::ACCESS => {
                let name = String::from_utf8_lossy(name);
                let why = format!("its extended attribute {name:?} cannot be removed: {errno}");
                Error::BadFile { path: path.into(), why }
            }
            errno => Error::sys("remove an extended attribute of", path)(errno),
        })?;
    }
    Ok(mode_changed)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

    use super::*;

    fn metadata(path: &Path) -> (u32, i64) {
        let meta = std::fs::symlink_metadata(path).unwrap();
        (meta.mode() & 0o7777, meta.mtime())
    }

    #[test]
    fn modes_and_times() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("t");
        std::fs::create_dir_all(tree.join("d")).unwrap();
        let file = |name: &str, mode| {
            std::fs::write(tree.join(name), name).unwrap();
            std::fs::set_permissions(tree.join(name), std::fs::Permissions::from_mode(mode)).unwrap();
        };
        file("d/setuid", 0o6755);
        file("d/others", 0o677);
        file("d/none", 0o000);
        file("d/canonical", 0o444);
        std::os::unix::fs::symlink("/nowhere", tree.join("d/link")).unwrap();
        std::fs::set_permissions(tree.join("d"), std::fs::Permissions::from_mode(0o1777)).unwrap();
        canonicalise(&tree, None, &mut SeenInodes::new()).unwrap();
        for (name, mode) in [
            ("", 0o555),
            ("d", 0o555),
            ("d/setuid", 0o555),
            ("d/others", 0o444),
            ("d/none", 0o444),
            ("d/canonical", 0o444),
        ] {
            assert_eq!(metadata(&tree.join(name)), (mode, 1), "{name}");
        }
        assert_eq!(metadata(&tree.join("d/link")).1, 1);
        assert!(!Path::new("/nowhere").exists());
        super::super::delete(&tree).unwrap();
    }

    #[test]
    fn extended_attributes_go() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        std::fs::write(&file, "x").unwrap();
        let set = rustix::fs::setxattr(&file, "user.drover", b"1", rustix::fs::XattrFlags::empty());
        if set == Err(Errno::OPNOTSUPP) {
            // This file system has none, so there is nothing that could stay: what is left to show is that it passes.
            canonicalise(&file, None, &mut SeenInodes::new()).unwrap();
            return;
        }
        set.unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o444)).unwrap();
        canonicalise(&file, None, &mut SeenInodes::new()).unwrap();
        assert_eq!(rustix::fs::listxattr_query(&file), Ok(0));
        assert_eq!(metadata(&file), (0o444, 1));
    }

    #[test]
    fn files_of_others_are_refused_but_hard_links_of_ones_own_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let me = rustix::process::geteuid().as_raw();
        let tree = dir.path().join("t");
        std::fs::create_dir(&tree).unwrap();
        std::fs::write(tree.join("a"), "x").unwrap();
        std::fs::hard_link(tree.join("a"), tree.join("b")).unwrap();
        let mut seen = SeenInodes::new();
        canonicalise(&tree, Some(me..=me), &mut seen).unwrap();
        let foreign = me + 1..=me + 1;
        let error = canonicalise(&tree.join("a"), Some(foreign.clone()), &mut SeenInodes::new()).unwrap_err();
        assert!(error.to_string().contains("ownership"), "{error}");
        // Another output of the same build links to it: seen, so it passes.
        canonicalise(&tree.join("b"), Some(foreign), &mut seen).unwrap();
        super::super::delete(&tree).unwrap();
    }

    #[test]
    fn what_no_path_can_name_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (tree, name) = (dir.path().join("t"), "d".repeat(250));
        std::fs::create_dir(&tree).unwrap();
        let mut here = rustix::fs::open(&tree, super::super::OPEN_DIRECTORY, Mode::empty()).unwrap();
        for _ in 0..20 {
            rustix::fs::mkdirat(&here, &name, Mode::RWXU).unwrap();
            here = rustix::fs::openat(&here, &name, super::super::OPEN_DIRECTORY, Mode::empty()).unwrap();
        }
        let error = canonicalise(&tree, None, &mut SeenInodes::new()).unwrap_err();
        assert!(error.to_string().contains("4096 bytes"), "{error}");
        super::super::delete(&tree).unwrap();
    }

    #[test]
    fn devices_sockets_and_bottomless_trees_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let _listener = std::os::unix::net::UnixListener::bind(dir.path().join("s")).unwrap();
        let error = canonicalise(&dir.path().join("s"), None, &mut SeenInodes::new()).unwrap_err();
        assert!(error.to_string().contains("unsupported type"), "{error}");
        std::fs::create_dir_all(dir.path().join("d/".repeat(MAX_DEPTH + 1))).unwrap();
        assert!(canonicalise(&dir.path().join("d"), None, &mut SeenInodes::new()).is_err());
        super::super::delete(&dir.path().join("d")).unwrap();
    }
}
