//! What a store or a cache knows about a valid path.

use std::collections::BTreeSet;

use crate::signature::Signature;
use crate::{ContentAddress, Sha256, StoreDir, StorePath};

/// Metadata of one store object (Nix: path-info.hh). Registration time and `ultimate` belong to a store's database.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PathInfo {
    pub path: StorePath,
    pub nar_hash: Sha256,
    /// Bytes of the NAR, never 0.
    pub nar_size: u64,
    /// Includes the path itself if it refers to itself.
    pub references: BTreeSet<StorePath>,
    pub deriver: Option<StorePath>,
    pub signatures: Vec<Signature>,
    pub ca: Option<ContentAddress>,
}

impl PathInfo {
    /// The text that signatures sign (Nix: path-info.cc, fingerprint).
    pub fn fingerprint(&self, dir: &StoreDir) -> String {
        let references: Vec<String> = self.references.iter().map(|path| dir.full(path)).collect();
        format!("1;{};{};{};{}", dir.full(&self.path), self.nar_hash, self.nar_size, references.join(","))
    }

    /// References other than to itself.
    pub fn other_references(&self) -> impl Iterator<Item = &StorePath> {
        self.references.iter().filter(|path| **path != self.path)
    }
}
