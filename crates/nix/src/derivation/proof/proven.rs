//! What was proven, in little memory: hashes and output paths of many derivations, and the files of the few that were asked
//! for last.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::convert::Infallible;
use std::sync::Arc;

use super::{DrvFile, MAX_DERIVATIONS, ProofError, compare};
use crate::derivation::modulo::{self, InputHash};
use crate::derivation::{BasicDerivation, Derivation, DerivationType, OutputName};
use crate::{Error, StoreDir, StorePath};

/// Derivations that are remembered, at least: a proof that begins forgets what was of no use for longest beyond these.
/// Each takes about 400 bytes.
const MAX_KEPT: usize = 100_000;
/// Bytes of `.drv` text whose derivations are kept whole, and how many.
const MAX_FILE_BYTES: usize = 8 << 20;
const MAX_FILES: usize = 2000;

/// Gives the text of a `.drv` file, or None if it is not to be had.
pub type ReadFile<'a, E> = dyn FnMut(&StorePath) -> Result<Option<Vec<u8>>, E> + 'a;

/// Derivations whose files and output paths were proven. What is in it stays true, so it may be kept and shared
/// between proofs.
pub struct Proven {
    entries: HashMap<StorePath, Entry>,
    /// Whole derivations, the one that was used last at the end; and the bytes of their files.
    files: VecDeque<Arc<DrvFile>>,
    file_bytes: usize,
    /// Counts proofs.
    now: u64,
    max_kept: usize,
}

struct Entry {
    hash: InputHash,
    /// None where the path is not known before the build.
    outputs: Box<[(OutputName, Option<StorePath>)]>,
    /// The last proof that it was used in.
    used: u64,
}

impl Default for Proven {
    fn default() -> Self {
        Self::keeping(MAX_KEPT)
    }
}

impl Proven {
    /// With another number of derivations that are remembered.
    pub fn keeping(max_kept: usize) -> Self {
        Self { entries: HashMap::new(), files: VecDeque::new(), file_bytes: 0, now: 0, max_kept }
    }

    /// How many derivations are in it.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// A proof begins, which is the time to forget: what it takes in, it may need.
    pub fn begin(&mut self) {
        self.now += 1;
        if self.entries.len() <= self.max_kept {
            return;
        }
        let mut ages: Vec<u64> = self.entries.values().map(|entry| entry.used).collect();
        let excess = ages.len() - self.max_kept / 2;
        let (_, last, _) = ages.select_nth_unstable(excess - 1);
        let last = *last;
        // Half of them, so that this is seldom; of those that were used together, any.
        let mut excess = excess;
        self.entries.retain(|_, entry| {
            let goes = excess > 0 && entry.used <= last;
            excess -= usize::from(goes);
            !goes
        });
        self.entries.shrink_to_fit();
    }

    /// Whether a derivation was proven.
    pub fn knows(&mut self, drv: &StorePath) -> bool {
        let now = self.now;
        self.entries.get_mut(drv).map(|entry| entry.used = now).is_some()
    }

    /// Whether [`Self::resolve`] and [`Self::entitles`] can answer for this one.
    pub fn is_ready(&mut self, drv: &StorePath) -> bool {
        if !self.knows(drv) {
            return false;
        }
        let Some(at) = self.files.iter().position(|file| file.path() == drv) else { return false };
        let Some(file) = self.files.remove(at) else { return false };
        self.files.push_back(Arc::clone(&file));
        file.inputs().all(|input| self.knows(input))
    }

    /// Inputs that have to be taken in before.
    pub fn lacks(&mut self, file: &DrvFile) -> Vec<StorePath> {
        file.inputs().filter(|input| !self.knows(input)).cloned().collect()
    }

    /// Proves the output paths of a derivation all of whose inputs have been proven.
    pub fn take_in(&mut self, dir: &StoreDir, file: &DrvFile) -> Result<(), ProofError<Infallible>> {
        let (path, drv) = (file.path(), file.derivation());
        let invalid = |source| ProofError::Invalid { drv: path.to_string(), source };
        let mut input = |input: &StorePath| self.input_hash(input);
        let outputs = drv.basic.output_paths(dir).map_err(invalid)?;
        if drv.basic.kind().map_err(invalid)? == DerivationType::InputAddressed {
            let Some(computed) = modulo::output_paths(dir, drv, &mut input).map_err(invalid)? else {
                let output = outputs.into_keys().next().unwrap_or_else(OutputName::out);
                return Err(ProofError::Deferred { drv: path.to_string(), output });
            };
            compare(dir, path.as_str(), &drv.basic, &outputs, &computed)?;
        }
        let hash = modulo::input_hash(dir, drv, &mut input).map_err(invalid)?;
        let outputs = outputs.into_iter().collect();
        self.entries.insert(path.clone(), Entry { hash, outputs, used: self.now });
        Ok(())
    }

