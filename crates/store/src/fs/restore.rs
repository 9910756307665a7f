//! Unpacking a NAR.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread::{self, JoinHandle};

use drover_nix::Sha256;
use drover_nix::hash::Sha256Hasher;
use drover_nix::nar::{Event, Reader};
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use super::{CANONICAL_TIMES, EXECUTABLE, OPEN_DIRECTORY, PLAIN, open_parent};
use crate::Error;

/// Bytes of contents written at a time.
const CHUNK: usize = 256 << 10;
/// Bytes of an archive of known size that are read ahead of the parser.
const READ_AHEAD: usize = 64 << 10;

/// From which size on an archive is hashed by a thread of its own. Below it, starting one costs more than it saves.
const HASH_APART_FROM: u64 = 4 << 20;

/// What [`restore`] read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Restored {
    pub nar_hash: Sha256,
    pub nar_size: u64,
}

/// Unpacks a NAR to `destination`, which must not exist, with canonical metadata. Reads not one byte beyond the
/// archive's end. On failure what was unpacked so far stays: see [`super::delete`].
pub fn restore(nar: &mut dyn Read, destination: &Path) -> Result<Restored, Error> {
    let (parent, name) = open_parent(destination)?;
    let to =
        Destination { directory: parent.as_fd(), name, path: destination, replace: false, modes_hold: false };
    unpack(Source::new(nar, None), &to)
}

/// Where an archive goes.
pub(crate) struct Destination<'a> {
    pub(crate) directory: BorrowedFd<'a>,
    /// In `directory`.
    pub(crate) name: &'a OsStr,
    /// The same, for messages.
    pub(crate) path: &'a Path,
    /// Whether to delete what is there.
    pub(crate) replace: bool,
    /// Whether files get the mode that they are made with: see [`super::modes_hold`].
    pub(crate) modes_hold: bool,
}

/// [`restore`] where the archive is known to have `size` bytes, which lets it read far ahead. The archive may turn out
/// to be shorter than `size`; what was read is then not defined, but for that it is at most `size`.
pub(crate) fn restore_exactly(
    nar: &mut dyn Read,
    size: u64,
    to: &Destination<'_>,
) -> Result<Restored, Error> {
    unpack(Source::new(nar, Some(size)), to)
}

fn unpack(source: Source<'_>, to: &Destination<'_>) -> Result<Restored, Error> {
    let mut unpacker =
        Unpacker { to, name: to.name.as_bytes().to_vec(), open: Vec::new(), buffer: Vec::new() };
    let mut reader = Reader::new(source);
    let broken = |source| Error::Archive { act: "unpack", source };
    loop {
        match reader.next().map_err(broken)? {
            None => break,
            Some(Event::Entry(name)) => {
                unpacker.name.clear();
                unpacker.name.extend_from_slice(name);
            }
            Some(Event::Directory) => unpacker.directory()?,
            Some(Event::EndDirectory) => unpacker.end_directory()?,
            Some(Event::Symlink(target)) => unpacker.symlink(OsStr::from_bytes(target))?,
            Some(Event::File { executable, size }) => unpacker.file(executable, size, &mut reader)?,
        }
    }
    let nar_size = reader.offset();
    Ok(Restored { nar_hash: reader.into_inner().hasher.finish(), nar_size })
}

/// Makes files, each by its name in an open directory, so that no symlink is ever followed: neither one that the
/// archive brought nor one that someone planted.
struct Unpacker<'a> {
    to: &'a Destination<'a>,
    /// Of the next node.
    name: Vec<u8>,
    /// Directories that are being filled, outermost first. A NAR may not nest deeper than `nar::MAX_DEPTH`.
    open: Vec<OwnedFd>,
    buffer: Vec<u8>,
}

