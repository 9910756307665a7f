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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use drover_nix::{BasicDerivation, ContentAddress, Hash, Method, PathInfo, Sha256};

    use super::*;
    use crate::testing::{file_nar, info, store, store_path};

    /// A derivation with one output, its path filled in.
    fn derivation(store: &LocalStore, name: &str, inputs: &[&StorePath]) -> Derivation {
        let env = [("out".into(), "".into()), ("name".into(), name.into())];
        let basic = BasicDerivation {
            name: name.into(),
            outputs: [(OutputName::out(), DerivationOutput::Deferred)].into(),
            input_srcs: BTreeSet::new(),
            system: "x86_64-linux".into(),
            builder: "/bin/sh".into(),
            args: Vec::new(),
            env: env.into(),
        };
        let input_drvs = inputs.iter().map(|path| ((*path).clone(), [OutputName::out()].into())).collect();
        let mut drv = Derivation { basic, input_drvs };
        store.hash_inputs(&drv, &HashSet::new()).unwrap();
        let paths = modulo::output_paths(store.store_dir(), &drv, &mut |input| store.known_hash(input));
        claim(store, &mut drv, paths.unwrap().unwrap().remove("out").unwrap());
        drv
    }

    fn claim(store: &LocalStore, drv: &mut Derivation, path: StorePath) {
        drv.basic.env.insert("out".into(), store.store_dir().full(&path).into());
        drv.basic.outputs.insert(OutputName::out(), DerivationOutput::InputAddressed(path));
    }

    fn add(store: &LocalStore, drv: &Derivation) -> Result<StorePath, Error> {
        let text = aterm::print(store.store_dir(), drv).unwrap();
        let nar = file_nar(&text);
        let info = PathInfo {
            path: modulo::drv_path(store.store_dir(), drv).unwrap(),
            references: drv.input_drvs.keys().cloned().collect(),
            ca: Some(ContentAddress { method: Method::Text, hash: Hash::from(Sha256::of(&text)) }),
            ..info("x", &nar, &[])
        };
        store.add_nar(&info, false, 0, &mut &nar[..]).map(|_| info.path)
    }

    #[test]
    fn outputs_are_recorded() {
        let (_dir, store) = store();
        let first = derivation(&store, "first", &[]);
        let first_path = add(&store, &first).unwrap();
        let second = derivation(&store, "second", &[&first_path]);
        let second_path = add(&store, &second).unwrap();
        assert_eq!(store.read_derivation(&second_path).unwrap(), second);
        let outputs = store.derivation_outputs(&second_path).unwrap();
        let known = second.basic.output_paths(store.store_dir()).unwrap();
        assert_eq!(Some(&outputs["out"]), known["out"].as_ref());
        assert_eq!(store.valid_derivers(&outputs["out"]).unwrap(), [second_path].into());
    }

    #[test]
    fn a_derivation_that_claims_what_is_not_its_own_is_refused() {
        let (_dir, store) = store();
        let input = add(&store, &derivation(&store, "input", &[])).unwrap();
        let mut thief = derivation(&store, "thief", &[&input]);
        claim(&store, &mut thief, store_path("thief"));
        let error = add(&store, &thief).unwrap_err();
        assert!(matches!(error, Error::Derivation { .. }), "{error}");
        let mut liar = derivation(&store, "liar", &[&input]);
        liar.basic.env.insert("out".into(), "/nix/store/elsewhere".into());
        assert!(matches!(add(&store, &liar), Err(Error::Derivation { .. })));
        let nar = file_nar(b"not a derivation");
        let error = store.add_nar(&info("x.drv", &nar, &[]), false, 0, &mut &nar[..]).unwrap_err();
        assert!(matches!(error, Error::Derivation { .. }), "{error}");
        assert_eq!(store.all_valid_paths().unwrap(), [input].into());
    }

    #[test]
    fn long_chains_are_hashed_without_recursion() {
        let (_dir, store) = store();
        let mut paths: Vec<StorePath> = Vec::new();
        for i in 0..300 {
            let inputs: Vec<&StorePath> = paths.iter().rev().take(2).collect();
            let drv = derivation(&store, &format!("d{i}"), &inputs);
            paths.push(add(&store, &drv).unwrap());
        }
        // As a process sees it that has verified nothing yet.
        store.input_hashes(HashMap::clear);
        let last = paths.last().unwrap();
        add(&store, &derivation(&store, "last", &[last])).unwrap();
    }
}
