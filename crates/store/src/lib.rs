//! Nix's local store on disk, as Nix itself keeps it: layout, SQLite database, locks, roots and file metadata, so that
//! real Nix can read, verify, collect and share what is written here.
//!
//! This crate owns everything below a store's directories and the protocols between the processes that share them. It
//! may not touch the network or an async runtime, starts no processes, and knows nothing of builds or of who asks.
//! All of it is synchronous; NARs stream through it and are never held in memory.
//!
//! In the order of its story: where a store lies ([`StoreUri`], [`StoreLayout`]), its objects as files ([`fs`]), who may
//! touch them when ([`PathLock`], [`TempRoots`]), and the store itself ([`LocalStore`]). [`in_parallel`] is for whoever
//! works on it with several threads.

mod batch;
mod claim;
mod content;
mod db;
mod derivations;
mod error;
pub mod fs;
mod gc;
mod import;
mod layout;
mod local;
mod open;
mod path_lock;
mod socket;
mod temp_dir;
mod temp_roots;
#[cfg(test)]
mod testing;
mod threads;
mod verify;

pub use batch::Batch;
pub use claim::{Claim, Claimed};
pub use error::Error;
pub use gc::{GcOptions, GcReport};
pub use import::Added;
pub use layout::{StoreLayout, StoreUri};
pub use local::{Access, LocalStore, ValidPath};
pub use path_lock::{PathLock, Wait};
pub use temp_dir::TempDir;
pub use temp_roots::TempRoots;
pub use threads::in_parallel;
pub use verify::VerifyReport;
