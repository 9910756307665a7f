//! The parser. It reads in steps as large as the grammar allows: where it knows that at least `n` more bytes must
//! follow in any valid archive, it takes them at once. So it needs no buffer of its own, never reads beyond the end,
//! and a small file costs five reads, which a `BufReader` underneath makes five copies.

use std::io::{self, ErrorKind, Read, Write};

use super::{CHUNK, MAX_DEPTH, MAX_NAME_LEN, MAX_TARGET_LEN, check_name, check_target, padding, token};
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
///
/// After an error every further call fails.
pub struct Reader<R> {
    input: R,
    offset: u64,
    state: State,
    /// Name of the latest entry of each open directory. Those beyond `open` are spare room.
    names: Vec<Vec<u8>>,
    open: usize,
    target: Vec<u8>,
    /// For contents that nobody wants.
    discard: Vec<u8>,
}

/// What was read already, and so what the next step begins with.
#[derive(Clone, Copy)]
enum State {
    Start,
    /// A node up to the first 16 bytes of its kind.
    Node(Kind),
    Contents {
        left: u64,
        padding: usize,
    },
    /// Inside a directory, and its next token.
    Inside(Next),
    Done,
    Failed,
}

#[derive(Clone, Copy)]
enum Kind {
    Directory,
    Regular,
    Symlink,
}

#[derive(Clone, Copy)]
enum Next {
    Entry,
    Close,
}

/// An [`Event`] that borrows nothing.
enum Step {
    Directory,
    Entry,
    EndDirectory,
    File { executable: bool, size: u64 },
    Symlink,
}

/// `(`, `type` and 16 bytes of the kind.
const HEAD: usize = 48;
/// `)` of an entry and the next token of its directory.
const AFTER_NODE: usize = 32;

impl<R: Read> Reader<R> {
    pub fn new(input: R) -> Self {
        Self {
            input,
            offset: 0,
            state: State::Start,
            names: Vec::new(),
            open: 0,
            target: Vec::new(),
            discard: Vec::new(),
        }
    }

