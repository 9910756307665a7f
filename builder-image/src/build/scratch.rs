//! The directories of one build: what becomes its store directory (beside the store's objects, so that outputs can be
//! renamed into the store), the directory that it works in and its `/tmp`. Made before the build's process exists and
//! readable by its owner alone, so that nothing here races with a builder (Nix: chroot.cc, derivation-builder.cc).

use std::fs::{self, File, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use drover_nix::StorePath;
use drover_store::StoreLayout;
use rustix::io::Errno;

use super::ids::BuildIds;
use super::keep;
use crate::error::Error;

/// Where the build directory is inside (Nix: `sandbox-build-dir`).
pub(crate) const BUILD_DIR: &str = "/build";
/// How often deleting begins anew when somebody changes what is deleted.
const DELETE_PASSES: u32 = 100;

/// Deleted when dropped, but for a build directory that is to be kept.
pub(crate) struct Scratch {
    parent: PathBuf,
    top: PathBuf,
    /// Where the build directory is, if not in `top`.
    place: Option<PathBuf>,
    owner: Option<(u32, u32)>,
    keep: bool,
}

impl Scratch {
    /// Makes all. Whoever calls this has the derivation's lock, so that what is there in the place of its store directory is a
    /// dead one's.
    /// The build directory is at `place` if one is given, which has to be absent or empty, in a directory of nobody else's.
    pub(crate) fn create(
        layout: &StoreLayout,
        drv_path: &StorePath,
        ids: &BuildIds,
        place: Option<PathBuf>,
    ) -> Result<Self, Error> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let parent = layout.real_store_dir.join(format!("{drv_path}.chroot"));
        let builds = layout.state_dir.join("builds");
        private(&builds)?;
        let top = new_dir(&builds, &COUNTER)?;
        let scratch = Self { parent, top, place, owner: ids.foreign(), keep: false };
        // What must not be there is rare: look when it does not work.
        if make_dir(&scratch.parent, 0o700).is_err() {
            drover_store::fs::delete(&scratch.parent)?;
            make_dir(&scratch.parent, 0o700)?;
        }
        scratch.fill()?;
        Ok(scratch)
    }

    /// Where everything but the store directory lies. Nobody but the caller can look into it, and no build sees it.
    pub(crate) fn top(&self) -> &Path {
        &self.top
    }

    /// Outside what the store directory is inside.
    pub(crate) fn store(&self) -> PathBuf {
        self.parent.join("store")
    }

    /// Outside what [`BUILD_DIR`] is inside.
    pub(crate) fn build_dir(&self) -> PathBuf {
        self.place.clone().unwrap_or_else(|| self.top.join("build"))
    }

    /// Outside what `/tmp` is inside.
    pub(crate) fn tmp(&self) -> PathBuf {
        self.top.join("tmp")
    }

    /// Where a store path of the build's lies outside.
    pub(crate) fn outside(&self, path: &StorePath) -> PathBuf {
        self.store().join(path.as_str())
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

    /// Makes what the object at `source` can be mounted on as the store path `path`. False for a symlink, which is
    /// copied and needs no mount.
    pub(crate) fn input(&self, source: &Path, path: &StorePath) -> Result<bool, Error> {
        let target = self.outside(path);
        let kind = fs::symlink_metadata(source).map_err(Error::file("examine", source))?.file_type();
        if kind.is_symlink() {
            let to = fs::read_link(source).map_err(Error::file("read", source))?;
            std::os::unix::fs::symlink(to, &target).map_err(Error::file("create", &target))?;
            return Ok(false);
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
        Ok(true)
    }

    /// Keeps the build directory for whoever wants to look at it, and says where it is. On failure it goes as always.
    pub(crate) fn keep(&mut self) -> Result<PathBuf, Error> {
        keep::take_over(&self.top)?;
        for dir in [&self.top, &self.build_dir()] {
            set_mode(dir, 0o755)?;
        }
        self.keep = true;
        Ok(self.build_dir())
    }

    fn fill(&self) -> Result<(), Error> {
        let chown = |path: &Path, uid, gid| {
            std::os::unix::fs::chown(path, uid, Some(gid)).map_err(Error::file("change the owner of", path))
        };
        make_dir(&self.store(), 0o755)?;
        if let Some(place) = &self.place {
            // One that cannot be removed may be a mount, and serve if it is empty.
            match fs::remove_dir(place) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => set_mode(place, 0o700)?,
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::file("make the build directory", place)(error));
                }
                _ => make_dir(place, 0o700)?,
            }
        } else {
            make_dir(&self.build_dir(), 0o700)?;
        }
        make_dir(&self.tmp(), 0o1777)?;
        if let Some((uid, gid)) = self.owner {
            chown(&self.store(), None, gid)?;
            chown(&self.build_dir(), Some(uid), gid)?;
        }
        set_mode(&self.store(), 0o1775)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What is left behind is deleted by the next build of this derivation or by the next collection.
        let _left_behind = delete_all(&self.parent, &[self.store()]);
        if !self.keep {
            if let Some(place) = &self.place {
                let _left_behind = delete_all(place, &[]);
            }
            let _left_behind = delete_all(&self.top, &[self.top.join("build"), self.tmp()]);
        }
    }
}

