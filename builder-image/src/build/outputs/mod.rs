//! From what a builder left behind to valid store paths (Nix: derivation-builder.cc, registerOutputs). The builder and all
//! of its processes are dead when this begins; for those with network access something outside may still hold their
//! files open, so theirs are copied.
//!
//! In the order of its story: each output is examined, canonicalised and scanned ([`made`]), they are sorted so that one
//! comes after those that it refers to, those whose paths follow from their content get them ([`address`]),
//! all are checked (`checks`), and then moved to where they belong and registered ([`place`]).

mod address;
mod made;
mod place;

use std::collections::{BTreeMap, BTreeSet};

use drover_nix::hash_modulo::SelfReferenceHash;
use drover_nix::order::references_first;
use drover_nix::{BasicDerivation, ContentAddress, DerivationOutput, OutputName, PathInfo, StorePath};
use drover_store::fs::SeenInodes;
use drover_store::{LocalStore, TempRoots};

use self::made::Made;
use super::attrs::Attributes;
use super::cancel::Interest;
use super::checks;
use super::ids::BuildIds;
use super::scratch::Scratch;
use super::targets::{Paths, Targets};
use crate::error::Error;

/// A finished build.
pub(crate) struct Finished<'a> {
    pub store: &'a LocalStore,
    pub drv_path: &'a StorePath,
    pub drv: &'a BasicDerivation,
    pub attributes: &'a Attributes<'a>,
    pub scratch: &'a Scratch,
    pub ids: &'a BuildIds,
    pub targets: &'a Targets,
    /// Known paths that were valid before the build: what it made in their place is left alone.
    pub valid: &'a BTreeSet<StorePath>,
    /// The closure of the derivation's inputs: what outputs may refer to, beside each other.
    pub inputs: &'a BTreeSet<StorePath>,
    /// Keeps from the collector what gets its path only now.
    pub roots: &'a TempRoots,
    pub self_references: SelfReferenceHash,
    /// Large outputs take a while, and nobody may want them any more.
    pub interest: &'a Interest<'a>,
}

/// An output that is ready to be moved to where it belongs.
struct Ready {
    made: Made,
    info: PathInfo,
}

/// What an output's scratch path was replaced by, for those that refer to it.
type Rewrites = BTreeMap<StorePath, StorePath>;

