use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use drover_cache::Cache;
use drover_nix::derivation::{DerivationType, modulo};
use drover_nix::signature::SecretKey;
use drover_nix::{BasicDerivation, OutputName, StoreDir, StorePath};
use drover_serve::BuildOptions;

use crate::trust::prove_output_paths;
use crate::{Failure, Kept, Proofs, Reason};

/// One build: what, from where, to where.
pub struct Job {
    pub dir: StoreDir,
    /// Names the derivation, its log and its outputs' deriver. See [`drv_path_of`].
    pub drv_path: StorePath,
    pub derivation: BasicDerivation,
    pub options: BuildOptions,
    /// Where inputs come from, the preferred one first.
    pub caches: Vec<Arc<dyn Cache>>,
    /// Where outputs go. None: they are received and checked, and that is all.
    pub push: Option<Arc<dyn Cache>>,
    /// Signs outputs.
    pub signing_key: Option<Arc<SecretKey>>,
    pub trust: Trust,
    /// What was proven so far; jobs may share it. Used with [`Trust::Verified`].
    pub proven: Arc<Proofs>,
    /// Most bytes that all outputs together may have, as NARs.
    pub max_output_bytes: Option<u64>,
    /// An existing directory for outputs on their way to the cache.
    pub spool_dir: PathBuf,
    /// What earlier sessions for this job have received.
    pub kept: Arc<Kept>,
}

/// Whose word counts for the paths of input-addressed outputs, and for content-addressed ones whose content refers to
/// itself in the way in which Nix 2.17 to 2.34 hashed it, which is no proof. All other content is proof enough for both.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trust {
    /// The caller's, who has proven them in another way or believes the request.
    Claimed,
    /// Nobody's: they must follow from the derivation's own fields, or from the closure of its `.drv` in the caches.
    Verified,
}

impl Job {
    /// The outputs with their paths as far as these are known before the build. Fails for derivations that no
    /// builder can build, and for paths that are not proven.
    pub(crate) fn outputs(&self) -> Result<BTreeMap<OutputName, Option<StorePath>>, Failure> {
        let invalid =
            |error: drover_nix::Error| Failure::verdict(Reason::InvalidDerivation, error.to_string());
        let kind = self.derivation.kind().map_err(invalid)?;
        if kind == DerivationType::Deferred {
            let message = "the derivation's output paths depend on outputs that are not built yet: build these, then \
                           make the request again (`drover request` resolves it), or leave it to `drover build \
                           --recursive`";
            return Err(Failure::verdict(Reason::InvalidDerivation, message));
        }
        if self.drv_path.derivation_name() != Some(self.derivation.name.as_str()) {
            let message =
                format!("{} is not a path for the derivation {}", self.drv_path, self.derivation.name);
            return Err(Failure::verdict(Reason::InvalidDerivation, message));
        }
        if self.trust == Trust::Verified {
            prove_output_paths(&self.dir, &self.derivation, &self.drv_path, &self.caches, &self.proven)?;
        }
        self.derivation.output_paths(&self.dir).map_err(invalid)
    }

    /// The paths of all outputs if all are known before the build.
    pub(crate) fn known_outputs(&self) -> Result<Option<BTreeMap<OutputName, StorePath>>, Failure> {
        Ok(self.outputs()?.into_iter().map(|(name, path)| Some((name, path?))).collect())
    }

    pub(crate) fn inputs(&self) -> &BTreeSet<StorePath> {
        &self.derivation.input_srcs
    }
}

/// The path that the `.drv` file of a resolved derivation would have.
pub fn drv_path_of(dir: &StoreDir, derivation: &BasicDerivation) -> Result<StorePath, drover_nix::Error> {
    modulo::basic_drv_path(dir, derivation)
}