/// Deletes a directory and what is in it, which as a rule is these empty directories only.
fn delete_all(path: &Path, within: &[PathBuf]) -> Result<(), drover_store::Error> {
    let empty = within.iter().chain([&path.to_owned()]).all(|dir| fs::remove_dir(dir).is_ok());
    if empty {
        return Ok(());
    }
    // Whoever has a directory of a fixed output open, from outside, can add to it and exchange what is in it until that
    // very directory is gone.
    let changed = |error: &io::Error| {
        matches!(
            Errno::from_io_error(error),
            Some(Errno::NOTEMPTY | Errno::NOTDIR | Errno::ISDIR | Errno::LOOP)
        )
    };
    let mut passes = 1;
    loop {
        match drover_store::fs::delete(path) {
            Err(drover_store::Error::Io { source, .. }) if changed(&source) && passes < DELETE_PASSES => {
                passes += 1;
            }
            other => return other.map(drop),
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

/// Makes the directory of build directories if it is not there. Refuses one that others could exchange anything in: the
/// names of build directories are no secret (Nix: derivation-builder.cc, checkNotWorldWritable).
fn private(builds: &Path) -> Result<(), Error> {
    let metadata = match fs::symlink_metadata(builds) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::create_dir_all(builds).map_err(Error::file("create", builds))?;
            fs::symlink_metadata(builds)
        }
        other => other,
    };
    let metadata = metadata.map_err(Error::file("examine", builds))?;
    let owner = rustix::process::geteuid().as_raw();
    if metadata.is_dir() && metadata.uid() == owner && metadata.mode() & 0o022 == 0 {
        return Ok(());
    }
    let why = format!(
        "it must be a directory, no symlink, that belongs to user {owner} and that nobody else may write to (its owner is \
         {}, its mode {:o}); remove it, and it is made anew",
        metadata.uid(),
        metadata.mode()
    );
    Err(Error::file("build in", builds)(io::Error::new(io::ErrorKind::PermissionDenied, why)))
}

/// Makes a directory that was not there, readable by its owner alone. One that is there is let be: an earlier process with this
/// one's id may have kept it for somebody to look at, or one in another container is working in it.
fn new_dir(builds: &Path, counter: &AtomicU64) -> Result<PathBuf, Error> {
    loop {
        let number = counter.fetch_add(1, Ordering::Relaxed);
        let dir = builds.join(format!("nix-{}-{number}", std::process::id()));
        match make_dir(&dir, 0o700) {
            Ok(()) => return Ok(dir),
            Err(Error::File { source, .. }) if source.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
}

fn make_dir(path: &Path, mode: u32) -> Result<(), Error> {
    fs::DirBuilder::new().mode(mode).create(path).map_err(Error::file("create", path))?;
    // Bits that the process's mask takes away (see `main`).
    if mode & 0o022 == 0 { Ok(()) } else { set_mode(path, mode) }
}

fn set_mode(path: &Path, mode: u32) -> Result<(), Error> {
    fs::set_permissions(path, Permissions::from_mode(mode)).map_err(Error::file("change the mode of", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::rungs::Ids;

    const DRV: &str = "q4mzjdlh5px6977h7v5fdsk1p33yg583-x.drv";

    /// A store of its own, and the scratch directories of a build under the caller's own ids.
    fn create(root: &Path) -> Result<Scratch, Error> {
        let layout = StoreLayout::in_root(root);
        fs::create_dir_all(&layout.real_store_dir).unwrap();
        fs::create_dir_all(&layout.state_dir).unwrap();
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let ids = BuildIds::take(Ids::Own { uid, gid }, &layout.state_dir).unwrap().unwrap();
        Scratch::create(&layout, &DRV.parse().unwrap(), &ids, None)
    }

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn nobody_else_gets_in() {
        let dir = tempfile::tempdir().unwrap();
        let scratch = create(dir.path()).unwrap();
        assert_eq!((mode(&scratch.parent), mode(&scratch.top)), (0o700, 0o700));
        assert_eq!((mode(&scratch.build_dir()), mode(&scratch.tmp())), (0o700, 0o1777));
    }

    #[test]
    fn what_is_there_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let parent = create(dir.path()).unwrap().parent.clone();
        fs::create_dir(&parent).unwrap();
        fs::write(parent.join("planted"), "").unwrap();
        let held = File::open(&parent).unwrap();
        let scratch = create(dir.path()).unwrap();
        let now = fs::metadata(&scratch.parent).unwrap();
        assert!(held.metadata().unwrap().ino() != now.ino() && !scratch.parent.join("planted").exists());
        drop(scratch);
        // Nor followed.
        std::os::unix::fs::symlink("/tmp", &parent).unwrap();
        let scratch = create(dir.path()).unwrap();
        assert!(fs::symlink_metadata(&scratch.parent).unwrap().is_dir());
    }

    #[test]
    fn what_an_earlier_process_kept_stays() {
        let dir = tempfile::tempdir().unwrap();
        let kept = new_dir(dir.path(), &AtomicU64::new(0)).unwrap();
        fs::write(kept.join("evidence"), "").unwrap();
        // As a process counts that has just begun, with the same id: in a container it always is.
        let new = new_dir(dir.path(), &AtomicU64::new(0)).unwrap();
        assert!(kept != new && kept.join("evidence").exists());
        assert_eq!((mode(&kept), mode(&new)), (0o700, 0o700));
    }

    #[test]
    fn a_place_that_others_can_change_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let builds = create(dir.path()).unwrap().top.parent().unwrap().to_owned();
        for mode in [0o777, 0o775, 0o757] {
            set_mode(&builds, mode).unwrap();
            let why = create(dir.path()).err().unwrap().to_string();
            assert!(why.contains("builds"), "{why}");
        }
        fs::remove_dir(&builds).unwrap();
        std::os::unix::fs::symlink("/tmp", &builds).unwrap();
        assert!(create(dir.path()).is_err());
    }

    /// A second line: nobody else can enter the directory before the build does.
    #[test]
    fn a_file_of_a_build_is_new() {
        let dir = tempfile::tempdir().unwrap();
        let scratch = create(dir.path()).unwrap();
        let victim = dir.path().join("victim");
        fs::write(&victim, "untouched").unwrap();
        std::os::unix::fs::symlink(&victim, scratch.build_dir().join("planted")).unwrap();
        scratch.build_file("new", b"text").unwrap();
        assert_eq!(fs::read(scratch.build_dir().join("new")).unwrap(), b"text");
        for name in ["planted", "new"] {
            let why = scratch.build_file(name, b"other").unwrap_err().to_string();
            assert!(why.contains(name) && why.contains("exists"), "{why}");
        }
        assert_eq!(fs::read(victim).unwrap(), b"untouched");
    }
}
