//! The directories of one build: the tree that becomes its root (beside the store's objects, so that outputs can be
//! renamed into the store) and the directory that it works in. Made before the build's process exists and readable by
//! its owner alone, so that nothing here races with a builder (Nix: chroot.cc, derivation-builder.cc).

use std::fs::{self, File, Permissions};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use drover_nix::StorePath;
use drover_store::StoreLayout;

use super::ids::BuildIds;
use crate::error::Error;

/// Where the build directory is inside (Nix: `sandbox-build-dir`).
pub(crate) const BUILD_DIR: &str = "/build";

/// Deleted when dropped, but for a build directory that is to be kept.
pub(crate) struct Scratch {
    parent: PathBuf,
    root: PathBuf,
    top: PathBuf,
    owner: Option<(u32, u32)>,
    keep: bool,
}

impl Scratch {
    /// Makes both. Whoever calls this has the locks of the derivation's outputs, so a tree that is there is a dead one's.
    pub(crate) fn create(layout: &StoreLayout, drv_path: &StorePath, ids: &BuildIds) -> Result<Self, Error> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let parent = layout.real_store_dir.join(format!("{drv_path}.chroot"));
        let builds = layout.state_dir.join("builds");
        fs::create_dir_all(&builds).map_err(Error::file("create", &builds))?;
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let top = builds.join(format!("nix-{}-{number}", std::process::id()));
        drover_store::fs::delete(&parent)?;
        drover_store::fs::delete(&top)?;
        let root = parent.join("root");
        let scratch = Self { parent, root, top, owner: ids.foreign(), keep: false };
        scratch.fill(layout)?;
        Ok(scratch)
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Outside what [`BUILD_DIR`] is inside.
    pub(crate) fn build_dir(&self) -> PathBuf {
        self.top.join("build")
    }

    /// A path inside as it is outside.
    pub(crate) fn outside(&self, path: &Path) -> PathBuf {
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Writes a file of the build's environment into its build directory, owned by the build.
    pub(crate) fn build_file(&self, name: &str, contents: &[u8]) -> Result<(), Error> {
        let path = self.build_dir().join(name);
        let mut options = File::options();
        let file = options.write(true).create_new(true).mode(0o644).open(&path);
        let mut file = file.map_err(Error::file("create", &path))?;
        if let Some((uid, gid)) = self.owner {
            std::os::unix::fs::fchown(&file, Some(uid), Some(gid))
                .map_err(Error::file("change the owner of", &path))?;
        }
        file.write_all(contents).map_err(Error::file("write", &path))
    }

    /// Makes what `source` can be bound to at `inside`, and returns the two. A symlink is copied instead and needs no
    /// binding: None.
    pub(crate) fn mount_point(
        &self,
        source: &Path,
        inside: &Path,
    ) -> Result<Option<(PathBuf, PathBuf)>, Error> {
        let target = self.outside(inside);
        let kind = fs::symlink_metadata(source).map_err(Error::file("examine", source))?.file_type();
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent).map_err(Error::file("create", parent))?;
        }
        if kind.is_symlink() {
            let to = fs::read_link(source).map_err(Error::file("read", source))?;
            std::os::unix::fs::symlink(to, &target).map_err(Error::file("create", &target))?;
            return Ok(None);
        }
        if kind.is_dir() {
            make_dir(&target, 0o755)?;
        } else {
            File::options()
                .write(true)
                .create_new(true)
                .open(&target)
                .map_err(Error::file("create", &target))?;
        }
        Ok(Some((source.to_owned(), target)))
    }

    /// Closes `/etc` to changes: what is in it is what builds shall see.
    pub(crate) fn seal(&self) -> Result<(), Error> {
        let etc = self.outside(Path::new("/etc"));
        set_mode(&etc, 0o555)
    }

    /// Keeps the build directory and says where it is.
    pub(crate) fn keep(&mut self) -> PathBuf {
        self.keep = true;
        for dir in [self.top.clone(), self.build_dir()] {
            let _kept_anyway = set_mode(&dir, 0o755);
        }
        self.build_dir()
    }

    fn fill(&self, layout: &StoreLayout) -> Result<(), Error> {
        make_dir(&self.parent, 0o700)?;
        make_dir(&self.root, 0o750)?;
        let group = |path: &Path| match self.owner {
            Some((_, gid)) => std::os::unix::fs::chown(path, None, Some(gid))
                .map_err(Error::file("change the group of", path)),
            None => Ok(()),
        };
        group(&self.root)?;
        for dir in ["bin", "dev", "dev/shm", "etc", "proc"] {
            make_dir(&self.root.join(dir), 0o755)?;
        }
        make_dir(&self.root.join("tmp"), 0o1777)?;
        let store = self.outside(Path::new(layout.store_dir.as_str()));
        fs::create_dir_all(&store).map_err(Error::file("create", &store))?;
        group(&store)?;
        set_mode(&store, 0o1775)?;
        for (link, target) in [
            ("fd", "/proc/self/fd"),
            ("stdin", "/proc/self/fd/0"),
            ("stdout", "/proc/self/fd/1"),
            ("stderr", "/proc/self/fd/2"),
        ] {
            let link = self.root.join("dev").join(link);
            std::os::unix::fs::symlink(target, &link).map_err(Error::file("create", &link))?;
        }
        make_dir(&self.top, 0o700)?;
        let build = self.build_dir();
        make_dir(&build, 0o700)?;
        if let Some((uid, gid)) = self.owner {
            std::os::unix::fs::chown(&build, Some(uid), Some(gid))
                .map_err(Error::file("change the owner of", &build))?;
        }
        Ok(())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let mut dead = vec![&self.parent];
        if !self.keep {
            dead.push(&self.top);
        }
        for path in dead {
            // What is left behind is deleted by the next build of this derivation or by the next collection.
            let _left_behind = drover_store::fs::delete(path);
        }
    }
}

/// `/etc/passwd` as Nix writes it for the ids that builds see.
pub(crate) fn passwd(uid: u32, gid: u32) -> String {
    format!(
        "root:x:0:0:Nix build user:{BUILD_DIR}:/noshell\n\
         nixbld:x:{uid}:{gid}:Nix build user:{BUILD_DIR}:/noshell\n\
         nobody:x:65534:65534:Nobody:/:/noshell\n"
    )
}

pub(crate) fn group(gid: u32) -> String {
    format!("root:x:0:\nnixbld:!:{gid}:\nnogroup:x:65534:\n")
}

pub(crate) const HOSTS: &str = "127.0.0.1 localhost\n::1 localhost\n";

/// Name resolution of builds that have the network.
pub(crate) const NSSWITCH: &str = "hosts: files dns\nservices: files\n";

/// A file that builds may read and nobody shall write.
pub(crate) fn fixed_file(path: &Path, contents: &[u8]) -> Result<(), Error> {
    let mut options = File::options();
    let file = options.write(true).create_new(true).mode(0o444).open(path);
    file.and_then(|mut file| file.write_all(contents)).map_err(Error::file("write", path))
}

fn make_dir(path: &Path, mode: u32) -> Result<(), Error> {
    fs::DirBuilder::new().mode(mode).create(path).map_err(Error::file("create", path))?;
    // The process's mask took bits away.
    set_mode(path, mode)
}

fn set_mode(path: &Path, mode: u32) -> Result<(), Error> {
    fs::set_permissions(path, Permissions::from_mode(mode)).map_err(Error::file("change the mode of", path))
}
