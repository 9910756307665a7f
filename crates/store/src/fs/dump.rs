//! Packing a tree into a NAR.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use drover_nix::nar::Writer;
use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::{OPEN_DIRECTORY, below, list, open_parent};
use crate::Error;

/// From which size on the kernel moves a file's contents. Smaller ones are cheaper to gather with what is around them.
const SEND_FROM: u64 = 64 << 10;
/// Bytes that pass between two threads at a time: what a pipe holds, and twice that on either side.
const PIPE_STEP: usize = 128 << 10;
/// Most bytes that the kernel is asked to move at a time.
const SEND_STEP: usize = 16 << 20;

/// Writes the NAR of the file, directory or symlink at `path`. Returns the archive's size. A file counts as executable
/// if its owner may execute it.
pub fn dump(path: &Path, output: &mut dyn Write) -> Result<u64, Error> {
    let (parent, name) = open_parent(path)?;
    dump_in(parent.as_fd(), name, path, output)
}

/// Has `read` read the NAR of the tree at `path`. See [`with_stream`].
pub fn with_nar<T>(path: &Path, read: impl FnOnce(&mut dyn Read) -> T) -> Result<T, Error> {
    with_stream(|output| dump(path, output).map(drop), read)
}

/// Has `read` read what `write` writes meanwhile in another thread. What is left unread does not matter; what the
/// writing fails of does, since `read` then has read a piece only.
pub fn with_stream<T>(
    write: impl FnOnce(&mut dyn Write) -> Result<(), Error> + Send,
    read: impl FnOnce(&mut dyn Read) -> T,
) -> Result<T, Error> {
    let (reader, writer) = io::pipe().map_err(Error::io("make", "a pipe"))?;
    std::thread::scope(|scope| {
        let pack = move || {
            let mut writer = BufWriter::with_capacity(PIPE_STEP, writer);
            write(&mut writer)?;
            writer.flush().map_err(|source| failed(drover_nix::Error::NarIo { act: "write", source }))
        };
        let packer =
            std::thread::Builder::new().spawn_scoped(scope, pack).map_err(Error::io("start", "a thread"))?;
        let mut reader = BufReader::with_capacity(PIPE_STEP, reader);
        let result = read(&mut reader);
        // A packer that waits for room shall not wait for ever.
        drop(reader);
        match packer.join() {
            Ok(Err(error)) if !is_left_unread(&error) => Err(error),
            Ok(_) => Ok(result),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// [`dump`] of what is named `name` in an open directory; `path` is for messages.
pub(crate) fn dump_in(
    parent: BorrowedFd<'_>,
    name: impl AsRef<OsStr>,
    path: &Path,
    output: &mut dyn Write,
) -> Result<u64, Error> {
    pack(output, parent, name.as_ref(), path, |writer, file, executable, size| {
        writer.file(executable, size, Regular { file, left: size, ended: false })
    })
}

/// [`dump_in`] to a descriptor, to which the kernel moves large contents by itself.
pub(crate) fn dump_to(
    parent: BorrowedFd<'_>,
    name: impl AsRef<OsStr>,
    path: &Path,
    output: BorrowedFd<'_>,
) -> Result<u64, Error> {
    pack(Descriptor(output), parent, name.as_ref(), path, |writer, file, executable, size| match size {
        SEND_FROM.. => writer.file_through(executable, size, |output| send(file, output.0, size)),
        _ => writer.file(executable, size, Regular { file, left: size, ended: false }),
    })
}

/// Writes one regular file of a known size.
trait Contents<W>: FnMut(&mut Writer<W>, &File, bool, u64) -> Result<(), drover_nix::Error> {}

impl<W, F: FnMut(&mut Writer<W>, &File, bool, u64) -> Result<(), drover_nix::Error>> Contents<W> for F {}

fn pack<W: Write>(
    output: W,
    parent: BorrowedFd<'_>,
    name: &OsStr,
    path: &Path,
    mut contents: impl Contents<W>,
) -> Result<u64, Error> {
    let mut writer = Writer::new(output);
    node(&mut writer, parent, name, FileType::Unknown, path, &mut contents)?;
    let size = writer.offset();
    writer.finish().map_err(failed)?;
    Ok(size)
}

/// The writer refuses what nests too deeply, which bounds the recursion.
fn node<W: Write>(
    writer: &mut Writer<W>,
    parent: BorrowedFd<'_>,
    name: &OsStr,
    kind: FileType,
    path: &Path,
    contents: &mut impl Contents<W>,
) -> Result<(), Error> {
    let kind = match kind {
        FileType::Unknown => {
            let stat = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)
                .map_err(Error::sys("examine", path))?;
            FileType::from_raw_mode(stat.st_mode)
        }
        known => known,
    };
    match kind {
        FileType::RegularFile => {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file: File = rustix::fs::openat(parent, name, flags, Mode::empty())
                .map_err(Error::sys("open", path))?
                .into();
            let stat = rustix::fs::fstat(&file).map_err(Error::sys("examine", path))?;
            let size = u64::try_from(stat.st_size).unwrap_or(0);
            let executable = Mode::from_raw_mode(stat.st_mode).contains(Mode::XUSR);
            contents(writer, &file, executable, size).map_err(failed)
        }
        FileType::Symlink => {
            let target = rustix::fs::readlinkat(parent, name, Vec::new())
                .map_err(Error::sys("read the symlink", path))?;
            writer.symlink(target.as_bytes()).map_err(failed)
        }
        FileType::Directory => {
            let directory = rustix::fs::openat(parent, name, OPEN_DIRECTORY, Mode::empty())
                .map_err(Error::sys("open the directory", path))?;
            let mut entries = list(directory.as_fd(), path)?;
            entries.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
            writer.directory().map_err(failed)?;
            for (name, kind) in entries {
                writer.entry(name.as_bytes()).map_err(failed)?;
                let path = below(path, name.as_bytes());
                node(writer, directory.as_fd(), &name, kind, &path, contents)?;
            }
            writer.end_directory().map_err(failed)
        }
        _ => {
            let why = "it is neither a regular file nor a directory nor a symlink".into();
            Err(Error::BadFile { path: path.into(), why })
        }
    }
}

/// A regular file, which is known to end where its size says and a read gives less than was asked for: one call fewer
/// for each small file.
struct Regular<'a> {
    file: &'a File,
    left: u64,
    ended: bool,
}

impl Read for Regular<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.ended {
            return Ok(0);
        }
        let count = self.file.read(buffer)?;
        self.left = self.left.saturating_sub(count as u64);
        self.ended = self.left == 0 && count < buffer.len();
        Ok(count)
    }
}

