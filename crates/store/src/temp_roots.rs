//! Temporary roots: what a collector leaves alone while this process works with it (Nix: gc.cc).
//!
//! A process has one file, `temproots/<pid>`, which it keeps locked; its entries are full store paths, each ended by
//! NUL. Collectors take a file that nobody has locked for a dead process's and remove it. An entry is written while
//! `gc.lock` is held shared, or, where a collector has that lock, after the collector has said over its socket that it
//! knows. Two processes with one pid (in different pid namespaces) must not share a state directory: Nix's protocol has
//! no place for it.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use std::{io, thread};

use drover_nix::{StoreDir, StorePath};
use rustix::fs::{FlockOperation, Mode, OFlags};

use crate::path_lock::flock;
use crate::{Error, LocalStore, socket};

/// How long to wait before looking again for a collector that has its lock but not its socket yet.
const COLLECTOR_RETRY: Duration = Duration::from_millis(100);

/// A session's hold on paths. The paths stay protected until the last `TempRoots` of this process on that store is
/// dropped: the file behind them is one a process and is only ever appended to.
#[derive(Clone, Debug)]
pub struct TempRoots {
    file: Arc<RootsFile>,
}

/// The open files of this process by device and inode of their `temproots` directory, so that every store that is
/// opened on one state directory, under whatever name, shares one.
static FILES: LazyLock<Mutex<Files>> = LazyLock::new(Mutex::default);

type Files = HashMap<(u64, u64), Weak<RootsFile>>;

#[derive(Debug)]
struct RootsFile {
    path: PathBuf,
    file: File,
    store_dir: StoreDir,
    gc_lock_path: PathBuf,
    gc_lock: File,
    socket_path: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    added: HashSet<StorePath>,
    /// Bytes of the file that are entries. What lies behind them was written in part by a write that failed.
    len: u64,
    /// To the collector that was running when the last root was added.
    collector: Option<UnixStream>,
}

impl TempRoots {
    pub fn new(store: &LocalStore) -> Result<Self, Error> {
        store.must_write("protect paths from the collector")?;
        let directory = store.layout().state_dir.join("temproots");
        let stat = rustix::fs::stat(&directory).map_err(Error::sys("examine", &directory))?;
        let mut files = lock(&FILES);
        files.retain(|_, file| file.strong_count() > 0);
        let key = (stat.st_dev, stat.st_ino);
        if let Some(file) = files.get(&key).and_then(Weak::upgrade) {
            return Ok(Self { file });
        }
        let file = Arc::new(RootsFile::create(store, &directory)?);
        files.insert(key, Arc::downgrade(&file));
        Ok(Self { file })
    }

    /// Protects `path`, which need not exist. Returns once no collector can be deleting it any more; whether it is
    /// valid is to be asked after that.
    pub fn add(&self, path: &StorePath) -> Result<(), Error> {
        self.add_all([path])
    }

    /// [`Self::add`] for many paths at the cost of one.
    pub fn add_all<'a>(&self, paths: impl IntoIterator<Item = &'a StorePath>) -> Result<(), Error> {
        let mut state = lock(&self.file.state);
        let new: Vec<&StorePath> = paths.into_iter().filter(|path| !state.added.contains(*path)).collect();
        if new.is_empty() {
            return Ok(());
        }
        self.file.protect(&mut state, &new)?;
        state.added.extend(new.into_iter().cloned());
        Ok(())
    }
}

impl RootsFile {
    fn create(store: &LocalStore, directory: &Path) -> Result<Self, Error> {
        let layout = store.layout();
        let gc_lock_path = layout.state_dir.join("gc.lock");
        let gc_lock = open_lock(&gc_lock_path)?;
        let path = directory.join(std::process::id().to_string());
        let file = loop {
            // A file with our pid that is not in FILES is a dead process's.
            match rustix::fs::unlink(&path) {
                Ok(()) | Err(rustix::io::Errno::NOENT) => {}
                Err(errno) => return Err(Error::sys("remove the stale file", &path)(errno)),
            }
            let file = open_lock(&path)?;
            flock(&file, FlockOperation::LockExclusive).map_err(Error::sys("lock", &path))?;
            let stat = rustix::fs::fstat(&file).map_err(Error::sys("examine", &path))?;
            // A collector came between our opening and locking and retired the file.
            if stat.st_size == 0 {
                break file;
            }
        };
        Ok(Self {
            path,
            file,
            store_dir: layout.store_dir.clone(),
            gc_lock_path,
            gc_lock,
            socket_path: layout.gc_socket(),
            state: Mutex::default(),
        })
    }

