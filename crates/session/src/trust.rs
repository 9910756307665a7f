//! Whether a request is entitled to the output paths that it claims.
//!
//! The proofs themselves are `drover_nix::derivation::proof`'s, the files are brought by [`crate::proofs`]; this puts the result
//! into the API's words.

use std::sync::Arc;

use drover_cache::Cache;
use drover_nix::derivation::proof::{self, ProofError};
use drover_nix::{BasicDerivation, StoreDir, StorePath};

use crate::{Failure, Proofs, Reason};

/// Checks that the paths of input-addressed outputs follow from the derivation's own fields, or else from the closure of
/// its `.drv`, which the caches may have. Content-addressed outputs are checked when their content is there.
pub(crate) fn prove_output_paths(
    dir: &StoreDir,
    derivation: &BasicDerivation,
    drv_path: &StorePath,
    caches: &[Arc<dyn Cache>],
    proofs: &Proofs,
) -> Result<(), Failure> {
    let Err(alone) = proof::prove_alone(dir, derivation) else {
        return Ok(());
    };
    proofs.entitle(dir, caches, drv_path, derivation).map_err(|error| match error {
        ProofError::Read { drv, source } => Failure::cache(&format!("reading {drv} for its proof"))(*source),
        ProofError::Missing(path) => missing(&alone.to_string(), &path, caches),
        error => not_proven(&error.to_string()),
    })
}

fn missing(alone: &str, path: &StorePath, caches: &[Arc<dyn Cache>]) -> Failure {
    let asked: Vec<String> = caches.iter().map(|cache| cache.url()).collect();
    not_proven(&format!(
        "{alone}; and the closure of its .drv proves nothing, because no cache has {path} (asked: {}). Name the .drv \
         in spec.drvPath and copy it to the cache with the .drv files below it: nix copy --derivation",
        asked.join(", ")
    ))
}

fn not_proven(why: &str) -> Failure {
    Failure::verdict(Reason::PathNotProven, why)
}
