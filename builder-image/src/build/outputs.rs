//! From what a builder left behind to valid store paths (Nix: derivation-builder.cc, registerOutputs): collect,
//! canonicalise, hash and scan, check, move into the store, register. The builder and all of its processes are dead
//! when this begins; for those with network access something outside may still hold their files open, so theirs are
//! copied.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Permissions};
use std::io::{self, BufReader, Write};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use drover_nix::hash::{Hasher, Sha256Hasher};
use drover_nix::references::RefScanner;
use drover_nix::{
    BasicDerivation, ContentAddress, DerivationOutput, Hash, HashAlgo, Method, OutputName, PathInfo, Sha256,
    StorePath,
};
use drover_store::fs::SeenInodes;
use drover_store::{LocalStore, TempDir, ValidPath};
use serde_json::Value;

use super::attrs::Attributes;
use super::cancel::Interest;
use super::checks;
use super::ids::BuildIds;
use super::scratch::Scratch;
use crate::error::Error;

/// How much of a file is hashed at once.
const CHUNK: usize = 128 << 10;

/// A finished build.
pub(crate) struct Finished<'a> {
    pub store: &'a LocalStore,
    pub drv_path: &'a StorePath,
    pub drv: &'a BasicDerivation,
    pub attributes: &'a Attributes<'a>,
    pub scratch: &'a Scratch,
    pub ids: &'a BuildIds,
    /// Outputs that were not valid before the build.
    pub outputs: &'a BTreeMap<OutputName, StorePath>,
    /// The closure of the derivation's inputs: what outputs may refer to, beside each other.
    pub inputs: &'a BTreeSet<StorePath>,
    /// Large outputs take a while, and nobody may want them any more.
    pub interest: &'a Interest<'a>,
}

/// An output that is ready to be moved to where it belongs.
struct Collected {
    from: PathBuf,
    info: PathInfo,
    /// Keeps a copy's directory alive until the copy has been moved out of it.
    _copied_into: Option<TempDir>,
}

impl Finished<'_> {
    /// Makes all outputs valid, or none.
    pub(crate) fn register(&self) -> Result<(), Error> {
        let mut seen = SeenInodes::default();
        let mut places = BTreeMap::new();
        for (name, path) in self.outputs {
            let place = self.scratch.outside(path);
            self.examine(name, path, &place)?;
            let uids = self.ids.foreign().map(|(uid, _)| uid..=uid);
            drover_store::fs::canonicalise(&place, uids, &mut seen).map_err(|error| match error {
                drover_store::Error::BadFile { .. } => {
                    Error::output(format!("output '{}' cannot be a store object: {error}", self.full(path)))
                }
                other => other.into(),
            })?;
            places.insert(name.clone(), place);
        }
        let mut collected = BTreeMap::new();
        for (name, place) in places {
            collected.insert(name.clone(), self.collect(&name, place)?);
        }
        let infos = collected.iter().map(|(name, output)| (name.clone(), output.info.clone())).collect();
        let known = |path: &StorePath| {
            self.store
                .path_info(path)?
                .ok_or_else(|| drover_store::Error::NotValid { path: path.clone() }.into())
        };
        checks::Outputs { dir: self.store.store_dir(), infos: &infos, known: &known }
            .check(self.attributes)?;
        let placed = collected.values().try_for_each(|output| self.place(output));
        let valid = infos.into_values().map(|info| ValidPath { info, ultimate: true, registration_time: 0 });
        let registered = placed.and_then(|()| Ok(self.store.register(&valid.collect::<Vec<_>>())?));
        if registered.is_err() {
            for output in collected.values() {
                // Not valid, so that what is left behind is deleted by the next build or the next collection.
                let _left_behind = drover_store::fs::delete(&self.store.real_path(&output.info.path));
            }
        }
        registered
    }

    fn full(&self, path: &StorePath) -> String {
        self.store.store_dir().full(path)
    }

    /// What must hold of an output's top before anything is done to it.
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

    /// Hashes and scans one output, and proves a fixed one.
    fn collect(&self, name: &OutputName, place: PathBuf) -> Result<Collected, Error> {
        // Only names that are declared come here.
        let path = self.outputs[name].clone();
        let candidates = self.inputs.iter().chain(self.outputs.values()).cloned();
        let mut tee = Tee {
            scanner: RefScanner::new(candidates),
            hasher: Sha256Hasher::new(),
            size: 0,
            interest: self.interest,
        };
        let fixed = match &self.drv.outputs[name] {
            DerivationOutput::CaFixed(ca) => Some(ca),
            _ => None,
        };
        let (from, copied_into, nar_hash, nar_size, references) = if fixed.is_some() {
            let dir = self.store.temp_dir()?;
            let copy = dir.path().join("x");
            let (restored, references) = copy_tree(&place, &copy, tee.scanner, self.interest)?;
            (copy, Some(dir), restored.nar_hash, restored.nar_size, references)
        } else {
            let dumped = drover_store::fs::dump(&place, &mut tee);
            self.interest.check()?;
            dumped?;
            (place, None, tee.hasher.finish(), tee.size, tee.scanner.found())
        };
        let references = if self.discards_references(name) { BTreeSet::new() } else { references };
        if let Some(ca) = fixed {
            self.prove(&path, ca, &from, nar_hash, &references)?;
        }
        let info = PathInfo {
            path,
            nar_hash,
            nar_size,
            references,
            deriver: Some(self.drv_path.clone()),
            signatures: Vec::new(),
            ca: fixed.cloned(),
        };
        Ok(Collected { from, info, _copied_into: copied_into })
    }

    /// A fixed output has the hash that it was declared with, and refers to nothing.
    fn prove(
        &self,
        path: &StorePath,
        ca: &ContentAddress,
        place: &Path,
        nar_hash: Sha256,
        references: &BTreeSet<StorePath>,
    ) -> Result<(), Error> {
        let got = match (ca.method, ca.hash.algo) {
            (Method::Nar, HashAlgo::Sha256) => Hash::from(nar_hash),
            (Method::Nar, algo) => {
                let mut hasher = Hasher::new(algo);
                drover_store::fs::dump(place, &mut hasher)?;
                hasher.finish()
            }
            (Method::Flat | Method::Text, algo) => self.hash_flat(path, place, algo)?,
            (Method::Git, _) => {
                return Err(Error::input("outputs that are hashed as git does are not supported"));
            }
        };
        if got != ca.hash {
            return Err(Error::output(format!(
                "hash mismatch in fixed-output derivation '{}':\n  specified: {}\n     got:    {}",
                self.full(self.drv_path),
                ca.hash.to_sri(),
                got.to_sri()
            )));
        }
        if !references.is_empty() {
            let list: Vec<String> = references.iter().map(|path| self.full(path)).collect();
            return Err(Error::output(format!(
                "fixed-output derivation '{}' must not reference store paths but refers to:\n  {}",
                self.full(self.drv_path),
                list.join("\n  ")
            )));
        }
        Ok(())
    }

    fn hash_flat(&self, path: &StorePath, place: &Path, algo: HashAlgo) -> Result<Hash, Error> {
        let metadata = fs::symlink_metadata(place).map_err(Error::file("examine", place))?;
        if !metadata.is_file() || metadata.mode() & 0o100 != 0 {
            return Err(Error::output(format!(
                "output path '{}' should be a regular file that is not executable, since its hash is that of a flat file",
                self.full(path)
            )));
        }
        let mut file = fs::File::open(place).map_err(Error::file("open", place))?;
        let mut hasher = Hasher::new(algo);
        io::copy(&mut BufReader::with_capacity(CHUNK, &mut file), &mut hasher)
            .map_err(Error::file("read", place))?;
        Ok(hasher.finish())
    }

    fn discards_references(&self, name: &OutputName) -> bool {
        let structured = self.attributes.structured();
        let discard = structured.and_then(|map| map.get("unsafeDiscardReferences")?.get(name.as_str()));
        discard == Some(&Value::Bool(true))
    }

    /// Moves an output to its place, which we hold the lock of; what lies there is not valid.
    fn place(&self, output: &Collected) -> Result<(), Error> {
        let to = self.store.real_path(&output.info.path);
        drover_store::fs::delete(&to)?;
        let metadata = fs::symlink_metadata(&output.from).map_err(Error::file("examine", &output.from))?;
        let is_dir = metadata.is_dir();
        // Moving a directory writes its `..`, which takes the right to write to it unless one is root.
        if is_dir {
            set_mode(&output.from, 0o755)?;
        }
        fs::rename(&output.from, &to).map_err(Error::file("move an output to", &to))?;
        if is_dir {
            set_mode(&to, 0o555)?;
        }
        Ok(())
    }
}