    fn protect(&self, state: &mut State, paths: &[&StorePath]) -> Result<(), Error> {
        let mut entries = Vec::new();
        for path in paths {
            entries.extend_from_slice(self.store_dir.full(path).as_bytes());
            entries.push(0);
        }
        let gc_lock = |operation| {
            flock(&self.gc_lock, operation).map_err(Error::sys("lock", self.gc_lock_path.clone()))
        };
        let mut written = false;
        loop {
            if gc_lock(FlockOperation::NonBlockingLockShared)? {
                let result = if written { Ok(()) } else { self.append(state, &entries) };
                gc_lock(FlockOperation::Unlock)?;
                return result;
            }
            // Before this collector is told and not, as Nix does it, after: otherwise it could end, and the next one
            // read our file, in between.
            if !written {
                self.append(state, &entries)?;
                written = true;
            }
            match self.tell_collector(state, paths) {
                Ok(()) => return Ok(()),
                Err(error) => {
                    state.collector = None;
                    match error.kind() {
                        io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => {
                            thread::sleep(COLLECTOR_RETRY);
                        }
                        // It has ended, or is about to.
                        io::ErrorKind::BrokenPipe
                        | io::ErrorKind::ConnectionReset
                        | io::ErrorKind::UnexpectedEof => {}
                        _ => return Err(Error::io("talk to the collector at", &self.socket_path)(error)),
                    }
                }
            }
        }
    }

    fn append(&self, state: &mut State, entries: &[u8]) -> Result<(), Error> {
        let written = append_at(&self.file, state.len, entries);
        written.map_err(Error::io("write the temporary roots", &self.path))?;
        state.len += entries.len() as u64;
        Ok(())
    }

    /// Names each path to the running collector and waits until it has none of them in hand.
    fn tell_collector(&self, state: &mut State, paths: &[&StorePath]) -> io::Result<()> {
        let mut socket = match state.collector.take() {
            Some(socket) => socket,
            None => socket::connect(&self.socket_path)?,
        };
        for path in paths {
            socket.write_all(format!("{}\n", self.store_dir.full(path)).as_bytes())?;
            let mut answer = [0; 1];
            socket.read_exact(&mut answer)?;
            if &answer != b"1" {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "the answer is not the byte `1`: something else than a collector is listening",
                ));
            }
        }
        state.collector = Some(socket);
        Ok(())
    }
}

impl Drop for RootsFile {
    fn drop(&mut self) {
        let _files = lock(&FILES);
        // Once this file had no owner, a successor may have unlinked it and taken its name; that one must stay.
        if rustix::fs::fstat(&self.file).is_ok_and(|stat| stat.st_nlink > 0) {
            let _ = rustix::fs::unlink(&self.path);
        }
    }
}

/// Writes all of `entries` or nothing. A piece of one, left by a disk that was full for a moment, would become the beginning
/// of the next, and that be a root of nothing.
fn append_at(file: &File, at: u64, entries: &[u8]) -> io::Result<()> {
    file.write_all_at(entries, at).inspect_err(|_| {
        // If even that fails, the next entry is written over it.
        let _ = file.set_len(at);
    })
}

/// Opens or makes a file to lock, for its owner only.
pub(crate) fn open_lock(path: &Path) -> Result<File, Error> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)
        .map(File::from)
        .map_err(Error::sys("open the lock file", path))
}

