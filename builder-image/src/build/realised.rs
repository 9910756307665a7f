//! What builds of this process made of derivations whose output paths are not known before: remembered as long as the
//! process lives, since no table of the store is kept of it. Whether a path is still valid is for the caller to ask.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use drover_nix::derivation::aterm;
use drover_nix::hash::Sha256Hasher;
use drover_nix::{BasicDerivation, Derivation, Sha256, StoreDir, StorePath};

use super::targets::Paths;
use crate::error::Error;

/// Derivations that are remembered. All are forgotten when there are more, which costs building them again.
const MAX_REMEMBERED: usize = 50_000;

/// Clones are one.
#[derive(Clone, Default)]
pub(crate) struct Realised {
    made: Arc<Mutex<Made>>,
}

#[derive(Default)]
struct Made {
    by_text: HashMap<Key, Paths>,
    by_file: HashMap<StorePath, Paths>,
}

/// Path and text of a derivation: a client may give any path to any derivation, and shall find its own only.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Key(Sha256);

impl Key {
    pub(crate) fn of(dir: &StoreDir, drv_path: &StorePath, drv: &BasicDerivation) -> Result<Self, Error> {
        let mut hasher = Sha256Hasher::new();
        // A path has no NUL, so that it is clear where the text begins.
        hasher.update(drv_path.as_str().as_bytes());
        hasher.update(b"\0");
        hasher.update(&aterm::print(dir, &Derivation { basic: drv.clone(), input_drvs: [].into() })?);
        Ok(Self(hasher.finish()))
    }
}

impl Realised {
    pub(crate) fn get(&self, key: &Key) -> Option<Paths> {
        self.lock().by_text.get(key).cloned()
    }

    pub(crate) fn insert(&self, key: Key, paths: Paths) {
        insert(&mut self.lock().by_text, key, paths);
    }

    /// The outputs of a `.drv` that is valid in the store, whose name says what is in it.
    pub(crate) fn of_file(&self, drv_path: &StorePath) -> Option<Paths> {
        self.lock().by_file.get(drv_path).cloned()
    }

    /// For what was read from that file only: what a client says of a derivation is not to be found here.
    pub(crate) fn insert_of_file(&self, drv_path: StorePath, paths: Paths) {
        insert(&mut self.lock().by_file, drv_path, paths);
    }

    fn lock(&self) -> MutexGuard<'_, Made> {
        // Whole between any two statements, so a panic elsewhere spoils nothing.
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn insert<K: Eq + Hash>(map: &mut HashMap<K, Paths>, key: K, paths: Paths) {
    if map.len() >= MAX_REMEMBERED {
        map.clear();
    }
    map.insert(key, paths);
}

#[cfg(test)]
mod tests {
    use drover_nix::OutputName;

    use super::*;
    use crate::build::testing::derivation;

    #[test]
    fn only_the_very_same_derivation_is_found() {
        let dir = StoreDir::default();
        let path: StorePath = "i00sflxqsj37lfmf95m8mn0grv615hpj-x.drv".parse().unwrap();
        let other: StorePath = "q4mzjdlh5px6977h7v5fdsk1p33yg583-x.drv".parse().unwrap();
        let made: Paths = [(OutputName::out(), "i00sflxqsj37lfmf95m8mn0grv615hpj-x".parse().unwrap())].into();
        let realised = Realised::default();
        let key = |path, env| Key::of(&dir, path, &derivation(env)).unwrap();
        realised.insert(key(&path, &[]), made.clone());
        assert_eq!(realised.get(&key(&path, &[])), Some(made));
        assert_eq!(realised.get(&key(&other, &[])), None);
        assert_eq!(realised.get(&key(&path, &[("a", "b")])), None);
    }
}
