//! Importing archives and registering paths (Nix: local-store.cc, addToStore and registerValidPaths).

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::io::Read;

use drover_nix::nar::{Plain, Stream};
use drover_nix::{PathInfo, StorePath};
use rustix::fs::AtFlags;
use rustix::io::Errno;

use crate::db::DrvOutputs;
use crate::fs::Destination;
use crate::{Error, LocalStore, PathLock, ValidPath, Wait, content, fs};

/// What [`LocalStore::add_nar`] did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Added {
    /// The path was valid already; nothing was read from the archive.
    AlreadyValid,
    Imported,
}

impl LocalStore {
    /// Imports an archive: protects the path from collectors while this store is open, locks it, unpacks and hashes,
    /// compares hash, size and content address with `info`, and registers it. Reads `info.nar_size` bytes at most. On
    /// failure nothing is left on disk. Signatures are kept but not checked. Waits for whoever has the path's lock.
    ///
    /// `registration_time` is Unix seconds, 0 for now.
    pub fn add_nar(
        &self,
        info: &PathInfo,
        ultimate: bool,
        registration_time: u64,
        nar: &mut dyn Read,
    ) -> Result<Added, Error> {
        self.add_stream(info, ultimate, registration_time, &mut Plain(nar))
    }

    /// [`Self::add_nar`] of a stream that large files may be moved from.
    pub fn add_stream(
        &self,
        info: &PathInfo,
        ultimate: bool,
        registration_time: u64,
        nar: &mut dyn Stream,
    ) -> Result<Added, Error> {
        self.must_write("import archives")?;
        self.own_temp_roots()?.add(&info.path)?;
        // Never None: who blocks gets the lock.
        let Some(lock) = PathLock::acquire(self, [&info.path], Wait::Block)? else {
            return Ok(Added::AlreadyValid);
        };
        let path = ValidPath { info: info.clone(), ultimate, registration_time };
        let added = match self.unpack_locked(info, nar) {
            Ok(Added::Imported) => match self.register(std::slice::from_ref(&path)) {
                Ok(()) => {
                    self.note_imported(std::slice::from_ref(&path));
                    Ok(Added::Imported)
                }
                Err(error) => {
                    self.discard(&info.path);
                    Err(error)
                }
            },
            other => other,
        };
        lock.release_deleting();
        added
    }

    /// Unpacks the archive of a path that the caller has protected and locked, unless the path is valid. It is not
    /// registered yet. On failure nothing is left on disk.
    pub(crate) fn unpack_locked(&self, info: &PathInfo, nar: &mut dyn Stream) -> Result<Added, Error> {
        // Asked under the lock, since whoever had it may have made the path valid.
        if self.is_there_and_valid(&info.path)? {
            return Ok(Added::AlreadyValid);
        }
        content::check_address(self.store_dir(), info)?;
        let unpacked = self.unpack(info, nar);
        if unpacked.is_err() {
            self.discard(&info.path);
        }
        unpacked.map(|()| Added::Imported)
    }

    /// Deletes an object that is not valid. What cannot be deleted now is replaced by the next import.
    pub(crate) fn discard(&self, path: &StorePath) {
        let _ = fs::delete(&self.real_path(path));
    }

    /// Registers paths whose objects are in place, in one transaction. Whatever one refers to must be valid already
    /// or be among them, they may not refer to each other in a circle, content addresses must lead to their paths, and
    /// a `.drv` must be a derivation whose outputs are its own. What is valid already gets the new hash, size,
    /// `ultimate`, signatures and content address, but keeps its deriver and time.
    pub fn register(&self, paths: &[ValidPath]) -> Result<(), Error> {
        self.must_write("register paths")?;
        for path in paths {
            content::check_address(self.store_dir(), &path.info)?;
        }
        refuse_cycles(paths)?;
        let together: HashSet<&StorePath> = paths.iter().map(|path| &path.info.path).collect();
        let mut outputs = DrvOutputs::new();
        for path in paths.iter().filter(|path| path.info.path.is_derivation()) {
            outputs.insert(path.info.path.clone(), self.verify_derivation(&path.info.path, &together)?);
        }
        self.database().register(paths, &outputs)
    }

    /// Whether the path is valid and its object is in place, which costs next to nothing where nothing is in its place.
    /// Objects are put in place before they are registered, and deleted after.
    fn is_there_and_valid(&self, path: &StorePath) -> Result<bool, Error> {
        match rustix::fs::statat(self.directory()?, path.as_str(), AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => Ok(false),
            Err(errno) => Err(Error::sys("examine", self.real_path(path))(errno)),
            Ok(_) => self.is_valid(path),
        }
    }

