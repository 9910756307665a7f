//! The writer. Tokens gather in one buffer, together with the contents of small files, and go out in large writes.

use std::io::{self, ErrorKind, Read, Write};

use super::{CHUNK, MAX_DEPTH, MAX_NAME_LEN, check_name, check_target, padding, token};
use crate::Error;

/// Room for what is pending at first: a small archive needs no more.
const FIRST: usize = 8 << 10;

/// Writes an archive node by node. The caller gives entries in byte order of their names; the writer checks it.
///
/// What was written may stay in a buffer until [`Self::finish`]. After an error every further call fails.
pub struct Writer<W> {
    output: W,
    /// Bytes that are not written yet: at most about [`CHUNK`] and one node's tokens.
    pending: Vec<u8>,
    /// Bytes of the archive so far, the pending ones included.
    offset: u64,
    state: State,
    /// Name of the latest entry of each open directory. Those beyond `open` are spare room.
    names: Vec<Vec<u8>>,
    open: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// A node is due: the root, or the one that an entry named.
    Node,
    /// In a directory, between entries.
    Between,
    Done,
    Failed,
}

impl<W: Write> Writer<W> {
    pub fn new(output: W) -> Self {
        Self {
            output,
            pending: Vec::with_capacity(FIRST),
            offset: 0,
            state: State::Node,
            names: Vec::new(),
            open: 0,
        }
    }

    pub fn directory(&mut self) -> Result<(), Error> {
        self.begin_node()?;
        self.put(&token::DIRECTORY);
        match self.names.get_mut(self.open) {
            Some(name) => name.clear(),
            None => self.names.push(Vec::with_capacity(MAX_NAME_LEN)),
        }
        self.open += 1;
        self.state = State::Between;
        Ok(())
    }

    /// Names the node that is written next.
    pub fn entry(&mut self, name: &[u8]) -> Result<(), Error> {
        if self.state != State::Between {
            return Err(self.fail("an entry outside a directory"));
        }
        check_name(name).map_err(|why| self.fail(why))?;
        if name <= &self.names[self.open - 1][..] {
            return Err(self.fail("an entry does not come after its predecessor"));
        }
        let previous = &mut self.names[self.open - 1];
        previous.clear();
        previous.extend_from_slice(name);
        self.put(&token::ENTRY);
        self.put(&token::OPEN);
        self.put(&token::NAME);
        self.put_string(name);
        self.put(&token::NODE);
        self.state = State::Node;
        Ok(())
    }

    pub fn end_directory(&mut self) -> Result<(), Error> {
        if self.state != State::Between {
            return Err(self.fail("the end of a directory where none is open"));
        }
        self.open -= 1;
        self.end_node()
    }

    pub fn symlink(&mut self, target: &[u8]) -> Result<(), Error> {
        check_target(target).map_err(|why| self.fail(why))?;
        self.begin_node()?;
        self.put(&token::SYMLINK);
        self.put(&token::TARGET);
        self.put_string(target);
        self.end_node()
    }