    /// The next step, or None once the archive is complete.
    #[allow(clippy::should_implement_trait)] // it lends: an Iterator cannot
    pub fn next(&mut self) -> Result<Option<Event<'_>>, Error> {
        let step = match self.step() {
            Ok(step) => step,
            Err(error) => {
                self.state = State::Failed;
                return Err(error);
            }
        };
        Ok(step.map(|step| match step {
            Step::Directory => Event::Directory,
            Step::Entry => Event::Entry(&self.names[self.open - 1]),
            Step::EndDirectory => Event::EndDirectory,
            Step::File { executable, size } => Event::File { executable, size },
            Step::Symlink => Event::Symlink(&self.target),
        }))
    }

    /// Reads from the current file's contents; 0 at their end.
    pub fn read_contents(&mut self, buffer: &mut [u8]) -> Result<usize, Error> {
        let State::Contents { left, padding } = self.state else {
            return Ok(0);
        };
        let want = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        if want == 0 {
            return Ok(0);
        }
        let count = loop {
            match self.input.read(&mut buffer[..want]) {
                Ok(0) => {
                    self.state = State::Failed;
                    return Err(self.ended());
                }
                Ok(count) => break count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(source) => {
                    self.state = State::Failed;
                    return Err(Error::NarIo { act: "read", source });
                }
            }
        };
        self.offset += count as u64;
        self.state = State::Contents { left: left - count as u64, padding };
        Ok(count)
    }

    /// Has `take` take some of the current file's contents from the stream itself, in a better way than
    /// [`Self::read_contents`] has. It is told how many bytes are left, and says how many it took: no more than that,
    /// and none only where the stream has ended. None at the contents' end.
    pub fn take_contents<T>(
        &mut self,
        take: impl FnOnce(&mut R, u64) -> io::Result<(T, u64)>,
    ) -> Result<Option<T>, Error> {
        let (left, padding) = match self.state {
            State::Contents { left, padding } if left > 0 => (left, padding),
            _ => return Ok(None),
        };
        self.state = State::Failed;
        let (taken, count) =
            take(&mut self.input, left).map_err(|source| Error::NarIo { act: "read", source })?;
        if count == 0 {
            return Err(self.ended());
        }
        if count > left {
            return Err(self.fail("more was taken than the file has".into()));
        }
        self.offset += count;
        self.state = State::Contents { left: left - count, padding };
        Ok(Some(taken))
    }

    /// Copies what is left of the current file's contents to `output` and says how much it was.
    pub fn copy_contents(&mut self, output: &mut (impl Write + ?Sized)) -> Result<u64, Error> {
        let mut buffer = std::mem::take(&mut self.discard);
        let result = self.copy_through(&mut buffer, output);
        self.discard = buffer;
        result
    }

    /// Bytes read so far: after the end, the archive's size.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Parses to the end and says how long the archive is.
    pub fn skip_all(&mut self) -> Result<u64, Error> {
        while self.next()?.is_some() {}
        Ok(self.offset)
    }

    /// The stream, which stands right behind the archive once [`Self::next`] has returned None.
    pub fn into_inner(self) -> R {
        self.input
    }

    /// Bytes that its buffers hold, for tests of the limits.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.target.capacity() + self.discard.capacity()
    }

    fn step(&mut self) -> Result<Option<Step>, Error> {
        match self.state {
            State::Start => {
                let bytes = self.read::<{ token::MAGIC.len() + HEAD }>()?;
                let mut fields = self.fields(&bytes);
                fields.expect(&token::MAGIC, "`nix-archive-1`")?;
                let kind = fields.node_head()?;
                self.node(kind).map(Some)
            }
            State::Node(kind) => self.node(kind).map(Some),
            State::Contents { .. } => {
                self.copy_contents(&mut io::sink())?;
                let State::Contents { padding, .. } = self.state else { return Err(self.misuse()) };
                self.close_node(padding)?;
                self.step_after_node()
            }
            State::Inside(_) | State::Done => self.step_after_node(),
            State::Failed => Err(self.misuse()),
        }
    }

    /// The step that follows a complete node: no recursion, whatever the archive says.
    fn step_after_node(&mut self) -> Result<Option<Step>, Error> {
        match self.state {
            State::Inside(Next::Entry) => self.entry().map(Some),
            State::Inside(Next::Close) => {
                self.open -= 1;
                if self.open == 0 {
                    self.state = State::Done;
                } else {
                    let bytes = self.read::<AFTER_NODE>()?;
                    let mut fields = self.fields(&bytes);
                    fields.expect(&token::CLOSE, "`)` after a node")?;
                    self.state = State::Inside(fields.next_in_directory()?);
                }
                Ok(Some(Step::EndDirectory))
            }
            State::Done => Ok(None),
            _ => Err(self.misuse()),
        }
    }

    fn node(&mut self, kind: Kind) -> Result<Step, Error> {
        if self.open == MAX_DEPTH {
            return Err(self.fail(format!("nodes are nested more than {MAX_DEPTH} deep")));
        }
        match kind {
            Kind::Directory => {
                // The last byte of `directory`, and the token that follows.
                let bytes = self.read::<24>()?;
                let mut fields = self.fields(&bytes);
                fields.expect(&token::DIRECTORY[16..], "`directory`")?;
                self.state = State::Inside(fields.next_in_directory()?);
                match self.names.get_mut(self.open) {
                    Some(name) => name.clear(),
                    None => self.names.push(Vec::with_capacity(MAX_NAME_LEN)),
                }
                self.open += 1;
                Ok(Step::Directory)
            }
            Kind::Regular => {
                // `contents` and the size, or all of `executable`.
                let bytes = self.read::<24>()?;
                let executable = bytes == token::EXECUTABLE;
                let size = if executable {
                    let bytes = self.read::<32>()?;
                    let mut fields = self.fields(&bytes);
                    fields.expect(&token::EMPTY, "an empty string after `executable`")?;
                    fields.expect(&token::CONTENTS, "`contents`")?;
                    fields.number()
                } else {
                    let mut fields = self.fields(&bytes);
                    fields.expect(&token::CONTENTS, "`contents` or `executable`")?;
                    fields.number()
                };
                self.state = State::Contents { left: size, padding: padding(size) };
                Ok(Step::File { executable, size })
            }
            Kind::Symlink => {
                let bytes = self.read::<24>()?;
                let mut fields = self.fields(&bytes);
                fields.expect(&token::TARGET, "`target`")?;
                let len = fields.length(MAX_TARGET_LEN, "a symlink's target")?;
                let mut target = std::mem::take(&mut self.target);
                target.resize(len, 0);
                let start = self.offset;
                self.fill(&mut target)?;
                self.target = target;
                check_target(&self.target).map_err(|why| Error::Nar { offset: start, why: why.into() })?;
                self.close_node(padding(len as u64))?;
                Ok(Step::Symlink)
            }
        }
    }

    fn entry(&mut self) -> Result<Step, Error> {
        let bytes = self.read::<40>()?;
        let mut fields = self.fields(&bytes);
        fields.expect(&token::OPEN, "`(` of an entry")?;
        fields.expect(&token::NAME, "`name`")?;
        let len = fields.length(MAX_NAME_LEN, "an entry's name")?;
        let start = self.offset;
        let mut room = [0; MAX_NAME_LEN + 1 + token::NODE.len() + HEAD];
        let bytes = &mut room[..len.next_multiple_of(8) + token::NODE.len() + HEAD];
        self.fill(bytes)?;
        let (name, rest) = bytes.split_at(len);
        let fail = |why: String| Err(Error::Nar { offset: start, why });
        if let Err(why) = check_name(name) {
            return fail(why.into());
        }
        let previous = &mut self.names[self.open - 1];
        if name <= &previous[..] {
            return fail(format!(
                "entry {:?} does not come after its predecessor {:?}",
                bstr::BStr::new(name),
                bstr::BStr::new(previous)
            ));
        }
        previous.clear();
        previous.extend_from_slice(name);
        let mut fields = self.fields(rest);
        fields.padding(padding(len as u64))?;
        fields.expect(&token::NODE, "`node`")?;
        self.state = State::Node(fields.node_head()?);
        Ok(Step::Entry)
    }

    /// Reads what follows a file's contents or a symlink's target.
    fn close_node(&mut self, padding: usize) -> Result<(), Error> {
        let mut room = [0; 7 + token::CLOSE.len() + AFTER_NODE];
        let inside = self.open > 0;
        let len = padding + token::CLOSE.len() + if inside { AFTER_NODE } else { 0 };
        let bytes = &mut room[..len];
        self.fill(bytes)?;
        let mut fields = self.fields(bytes);
        fields.padding(padding)?;
        fields.expect(&token::CLOSE, "`)`")?;
        self.state = if inside {
            fields.expect(&token::CLOSE, "`)` after a node")?;
            State::Inside(fields.next_in_directory()?)
        } else {
            State::Done
        };
        Ok(())
    }

    fn copy_through(
        &mut self,
        buffer: &mut Vec<u8>,
        output: &mut (impl Write + ?Sized),
    ) -> Result<u64, Error> {
        let State::Contents { left, .. } = self.state else {
            return Ok(0);
        };
        // Grows to CHUNK and no further, whatever size the archive claims.
        let want = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        if buffer.len() < want {
            buffer.resize(want, 0);
        }
        let mut copied = 0;
        loop {
            let count = self.read_contents(buffer)?;
            if count == 0 {
                return Ok(copied);
            }
            output.write_all(&buffer[..count]).map_err(|source| {
                self.state = State::Failed;
                Error::NarIo { act: "write", source }
            })?;
            copied += count as u64;
        }
    }

    fn read<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), Error> {
        match self.input.read_exact(bytes) {
            Ok(()) => {
                self.offset += bytes.len() as u64;
                Ok(())
            }
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => Err(self.ended()),
            Err(source) => Err(Error::NarIo { act: "read", source }),
        }
    }

    /// The fields of bytes that were just read.
    fn fields<'b>(&self, bytes: &'b [u8]) -> Fields<'b> {
        Fields { bytes, offset: self.offset - bytes.len() as u64 }
    }

    fn fail(&self, why: String) -> Error {
        Error::Nar { offset: self.offset, why }
    }

    fn ended(&self) -> Error {
        let why = format!("it ended inside an archive, {} bytes or more after its start", self.offset);
        Error::NarIo { act: "read", source: io::Error::new(ErrorKind::UnexpectedEof, why) }
    }

    fn misuse(&self) -> Error {
        self.fail("the parser failed earlier and cannot go on".into())
    }
}

