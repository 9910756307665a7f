//! Importing many small archives at once, registered in one transaction.
//!
//! By one thread: locks and objects are all made in the store's own directory, and several threads would take turns there
//! at a higher price (measured: the same time with two of them, for half as much again of the processor's).

use std::collections::HashMap;
use std::io::Read as _;

use drover_nix::nar::Stream;
use drover_nix::{PathInfo, StorePath};

use crate::import::Added;
use crate::{Error, LocalStore, PathLock, TempRoots, ValidPath, Wait};

/// Largest archive that is kept in memory until its batch is committed, in bytes.
const MAX_NAR: u64 = 64 << 10;

/// Imports whose paths become valid together. Paths may refer to earlier ones of the same batch. Small archives are
/// kept in memory, and nothing at all happens to the store, until [`Batch::commit`]; dropping it instead leaves no
/// trace. How many there may be is the caller's to limit.
#[derive(Debug)]
pub struct Batch {
    store: LocalStore,
    roots: TempRoots,
    paths: Vec<ValidPath>,
    /// Of each path.
    nars: Vec<Vec<u8>>,
    /// How many of all additions are in effect: their paths are valid.
    in_effect: usize,
    /// A commit failed, so that some path that was added is not there.
    broken: bool,
}

/// What became of a path that was to be unpacked.
enum Staged {
    /// In place, not registered.
    Unpacked(PathLock),
    AlreadyValid,
    /// Someone else has the path's lock, or something is wrong. Nothing is in place.
    NotYet,
}

impl LocalStore {
    /// An empty batch. It protects its paths from collectors while this store is open.
    pub fn batch(&self) -> Result<Batch, Error> {
        self.must_write("import archives")?;
        Ok(Batch {
            store: self.clone(),
            roots: self.own_temp_roots()?.clone(),
            paths: Vec::new(),
            nars: Vec::new(),
            in_effect: 0,
            broken: false,
        })
    }
}

impl Batch {
    /// As [`LocalStore::add_nar`], but what is wrong with a small archive is known, and its path valid, only after
    /// [`Batch::commit`]. A large one is imported at once, after all that came before it.
    pub fn add_nar(
        &mut self,
        info: &PathInfo,
        ultimate: bool,
        registration_time: u64,
        nar: &mut dyn Stream,
    ) -> Result<(), Error> {
        if self.broken {
            return Err(Error::BrokenBatch);
        }
        if info.nar_size > MAX_NAR {
            self.commit()?;
            self.store.add_stream(info, ultimate, registration_time, nar)?;
            self.in_effect += 1;
            return Ok(());
        }
        // A stream that is too short is found to be one when it is unpacked.
        let mut bytes = Vec::with_capacity(usize::try_from(info.nar_size).unwrap_or_default());
        nar.take(info.nar_size).read_to_end(&mut bytes).map_err(|source| Error::Archive {
            act: "receive",
            source: drover_nix::Error::NarIo { act: "read", source },
        })?;
        self.paths.push(ValidPath { info: info.clone(), ultimate, registration_time });
        self.nars.push(bytes);
        Ok(())
    }

    /// How many paths wait to become valid.
    pub fn len(&self) -> usize {
        self.paths.len()
    }

    pub fn is_empty(&self) -> bool {
        self.paths.is_empty()
    }

    /// How many additions since the batch was made are in effect, the first ones: their paths are valid.
    pub fn in_effect(&self) -> usize {
        self.in_effect
    }

    /// Makes all paths valid, as if each had been added alone and in order, up to the first for which that fails. After
    /// a failure every further commit fails.
    pub fn commit(&mut self) -> Result<(), Error> {
        if self.broken {
            return Err(Error::BrokenBatch);
        }
        let (paths, nars) = (std::mem::take(&mut self.paths), std::mem::take(&mut self.nars));
        let done = if paths.len() > 1 { self.together(&paths, &nars) } else { Ok(0) };
        let result = done.and_then(|done| {
            self.in_effect += done;
            self.one_by_one(&paths[done..], &nars[done..])
        });
        self.broken = result.is_err();
        result
    }

