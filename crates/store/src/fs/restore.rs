//! Unpacking a NAR.

use std::ffi::OsStr;
use std::io::{Read, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use drover_nix::Sha256;
use drover_nix::nar::{Event, Plain, Reader, Stream};
use rustix::fs::{AtFlags, Mode};
use rustix::io::Errno;

use super::crew::{self, Crew, Directory, Failed, Job};
use super::feed::{Feed, Piece};
use super::{CANONICAL_TIMES, MAX_PATH_LEN, OPEN_DIRECTORY, open_parent, too_long};
use crate::Error;

/// From which size on an archive's files are made by several threads. Below it, starting them costs more than it saves.
const CREW_FROM: u64 = 1 << 20;

/// From which size on a file's contents may come by the kernel alone.
const SPLICE_FROM: u64 = 1 << 20;

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
    unpack(Feed::new(&mut Plain(nar), None), None, &to)
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
    nar: &mut dyn Stream,
    size: u64,
    to: &Destination<'_>,
) -> Result<Restored, Error> {
    let crew = (size >= CREW_FROM).then(Crew::start);
    unpack(Feed::new(nar, Some(size)), crew, to)
}

fn unpack(feed: Feed<'_>, crew: Option<Crew>, to: &Destination<'_>) -> Result<Restored, Error> {
    let failed = Arc::<Failed>::default();
    let mut unpacker = Unpacker {
        to,
        name: to.name.as_bytes().to_vec(),
        open: Vec::new(),
        lengths: Vec::new(),
        len: to.path.as_os_str().len(),
        path: to.path.into(),
        failed: Arc::clone(&failed),
        crew,
    };
    let mut reader = Reader::new(feed);
    let unpacked = unpacker.run(&mut reader);
    // Nobody is at work any more when this returns, whatever the outcome: the caller may delete everything.
    drop(unpacker);
    unpacked?;
    if let Some(error) = failed.take() {
        return Err(error);
    }
    let nar_size = reader.offset();
    let nar_hash = reader
        .into_inner()
        .finish()
        .map_err(|source| broken(drover_nix::Error::NarIo { act: "read back", source }))?;
    Ok(Restored { nar_hash, nar_size })
}

/// Some of a file's contents: at hand, or this many bytes in place already.
enum Next {
    Piece(Piece),
    Moved(u64),
}

/// Makes files, each by its name in an open directory, so that no symlink is ever followed: neither one that the
/// archive brought nor one that someone planted.
struct Unpacker<'a> {
    to: &'a Destination<'a>,
    /// Of the next node.
    name: Vec<u8>,
    /// Directories that are being filled, outermost first. A NAR may not nest deeper than `nar::MAX_DEPTH`.
    open: Vec<Arc<Directory>>,
    /// Of their paths, in bytes; and that of the next node.
    lengths: Vec<usize>,
    len: usize,
    path: Arc<Path>,
    /// What went wrong elsewhere than in this thread.
    failed: Arc<Failed>,
    crew: Option<Crew>,
}

