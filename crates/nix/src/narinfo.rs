//! narinfo files: what a binary cache says about a path (Nix: nar-info.cc).

use crate::{Error, PathInfo, Sha256, StoreDir};

/// Most bytes of a narinfo file that are read.
pub const MAX_LEN: usize = 1 << 20;

/// How a cache stores a NAR. Names as in the `Compression` line; others are refused when they are fetched.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Compression {
    Bzip2,
    Gzip,
    None,
    Xz,
    Zstd,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NarInfo {
    pub info: PathInfo,
    /// Relative to the cache's root, or absolute.
    pub url: String,
    pub compression: Compression,
    pub file_hash: Option<Sha256>,
    pub file_size: Option<u64>,
}

impl NarInfo {
    pub fn parse(_dir: &StoreDir, _text: &[u8]) -> Result<Self, Error> {
        todo!()
    }

    /// The file as Nix writes it, to the byte.
    pub fn print(&self, _dir: &StoreDir) -> String {
        todo!()
    }
}