    fn one_by_one(&mut self, paths: &[ValidPath], nars: &[Vec<u8>]) -> Result<(), Error> {
        paths.iter().zip(nars).try_for_each(|(path, nar)| {
            let (info, mut nar) = (&path.info, &nar[..]);
            self.store.add_nar(info, path.ultimate, path.registration_time, &mut nar)?;
            self.in_effect += 1;
            Ok(())
        })
    }

    /// Makes paths valid together, as far as that goes without waiting for others and without a mistake. Returns how
    /// many; nothing is left of the rest.
    fn together(&self, paths: &[ValidPath], nars: &[Vec<u8>]) -> Result<usize, Error> {
        self.roots.add_all(paths.iter().map(|path| &path.info.path))?;
        let paths = &paths[..in_order(paths)];
        let mut fresh = Vec::with_capacity(paths.len());
        let mut locks = Vec::with_capacity(paths.len());
        let mut done = 0;
        for (path, nar) in paths.iter().zip(nars) {
            match self.stage(&path.info, nar) {
                Staged::Unpacked(lock) => {
                    fresh.push(path.clone());
                    locks.push(lock);
                }
                Staged::AlreadyValid => {}
                Staged::NotYet => break,
            }
            done += 1;
        }
        if !fresh.is_empty() && self.store.register(&fresh).is_err() {
            // One by one it will be seen which is wrong, and why.
            fresh.iter().for_each(|path| self.store.discard(&path.info.path));
            done = 0;
            fresh.clear();
        }
        self.store.note_imported(&fresh);
        locks.into_iter().for_each(PathLock::release_deleting);
        Ok(done)
    }

    /// Unpacks and verifies one archive, if nobody else is at work on its path. What is wrong is told by the second
    /// attempt, which is made in order.
    fn stage(&self, info: &PathInfo, mut nar: &[u8]) -> Staged {
        let Ok(Some(lock)) = PathLock::acquire(&self.store, [&info.path], Wait::Try) else {
            return Staged::NotYet;
        };
        match self.store.unpack_locked(info, &mut nar) {
            Ok(Added::Imported) => Staged::Unpacked(lock),
            other => {
                lock.release_deleting();
                if other.is_ok() { Staged::AlreadyValid } else { Staged::NotYet }
            }
        }
    }
}

