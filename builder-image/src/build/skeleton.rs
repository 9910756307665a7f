//! The part of a build's root directory that is the same for all builds: mount points for devices and the shell, the few
//! files of `/etc`, empty directories. Made once in the state directory and mounted read-only by every build, which
//! saves making and deleting some thirty files for each.
//!
//! A skeleton's name is a hash of what is in it, so that one that is there is right, whoever made it.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use drover_nix::Sha256;
use drover_store::StoreLayout;

use crate::error::Error;

/// Directory of skeletons in the state directory.
const SKELETONS: &str = "drover-skeletons";

/// A skeleton in memory, and what is to be mounted on it.
#[derive(Clone, Default, Debug)]
pub(crate) struct Skeleton {
    /// By path inside.
    nodes: BTreeMap<PathBuf, Node>,
    binds: Vec<(PathBuf, PathBuf)>,
    /// Who may look into the root directory beside its owner.
    gid: Option<u32>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Node {
    Directory,
    File(Vec<u8>),
    Symlink(PathBuf),
}

/// A skeleton on disk.
#[derive(Clone, Debug)]
pub(crate) struct Placed {
    pub root: PathBuf,
    /// Source outside, path inside.
    pub binds: Vec<(PathBuf, PathBuf)>,
}

impl Skeleton {
    pub(crate) fn new(gid: Option<u32>) -> Self {
        Self { gid, ..Self::default() }
    }

    pub(crate) fn directory(&mut self, inside: &str) {
        self.nodes.insert(inside.into(), Node::Directory);
    }

    /// A file that builds may read and nobody shall write.
    pub(crate) fn file(&mut self, inside: &str, contents: &[u8]) {
        self.nodes.insert(inside.into(), Node::File(contents.to_owned()));
    }

    pub(crate) fn symlink(&mut self, inside: &str, target: &Path) {
        self.nodes.insert(inside.into(), Node::Symlink(target.to_owned()));
    }

    /// Mounts `source` there. A symlink is copied instead.
    pub(crate) fn bind(&mut self, source: &Path, inside: &str) -> Result<(), Error> {
        let kind = fs::symlink_metadata(source).map_err(Error::file("examine", source))?.file_type();
        if kind.is_symlink() {
            let target = fs::read_link(source).map_err(Error::file("read", source))?;
            self.symlink(inside, &target);
            return Ok(());
        }
        if kind.is_dir() {
            self.directory(inside);
        } else {
            self.file(inside, b"");
        }
        self.binds.push((source.to_owned(), inside.into()));
        Ok(())
    }

    /// Makes it, unless it is there.
    pub(crate) fn place(&self, layout: &StoreLayout) -> Result<Placed, Error> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let skeletons = layout.state_dir.join(SKELETONS);
        let placed = Placed { root: skeletons.join(self.name()), binds: self.binds.clone() };
        if placed.root.is_dir() {
            return Ok(placed);
        }
        fs::create_dir_all(&skeletons).map_err(Error::file("create", &skeletons))?;
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let making = skeletons.join(format!("tmp-{}-{number}", std::process::id()));
        drover_store::fs::delete(&making)?;
        let made = self.make(&making).and_then(|()| match fs::rename(&making, &placed.root) {
            // Someone else was faster, and made the same.
            Err(_) if placed.root.is_dir() => Ok(()),
            other => other.map_err(Error::file("move the skeleton of a sandbox to", &placed.root)),
        });
        let _gone_unless_in_the_way = drover_store::fs::delete(&making);
        made.map(|()| placed)
    }

    fn make(&self, root: &Path) -> Result<(), Error> {
        directory(root, 0o750)?;
        if let Some(gid) = self.gid {
            std::os::unix::fs::chown(root, None, Some(gid))
                .map_err(Error::file("change the group of", root))?;
        }
        for (inside, node) in &self.nodes {
            let path = root.join(inside.strip_prefix("/").unwrap_or(inside));
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent).map_err(Error::file("create", parent))?;
            }
            match node {
                Node::Directory if path.is_dir() => {}
                Node::Directory => directory(&path, 0o755)?,
                Node::File(contents) => {
                    let mut options = File::options();
                    let file = options.write(true).create_new(true).mode(0o444).open(&path);
                    file.and_then(|mut file| file.write_all(contents))
                        .map_err(Error::file("write", &path))?;
                }
                Node::Symlink(target) => {
                    std::os::unix::fs::symlink(target, &path).map_err(Error::file("create", &path))?
                }
            }
        }
        // What is in it is what builds shall see.
        let etc = root.join("etc");
        match fs::set_permissions(&etc, Permissions::from_mode(0o555)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.map_err(Error::file("change the mode of", &etc)),
        }
    }

    fn name(&self) -> String {
        let mut text = format!("drover skeleton 1, group {:?}\0", self.gid).into_bytes();
        for (inside, node) in &self.nodes {
            let (kind, contents) = match node {
                Node::Directory => (b'd', &b""[..]),
                Node::File(contents) => (b'f', contents.as_slice()),
                Node::Symlink(target) => (b'l', target.as_os_str().as_bytes()),
            };
            text.push(kind);
            for part in [inside.as_os_str().as_bytes(), contents] {
                text.extend((part.len() as u64).to_le_bytes());
                text.extend(part);
            }
        }
        Sha256::of(&text).to_nix32()
    }
}

fn directory(path: &Path, mode: u32) -> Result<(), Error> {
    DirBuilder::new().mode(mode).create(path).map_err(Error::file("create", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn skeleton() -> Skeleton {
        let mut skeleton = Skeleton::new(None);
        skeleton.directory("/proc");
        skeleton.file("/etc/hosts", b"127.0.0.1 localhost\n");
        skeleton.symlink("/dev/fd", Path::new("/proc/self/fd"));
        skeleton.bind(Path::new("/dev/null"), "/dev/null").unwrap();
        skeleton
    }

    #[test]
    fn is_made_once_and_as_it_was_said() {
        let dir = tempfile::tempdir().unwrap();
        let layout = StoreLayout::in_root(dir.path());
        let placed = skeleton().place(&layout).unwrap();
        let read = |path: &str| fs::read_to_string(placed.root.join(path)).unwrap();
        assert_eq!((read("etc/hosts").as_str(), read("dev/null").as_str()), ("127.0.0.1 localhost\n", ""));
        assert_eq!(fs::read_link(placed.root.join("dev/fd")).unwrap(), Path::new("/proc/self/fd"));
        assert_eq!(placed.binds, [("/dev/null".into(), "/dev/null".into())]);
        fs::write(placed.root.join("mark"), "").unwrap();
        assert_eq!(skeleton().place(&layout).unwrap().root, placed.root);
        assert!(placed.root.join("mark").exists(), "it was made again");
        assert_eq!(fs::read_dir(layout.state_dir.join(SKELETONS)).unwrap().count(), 1);
    }

    #[test]
    fn what_differs_has_another_name() {
        let mut other = skeleton();
        other.file("/etc/hosts", b"");
        assert_ne!(skeleton().name(), other.name());
        assert_ne!(skeleton().name(), Skeleton { gid: Some(1), ..skeleton() }.name());
    }
}
