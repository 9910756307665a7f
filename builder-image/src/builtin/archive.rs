//! Unpacks tar archives that nobody vouches for: whatever their members are called, nothing is made, changed or read
//! outside of the directory that they are unpacked to (CVE-2026-44029). Each directory on a member's way is opened from
//! the one above it, never through a symlink. Metadata is not kept but for "executable": no owner, time, set-user-ID bit.
//!
//! Like Nix (libutil/tarfile.cc): absolute names are taken as relative ones; `..`, and ways through symlinks, are errors.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use tar::EntryType;

/// Bytes of a member's name, which is more than the kernel takes at once.
const MAX_NAME_LEN: usize = 16 << 10;
const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Unpacks `archive` into the directory `to`, which is there.
pub(super) fn unpack(archive: impl Read, to: &Path) -> Result<()> {
    let top = rustix::fs::open(to, DIRECTORY, Mode::empty())
        .with_context(|| format!("cannot open {}", to.display()))?;
    let mut unpacker = Unpacker { top, last: None };
    let mut archive = tar::Archive::new(archive);
    for member in archive.entries().context("cannot read the archive")? {
        let mut member = member.context("cannot read the archive")?;
        let name = member.path_bytes().into_owned();
        let shown = || String::from_utf8_lossy(&name[..name.len().min(MAX_NAME_LEN)]).into_owned();
        unpacker
            .member(&mut member, &name)
            .with_context(|| format!("cannot unpack the member '{}'", shown()))?;
    }
    Ok(())
}

struct Unpacker {
    top: OwnedFd,
    /// The directory of the last member: the next one is often beside it.
    last: Option<(Vec<Vec<u8>>, OwnedFd)>,
}

impl Unpacker {
    fn member<R: Read>(&mut self, member: &mut tar::Entry<'_, R>, name: &[u8]) -> Result<()> {
        let kind = member.header().entry_type();
        if kind.is_pax_global_extensions() {
            // Comments for the whole archive, such as the commit that it was made from.
            return Ok(());
        }
        if let Some(extensions) = member.pax_extensions()? {
            for extension in extensions {
                if extension?.key_bytes().starts_with(b"GNU.sparse.") {
                    bail!("sparse files in this format are not supported");
                }
            }
        }
        let path = components(name)?;
        let Some((last, way)) = path.split_last() else {
            return if kind.is_dir() { Ok(()) } else { bail!("it has no name") };
        };
        // Before there was a type for directories, a slash at the end said it.
        if kind.is_dir() || (kind.is_file() && name.ends_with(b"/")) {
            return self.directory(&path).map(drop);
        }
        match kind {
            EntryType::Symlink => {
                let target = member.link_name_bytes().context("a symlink without a target")?.into_owned();
                let parent = self.directory(way)?;
                place(parent, last, &|| rustix::fs::symlinkat(target.as_slice(), parent, last.as_slice()))
            }
            EntryType::Link => {
                let target = member.link_name_bytes().context("a hard link without a target")?.into_owned();
                let target = components(&target).context("the hard link's target")?;
                let (target_name, target_way) = target.split_last().context("a hard link to no file")?;
                let target_parent = rustix::io::fcntl_dupfd_cloexec(self.directory(target_way)?, 0)?;
                let parent = self.directory(way)?;
                if target != path {
                    // Does not follow a symlink that is the target itself.
                    place(parent, last, &|| {
                        let (from, to) = (target_name.as_slice(), last.as_slice());
                        rustix::fs::linkat(&target_parent, from, parent, to, AtFlags::empty())
                    })?;
                }
                Ok(())
            }
            EntryType::Char | EntryType::Block | EntryType::Fifo => {
                bail!("it is a device or a pipe, which no store object can be")
            }
            // What is of an unknown type shall be taken for a file (POSIX, pax).
            _ => {
                let executable = member.header().mode().unwrap_or(0) & 0o100 != 0;
                let mode = Mode::from_raw_mode(if executable { 0o755 } else { 0o644 });
                let parent = self.directory(way)?;
                let mut file = None;
                place(parent, last, &|| {
                    let flags =
                        OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                    rustix::fs::openat(parent, last.as_slice(), flags, mode)
                })
                .map(|descriptor| file = Some(File::from(descriptor)))?;
                // Set by the line above, or that one has returned.
                let mut file = file.context("no file")?;
                io::copy(member, &mut file)?;
                Ok(())
            }
        }
    }

    /// Opens a directory below the top, and makes what is missing on the way.
    fn directory(&mut self, way: &[Vec<u8>]) -> Result<&OwnedFd> {
        if self.last.as_ref().is_none_or(|(at, _)| at != way) {
            let mut at = rustix::io::fcntl_dupfd_cloexec(&self.top, 0)?;
            for name in way {
                at = enter(&at, name)?;
            }
            self.last = Some((way.to_vec(), at));
        }
        Ok(self.last.as_ref().map_or(&self.top, |(_, directory)| directory))
    }
}

/// A member's name as the names of directories and its own. None is empty, `.` or `..`.
fn components(name: &[u8]) -> Result<Vec<Vec<u8>>> {
    if name.len() > MAX_NAME_LEN {
        bail!("its name is longer than {MAX_NAME_LEN} bytes");
    }
    let names = name.split(|byte| *byte == b'/').filter(|name| !name.is_empty() && *name != b".");
    names
        .map(|name| match name {
            b".." => bail!("its name has '..' in it"),
            name if name.contains(&0) => bail!("its name has a NUL byte in it"),
            name => Ok(name.to_vec()),
        })
        .collect()
}

/// Opens the directory `name`; makes it if nothing has that name.
fn enter(parent: &OwnedFd, name: &[u8]) -> Result<OwnedFd> {
    let open = || rustix::fs::openat(parent, name, DIRECTORY, Mode::empty());
    let shown = OsStr::from_bytes(name).display();
    let opened = match open() {
        Err(Errno::NOENT) => {
            rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755))
                .with_context(|| format!("cannot create the directory {shown}"))?;
            open()
        }
        other => other,
    };
    match opened {
        Ok(directory) => Ok(directory),
        // With both flags the kernel says the second of a symlink, too.
        Err(Errno::LOOP | Errno::NOTDIR) => {
            bail!("'{shown}' on its way is a symlink or a file, and no directory")
        }
        Err(errno) => Err(errno).with_context(|| format!("cannot open the directory {shown}")),
    }
}

/// Makes something by `make`. What has the name already makes room, but for a directory with something in it.
fn place<T>(parent: &OwnedFd, name: &[u8], make: &dyn Fn() -> rustix::io::Result<T>) -> Result<T> {
    match make() {
        Err(Errno::EXIST) => {}
        other => return Ok(other?),
    }
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Err(Errno::ISDIR) => rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR),
        other => other,
    }
    .context("cannot replace an earlier member of this name")?;
    Ok(make()?)
}

#[cfg(test)]
mod tests;