    /// A regular file of exactly `size` bytes; a stream that ends early or is longer is an error.
    pub fn file(&mut self, executable: bool, size: u64, mut contents: impl Read) -> Result<(), Error> {
        self.begin_file(executable, size)?;
        let mut left = size;
        loop {
            let used = self.pending.len();
            // One byte more than is due, so that a file of the right size ends in two reads.
            let want = CHUNK.min(usize::try_from(left).unwrap_or(CHUNK).saturating_add(1));
            self.pending.resize(used + want, 0);
            let result = contents.read(&mut self.pending[used..]);
            let count = *result.as_ref().unwrap_or(&0);
            self.pending.truncate(used + count);
            match result {
                Ok(0) if left == 0 => break,
                Ok(0) => return Err(self.fail("a file has fewer bytes than were announced")),
                Ok(count) if count as u64 > left => {
                    return Err(self.fail("a file has more bytes than were announced"));
                }
                Ok(count) => {
                    left -= count as u64;
                    self.offset += count as u64;
                    self.flush_if_full()?;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(source) => {
                    self.state = State::Failed;
                    return Err(Error::NarIo { act: "read a file for", source });
                }
            }
        }
        self.end_file(size)
    }

    /// A regular file whose `size` bytes `contents` writes to the output itself, because it has a better way. It says how
    /// many bytes it wrote; another number than `size` is an error.
    pub fn file_through(
        &mut self,
        executable: bool,
        size: u64,
        contents: impl FnOnce(&mut W) -> io::Result<u64>,
    ) -> Result<(), Error> {
        self.begin_file(executable, size)?;
        self.flush()?;
        match contents(&mut self.output) {
            Ok(written) if written == size => {
                self.offset += size;
                self.end_file(size)
            }
            Ok(_) => Err(self.fail("a file has fewer or more bytes than were announced")),
            Err(source) => {
                self.state = State::Failed;
                Err(Error::NarIo { act: "write", source })
            }
        }
    }

    /// A regular file whose contents are at hand.
    pub fn file_bytes(&mut self, executable: bool, contents: &[u8]) -> Result<(), Error> {
        self.begin_file(executable, contents.len() as u64)?;
        if contents.len() < CHUNK / 2 {
            self.put(contents);
        } else {
            self.flush()?;
            self.write(contents)?;
            self.offset += contents.len() as u64;
        }
        self.end_file(contents.len() as u64)
    }

    /// Bytes of the archive so far.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Checks that the archive is complete and gives the output back, with everything written (but not flushed).
    pub fn finish(mut self) -> Result<W, Error> {
        if self.state != State::Done {
            return Err(self.fail("the archive is not complete"));
        }
        self.flush()?;
        Ok(self.output)
    }

    fn begin_file(&mut self, executable: bool, size: u64) -> Result<(), Error> {
        self.begin_node()?;
        self.put(&token::REGULAR);
        if executable {
            self.put(&token::EXECUTABLE);
            self.put(&token::EMPTY);
        }
        self.put(&token::CONTENTS);
        self.put(&size.to_le_bytes());
        Ok(())
    }

    fn end_file(&mut self, size: u64) -> Result<(), Error> {
        self.put(&[0; 7][..padding(size)]);
        self.end_node()
    }

    fn begin_node(&mut self) -> Result<(), Error> {
        if self.state != State::Node {
            return Err(self.fail("a node without an entry that names it"));
        }
        if self.open == MAX_DEPTH {
            return Err(self.fail("nodes are nested more than 64 deep"));
        }
        if self.offset == 0 {
            self.put(&token::MAGIC);
        }
        self.put(&token::OPEN);
        self.put(&token::TYPE);
        Ok(())
    }

    /// Closes a node, and the entry around it if there is one.
    fn end_node(&mut self) -> Result<(), Error> {
        self.put(&token::CLOSE);
        if self.open == 0 {
            self.state = State::Done;
        } else {
            self.put(&token::CLOSE);
            self.state = State::Between;
        }
        self.flush_if_full()
    }

    fn put(&mut self, bytes: &[u8]) {
        self.pending.extend_from_slice(bytes);
        self.offset += bytes.len() as u64;
    }

    fn put_string(&mut self, bytes: &[u8]) {
        self.put(&(bytes.len() as u64).to_le_bytes());
        self.put(bytes);
        self.put(&[0; 7][..padding(bytes.len() as u64)]);
    }

    fn flush_if_full(&mut self) -> Result<(), Error> {
        if self.pending.len() >= CHUNK / 2 { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), Error> {
        let pending = std::mem::take(&mut self.pending);
        let result = self.write(&pending);
        self.pending = pending;
        self.pending.clear();
        result
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.output.write_all(bytes).map_err(|source| {
            self.state = State::Failed;
            Error::NarIo { act: "write", source }
        })
    }

    fn fail(&mut self, why: &str) -> Error {
        self.state = State::Failed;
        Error::Nar { offset: self.offset, why: why.into() }
    }
}