/// How many paths there are before the first that refers to a later one: alone, that one would be refused, and whether it
/// is must not depend on what happened to arrive with it.
fn in_order(paths: &[ValidPath]) -> usize {
    let first: HashMap<&StorePath, usize> =
        paths.iter().enumerate().rev().map(|(i, path)| (&path.info.path, i)).collect();
    let is_later = |i: usize, path: &StorePath| first.get(path).is_some_and(|later| *later > i);
    let ahead = |(i, path): (usize, &ValidPath)| path.info.other_references().any(|other| is_later(i, other));
    paths.iter().enumerate().position(ahead).unwrap_or(paths.len())
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::testing::{entries, file_nar, info, store, store_path};

    #[test]
    fn a_batch_becomes_valid_at_once() {
        let (_dir, store) = store();
        let mut batch = store.batch().unwrap();
        let mut before: Option<StorePath> = None;
        let mut all = Vec::new();
        // Each path with a reference to the one before it, one of them there already.
        for i in 0..40 {
            let nar = file_nar(format!("contents {i}").as_bytes());
            let references: Vec<&StorePath> = before.iter().collect();
            let info = info(&format!("p{i}"), &nar, &references);
            if i == 0 {
                store.add_nar(&info, false, 1000, &mut &nar[..]).unwrap();
            }
            batch.add_nar(&info, false, 0, &mut &nar[..]).unwrap();
            before = Some(info.path.clone());
            all.push((info, nar));
        }
        assert_eq!((batch.len(), entries(&store).len()), (all.len(), 1));
        batch.commit().unwrap();
        assert!(batch.is_empty());
        for (info, nar) in &all {
            assert_eq!(store.path_info(&info.path).unwrap().unwrap(), *info);
            let mut again = Vec::new();
            store.dump(&info.path, &mut again).unwrap();
            assert_eq!(again, *nar);
        }
        assert_eq!(store.registration(&all[0].0.path).unwrap().unwrap().registration_time, 1000);
        // No lock file stays.
        assert_eq!(entries(&store).len(), all.len());
    }

    #[test]
    fn what_comes_before_a_mistake_is_valid_and_nothing_else() {
        let nar = file_nar(b"x");
        let dangling = info("wrong", &nar, &[&store_path("missing")]);
        let forged = PathInfo { nar_hash: drover_nix::Sha256::of(b"other"), ..info("wrong", &nar, &[]) };
        for (wrong, given) in [(&dangling, &nar[..]), (&forged, &nar[..]), (&info("wrong", &nar, &[]), b"")] {
            let (_dir, store) = store();
            let mut batch = store.batch().unwrap();
            for i in 0..40 {
                match i {
                    20 => batch.add_nar(wrong, false, 0, &mut &*given).unwrap(),
                    _ => batch.add_nar(&info(&format!("p{i}"), &nar, &[]), false, 0, &mut &nar[..]).unwrap(),
                }
            }
            let error = batch.commit().unwrap_err();
            assert!(error.to_string().contains("wrong"), "{error}");
            let valid = store.all_valid_paths().unwrap();
            assert_eq!(valid, (0..20).map(|i| store_path(&format!("p{i}"))).collect());
            assert_eq!(entries(&store).len(), 20);
            assert_eq!(batch.in_effect(), 20);
            // Whoever answers for what was added must not answer for what is gone.
            assert!(matches!(batch.commit(), Err(Error::BrokenBatch)));
            assert!(batch.add_nar(&info("p1", &nar, &[]), false, 0, &mut &nar[..]).is_err());
        }
    }

    #[test]
    fn what_refers_to_a_later_path_is_refused_as_it_would_be_alone() {
        let (_dir, store) = store();
        let nar = file_nar(b"x");
        let mut batch = store.batch().unwrap();
        for (name, reference) in [("a", "a"), ("b", "c"), ("c", "a")] {
            let info = info(name, &nar, &[&store_path(reference)]);
            batch.add_nar(&info, false, 0, &mut &nar[..]).unwrap();
        }
        assert!(batch.commit().is_err());
        assert_eq!(store.all_valid_paths().unwrap(), [store_path("a")].into());
        assert_eq!(entries(&store).len(), 1);
    }

    #[test]
    fn without_a_commit_nothing_happens() {
        let (_dir, store) = store();
        let nar = file_nar(b"x");
        let mut batch = store.batch().unwrap();
        batch.add_nar(&info("a", &nar, &[]), false, 0, &mut &nar[..]).unwrap();
        drop(batch);
        assert_eq!(entries(&store), Vec::<String>::new());
    }

    #[test]
    fn a_path_that_someone_else_locked_is_waited_for_after_the_others() {
        let (_dir, store) = store();
        let nar = file_nar(b"x");
        let lock = PathLock::acquire(&store, [&store_path("p1")], Wait::Try).unwrap().unwrap();
        let mut batch = store.batch().unwrap();
        for i in 0..3 {
            batch.add_nar(&info(&format!("p{i}"), &nar, &[]), false, 0, &mut &nar[..]).unwrap();
        }
        thread::scope(|scope| {
            let committer = scope.spawn(|| batch.commit());
            // The one before it does not wait, and nothing of the others is held meanwhile.
            while !store.is_valid(&store_path("p0")).unwrap() {
                thread::yield_now();
            }
            let other = PathLock::acquire(&store, [&store_path("p2")], Wait::Block).unwrap();
            drop(other);
            lock.release_deleting();
            committer.join().unwrap().unwrap();
        });
        assert_eq!(store.all_valid_paths().unwrap().len(), 3);
    }

    #[test]
    fn two_batches_over_the_same_paths_do_not_wait_for_each_other_for_ever() {
        let (_dir, store) = store();
        let names: Vec<String> = (0..50).map(|i| format!("p{i}")).collect();
        let nar = file_nar(b"x");
        let run = |names: Vec<&String>| {
            let mut batch = store.batch().unwrap();
            for name in names {
                batch.add_nar(&info(name, &nar, &[]), false, 0, &mut &nar[..]).unwrap();
            }
            batch.commit().unwrap();
        };
        thread::scope(|scope| {
            scope.spawn(|| run(names.iter().collect()));
            scope.spawn(|| run(names.iter().rev().collect()));
        });
        assert_eq!(store.all_valid_paths().unwrap().len(), names.len());
        assert_eq!(entries(&store).len(), names.len());
    }
}
