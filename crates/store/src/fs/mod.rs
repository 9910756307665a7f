//! Store objects as files: dumping and restoring NARs, canonical metadata, deleting trees.
//!
//! Trees may be hostile: made by a builder or by an archive. So everything goes by directory descriptors, never
//! through a symlink, and never deeper than a NAR may nest (but for deleting, which copes with any depth).

use std::collections::HashSet;
use std::io::{Read, Write};
use std::ops::RangeInclusive;
use std::path::Path;

use drover_nix::Sha256;

use crate::Error;

/// Writes the NAR of the file, directory or symlink at `path`. Returns the archive's size.
pub fn dump(_path: &Path, _output: &mut dyn Write) -> Result<u64, Error> {
    todo!()
}

/// What [`restore`] read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Restored {
    pub nar_hash: Sha256,
    pub nar_size: u64,
}

/// Unpacks a NAR to `destination`, which must not exist, with canonical metadata. Reads not one byte beyond the
/// archive's end. On failure what was unpacked so far stays: see [`delete`].
pub fn restore(_nar: &mut dyn Read, _destination: &Path) -> Result<Restored, Error> {
    todo!()
}

/// Files that were canonicalised already, by device and inode: shared by all outputs of one build, so that hard links
/// between them are told from links to files of others.
pub type SeenInodes = HashSet<(u64, u64)>;

/// Gives a builder's output the metadata that store objects have: modes 0444 and 0555, mtime 1, no extended
/// attributes, owned by us. `uids`: who may own the files (else they are refused); None accepts all.
pub fn canonicalise(
    _path: &Path,
    _uids: Option<RangeInclusive<u32>>,
    _seen: &mut SeenInodes,
) -> Result<(), Error> {
    todo!()
}

/// Deletes the tree at `path`, whatever its modes and depth, if it is there. Returns the bytes of disk that became
/// free (hard links elsewhere keep theirs).
pub fn delete(_path: &Path) -> Result<u64, Error> {
    todo!()
}
