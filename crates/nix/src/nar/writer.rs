use std::io::{Read, Write};

use crate::Error;

/// Writes an archive node by node. The caller gives entries in byte order of their names; the writer checks it.
pub struct Writer<W> {
    _output: W,
}

impl<W: Write> Writer<W> {
    pub fn new(output: W) -> Self {
        Self { _output: output }
    }

    pub fn directory(&mut self) -> Result<(), Error> {
        todo!()
    }

    /// Names the node that is written next.
    pub fn entry(&mut self, _name: &[u8]) -> Result<(), Error> {
        todo!()
    }

    pub fn end_directory(&mut self) -> Result<(), Error> {
        todo!()
    }

    pub fn symlink(&mut self, _target: &[u8]) -> Result<(), Error> {
        todo!()
    }

    /// A regular file of exactly `size` bytes; a stream that ends early or is longer is an error.
    pub fn file(&mut self, _executable: bool, _size: u64, _contents: impl Read) -> Result<(), Error> {
        todo!()
    }

    /// Checks that the archive is complete and gives the output back.
    pub fn finish(self) -> Result<W, Error> {
        todo!()
    }
}