/// An open pipe, socket or file of someone else's.
struct Descriptor<'a>(BorrowedFd<'a>);

impl Write for Descriptor<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::io::write(self.0, bytes)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Has the kernel move `size` bytes, or moves them where it cannot. Says how many there were, if there were fewer.
fn send(file: &File, output: BorrowedFd<'_>, size: u64) -> io::Result<u64> {
    let mut sent = 0;
    while sent < size {
        let step = usize::try_from(size - sent).unwrap_or(SEND_STEP).min(SEND_STEP);
        match rustix::fs::sendfile(output, file, None, step) {
            Ok(0) => break,
            Ok(count) => sent += count as u64,
            Err(Errno::INTR) => {}
            Err(Errno::INVAL | Errno::NOSYS) => {
                sent += io::copy(&mut Read::take(file, size - sent), &mut Descriptor(output))?;
                break;
            }
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(sent)
}

/// Whether an archive could not be written since nobody reads it any more.
fn is_left_unread(error: &Error) -> bool {
    match error {
        Error::Archive { source: drover_nix::Error::NarIo { source, .. }, .. } => {
            source.kind() == io::ErrorKind::BrokenPipe
        }
        _ => false,
    }
}

fn failed(source: drover_nix::Error) -> Error {
    Error::Archive { act: "write", source }
}

#[cfg(test)]
mod tests {
    use drover_nix::Sha256;

    use super::*;

    #[test]
    fn the_archive_of_a_known_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hello");
        std::fs::write(&path, "hello\n").unwrap();
        let mut nar = Vec::new();
        assert_eq!(dump(&path, &mut nar).unwrap(), 120);
        assert_eq!(
            Sha256::of(&nar).to_hex(),
            "1c37d01af40be2e80691de3cc3df44377a699afbb17c68f080964b2fd071fc13"
        );
    }

    #[test]
    fn what_has_no_archive() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("t");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert!(matches!(dump(dir.path(), &mut Vec::new()), Err(Error::BadFile { .. })));
        assert!(dump(&dir.path().join("missing"), &mut Vec::new()).is_err());
        let deep = dir.path().join("d/".repeat(drover_nix::nar::MAX_DEPTH + 1));
        std::fs::create_dir_all(deep).unwrap();
        assert!(dump(&dir.path().join("d"), &mut Vec::new()).is_err());
    }

    #[test]
    fn a_reader_gets_the_archive_or_the_reason_why_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, vec![7; 1 << 20]).unwrap();
        let mut nar = Vec::new();
        dump(&path, &mut nar).unwrap();
        let read = with_nar(&path, |stream| {
            let mut read = Vec::new();
            stream.read_to_end(&mut read).map(|_| read)
        });
        assert_eq!(read.unwrap().unwrap(), nar);
        assert_eq!(with_nar(&path, |_| "no more than that").unwrap(), "no more than that");
        assert!(with_nar(&dir.path().join("missing"), |_| ()).is_err());
    }
}