    /// Keeps a derivation whole for a while, for [`Self::resolve`] and [`Self::entitles`].
    pub fn keep(&mut self, file: Arc<DrvFile>) {
        if let Some(at) = self.files.iter().position(|kept| kept.path() == file.path())
            && let Some(kept) = self.files.remove(at)
        {
            self.file_bytes -= kept.len();
        }
        self.file_bytes += file.len();
        self.files.push_back(file);
        // The last one stays, however large it is.
        while self.files.len() > 1 && (self.files.len() > MAX_FILES || self.file_bytes > MAX_FILE_BYTES) {
            let oldest = self.files.pop_front();
            self.file_bytes -= oldest.map_or(0, |file| file.len());
        }
    }

    /// Takes in the derivation `root` and all below it, one file after the other. `read` gives the text of a `.drv` file,
    /// or None if it is not to be had. On an error, what was proven before it is kept.
    pub fn prove<E>(
        &mut self,
        dir: &StoreDir,
        root: &StorePath,
        read: &mut ReadFile<'_, E>,
    ) -> Result<(), ProofError<E>> {
        self.begin();
        if self.is_ready(root) {
            return Ok(());
        }
        // Depth first without recursion: a chain may be thousands of derivations long. A derivation stays on the
        // stack until its inputs are proven.
        let mut parsed: BTreeMap<StorePath, Arc<DrvFile>> = BTreeMap::new();
        let mut stack = vec![root.clone()];
        while let Some(path) = stack.last().cloned() {
            if path != *root && self.knows(&path) {
                stack.pop();
                continue;
            }
            let Some(file) = parsed.get(&path).cloned() else {
                if parsed.len() >= MAX_DERIVATIONS {
                    return Err(ProofError::TooMany(root.clone()));
                }
                let text = match read(&path) {
                    Ok(text) => text.ok_or_else(|| ProofError::Missing(path.clone()))?,
                    Err(source) => return Err(ProofError::Read { drv: path, source }),
                };
                let file = Arc::new(DrvFile::parse(dir, &path, &text).map_err(ProofError::widen)?);
                stack.extend(self.lacks(&file));
                parsed.insert(path, file);
                continue;
            };
            self.take_in(dir, &file).map_err(ProofError::widen)?;
            parsed.remove(&path);
            if path == *root {
                self.keep(file);
            }
            stack.pop();
        }
        Ok(())
    }

    /// The resolved form of a derivation that was proven: its sources and the needed outputs of its inputs.
    pub fn resolve(
        &self,
        dir: &StoreDir,
        drv_path: &StorePath,
    ) -> Result<BasicDerivation, ProofError<Infallible>> {
        self.kept(drv_path)?
            .resolve(dir, |input, output| self.output_path(input, output))
            .map_err(|source| ProofError::Invalid { drv: drv_path.to_string(), source })
    }

    /// Where an output of a proven derivation is, if that is known before it is built.
    pub fn output_path(&self, drv: &StorePath, output: &OutputName) -> Option<StorePath> {
        self.entries.get(drv)?.outputs.iter().find(|(name, _)| name == output)?.1.clone()
    }

    pub(super) fn input_hash(&self, drv: &StorePath) -> Result<InputHash, Error> {
        let entry = self.entries.get(drv);
        entry
            .map(|entry| entry.hash.clone())
            .ok_or_else(|| Error::Derivation { why: format!("its input {drv} has not been proven") })
    }

    fn kept(&self, drv_path: &StorePath) -> Result<&Derivation, ProofError<Infallible>> {
        let file = self.files.iter().rev().find(|file| file.path() == drv_path);
        file.map(|file| file.derivation()).ok_or_else(|| ProofError::Missing(drv_path.clone()))
    }
}