/// What these mutexes guard is whole after every statement, so a panic elsewhere spoils nothing.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::io::BufRead as _;
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::testing::{store, store_path};

    fn roots_file(store: &LocalStore) -> PathBuf {
        store.layout().state_dir.join("temproots").join(std::process::id().to_string())
    }

    #[test]
    fn entries_are_full_paths_ended_by_nul() {
        let (_dir, store) = store();
        let roots = TempRoots::new(&store).unwrap();
        let (a, b) = (store_path("a"), store_path("b"));
        roots.add(&a).unwrap();
        roots.add_all([&a, &b]).unwrap();
        let expected = format!("/nix/store/{a}\0/nix/store/{b}\0");
        assert_eq!(std::fs::read(roots_file(&store)).unwrap(), expected.as_bytes());
    }

    #[test]
    fn what_was_written_in_part_is_taken_back() {
        use rustix::fs::{MemfdFlags, SealFlags};
        // A file that takes no more than a page, as a disk that is full takes a piece of what is written.
        const ROOM: usize = 4096;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create("roots", flags).unwrap());
        file.set_len(ROOM as u64).unwrap();
        rustix::fs::fcntl_add_seals(&file, SealFlags::GROW).unwrap();
        append_at(&file, 0, b"whole\0").unwrap();
        append_at(&file, 6, &[b'x'; ROOM]).unwrap_err();
        let mut left = Vec::new();
        (&file).read_to_end(&mut left).unwrap();
        assert_eq!(left, b"whole\0");
    }

    #[test]
    fn sessions_share_one_locked_file_that_the_last_one_removes() {
        let (_dir, store) = store();
        let first = TempRoots::new(&store).unwrap();
        let second =
            TempRoots::new(&LocalStore::open(store.layout().clone(), crate::Access::ReadWrite).unwrap());
        let second = second.unwrap();
        first.add(&store_path("a")).unwrap();
        second.add(&store_path("b")).unwrap();
        let file = roots_file(&store);
        assert_eq!(std::fs::read(&file).unwrap().iter().filter(|b| **b == 0).count(), 2);
        drop(first);
        let probe = File::open(&file).unwrap();
        assert!(!flock(&probe, FlockOperation::NonBlockingLockExclusive).unwrap());
        drop(second);
        assert!(!file.exists());
    }

    #[test]
    fn a_stale_file_is_replaced() {
        let (_dir, store) = store();
        std::fs::write(roots_file(&store), "/nix/store/old\0").unwrap();
        let roots = TempRoots::new(&store).unwrap();
        roots.add(&store_path("a")).unwrap();
        assert_eq!(
            std::fs::read(roots_file(&store)).unwrap(),
            format!("/nix/store/{}\0", store_path("a")).as_bytes()
        );
    }

    #[test]
    fn a_running_collector_is_told_and_waited_for() {
        let (_dir, store) = store();
        let collector = open_lock(&store.layout().state_dir.join("gc.lock")).unwrap();
        assert!(flock(&collector, FlockOperation::NonBlockingLockExclusive).unwrap());
        let socket = store.layout().gc_socket();
        std::fs::create_dir_all(socket.parent().unwrap()).unwrap();
        let listener = UnixListener::bind(&socket).unwrap();
        let roots = TempRoots::new(&store).unwrap();
        let adder = thread::spawn(move || {
            roots.add(&store_path("a")).unwrap();
            roots.add(&store_path("b")).unwrap();
            roots
        });
        // The first collector dies without an answer: the root must be told to the next one.
        drop(listener.accept().unwrap());
        let (stream, _) = listener.accept().unwrap();
        let mut lines = io::BufReader::new(stream.try_clone().unwrap()).lines();
        for name in ["a", "b"] {
            assert_eq!(lines.next().unwrap().unwrap(), format!("/nix/store/{}", store_path(name)));
            // Written already, for the collector after this one.
            let before = std::fs::read(roots_file(&store)).unwrap();
            assert!(before.ends_with(format!("{}\0", store_path(name)).as_bytes()));
            (&stream).write_all(b"1").unwrap();
        }
        let _roots = adder.join().unwrap();
        let expected = format!("/nix/store/{}\0/nix/store/{}\0", store_path("a"), store_path("b"));
        assert_eq!(std::fs::read(roots_file(&store)).unwrap(), expected.as_bytes());
    }
}
