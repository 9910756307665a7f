//! A store in memory, for tests of sessions: this crate's own and those of crates that use the client.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write};

use drover_nix::{BasicDerivation, PathInfo, Sha256, StorePath, nar};

use crate::{Backend, BoxError, BuildOptions, BuildResult, BuildStatus, ReceivedPath};

/// What BuildDerivation does: may add paths to the store, and says how it ended.
pub type Builder =
    Box<dyn FnMut(&mut MemoryStore, &StorePath, &BasicDerivation, &BuildOptions) -> BuildResult + Send>;

/// What DumpStorePathFrames gives: frames from what the NAR has behind the offset.
pub type Framer = Box<dyn FnMut(&[u8]) -> Vec<Vec<u8>> + Send>;

/// Valid paths with their NARs, and a record of what was asked.
#[derive(Default)]
pub struct MemoryStore {
    pub paths: BTreeMap<StorePath, (PathInfo, Vec<u8>)>,
    /// Paths that `substitute` can make valid.
    pub substitutable: BTreeMap<StorePath, (PathInfo, Vec<u8>)>,
    pub locked: BTreeSet<StorePath>,
    /// Commands in the order that they came, by name, with the path that they are about.
    pub calls: Vec<String>,
    pub builder: Option<Builder>,
    /// None: the store compresses nothing.
    pub framer: Option<Framer>,
}

impl MemoryStore {
    /// Adds a path without any check. Returns what is known about it.
    pub fn insert(&mut self, path: StorePath, references: &[&StorePath], nar: Vec<u8>) -> PathInfo {
        let info = info_of(path, references, &nar);
        self.paths.insert(info.path.clone(), (info.clone(), nar));
        info
    }

    fn get(&self, path: &StorePath) -> Result<&(PathInfo, Vec<u8>), BoxError> {
        self.paths.get(path).ok_or_else(|| format!("path {path} is not valid").into())
    }
}

/// Metadata that fits a NAR.
pub fn info_of(path: StorePath, references: &[&StorePath], nar: &[u8]) -> PathInfo {
    PathInfo {
        path,
        nar_hash: Sha256::of(nar),
        nar_size: nar.len() as u64,
        references: references.iter().copied().cloned().collect(),
        deriver: None,
        signatures: Vec::new(),
        ca: None,
    }
}

/// The NAR of a regular file.
pub fn file_nar(contents: &[u8]) -> Vec<u8> {
    let mut writer = nar::Writer::new(Vec::new());
    // Writing to memory does not fail, and one file is a complete archive.
    writer.file(false, contents.len() as u64, contents).unwrap_or_else(|_| unreachable!());
    writer.finish().unwrap_or_else(|_| unreachable!())
}

impl Backend for MemoryStore {
    fn query_valid_paths(
        &mut self,
        paths: &BTreeSet<StorePath>,
        lock: bool,
        substitute: bool,
    ) -> Result<BTreeSet<StorePath>, BoxError> {
        self.calls.push(format!("query-valid-paths lock={lock} substitute={substitute}"));
        if lock {
            self.locked.extend(paths.iter().cloned());
        }
        if substitute {
            let fetched =
                paths.iter().filter_map(|path| Some((path.clone(), self.substitutable.get(path)?.clone())));
            let fetched: Vec<_> = fetched.collect();
            self.paths.extend(fetched);
        }
        Ok(paths.iter().filter(|path| self.paths.contains_key(path)).cloned().collect())
    }

    fn path_info(&mut self, path: &StorePath) -> Result<Option<PathInfo>, BoxError> {
        self.calls.push(format!("path-info {path}"));
        Ok(self.paths.get(path).map(|(info, _)| info.clone()))
    }

    fn dump(&mut self, path: &StorePath, nar: &mut dyn Write) -> Result<(), BoxError> {
        self.calls.push(format!("dump {path}"));
        Ok(nar.write_all(&self.get(path)?.1)?)
    }

    fn makes_frames(&self) -> bool {
        self.framer.is_some()
    }

    fn dump_frames(
        &mut self,
        path: &StorePath,
        offset: u64,
        frames: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<(), BoxError> {
        self.calls.push(format!("dump-frames {path} {offset}"));
        let (_, nar) = self.paths.get(path).ok_or_else(|| format!("path {path} is not valid"))?;
        let rest = usize::try_from(offset).ok().and_then(|offset| nar.get(offset..));
        let rest = rest.ok_or("the path has fewer bytes")?;
        let framer = self.framer.as_mut().ok_or("this store does not compress")?;
        Ok(framer(rest).iter().try_for_each(|frame| frames(frame))?)
    }

    fn add_nar(&mut self, path: ReceivedPath, nar: &mut dyn Read) -> Result<(), BoxError> {
        let info = path.info;
        self.calls.push(format!("add-nar {}", info.path));
        if self.paths.contains_key(&info.path) {
            return Ok(());
        }
        let mut bytes = Vec::new();
        nar.read_to_end(&mut bytes)?;
        nar::Reader::new(bytes.as_slice()).skip_all()?;
        if (Sha256::of(&bytes), bytes.len() as u64) != (info.nar_hash, info.nar_size) {
            return Err(format!("the NAR of {} is not what was announced", info.path).into());
        }
        if let Some(missing) = info.other_references().find(|path| !self.paths.contains_key(path)) {
            return Err(format!("reference {missing} of {} is not valid", info.path).into());
        }
        self.paths.insert(info.path.clone(), (info, bytes));
        Ok(())
    }

    fn build_derivation(
        &mut self,
        drv_path: &StorePath,
        derivation: &BasicDerivation,
        options: &BuildOptions,
    ) -> Result<BuildResult, BoxError> {
        self.calls.push(format!("build-derivation {drv_path}"));
        let Some(mut builder) = self.builder.take() else {
            return Ok(BuildResult::failure(BuildStatus::InputRejected, "this store builds nothing"));
        };
        let result = builder(self, drv_path, derivation, options);
        self.builder = Some(builder);
        Ok(result)
    }

    fn query_closure(
        &mut self,
        paths: &BTreeSet<StorePath>,
        _include_outputs: bool,
    ) -> Result<BTreeSet<StorePath>, BoxError> {
        let mut closure = BTreeSet::new();
        let mut pending: Vec<StorePath> = paths.iter().cloned().collect();
        while let Some(path) = pending.pop() {
            if closure.insert(path.clone()) {
                pending.extend(self.get(&path)?.0.references.iter().cloned());
            }
        }
        Ok(closure)
    }

    fn spool(&mut self) -> Result<std::fs::File, BoxError> {
        Ok(tempfile::tempfile()?)
    }
}
