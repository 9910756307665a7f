//! NAR archives (Nix: archive.cc): a pull parser and a writer, both streaming, both strict.
//!
//! Nothing here allocates by what a peer says: names and targets are bounded, file contents are handed on piece by
//! piece. What is accepted is canonical, so that writing it again gives the same bytes.
//!
//! The grammar, each token a string (length as 8 bytes little-endian, bytes, zeros up to a multiple of 8):
//! `nix-archive-1` node, where node is `(` `type` and one of
//! `regular` \[`executable` ``\] `contents` BYTES `)`, `symlink` `target` TARGET `)`, or
//! `directory` {`entry` `(` `name` NAME `node` node `)`} `)`.

mod copy;
mod reader;
mod stream;
#[cfg(test)]
mod tests;
mod writer;

pub use copy::copy;
pub use reader::{Event, Reader};
pub use stream::{Plain, Stream};
pub use writer::Writer;

/// First token of every archive.
pub const MAGIC: &str = "nix-archive-1";
/// Longest name of a directory entry, in bytes.
pub const MAX_NAME_LEN: usize = 255;
/// Longest symlink target, in bytes.
pub const MAX_TARGET_LEN: usize = 4095;
/// Deepest nesting of nodes, the archive's root being the first. Nix refuses deeper ones since 2.34.7.
pub const MAX_DEPTH: usize = 64;

/// Bytes of contents that are moved at a time: a pipe's capacity, and well within a core's cache.
const CHUNK: usize = 64 << 10;

/// Every fixed token as it stands in an archive.
mod token {
    pub(super) const MAGIC: [u8; 24] = string(super::MAGIC);
    pub(super) const OPEN: [u8; 16] = string("(");
    pub(super) const CLOSE: [u8; 16] = string(")");
    pub(super) const TYPE: [u8; 16] = string("type");
    pub(super) const REGULAR: [u8; 16] = string("regular");
    pub(super) const EXECUTABLE: [u8; 24] = string("executable");
    pub(super) const EMPTY: [u8; 8] = string("");
    pub(super) const CONTENTS: [u8; 16] = string("contents");
    pub(super) const SYMLINK: [u8; 16] = string("symlink");
    pub(super) const TARGET: [u8; 16] = string("target");
    pub(super) const DIRECTORY: [u8; 24] = string("directory");
    pub(super) const ENTRY: [u8; 16] = string("entry");
    pub(super) const NAME: [u8; 16] = string("name");
    pub(super) const NODE: [u8; 16] = string("node");

    /// Evaluated at compile time only, where a wrong `N` is a compile error.
    const fn string<const N: usize>(text: &str) -> [u8; N] {
        let text = text.as_bytes();
        assert!(N == 8 + text.len().next_multiple_of(8));
        let mut token = [0; N];
        token[0] = text.len() as u8;
        let mut i = 0;
        while i < text.len() {
            token[8 + i] = text[i];
            i += 1;
        }
        token
    }
}

/// Zeros that follow a string of `len` bytes.
const fn padding(len: u64) -> usize {
    (len.wrapping_neg() % 8) as usize
}

/// The rules for the name of a directory entry, but for its place among the others.
fn check_name(name: &[u8]) -> Result<(), &'static str> {
    match name {
        b"" => Err("an entry's name is empty"),
        b"." | b".." => Err("an entry is named `.` or `..`"),
        _ if name.len() > MAX_NAME_LEN => Err("an entry's name is longer than 255 bytes"),
        _ if name.contains(&b'/') => Err("an entry's name has a slash"),
        _ if name.contains(&0) => Err("an entry's name has a NUL"),
        _ => Ok(()),
    }
}

/// The rules for a symlink's target.
fn check_target(target: &[u8]) -> Result<(), &'static str> {
    match target {
        b"" => Err("a symlink's target is empty"),
        _ if target.len() > MAX_TARGET_LEN => Err("a symlink's target is longer than 4095 bytes"),
        _ if target.contains(&0) => Err("a symlink's target has a NUL"),
        _ => Ok(()),
    }
}
