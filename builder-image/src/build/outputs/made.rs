//! What a builder made of one output: taken from it, given the metadata that store objects have, hashed and scanned.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, BufReader, Read, Write};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use drover_nix::hash::Sha256Hasher;
use drover_nix::references::RefScanner;
use drover_nix::rewrite::HashRewriter;
use drover_nix::{OutputName, Sha256, StorePath};
use drover_store::TempDir;
use drover_store::fs::SeenInodes;

use super::{Finished, Rewrites};
use crate::build::cancel::Interest;
use crate::build::targets::Target;
use crate::error::Error;

/// How much of a file is scanned at once.
const CHUNK: usize = 128 << 10;

/// An output with canonical metadata, somewhere where nobody else can change it.
pub(super) struct Made {
    pub from: PathBuf,
    /// Keeps a copy's directory alive until the copy has been moved out of it.
    _copied_into: Option<TempDir>,
    pub nar_hash: Sha256,
    pub nar_size: u64,
    /// What is mentioned in it of what it may refer to, by scratch paths.
    pub found: BTreeSet<StorePath>,
    /// The same, or nothing where the derivation discards its references.
    pub references: BTreeSet<StorePath>,
}

impl Finished<'_> {
    /// Checks what must hold of an output's top before anything is done to it, then canonicalises all of it.
    pub(super) fn take_over(
        &self,
        name: &OutputName,
        target: &Target,
        seen: &mut SeenInodes,
    ) -> Result<PathBuf, Error> {
        let (path, place) = (&target.scratch, self.scratch.outside(&target.scratch));
        self.examine(name, path, &place)?;
        let uids = self.ids.foreign().map(|(uid, _)| uid..=uid);
        drover_store::fs::canonicalise(&place, uids, seen).map_err(|error| match error {
            drover_store::Error::BadFile { .. } => {
                Error::output(format!("output '{}' cannot be a store object: {error}", self.full(path)))
            }
            other => other.into(),
        })?;
        Ok(place)
    }

    fn examine(&self, name: &OutputName, path: &StorePath, place: &Path) -> Result<(), Error> {
        let full = self.full(path);
        let metadata = fs::symlink_metadata(place).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Error::output(format!(
                "builder for '{}' failed to produce output path '{full}' (output `{name}`)",
                self.full(self.drv_path)
            )),
            _ => Error::file("examine", place)(error),
        })?;
        let foreign = self.ids.foreign().is_some_and(|(uid, _)| metadata.uid() != uid);
        let open = !metadata.is_symlink() && metadata.mode() & 0o022 != 0;
        if foreign || open {
            return Err(Error::output(format!(
                "suspicious ownership or permission on '{full}' (uid {}, mode {:04o}): an output belongs to the build's \
                 user and is writable by nobody else",
                metadata.uid(),
                metadata.mode() & 0o7777
            )));
        }
        Ok(())
    }

    /// Hashes an output and finds what it mentions. What a builder with the network made is copied: what is hashed is
    /// what was written, to files that nobody else can have open.
    pub(super) fn scan(&self, name: &OutputName, place: PathBuf) -> Result<Made, Error> {
        let scratch = self.targets.values().map(|target| &target.scratch);
        let candidates = self.inputs.iter().chain(scratch).cloned();
        let mut scanner = RefScanner::new(candidates);
        let kind = self.drv.kind()?;
        let mut made = if kind.is_sandboxed() {
            let hasher = Sha256Hasher::new();
            let mut tee = Tee { scanner, hasher, size: 0, interest: self.interest };
            let dumped = drover_store::fs::dump(&place, &mut tee);
            self.interest.check()?;
            dumped?;
            let (found, nar_hash) = (tee.scanner.found(), tee.hasher.finish());
            let (nar_size, references) = (tee.size, BTreeSet::new());
            Made { from: place, _copied_into: None, nar_hash, nar_size, found, references }
        } else {
            let mut made = self.copy(&place, &Rewrites::new(), Some(&mut scanner))?;
            made.found = scanner.found();
            made
        };
        if !self.attributes.discards_references()?.contains(name.as_str()) {
            made.references = made.found.clone();
        }
        Ok(made)
    }

    /// Replaces scratch paths by others in all of an output.
    pub(super) fn rewrite(&self, made: Made, rewrites: &Rewrites) -> Result<Made, Error> {
        let copy = self.copy(&made.from, rewrites, None)?;
        Ok(Made { found: made.found, references: made.references, ..copy })
    }

    /// A copy in inodes that nobody else can have open.
    fn copy(
        &self,
        from: &Path,
        rewrites: &Rewrites,
        scanner: Option<&mut RefScanner>,
    ) -> Result<Made, Error> {
        let dir = self.store.temp_dir()?;
        let to = dir.path().join("x");
        let written = drover_store::fs::with_stream(
            |output| {
                let mut rewriter = HashRewriter::new(rewrites, output);
                drover_store::fs::dump(from, &mut rewriter)?;
                let failed = |source| {
                    let source = drover_nix::Error::NarIo { act: "write", source };
                    drover_store::Error::Archive { act: "write", source }
                };
                rewriter.finish().map(drop).map_err(failed)
            },
            |nar| {
                let inner = BufReader::with_capacity(CHUNK, nar);
                drover_store::fs::restore(&mut Scanned { inner, scanner, interest: self.interest }, &to)
            },
        );
        self.interest.check()?;
        let restored = written?.map_err(|error| match error {
            // What was packed a moment ago is in order, but for names that now sort in another way.
            drover_store::Error::Archive { source: drover_nix::Error::Nar { .. }, .. } => Error::output(format!(
                "an output has temporary paths among the names of its files, and is in disorder with the final ones: {error}"
            )),
            other => other.into(),
        })?;
        Ok(Made {
            from: to,
            _copied_into: Some(dir),
            nar_hash: restored.nar_hash,
            nar_size: restored.nar_size,
            found: BTreeSet::new(),
            references: BTreeSet::new(),
        })
    }
}

/// Scans, hashes and counts, as long as somebody wants the result.
struct Tee<'a> {
    scanner: RefScanner,
    hasher: Sha256Hasher,
    size: u64,
    interest: &'a Interest<'a>,
}

impl Write for Tee<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        wanted(self.interest)?;
        self.scanner.feed(bytes);
        self.hasher.update(bytes);
        self.size += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Passes on what is read, as long as somebody wants the result, and scans it.
pub(super) struct Scanned<'a, R> {
    pub inner: R,
    pub scanner: Option<&'a mut RefScanner>,
    pub interest: &'a Interest<'a>,
}

impl<R: Read> Read for Scanned<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        wanted(self.interest)?;
        let count = self.inner.read(buffer)?;
        if let Some(scanner) = &mut self.scanner {
            scanner.feed(&buffer[..count]);
        }
        Ok(count)
    }
}

/// Stops a stream of which nobody wants the end any more.
fn wanted(interest: &Interest<'_>) -> io::Result<()> {
    if interest.is_over() { Err(io::Error::other("nobody wants this any more")) } else { Ok(()) }
}
