//! Finding references: which of a set of store paths occur in a stream, by their hash parts (Nix: references.cc).

use std::collections::BTreeSet;

use crate::StorePath;

/// Feed it a NAR's bytes, in pieces of any size.
pub struct RefScanner {}

impl RefScanner {
    /// Looks for the hash parts of `candidates`.
    pub fn new(_candidates: impl IntoIterator<Item = StorePath>) -> Self {
        todo!()
    }

    pub fn feed(&mut self, _bytes: &[u8]) {
        todo!()
    }

    /// The candidates that occurred.
    pub fn found(self) -> BTreeSet<StorePath> {
        todo!()
    }
}
