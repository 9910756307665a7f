//! Derivations in the store: reading them, and proving that the outputs which they claim are their own (Nix:
//! derivations.cc, checkInvariants).
//!
//! The path of an input-addressed output says nothing of the content. What protects it is that a `.drv` becomes valid
//! only if the paths in it follow from the derivation itself and all that it depends on.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::Read as _;

use drover_nix::derivation::{aterm, modulo};
use drover_nix::{Derivation, DerivationOutput, OutputName, StorePath};
use rustix::fs::{FileType, Mode, OFlags};

use crate::{Error, LocalStore};

/// Derivations whose hashes are kept for verifying others. All of them are forgotten when there are more.
const MAX_INPUT_HASHES: usize = 100_000;

impl LocalStore {
    /// Reads a valid `.drv`.
    pub fn read_derivation(&self, drv: &StorePath) -> Result<Derivation, Error> {
        if !self.is_valid(drv)? {
            return Err(Error::NotValid { path: drv.clone() });
        }
        self.parse_derivation(drv)
    }

    /// Checks a `.drv` that is in place on disk and gives its outputs as far as their paths are known. What it depends
    /// on must be valid or be among `together`, which are about to be registered with it.
    pub(crate) fn verify_derivation(
        &self,
        path: &StorePath,
        together: &HashSet<&StorePath>,
    ) -> Result<BTreeMap<OutputName, StorePath>, Error> {
        let dir = self.store_dir();
        let drv = self.parse_derivation(path)?;
        let fail = |why: String| Error::Derivation { path: path.clone(), why };
        let invalid = |error: drover_nix::Error| fail(error.to_string());
        let addressed = |output: &DerivationOutput| matches!(output, DerivationOutput::InputAddressed(_));
        let mut computed = None;
        if drv.basic.outputs.values().any(addressed) {
            self.hash_inputs(&drv, together)?;
            computed =
                modulo::output_paths(dir, &drv, &mut |input| self.known_hash(input)).map_err(invalid)?;
        }
        let mut known = BTreeMap::new();
        for (name, output) in &drv.basic.outputs {
            let claimed = output.path(dir, &drv.basic.name, name).map_err(invalid)?;
            if addressed(output) {
                let right = computed.as_ref().and_then(|paths| paths.get(name));
                if right != claimed.as_ref() {
                    let (claimed, right) = (spell(claimed.as_ref()), spell(right));
                    return Err(fail(format!(
                        "it says that its output {name} is {claimed}, but what it depends on gives {right}"
                    )));
                }
            }
            let Some(claimed) = claimed else { continue };
            // A builder finds its outputs by these variables.
            if drv.basic.env(name.as_str()).is_none_or(|value| value != dir.full(&claimed).as_bytes()) {
                return Err(fail(format!("its variable {name} is not the path of its output, {claimed}")));
            }
            known.insert(name.clone(), claimed);
        }
        Ok(known)
    }

    /// Sees to it that [`Self::known_hash`] knows all inputs of `drv`. Without recursion: chains of derivations are
    /// as long as someone likes.
    fn hash_inputs(&self, drv: &Derivation, together: &HashSet<&StorePath>) -> Result<(), Error> {
        let is_known = |path: &StorePath| self.input_hashes(|hashes| hashes.contains_key(path));
        self.input_hashes(|hashes| {
            if hashes.len() > MAX_INPUT_HASHES {
                hashes.clear();
            }
        });
        let mut open: HashMap<StorePath, Derivation> = HashMap::new();
        let mut stack: Vec<StorePath> =
            drv.input_drvs.keys().filter(|path| !is_known(path)).cloned().collect();
        while let Some(path) = stack.last().cloned() {
            if is_known(&path) {
                stack.pop();
                continue;
            }
            if let Some(drv) = open.remove(&path) {
                // Its own inputs lay above it on the stack and are done.
                let hash = modulo::input_hash(self.store_dir(), &drv, &mut |input| self.known_hash(input))
                    .map_err(|error| Error::Derivation { path: path.clone(), why: error.to_string() })?;
                self.input_hashes(|hashes| hashes.insert(path.clone(), hash));
                stack.pop();
                continue;
            }
            if !together.contains(&path) && !self.is_valid(&path)? {
                return Err(Error::NotValid { path });
            }
            let drv = self.parse_derivation(&path)?;
            for input in drv.input_drvs.keys().filter(|input| !is_known(input)) {
                if open.contains_key(input) || *input == path {
                    let why = format!("it depends on itself by way of {input}");
                    return Err(Error::Derivation { path, why });
                }
                stack.push(input.clone());
            }
            open.insert(path, drv);
        }
        Ok(())
    }

    fn known_hash(&self, path: &StorePath) -> Result<modulo::InputHash, drover_nix::Error> {
        self.input_hashes(|hashes| hashes.get(path).cloned())
            .ok_or_else(|| drover_nix::Error::Derivation { why: format!("its input {path} was not hashed") })
    }

    fn parse_derivation(&self, path: &StorePath) -> Result<Derivation, Error> {
        let fail = |why: String| Error::Derivation { path: path.clone(), why };
        let Some(name) = path.derivation_name() else {
            return Err(fail("its name does not end in `.drv`".into()));
        };
        let real = self.real_path(path);
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file: File =
            rustix::fs::open(&real, flags, Mode::empty()).map_err(Error::sys("open", &real))?.into();
        let stat = rustix::fs::fstat(&file).map_err(Error::sys("examine", &real))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(fail("it is not a regular file".into()));
        }
        let mut text = Vec::new();
        file.take(aterm::MAX_LEN as u64 + 1).read_to_end(&mut text).map_err(Error::io("read", &real))?;
        if text.len() > aterm::MAX_LEN {
            return Err(fail(format!("it has more than {} bytes", aterm::MAX_LEN)));
        }
        aterm::parse(self.store_dir(), name, &text).map_err(|error| fail(error.to_string()))
    }
}

fn spell(path: Option<&StorePath>) -> String {
    path.map_or_else(|| "not known".into(), ToString::to_string)
}
