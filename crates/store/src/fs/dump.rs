//! Packing a tree into a NAR.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use drover_nix::nar::Writer;
use rustix::fs::{AtFlags, FileType, Mode, OFlags};

use super::{OPEN_DIRECTORY, below, list, open_parent};
use crate::Error;

/// Writes the NAR of the file, directory or symlink at `path`. Returns the archive's size. A file counts as executable
/// if its owner may execute it.
pub fn dump(path: &Path, output: &mut dyn Write) -> Result<u64, Error> {
    let (parent, name) = open_parent(path)?;
    let mut writer = Writer::new(output);
    node(&mut writer, parent.as_fd(), name, FileType::Unknown, path)?;
    let size = writer.offset();
    writer.finish().map_err(failed)?;
    Ok(size)
}

/// The writer refuses what nests too deeply, which bounds the recursion.
fn node(
    writer: &mut Writer<&mut dyn Write>,
    parent: BorrowedFd<'_>,
    name: &OsStr,
    kind: FileType,
    path: &Path,
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
            writer.file(executable, size, &file).map_err(failed)
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
                node(writer, directory.as_fd(), &name, kind, &below(path, name.as_bytes()))?;
            }
            writer.end_directory().map_err(failed)
        }
        _ => {
            let why = "it is neither a regular file nor a directory nor a symlink".into();
            Err(Error::BadFile { path: path.into(), why })
        }
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
}
