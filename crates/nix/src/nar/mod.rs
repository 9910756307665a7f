//! NAR archives (Nix: archive.cc): a pull parser and a writer, both streaming, both strict.
//!
//! Nothing here allocates by what a peer says: names and targets are bounded, file contents are handed on piece by
//! piece. What is accepted is canonical, so that writing it again gives the same bytes.

mod reader;
mod writer;

pub use reader::{Event, Reader};
pub use writer::Writer;

/// First token of every archive.
pub const MAGIC: &str = "nix-archive-1";
/// Longest name of a directory entry, in bytes.
pub const MAX_NAME_LEN: usize = 255;
/// Longest symlink target, in bytes.
pub const MAX_TARGET_LEN: usize = 4095;
/// Deepest nesting of nodes. Nix refuses deeper ones since 2.34.7.
pub const MAX_DEPTH: usize = 64;
