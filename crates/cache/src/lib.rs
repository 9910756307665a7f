//! Binary caches and local stores behind one trait: where inputs come from and where outputs go.
//!
//! This crate owns how caches are reached and laid out. It is synchronous and streaming: it never has a whole NAR in
//! memory, and it believes nothing about a NAR before [`VerifiedNar`] has seen its last byte. It may not decide which
//! paths are needed, nor talk to builders.

mod error;
mod spool;
mod verified;

use std::io::Read;

use drover_nix::{NarInfo, PathInfo, StorePath};

pub use error::Error;
pub use spool::{NarSpool, SpooledNar};
pub use verified::VerifiedNar;

/// A place that has store paths. One handle serves many threads.
pub trait Cache: Send + Sync {
    /// For messages: what the user wrote, without secrets.
    fn url(&self) -> String;

    /// What the cache says about a path; None if it does not have it. Checked against the keys that the cache was
    /// opened with.
    fn narinfo(&self, path: &StorePath) -> Result<Option<NarInfo>, Error>;

    /// The NAR, decompressed but not verified: wrap it in a [`VerifiedNar`].
    fn nar(&self, narinfo: &NarInfo) -> Result<Box<dyn Read + Send>, Error>;

    /// Stores a path: its NAR first, its narinfo last. Does nothing if the cache has the path.
    fn put(&self, info: &PathInfo, nar: &SpooledNar) -> Result<(), Error>;

    /// Stores a build's log where `nix log` finds it.
    fn put_log(&self, drv_path: &StorePath, log: &mut dyn Read) -> Result<(), Error>;
}