impl Unpacker<'_> {
    fn directory(&mut self) -> Result<(), Error> {
        let made = self
            .make(|| rustix::fs::mkdirat(self.here(), self.name(), Mode::RWXU))?
            .and_then(|()| rustix::fs::openat(self.here(), self.name(), OPEN_DIRECTORY, Mode::empty()));
        let fd = made.map_err(Error::sys("make the directory", self.path()))?;
        self.open.push(fd);
        Ok(())
    }

    fn end_directory(&mut self) -> Result<(), Error> {
        if let Some(fd) = self.open.pop() {
            rustix::fs::fchmod(&fd, EXECUTABLE)
                .and_then(|()| rustix::fs::futimens(&fd, &CANONICAL_TIMES))
                .map_err(Error::sys("set mode and time of a directory in", self.to.path))?;
        }
        Ok(())
    }

    fn symlink(&mut self, target: &OsStr) -> Result<(), Error> {
        self.make(|| rustix::fs::symlinkat(target, self.here(), self.name()))?
            .and_then(|()| {
                let flags = AtFlags::SYMLINK_NOFOLLOW;
                rustix::fs::utimensat(self.here(), self.name(), &CANONICAL_TIMES, flags)
            })
            .map_err(Error::sys("make the symlink", self.path()))
    }

    fn file(&mut self, executable: bool, size: u64, reader: &mut Reader<Source<'_>>) -> Result<(), Error> {
        let mode = if executable { EXECUTABLE } else { PLAIN };
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        // The mode says nothing of this descriptor, which may write.
        let mut file: File = self
            .make(|| rustix::fs::openat(self.here(), self.name(), flags, mode))?
            .map_err(Error::sys("make the file", self.path()))?
            .into();
        let want = usize::try_from(size).unwrap_or(CHUNK).min(CHUNK);
        if self.buffer.len() < want {
            self.buffer.resize(want, 0);
        }
        loop {
            let count = reader
                .read_contents(&mut self.buffer)
                .map_err(|source| Error::Archive { act: "unpack", source })?;
            if count == 0 {
                break;
            }
            file.write_all(&self.buffer[..count]).map_err(Error::io("write", self.path()))?;
        }
        let chmod = if self.to.modes_hold { Ok(()) } else { rustix::fs::fchmod(&file, mode) };
        chmod
            .and_then(|()| rustix::fs::futimens(&file, &CANONICAL_TIMES))
            .map_err(Error::sys("set mode and time of", self.path()))
    }

    /// Makes a file. What is in the way of the outermost one is deleted if that was asked for: looking first would cost
    /// every import something, and hardly any finds something.
    fn make<T>(&self, make: impl Fn() -> Result<T, Errno>) -> Result<Result<T, Errno>, Error> {
        match make() {
            Err(Errno::EXIST) if self.open.is_empty() && self.to.replace => {
                super::delete(self.to.path)?;
                Ok(make())
            }
            other => Ok(other),
        }
    }

    fn here(&self) -> BorrowedFd<'_> {
        self.open.last().map_or(self.to.directory, |fd| fd.as_fd())
    }

    fn name(&self) -> &OsStr {
        OsStr::from_bytes(&self.name)
    }

    /// For messages: where we are, as far as it costs nothing to know.
    fn path(&self) -> PathBuf {
        match self.open.len() {
            0 => self.to.path.into(),
            1 => self.to.path.join(self.name()),
            _ => self.to.path.join("…").join(self.name()),
        }
    }
}

/// The archive's bytes, hashed as they come. With a known size it reads ahead, in large pieces.
struct Source<'a> {
    input: &'a mut dyn Read,
    hasher: Hasher,
    /// Bytes of the archive that were not read from `input` yet; None if that is not known.
    left: Option<u64>,
    ahead: Vec<u8>,
    /// Where in `ahead` the bytes begin that nobody took yet, and where they end.
    start: usize,
    end: usize,
}

impl<'a> Source<'a> {
    fn new(input: &'a mut dyn Read, size: Option<u64>) -> Self {
        let room = size.map_or(0, |size| usize::try_from(size).unwrap_or(READ_AHEAD).min(READ_AHEAD));
        let hasher = match size {
            Some(HASH_APART_FROM..) => Hasher::Apart(HashThread::start()),
            _ => Hasher::Here(Sha256Hasher::new()),
        };
        Self { input, hasher, left: size, ahead: vec![0; room], start: 0, end: 0 }
    }
}

