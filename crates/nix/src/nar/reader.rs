use std::io::Read;

use crate::Error;

/// One step through an archive. A directory's entries follow it, each an `Entry` and the node that it names, up to
/// its `EndDirectory`. After `File` the caller reads the contents with [`Reader::read_contents`] or
/// [`Reader::copy_contents`] (what it leaves is skipped).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event<'a> {
    Directory,
    /// Name of the next node: not empty, not `.` or `..`, without `/` and NUL, above its predecessor's.
    Entry(&'a [u8]),
    EndDirectory,
    File {
        executable: bool,
        size: u64,
    },
    /// 1 to [`super::MAX_TARGET_LEN`] bytes without NUL.
    Symlink(&'a [u8]),
}

/// Pull parser over a stream. Reads not one byte beyond the archive's end.
pub struct Reader<R> {
    _input: R,
}

impl<R: Read> Reader<R> {
    pub fn new(input: R) -> Self {
        Self { _input: input }
    }

    /// The next step, or None once the archive is complete.
    pub fn next(&mut self) -> Result<Option<Event<'_>>, Error> {
        todo!()
    }

    /// Reads from the current file's contents; 0 at their end.
    pub fn read_contents(&mut self, _buffer: &mut [u8]) -> Result<usize, Error> {
        todo!()
    }

    /// Bytes read so far: after the end, the archive's size.
    pub fn offset(&self) -> u64 {
        todo!()
    }

    /// Parses to the end and says how long the archive is.
    pub fn skip_all(&mut self) -> Result<u64, Error> {
        todo!()
    }
}
