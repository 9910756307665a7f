//! Replacing hash parts in a stream: what turns an output's temporary path into the one that it ends up with (Nix:
//! references.cc, RewritingSink). All hash parts have one length, so that nothing moves.

use std::io::{self, Write};

use bstr::ByteSlice as _;

use crate::StorePath;
use crate::store_path::HASH_PART_LEN;

/// Passes on what is written to it, hash parts replaced. What it still holds comes with [`Self::finish`].
pub struct HashRewriter<W> {
    /// What is replaced, and by what.
    rewrites: Vec<(Vec<u8>, Vec<u8>)>,
    /// The end of what was seen, in which an occurrence may have begun. Shorter than a hash part between writes.
    held: Vec<u8>,
    output: W,
}

impl<W: Write> HashRewriter<W> {
    /// Replaces the hash part of each first path by that of the second.
    pub fn new<'a>(rewrites: impl IntoIterator<Item = (&'a StorePath, &'a StorePath)>, output: W) -> Self {
        let part = |path: &StorePath| path.hash_part().as_bytes().to_vec();
        let rewrites = rewrites.into_iter().filter(|(from, to)| from.hash_part() != to.hash_part());
        Self {
            rewrites: rewrites.map(|(from, to)| (part(from), part(to))).collect(),
            held: Vec::new(),
            output,
        }
    }

    /// Passes the rest on. Does not flush.
    pub fn finish(mut self) -> io::Result<W> {
        self.output.write_all(&self.held)?;
        Ok(self.output)
    }
}

impl<W: Write> Write for HashRewriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.rewrites.is_empty() {
            return self.output.write(bytes);
        }
        self.held.extend_from_slice(bytes);
        for (from, to) in &self.rewrites {
            let mut start = 0;
            while let Some(found) = self.held[start..].find(from) {
                let end = start + found + from.len();
                self.held[start + found..end].copy_from_slice(to);
                start = end;
            }
        }
        let done = self.held.len().saturating_sub(HASH_PART_LEN - 1);
        self.output.write_all(&self.held[..done])?;
        self.held.drain(..done);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(fill: u8) -> StorePath {
        StorePath::from_parts([fill; 20], "x").unwrap()
    }

    #[test]
    fn hash_parts_are_replaced_wherever_a_piece_ends() {
        let paths: Vec<StorePath> = (1..=4).map(path).collect();
        let [a, b, new_a, new_b] = [0, 1, 2, 3].map(|i| paths[i].hash_part());
        let text = format!("{a}x{b}{a}--{}{b}", &a[..31]);
        let expected = format!("{new_a}x{new_b}{new_a}--{}{new_b}", &a[..31]);
        for piece in 1..=text.len() {
            let rewrites = [(&paths[0], &paths[2]), (&paths[1], &paths[3])];
            let mut rewriter = HashRewriter::new(rewrites, Vec::new());
            text.as_bytes().chunks(piece).for_each(|bytes| rewriter.write_all(bytes).unwrap());
            assert_eq!(rewriter.finish().unwrap(), expected.as_bytes(), "pieces of {piece}");
        }
    }

    #[test]
    fn nothing_to_replace_is_nothing_held() {
        let same = path(1);
        let mut rewriter = HashRewriter::new([(&same, &same)], Vec::new());
        rewriter.write_all(b"short").unwrap();
        assert_eq!(rewriter.output, b"short");
    }
}