impl Unpacker<'_> {
    fn run(&mut self, reader: &mut Reader<Feed<'_>>) -> Result<(), Error> {
        while let Some(event) = reader.next().map_err(broken)? {
            match event {
                Event::Entry(name) => {
                    self.name.clear();
                    self.name.extend_from_slice(name);
                    self.len = self.lengths.last().map_or(0, |directory| directory + 1) + name.len();
                    if self.len >= MAX_PATH_LEN {
                        return Err(too_long(self.to.path));
                    }
                }
                Event::Directory => self.directory()?,
                Event::EndDirectory => {
                    self.open.pop();
                    self.lengths.pop();
                }
                Event::Symlink(target) => self.symlink(OsStr::from_bytes(target))?,
                Event::File { executable, size } => self.file(executable, size, reader)?,
            }
        }
        Ok(())
    }

    fn directory(&mut self) -> Result<(), Error> {
        let made = self
            .make(|| rustix::fs::mkdirat(self.here(), self.name(), Mode::RWXU))?
            .and_then(|()| rustix::fs::openat(self.here(), self.name(), OPEN_DIRECTORY, Mode::empty()));
        let fd = made.map_err(Error::sys("make the directory", self.path()))?;
        self.lengths.push(self.len);
        self.open.push(Arc::new(Directory::new(fd, Arc::clone(&self.path), Arc::clone(&self.failed))));
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

    fn file(&mut self, executable: bool, size: u64, reader: &mut Reader<Feed<'_>>) -> Result<(), Error> {
        let first = reader.take_contents(Feed::piece).map_err(broken)?.unwrap_or_default();
        if first.len() as u64 == size
            && let (Some(crew), Some(directory)) = (&self.crew, self.open.last())
        {
            crew.give(Job {
                directory: Arc::clone(directory),
                name: self.name.as_slice().into(),
                executable,
                modes_hold: self.to.modes_hold,
                contents: first,
            });
            return Ok(());
        }
        let file = self
            .make(|| crew::create(self.here(), self.name(), executable, size >= SPLICE_FROM))?
            .map_err(Error::sys("make the file", self.path()))?;
        let file = Arc::new(file);
        let mut written = 0;
        let mut next = Some(Next::Piece(first));
        while let Some(some) = next {
            match some {
                Next::Moved(count) => written += count,
                // Let go of here: what comes next may need its place.
                Next::Piece(piece) => {
                    (&*file).write_all(piece.bytes()).map_err(Error::io("write", self.path()))?;
                    written += piece.len() as u64;
                }
            }
            let take = |feed: &mut Feed<'_>, left| {
                let moved = if size < SPLICE_FROM { 0 } else { feed.splice(left, &file, written) };
                match moved {
                    0 => feed.piece(left).map(|(piece, count)| (Next::Piece(piece), count)),
                    count => Ok((Next::Moved(count), count)),
                }
            };
            next = reader.take_contents(take).map_err(broken)?;
        }
        crew::seal(&file, executable, self.to.modes_hold)
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
        self.open.last().map_or(self.to.directory, |directory| directory.fd.as_fd())
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

fn broken(source: drover_nix::Error) -> Error {
    Error::Archive { act: "unpack", source }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::fs::MetadataExt as _;

    use super::*;
    use crate::fs::dump;
    use crate::testing::sample_tree;

    fn exactly(nar: &mut dyn Stream, size: u64, path: &Path) -> Result<Restored, Error> {
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
    fn a_path_that_no_program_could_open_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("x");
        // Directories whose names have 200 bytes, and a file that makes the whole path as long as `len`.
        let nar = |len: usize| {
            let mut writer = drover_nix::nar::Writer::new(Vec::new());
            writer.directory().unwrap();
            let mut left = len - to.as_os_str().len();
            let mut depth = 1;
            while left > 256 {
                writer.entry(&[b'd'; 200]).unwrap();
                writer.directory().unwrap();
                (left, depth) = (left - 201, depth + 1);
            }
            writer.entry(&vec![b'f'; left - 1]).unwrap();
            writer.file_bytes(false, b"x").unwrap();
            (0..depth).for_each(|_| writer.end_directory().unwrap());
            writer.finish().unwrap()
        };
        let longest = nar(MAX_PATH_LEN - 1);
        restore(&mut &longest[..], &to).unwrap();
        crate::fs::delete(&to).unwrap();
        let longer = nar(MAX_PATH_LEN);
        let why = restore(&mut &longer[..], &to).unwrap_err().to_string();
        assert!(why.contains("4096 bytes") && why.len() < 500, "{why}");
        crate::fs::delete(&to).unwrap();
    }

    #[test]
    fn threads_are_a_help_and_no_need() {
        let test = "fs::restore::tests::threads_are_a_help_and_no_need";
        crate::testing::without_threads(test, || {
            let mut writer = drover_nix::nar::Writer::new(Vec::new());
            writer.directory().unwrap();
            // More than all chunks of a feed hold.
            for number in 100..200 {
                writer.entry(number.to_string().as_bytes()).unwrap();
                writer.file_bytes(false, &[7; 50_000]).unwrap();
            }
            writer.end_directory().unwrap();
            let nar = writer.finish().unwrap();
            let dir = tempfile::tempdir().unwrap();
            let to = dir.path().join("x");
            let restored = exactly(&mut &nar[..], nar.len() as u64, &to).unwrap();
            assert_eq!(restored.nar_hash, Sha256::of(&nar));
            let refused = crate::fs::with_nar(&to, |_| ()).unwrap_err().to_string();
            assert!(refused.contains("start a thread"), "{refused}");
            crate::fs::delete(&to).unwrap();
        });
    }

    #[test]
    fn a_large_archive_is_hashed_apart() {
        let size = usize::try_from(crate::fs::feed::HASH_APART_FROM).unwrap() + 12_345;
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

    /// A stream whose descriptor may be taken from.
    struct Direct {
        input: std::fs::File,
        taken: u64,
    }

    impl Read for Direct {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            // Little at a time: the beginning of the contents comes with the tokens, the rest by itself.
            let most = buffer.len().min(5000);
            self.input.read(&mut buffer[..most])
        }
    }

    impl Stream for Direct {
        fn descriptor(&self) -> Option<BorrowedFd<'_>> {
            Some(self.input.as_fd())
        }

        fn taken(&mut self, count: u64) {
            self.taken += count;
        }
    }

    #[test]
    fn large_files_are_moved_from_a_pipe_and_read_from_anything_else() {
        let contents: Vec<u8> = (0..SPLICE_FROM + 12_345).map(|i| (i % 253) as u8).collect();
        let mut writer = drover_nix::nar::Writer::new(Vec::new());
        writer.directory().unwrap();
        for (name, contents) in [("a", &contents[..10]), ("b", &contents), ("c", &contents), ("d", b"")] {
            writer.entry(name.as_bytes()).unwrap();
            writer.file_bytes(false, contents).unwrap();
        }
        writer.end_directory().unwrap();
        let nar = writer.finish().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let (from, mut sender) = std::io::pipe().unwrap();
        let mut output = std::fs::File::from(OwnedFd::from(from));
        let stored = dir.path().join("nar");
        std::fs::write(&stored, &nar).unwrap();
        let sent = [&nar[..], b"next"].concat();
        let sending = std::thread::spawn(move || sender.write_all(&sent).unwrap());
        for (input, moved) in
            [(output.try_clone().unwrap(), true), (std::fs::File::open(&stored).unwrap(), false)]
        {
            let to = dir.path().join(format!("moved-{moved}"));
            let mut stream = Direct { input, taken: 0 };
            let restored = exactly(&mut stream, nar.len() as u64, &to).unwrap();
            assert_eq!((restored.nar_hash, restored.nar_size), (Sha256::of(&nar), nar.len() as u64));
            assert_eq!(stream.taken > SPLICE_FROM, moved, "{}", stream.taken);
            for name in ["b", "c"] {
                assert_eq!(std::fs::read(to.join(name)).unwrap(), contents);
            }
            assert_eq!(std::fs::symlink_metadata(to.join("c")).unwrap().mode() & 0o7777, 0o444);
            crate::fs::delete(&to).unwrap();
        }
        sending.join().unwrap();
        let mut rest = Vec::new();
        output.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, b"next");
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