    fn unpack(&self, info: &PathInfo, nar: &mut dyn Stream) -> Result<(), Error> {
        let path = self.real_path(&info.path);
        let to = Destination {
            directory: self.directory()?,
            name: OsStr::new(info.path.as_str()),
            path: &path,
            // Left behind by someone who died.
            replace: true,
            modes_hold: self.modes_hold(),
        };
        let restored = fs::restore_exactly(nar, info.nar_size, &to).map_err(|error| match error {
            Error::Archive { source, .. } => Error::Nar { path: info.path.clone(), source },
            other => other,
        })?;
        if restored.nar_size != info.nar_size {
            let (expected, actual) = (info.nar_size, restored.nar_size);
            return Err(Error::SizeMismatch { path: info.path.clone(), expected, actual });
        }
        if restored.nar_hash != info.nar_hash {
            let (expected, actual) = (info.nar_hash, restored.nar_hash);
            return Err(Error::HashMismatch { path: info.path.clone(), expected, actual });
        }
        content::check_content(info, &path)
    }
}

/// A path may refer to itself, but no two to each other.
fn refuse_cycles(paths: &[ValidPath]) -> Result<(), Error> {
    #[derive(Clone, Copy, PartialEq)]
    enum Mark {
        Open,
        Done,
    }
    if paths.len() < 2 {
        return Ok(());
    }
    let by_path: HashMap<&StorePath, &PathInfo> =
        paths.iter().map(|path| (&path.info.path, &path.info)).collect();
    let mut marks: HashMap<&StorePath, Mark> = HashMap::with_capacity(paths.len());
    for path in paths {
        if marks.contains_key(&path.info.path) {
            continue;
        }
        // Depth first, without recursion: what a peer sends may be one long chain.
        marks.insert(&path.info.path, Mark::Open);
        let mut stack = vec![(&path.info.path, path.info.other_references())];
        while let Some((from, references)) = stack.last_mut() {
            let from = *from;
            match references.next() {
                None => {
                    marks.insert(from, Mark::Done);
                    stack.pop();
                }
                Some(to) => {
                    let Some(info) = by_path.get(to) else { continue };
                    match marks.get(to) {
                        Some(Mark::Done) => {}
                        Some(Mark::Open) => {
                            return Err(Error::Cycle { path: to.clone(), via: from.clone() });
                        }
                        None => {
                            marks.insert(to, Mark::Open);
                            stack.push((to, info.other_references()));
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use drover_nix::{ContentAddress, Method, Sha256};

    use super::*;
    use crate::testing::{add, entries, file_nar, info, store, store_path};

    #[test]
    fn what_is_imported_is_valid_and_as_it_was_said() {
        let (_dir, store) = store();
        let a = add(&store, "a", &[]);
        let nar = file_nar(b"b");
        let mut info = info("b", &nar, &[&a, &store_path("b")]);
        info.deriver = Some(store_path("x.drv"));
        let mut stream = &[&nar[..], b"rest"].concat()[..];
        assert_eq!(store.add_nar(&info, true, 1234, &mut stream).unwrap(), Added::Imported);
        assert_eq!(stream, b"rest");
        let found = store.registration(&info.path).unwrap().unwrap();
        assert_eq!(found.info, info);
        assert!(found.ultimate);
        assert_eq!(found.registration_time, 1234);
        let mut again = Vec::new();
        store.dump(&info.path, &mut again).unwrap();
        assert_eq!(again, nar);
        // No lock file stays.
        assert_eq!(entries(&store).len(), 2);
        let mut stream = &b"untouched"[..];
        assert_eq!(store.add_nar(&info, true, 1, &mut stream).unwrap(), Added::AlreadyValid);
        assert_eq!(stream, b"untouched");
    }

    #[test]
    fn columns_are_written_as_nix_writes_them() {
        let (_dir, store) = store();
        let a = add(&store, "a", &[]);
        let database = store.layout().state_dir.join("db/db.sqlite");
        let connection = rusqlite::Connection::open(database).unwrap();
        let row: String = connection
            .query_row(
                "SELECT concat_ws(' ', path, hash, typeof(deriver), narSize, typeof(ultimate), typeof(sigs), typeof(ca))
                 FROM ValidPaths",
                [],
                |row| row.get(0),
            )
            .unwrap();
        let nar = file_nar(b"a");
        let hash = Sha256::of(&nar).to_hex();
        assert_eq!(row, format!("/nix/store/{a} sha256:{hash} null {} null null null", nar.len()));
        let time: i64 =
            connection.query_row("SELECT registrationTime FROM ValidPaths", [], |row| row.get(0)).unwrap();
        assert!(time > 1_500_000_000, "{time}");
    }

    #[test]
    fn whatever_is_wrong_leaves_nothing_behind() {
        let (_dir, store) = store();
        let nar = file_nar(b"content");
        let good = info("p", &nar, &[]);
        let refused = |info: &PathInfo, nar: &[u8]| {
            let error = store.add_nar(info, false, 0, &mut &nar[..]).unwrap_err();
            assert_eq!(entries(&store), Vec::<String>::new(), "{error}");
            assert!(!store.is_valid(&info.path).unwrap());
            error
        };
        let hash = PathInfo { nar_hash: Sha256::of(b"other"), ..good.clone() };
        assert!(matches!(refused(&hash, &nar), Error::HashMismatch { .. }));
        let larger = PathInfo { nar_size: good.nar_size + 8, ..good.clone() };
        assert!(matches!(refused(&larger, &[&nar[..], &[0; 8]].concat()), Error::SizeMismatch { .. }));
        let smaller = PathInfo { nar_size: good.nar_size - 8, ..good.clone() };
        assert!(matches!(refused(&smaller, &nar), Error::Nar { .. }));
        assert!(matches!(refused(&good, &nar[..nar.len() - 1]), Error::Nar { .. }));
        assert!(matches!(
            refused(&good, b"not a nar at all, not even nearly, but long enough to be read"),
            Error::Nar { .. }
        ));
        let dangling = info("p", &nar, &[&store_path("missing")]);
        assert!(matches!(refused(&dangling, &nar), Error::ReferenceNotValid { .. }));
        let ca = ContentAddress { method: Method::Nar, hash: good.nar_hash.into() };
        let misplaced = PathInfo { ca: Some(ca), ..good.clone() };
        assert!(matches!(refused(&misplaced, &nar), Error::ContentAddress { .. }));
        store.add_nar(&good, false, 0, &mut &nar[..]).unwrap();
    }

    #[test]
    fn leftovers_are_replaced() {
        let (_dir, store) = store();
        let path = store_path("a");
        std::fs::create_dir_all(store.real_path(&path).join("half")).unwrap();
        add(&store, "a", &[]);
        assert!(store.real_path(&path).is_file());
    }

    #[test]
    fn many_threads_import_the_same_path_once() {
        let (_dir, store) = store();
        let nar = file_nar(&vec![7; 300_000]);
        let info = info("p", &nar, &[]);
        let barrier = Barrier::new(8);
        let imported = std::thread::scope(|scope| {
            let import = || {
                barrier.wait();
                store.add_nar(&info, false, 0, &mut &nar[..]).unwrap()
            };
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(import)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).filter(|a| *a == Added::Imported).count()
        });
        assert_eq!(imported, 1);
        assert_eq!(entries(&store).len(), 1);
    }

    #[test]
    fn a_set_is_registered_whole_or_not_at_all() {
        let (_dir, store) = store();
        let valid = |name: &str, references: &[&StorePath]| {
            let nar = file_nar(name.as_bytes());
            std::fs::write(store.real_path(&store_path(name)), name).unwrap();
            ValidPath { info: info(name, &nar, references), ultimate: true, registration_time: 0 }
        };
        let (a, b, c) = (store_path("a"), store_path("b"), store_path("c"));
        // Forward references and one to itself are fine.
        store.register(&[valid("b", &[&a, &b]), valid("a", &[])]).unwrap();
        assert!(store.is_valid(&a).unwrap() && store.is_valid(&b).unwrap());
        let circle = [valid("c", &[&store_path("d")]), valid("d", &[&store_path("e")]), valid("e", &[&c])];
        assert!(matches!(store.register(&circle), Err(Error::Cycle { .. })));
        let dangling = [valid("c", &[]), valid("d", &[&store_path("missing")])];
        assert!(matches!(store.register(&dangling), Err(Error::ReferenceNotValid { .. })));
        assert!(!store.is_valid(&c).unwrap());
        // A chain as long as one likes.
        let names: Vec<String> = (0..20_000).map(|i| format!("n{i}")).collect();
        let paths: Vec<StorePath> = names.iter().map(|name| store_path(name)).collect();
        let chain: Vec<ValidPath> = (0..names.len())
            .map(|i| {
                let next: Vec<&StorePath> = paths.get(i + 1).into_iter().collect();
                ValidPath { info: info(&names[i], b"x", &next), ultimate: false, registration_time: 0 }
            })
            .collect();
        store.register(&chain).unwrap();
        assert_eq!(store.closure(&[paths[0].clone()].into()).unwrap().len(), names.len());
    }

    #[test]
    fn registering_again_updates_all_but_deriver_and_time() {
        let (_dir, store) = store();
        let nar = file_nar(b"a");
        let mut path = ValidPath { info: info("a", &nar, &[]), ultimate: false, registration_time: 100 };
        path.info.deriver = Some(store_path("first.drv"));
        store.register(&[path.clone()]).unwrap();
        let mut second = path.clone();
        second.ultimate = true;
        second.registration_time = 200;
        second.info.deriver = Some(store_path("second.drv"));
        second.info.nar_hash = Sha256::of(b"new");
        store.register(&[second.clone()]).unwrap();
        let found = store.registration(&path.info.path).unwrap().unwrap();
        assert_eq!(found.info.nar_hash, second.info.nar_hash);
        assert!(found.ultimate);
        assert_eq!((found.registration_time, found.info.deriver), (100, path.info.deriver));
    }
}
