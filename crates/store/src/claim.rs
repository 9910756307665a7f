//! Imports in two steps: unpack now, register when everything that the path refers to is valid.
//!
//! For whoever fetches many paths at once, in whatever order they arrive. Who holds several claims must have begun with
//! what they refer to: then two who want the same paths cannot wait for each other for ever.

use drover_nix::nar::Stream;
use drover_nix::{PathInfo, StorePath};

use crate::import::Added;
use crate::{Error, LocalStore, PathLock, ValidPath, Wait};

/// The right to make one path valid: it was not when the claim was made, and nobody else can make it so meanwhile. What
/// was unpacked and not registered goes when this is dropped.
#[derive(Debug)]
pub struct Claim {
    store: LocalStore,
    path: StorePath,
    /// In place, not registered.
    unpacked: Option<ValidPath>,
    lock: Option<PathLock>,
}

/// What came of asking for a claim.
#[derive(Debug)]
pub enum Claimed {
    /// There is nothing to make.
    Valid,
    /// Somebody else has the path's lock, and may be making it valid.
    Busy,
    Ours(Box<Claim>),
}

impl LocalStore {
    /// Protects a path from collectors while this store is open, and tries to get its lock. Never waits: whoever has it may be
    /// at a build of days, and who wants the path must be able to go away meanwhile.
    pub fn claim(&self, path: &StorePath) -> Result<Claimed, Error> {
        self.must_write("import archives")?;
        self.own_temp_roots()?.add(path)?;
        let Some(lock) = PathLock::acquire(self, [path], Wait::Try)? else { return Ok(Claimed::Busy) };
        let claim = Claim { store: self.clone(), path: path.clone(), unpacked: None, lock: Some(lock) };
        // Asked under the lock, since whoever had it may have made the path valid.
        Ok(if self.is_valid(path)? { Claimed::Valid } else { Claimed::Ours(Box::new(claim)) })
    }

    /// Makes unpacked paths valid in one transaction. Whatever one refers to must be valid already or be among them; if
    /// one cannot be registered none is, and nothing is left of them. Claims that were not unpacked are dropped.
    pub fn register_claims(&self, mut claims: Vec<Claim>) -> Result<(), Error> {
        let paths: Vec<ValidPath> = claims.iter().filter_map(|claim| claim.unpacked.clone()).collect();
        self.register(&paths)?;
        self.note_imported(&paths);
        for claim in &mut claims {
            claim.unpacked = None;
        }
        Ok(())
    }
}

impl Claim {
    pub fn path(&self) -> &StorePath {
        &self.path
    }

    /// Unpacks the claimed path's archive and compares hash, size and content address with `info`. After a failure nothing
    /// is left of it, and another archive may be tried.
    pub fn unpack(&mut self, info: &PathInfo, nar: &mut dyn Stream) -> Result<(), Error> {
        debug_assert_eq!(info.path, self.path);
        match self.store.unpack_locked(info, nar)? {
            Added::AlreadyValid => {}
            Added::Imported => {
                self.unpacked = Some(ValidPath { info: info.clone(), ultimate: false, registration_time: 0 });
            }
        }
        Ok(())
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.unpacked.is_some() {
            self.store.discard(&self.path);
        }
        if let Some(lock) = self.lock.take() {
            lock.release_deleting();
        }
    }
}

#[cfg(test)]
mod tests {
    use drover_nix::Sha256;

    use super::*;
    use crate::testing::{add, entries, file_nar, info, store, store_path};

    fn claim(store: &LocalStore, path: &StorePath) -> Claim {
        match store.claim(path).unwrap() {
            Claimed::Ours(claim) => *claim,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_arrives_first_waits_for_what_it_refers_to() {
        let (_dir, store) = store();
        let nar = file_nar(b"x");
        let (a, b) = (store_path("a"), store_path("b"));
        let mut low = claim(&store, &a);
        let mut high = claim(&store, &b);
        high.unpack(&info("b", &nar, &[&a]), &mut &nar[..]).unwrap();
        assert!(!store.is_valid(&b).unwrap());
        low.unpack(&info("a", &nar, &[]), &mut &nar[..]).unwrap();
        store.register_claims(vec![high, low]).unwrap();
        assert!(store.is_valid(&a).unwrap() && store.is_valid(&b).unwrap());
        assert_eq!(entries(&store).len(), 2, "no lock file stays");
        assert!(matches!(store.claim(&a).unwrap(), Claimed::Valid));
        assert_eq!(entries(&store).len(), 2);
    }

    #[test]
    fn what_is_not_registered_leaves_nothing() {
        let (_dir, store) = store();
        let nar = file_nar(b"x");
        let dangling = info("b", &nar, &[&store_path("missing")]);
        let mut ours = claim(&store, &dangling.path);
        ours.unpack(&dangling, &mut &nar[..]).unwrap();
        let mut good = claim(&store, &store_path("a"));
        good.unpack(&info("a", &nar, &[]), &mut &nar[..]).unwrap();
        assert!(store.register_claims(vec![good, ours]).is_err());
        assert_eq!(entries(&store), Vec::<String>::new());
        let mut ours = claim(&store, &store_path("a"));
        ours.unpack(&info("a", &nar, &[]), &mut &nar[..]).unwrap();
        drop(ours);
        assert_eq!(entries(&store), Vec::<String>::new());
    }

    #[test]
    fn a_second_archive_may_be_tried() {
        let (_dir, store) = store();
        let nar = file_nar(b"x");
        let good = info("a", &nar, &[]);
        let mut ours = claim(&store, &good.path);
        let wrong = PathInfo { nar_hash: Sha256::of(b"other"), ..good.clone() };
        assert!(matches!(ours.unpack(&wrong, &mut &nar[..]), Err(Error::HashMismatch { .. })));
        ours.unpack(&good, &mut &nar[..]).unwrap();
        store.register_claims(vec![ours]).unwrap();
        assert!(store.is_valid(&good.path).unwrap());
    }

    #[test]
    fn whoever_comes_second_finds_the_path_valid() {
        let (_dir, store) = store();
        let nar = file_nar(b"x");
        let info = info("a", &nar, &[]);
        let mut ours = claim(&store, &info.path);
        assert!(matches!(store.claim(&info.path).unwrap(), Claimed::Busy));
        ours.unpack(&info, &mut &nar[..]).unwrap();
        store.register_claims(vec![ours]).unwrap();
        assert!(matches!(store.claim(&info.path).unwrap(), Claimed::Valid));
        add(&store, "a", &[]);
    }
}