/// Takes fields off bytes whose number the caller chose to be enough.
struct Fields<'b> {
    bytes: &'b [u8],
    offset: u64,
}

impl Fields<'_> {
    fn expect(&mut self, token: &[u8], what: &str) -> Result<(), Error> {
        match self.bytes.strip_prefix(token) {
            Some(rest) => {
                self.advance(rest.len());
                Ok(())
            }
            None => Err(self.fail(format!("expected {what}"))),
        }
    }

    fn node_head(&mut self) -> Result<Kind, Error> {
        self.expect(&token::OPEN, "`(` of a node")?;
        self.expect(&token::TYPE, "`type`")?;
        if self.bytes == token::REGULAR {
            Ok(Kind::Regular)
        } else if self.bytes == &token::DIRECTORY[..16] {
            Ok(Kind::Directory)
        } else if self.bytes == token::SYMLINK {
            Ok(Kind::Symlink)
        } else {
            Err(self.fail("expected `regular`, `directory` or `symlink`".into()))
        }
    }

    fn next_in_directory(&mut self) -> Result<Next, Error> {
        if self.bytes == token::ENTRY {
            Ok(Next::Entry)
        } else if self.bytes == token::CLOSE {
            Ok(Next::Close)
        } else {
            Err(self.fail("expected `entry` or `)` in a directory".into()))
        }
    }

    fn number(&mut self) -> u64 {
        let (number, rest) = self.bytes.split_at(8);
        let mut bytes = [0; 8];
        bytes.copy_from_slice(number);
        self.advance(rest.len());
        u64::from_le_bytes(bytes)
    }

    fn length(&mut self, max: usize, what: &str) -> Result<usize, Error> {
        let offset = self.offset;
        let length = self.number();
        match usize::try_from(length) {
            Ok(length) if length <= max => Ok(length),
            _ => {
                let why = format!("{what} claims {length} bytes; {max} are allowed");
                Err(Error::Nar { offset, why })
            }
        }
    }

    fn padding(&mut self, count: usize) -> Result<(), Error> {
        let rest = &self.bytes[count..];
        if self.bytes[..count].iter().any(|byte| *byte != 0) {
            return Err(self.fail("padding is not zero".into()));
        }
        self.advance(rest.len());
        Ok(())
    }

    fn advance(&mut self, left: usize) {
        let taken = self.bytes.len() - left;
        self.bytes = &self.bytes[taken..];
        self.offset += taken as u64;
    }

    fn fail(&self, why: String) -> Error {
        Error::Nar { offset: self.offset, why }
    }
}