/// Whether an output fixed by `ca` can be checked here at all. Asked before the build, not after it.
pub(crate) fn supported(ca: &ContentAddress) -> Result<(), Error> {
    if ca.method == Method::Git {
        return Err(Error::input("outputs that are hashed as git does are not supported"));
    }
    Ok(())
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

/// Stops a stream of which nobody wants the end any more.
fn wanted(interest: &Interest<'_>) -> io::Result<()> {
    if interest.is_over() { Err(io::Error::other("nobody wants this any more")) } else { Ok(()) }
}

/// Copies a tree into inodes that nobody else can have open. What is hashed is what is written.
fn copy_tree(
    from: &Path,
    to: &Path,
    mut scanner: RefScanner,
    interest: &Interest<'_>,
) -> Result<(drover_store::fs::Restored, BTreeSet<StorePath>), Error> {
    let (reader, writer) = io::pipe().map_err(Error::system("make a pipe"))?;
    std::thread::scope(|scope| {
        let dumper = scope.spawn(move || {
            let mut writer = io::BufWriter::with_capacity(CHUNK, writer);
            let dumped = drover_store::fs::dump(from, &mut writer).map_err(Error::from);
            dumped.and_then(|_| writer.flush().map_err(Error::system("copy an output")))
        });
        let mut reader =
            Scanned { inner: BufReader::with_capacity(CHUNK, reader), scanner: &mut scanner, interest };
        let restored = drover_store::fs::restore(&mut reader, to);
        // A dump that waits for a reader shall not wait for ever.
        drop(reader);
        let dumped = dumper
            .join()
            .map_err(|_| Error::system("copy an output")(io::Error::other("the copy panicked")))?;
        interest.check()?;
        match (restored, dumped) {
            (Ok(restored), Ok(())) => Ok(restored),
            (Err(error), Ok(())) => Err(error.into()),
            // A truncated archive is the effect of what the dump failed of; a dump that nobody reads is the effect.
            (Err(error), Err(_)) if error.category() != "nar" => Err(error.into()),
            (_, Err(error)) => Err(error),
        }
    })
    .map(|restored| (restored, scanner.found()))
}

struct Scanned<'a, R> {
    inner: R,
    scanner: &'a mut RefScanner,
    interest: &'a Interest<'a>,
}

impl<R: io::Read> io::Read for Scanned<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        wanted(self.interest)?;
        let count = self.inner.read(buffer)?;
        self.scanner.feed(&buffer[..count]);
        Ok(count)
    }
}

fn set_mode(path: &Path, mode: u32) -> Result<(), Error> {
    fs::set_permissions(path, Permissions::from_mode(mode)).map_err(Error::file("change the mode of", path))
}
