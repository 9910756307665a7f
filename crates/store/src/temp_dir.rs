//! Directories inside the store directory for work that ends in a rename (Nix: createTempDirInStore).

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use crate::path_lock::flock;
use crate::{Error, LocalStore};

/// Makes names unique within this process.
static COUNTER: AtomicU64 = AtomicU64::new(0);

/// A directory of mode 0700 in the store's own directory, named `tmp-<pid>-<n>`. It is locked, so collectors leave it
/// alone, and it is deleted with the guard.
#[derive(Debug)]
pub struct TempDir {
    path: PathBuf,
    _lock: File,
}

impl TempDir {
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        // What stays is for the collector, which finds it unlocked.
        let _ = crate::fs::delete(&self.path);
    }
}

impl LocalStore {
    /// A new file on the store's disk that has no name, and is gone with its last descriptor.
    pub fn spool(&self) -> Result<File, Error> {
        let dir = self.temp_dir()?;
        let path = dir.path().join("spool");
        // The guard deletes the name; the file lives as long as it is open.
        let file = File::options().read(true).write(true).create_new(true).open(&path);
        file.map_err(Error::io("make", &path))
    }

    /// Makes a new directory in the store's directory that no collector touches while the guard lives.
    pub fn temp_dir(&self) -> Result<TempDir, Error> {
        self.must_write("make a directory in the store")?;
        loop {
            let number = COUNTER.fetch_add(1, Ordering::Relaxed);
            let path = self.real_store_dir().join(format!("tmp-{}-{number}", std::process::id()));
            match rustix::fs::mkdir(&path, Mode::RWXU) {
                Ok(()) => {}
                Err(Errno::EXIST) => continue,
                Err(errno) => return Err(Error::sys("make the directory", &path)(errno)),
            }
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let lock: File = match rustix::fs::open(&path, flags, Mode::empty()) {
                Ok(fd) => fd.into(),
                // A collector was faster.
                Err(Errno::NOENT) => continue,
                Err(errno) => return Err(Error::sys("open the directory", &path)(errno)),
            };
            let locked =
                flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(Error::sys("lock", &path))?;
            let stat = rustix::fs::fstat(&lock).map_err(Error::sys("examine", &path))?;
            // A collector has it, or had it before our lock and deleted it.
            if locked && stat.st_nlink > 0 {
                return Ok(TempDir { path, _lock: lock });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::store;

    #[test]
    fn exists_locked_while_it_lives() {
        let (_dir, store) = store();
        let (first, second) = (store.temp_dir().unwrap(), store.temp_dir().unwrap());
        assert_ne!(first.path(), second.path());
        std::fs::write(first.path().join("f"), "x").unwrap();
        let probe = std::fs::File::open(first.path()).unwrap();
        let operation = rustix::fs::FlockOperation::NonBlockingLockExclusive;
        assert!(!crate::path_lock::flock(&probe, operation).unwrap());
        let path = first.path().to_owned();
        drop(first);
        assert!(!path.exists());
    }
}