impl Finished<'_> {
    /// Makes all outputs valid and says where they are. If it fails, none is that would not have been without it, but
    /// for content under its own address.
    pub(crate) fn register(&self) -> Result<Paths, Error> {
        let mut made = self.collect()?;
        let mut paths = self.valid_before();
        let mut rewrites = Rewrites::new();
        let mut ready = Vec::new();
        for name in self.references_first(&made)? {
            // Sorted are the names of what was made.
            let Some(made) = made.remove(&name) else { continue };
            let one = self.finish(&name, made, &mut rewrites)?;
            paths.insert(name.clone(), one.info.path.clone());
            ready.push((name, one));
        }
        self.check(&ready, &paths)?;
        self.place_all(ready)?;
        Ok(paths)
    }

    /// The order in which outputs get their paths. Those that were valid before the build have theirs already, and do not
    /// count.
    fn references_first(&self, made: &BTreeMap<OutputName, Made>) -> Result<Vec<OutputName>, Error> {
        let by_path: BTreeMap<&StorePath, &OutputName> =
            made.keys().map(|name| (&self.targets[name].scratch, name)).collect();
        let others =
            |name: &OutputName| made[name].references.iter().filter_map(|path| by_path.get(path).copied());
        let order = references_first(made.keys(), others).map_err(|(from, to)| {
            Error::output(format!(
                "cycle detected in build of '{}' in the references of output '{to}' from output '{from}'",
                self.full(self.drv_path)
            ))
        })?;
        Ok(order.into_iter().cloned().collect())
    }

    fn full(&self, path: &StorePath) -> String {
        self.store.store_dir().full(path)
    }

    fn is_valid_before(&self, name: &OutputName) -> bool {
        let known = self.targets[name].known.as_ref();
        known.is_some_and(|path| self.valid.contains(path))
    }

    fn valid_before(&self) -> Paths {
        let known =
            self.targets.iter().filter_map(|(name, target)| Some((name.clone(), target.known.clone()?)));
        known.filter(|(_, path)| self.valid.contains(path)).collect()
    }

    /// Examines all outputs before anything becomes of one of them.
    fn collect(&self) -> Result<BTreeMap<OutputName, Made>, Error> {
        let mut seen = SeenInodes::default();
        let wanted = || self.targets.iter().filter(|(name, _)| !self.is_valid_before(name));
        let mut places = Vec::new();
        for (name, target) in wanted() {
            places.push((name, self.take_over(name, target, &mut seen)?));
        }
        places.into_iter().map(|(name, place)| Ok((name.clone(), self.scan(name, place)?))).collect()
    }

    /// Finds an output's path and what is said of it.
    fn finish(&self, name: &OutputName, made: Made, rewrites: &mut Rewrites) -> Result<Ready, Error> {
        match &self.drv.outputs[name] {
            DerivationOutput::CaFixed(declared) => {
                let ready = self.address(name, made, declared.method, declared.hash.algo, rewrites)?;
                self.prove(declared, ready)
            }
            DerivationOutput::CaFloating { method, algo } | DerivationOutput::Impure { method, algo } => {
                self.address(name, made, *method, *algo, rewrites)
            }
            // In a sandbox it was built where it belongs, so that nothing needs to be rewritten.
            DerivationOutput::InputAddressed(path) => {
                let info = self.info(path.clone(), &made, made.references.clone(), None);
                Ok(Ready { made, info })
            }
            DerivationOutput::Deferred => Err(Error::input("a path of its outputs is not known")),
        }
    }

    /// A fixed output has the hash that it was declared with, and refers to nothing. One with another hash is kept under
    /// the path that this one gives, so that correcting the derivation does not mean to fetch again.
    fn prove(&self, declared: &ContentAddress, ready: Ready) -> Result<Ready, Error> {
        let drv = self.full(self.drv_path);
        if !ready.info.references.is_empty() {
            let list: Vec<String> = ready.info.references.iter().map(|path| self.full(path)).collect();
            return Err(Error::output(format!(
                "fixed-output derivation '{drv}' must not reference store paths but refers to:\n  {}",
                list.join("\n  ")
            )));
        }
        match &ready.info.ca {
            Some(got) if got.hash != declared.hash => {
                let (specified, got) = (declared.hash.to_sri(), got.hash.to_sri());
                self.place_if_free(ready)?;
                Err(Error::output(format!(
                    "hash mismatch in fixed-output derivation '{drv}':\n  specified: {specified}\n     got:    {got}"
                )))
            }
            _ => Ok(ready),
        }
    }

    fn info(
        &self,
        path: StorePath,
        made: &Made,
        references: BTreeSet<StorePath>,
        ca: Option<ContentAddress>,
    ) -> PathInfo {
        PathInfo {
            path,
            nar_hash: made.nar_hash,
            nar_size: made.nar_size,
            references,
            deriver: Some(self.drv_path.clone()),
            signatures: Vec::new(),
            ca,
        }
    }

    fn check(&self, ready: &[(OutputName, Ready)], paths: &Paths) -> Result<(), Error> {
        let infos = ready.iter().map(|(name, one)| (name.clone(), one.info.clone())).collect();
        let known = |path: &StorePath| {
            self.store
                .path_info(path)?
                .ok_or_else(|| drover_store::Error::NotValid { path: path.clone() }.into())
        };
        let dir = self.store.store_dir();
        checks::Outputs { dir, infos: &infos, paths, known: &known }.check(self.attributes)
    }
}
