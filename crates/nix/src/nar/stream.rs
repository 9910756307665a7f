//! Where an archive comes from, if that is more than a reader.

use std::io::{self, Read};
use std::os::fd::BorrowedFd;

/// A stream of which a part may be taken past it: from the descriptor that it reads itself, by a system call that moves
/// bytes from there to a file.
pub trait Stream: Read {
    /// Where the next bytes come from, if none of them has been read already. None where that cannot be said.
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// This many bytes were taken from the descriptor.
    fn taken(&mut self, _count: u64) {}
}

/// A reader that is no more than that.
pub struct Plain<'a>(pub &'a mut dyn Read);

impl Read for Plain<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Stream for Plain<'_> {}

impl Stream for &[u8] {}