impl Read for Source<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(left) = self.left else {
            let count = self.input.read(buffer)?;
            self.hasher.update(&buffer[..count]);
            return Ok(count);
        };
        if self.start == self.end && buffer.len() >= self.ahead.len() {
            let want = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let count = self.input.read(&mut buffer[..want])?;
            self.hasher.update(&buffer[..count]);
            self.left = Some(left - count as u64);
            return Ok(count);
        }
        if self.start == self.end {
            let want = self.ahead.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let count = self.input.read(&mut self.ahead[..want])?;
            self.hasher.update(&self.ahead[..count]);
            self.left = Some(left - count as u64);
            (self.start, self.end) = (0, count);
        }
        let count = buffer.len().min(self.end - self.start);
        buffer[..count].copy_from_slice(&self.ahead[self.start..self.start + count]);
        self.start += count;
        Ok(count)
    }

    fn read_exact(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        // The parser's tokens, nearly always at hand.
        if let Some(bytes) = self.ahead[..self.end].get(self.start..self.start + buffer.len()) {
            buffer.copy_from_slice(bytes);
            self.start += buffer.len();
            return Ok(());
        }
        let mut filled = 0;
        while filled < buffer.len() {
            match self.read(&mut buffer[filled..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

enum Hasher {
    Here(Sha256Hasher),
    Apart(HashThread),
}

impl Hasher {
    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Here(hasher) => hasher.update(bytes),
            Self::Apart(thread) => thread.update(bytes),
        }
    }

    fn finish(self) -> Sha256 {
        match self {
            Self::Here(hasher) => hasher.finish(),
            Self::Apart(thread) => thread.finish(),
        }
    }
}

/// Hashes while its owner reads and writes files. It ends with its owner, finished or not.
struct HashThread {
    filling: Vec<u8>,
    full: SyncSender<Vec<u8>>,
    /// Buffers that were hashed and can be filled again.
    empty: Receiver<Vec<u8>>,
    thread: JoinHandle<Sha256>,
}

impl HashThread {
    /// Buffers on their way to the thread, beyond the one that is filled and the one that is hashed.
    const WAITING: usize = 2;

    fn start() -> Self {
        let (full, to_hash) = mpsc::sync_channel::<Vec<u8>>(Self::WAITING);
        let (give_back, empty) = mpsc::channel();
        for _ in 0..=Self::WAITING {
            // The receiver is right here.
            let _ = give_back.send(Vec::with_capacity(CHUNK));
        }
        let thread = thread::spawn(move || {
            let mut hasher = Sha256Hasher::new();
            for mut bytes in to_hash {
                hasher.update(&bytes);
                bytes.clear();
                // Nobody wants it any more once the owner has finished.
                let _ = give_back.send(bytes);
            }
            hasher.finish()
        });
        Self { filling: Vec::with_capacity(CHUNK), full, empty, thread }
    }

    fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let count = bytes.len().min(CHUNK - self.filling.len());
            self.filling.extend_from_slice(&bytes[..count]);
            bytes = &bytes[count..];
            if self.filling.len() == CHUNK {
                self.pass_on();
            }
        }
    }

    /// Both ends live as long as the thread, which ends by itself only if hashing panics; `finish` passes that on.
    fn pass_on(&mut self) {
        let next = self.empty.recv().unwrap_or_default();
        let _ = self.full.send(std::mem::replace(&mut self.filling, next));
    }

    fn finish(mut self) -> Sha256 {
        self.pass_on();
        drop(self.full);
        match self.thread.join() {
            Ok(hash) => hash,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;
    use crate::fs::dump;
    use crate::testing::sample_tree;

    fn exactly(nar: &mut dyn Read, size: u64, path: &Path) -> Result<Restored, Error> {
        let (parent, name) = open_parent(path)?;
        let directory = parent.as_fd();
        let to =
            Destination { directory, name, path, replace: true, modes_hold: crate::fs::modes_hold(path) };
        restore_exactly(nar, size, &to)
    }

    fn sample_nar() -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        sample_tree(&dir.path().join("t"));
        let mut nar = Vec::new();
        dump(&dir.path().join("t"), &mut nar).unwrap();
        nar
    }

    #[test]
    fn a_tree_comes_back_byte_for_byte_with_canonical_metadata() {
        let nar = sample_nar();
        for with_size in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let to = dir.path().join("x");
            let mut stream = nar.clone();
            stream.extend_from_slice(b"next");
            let mut stream = &stream[..];
            let restored = match with_size {
                true => exactly(&mut stream, nar.len() as u64, &to).unwrap(),
                false => restore(&mut stream, &to).unwrap(),
            };
            assert_eq!(stream, b"next");
            assert_eq!((restored.nar_hash, restored.nar_size), (Sha256::of(&nar), nar.len() as u64));
            let mut again = Vec::new();
            dump(&to, &mut again).unwrap();
            assert_eq!(again, nar);
            let meta = |name: &str| std::fs::symlink_metadata(to.join(name)).unwrap();
            for (name, mode) in
                [("", 0o555), ("bin", 0o555), ("bin/run", 0o555), ("text", 0o444), ("big", 0o444)]
            {
                assert_eq!(meta(name).mode() & 0o7777, mode, "{name}");
                assert_eq!((meta(name).mtime(), meta(name).mtime_nsec()), (1, 0), "{name}");
            }
            assert_eq!(meta("link").mtime(), 1);
            crate::fs::delete(&to).unwrap();
        }
    }

    #[test]
    fn a_large_archive_is_hashed_apart() {
        let size = usize::try_from(HASH_APART_FROM).unwrap() + 12_345;
        let contents: Vec<u8> = (0..size).map(|i| (i % 253) as u8).collect();
        let nar = crate::testing::file_nar(&contents);
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("x");
        let restored = exactly(&mut &nar[..], nar.len() as u64, &to).unwrap();
        assert_eq!((restored.nar_hash, restored.nar_size), (Sha256::of(&nar), nar.len() as u64));
        assert_eq!(std::fs::read(&to).unwrap(), contents);
        // A stream that ends early ends the thread too, or this would hang.
        assert!(exactly(&mut &nar[..nar.len() / 2], nar.len() as u64, &dir.path().join("y")).is_err());
    }

    #[test]
    fn single_nodes() {
        for (build, what) in [(0, "file"), (1, "symlink")] {
            let mut nar = Vec::new();
            let mut writer = drover_nix::nar::Writer::new(&mut nar);
            match build {
                0 => writer.file(true, 3, &b"abc"[..]).unwrap(),
                _ => writer.symlink(b"/no/where").unwrap(),
            }
            writer.finish().unwrap();
            let dir = tempfile::tempdir().unwrap();
            let to = dir.path().join(what);
            restore(&mut &nar[..], &to).unwrap();
            let mut again = Vec::new();
            dump(&to, &mut again).unwrap();
            assert_eq!(again, nar, "{what}");
        }
    }

    #[test]
    fn what_is_there_already_is_never_followed_or_replaced() {
        let nar = sample_nar();
        let dir = tempfile::tempdir().unwrap();
        let victim = dir.path().join("victim");
        std::fs::create_dir(&victim).unwrap();
        let to = dir.path().join("x");
        std::os::unix::fs::symlink(&victim, &to).unwrap();
        assert!(restore(&mut &nar[..], &to).is_err());
        assert_eq!(std::fs::read_dir(&victim).unwrap().count(), 0);
        // A file's name that is a symlink to something that can be written.
        let mut nar = Vec::new();
        let mut writer = drover_nix::nar::Writer::new(&mut nar);
        writer.file(false, 3, &b"abc"[..]).unwrap();
        writer.finish().unwrap();
        let target = dir.path().join("target");
        std::fs::write(&target, "precious").unwrap();
        std::fs::remove_file(&to).unwrap();
        std::os::unix::fs::symlink(&target, &to).unwrap();
        assert!(restore(&mut &nar[..], &to).is_err());
        assert_eq!(std::fs::read(&target).unwrap(), b"precious");
    }

    #[test]
    fn an_archive_that_names_a_symlink_and_goes_through_it_is_refused() {
        // Entry `x` twice: a symlink out of the destination, then a directory (CVE-2024-45593).
        let dir = tempfile::tempdir().unwrap();
        let victim = dir.path().join("victim");
        std::fs::create_dir(&victim).unwrap();
        let mut nar = Vec::new();
        let mut put = |text: &[u8]| {
            nar.extend_from_slice(&(text.len() as u64).to_le_bytes());
            nar.extend_from_slice(text);
            nar.resize(nar.len().next_multiple_of(8), 0);
        };
        let target = victim.to_str().unwrap().as_bytes();
        for token in [
            "nix-archive-1",
            "(",
            "type",
            "directory",
            "entry",
            "(",
            "name",
            "x",
            "node",
            "(",
            "type",
            "symlink",
            "target",
        ] {
            put(token.as_bytes());
        }
        put(target);
        for token in [
            ")",
            ")",
            "entry",
            "(",
            "name",
            "x",
            "node",
            "(",
            "type",
            "directory",
            "entry",
            "(",
            "name",
            "f",
            "node",
            "(",
            "type",
            "regular",
            "contents",
            "evil",
            ")",
            ")",
            ")",
            ")",
            ")",
        ] {
            put(token.as_bytes());
        }
        assert!(restore(&mut &nar[..], &dir.path().join("to")).is_err());
        assert_eq!(std::fs::read_dir(&victim).unwrap().count(), 0);
    }

    #[test]
    fn a_short_stream_fails() {
        let nar = sample_nar();
        let dir = tempfile::tempdir().unwrap();
        for (i, len) in [0, 8, 100, nar.len() / 2, nar.len() - 1].into_iter().enumerate() {
            assert!(restore(&mut &nar[..len], &dir.path().join(format!("a{i}"))).is_err());
            assert!(exactly(&mut &nar[..], len as u64, &dir.path().join(format!("b{i}"))).is_err());
            for kind in ["a", "b"] {
                crate::fs::delete(&dir.path().join(format!("{kind}{i}"))).unwrap();
            }
        }
    }
}
