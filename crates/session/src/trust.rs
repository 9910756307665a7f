//! Whether a request is entitled to the output paths that it claims.
//!
//! The proofs themselves are `drover_nix::derivation::proof`'s; this brings the files from caches and puts the result
//! into the API's words.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use drover_cache::Cache;
use drover_nix::derivation::aterm;
use drover_nix::derivation::proof::{self, ProofError, Proven};
use drover_nix::{BasicDerivation, StoreDir, StorePath};

use crate::{Failure, Reason};

/// Most derivations that are kept between proofs: some hundred megabytes, if they are large.
const MAX_KEPT: usize = 20_000;

/// Checks that the paths of input-addressed outputs follow from the derivation's own fields, or else from the closure of
/// its `.drv`, which the caches may have. Content-addressed outputs are checked when their content is there.
pub(crate) fn prove_output_paths(
    dir: &StoreDir,
    derivation: &BasicDerivation,
    drv_path: &StorePath,
    caches: &[Arc<dyn Cache>],
    proven: &Mutex<Proven>,
) -> Result<(), Failure> {
    let Err(alone) = proof::prove_alone(dir, derivation) else {
        return Ok(());
    };
    // Only ever extended by what is true, so what a panicking thread left is good.
    let mut proven = proven.lock().unwrap_or_else(PoisonError::into_inner);
    if proven.len() > MAX_KEPT {
        *proven = Proven::default();
    }
    let mut read = |path: &StorePath| {
        for cache in caches {
            if let Some(text) = drover_cache::read_file(&**cache, path, aterm::MAX_LEN as u64)? {
                return Ok(Some(text));
            }
        }
        Ok(None)
    };
    proven.prove(dir, drv_path, &mut read).map_err(|error: ProofError<drover_cache::Error>| match error {
        ProofError::Read { drv, source } => Failure::cache(&format!("reading {drv} for its proof"))(source),
        ProofError::Missing(path) => missing(&alone.to_string(), &path, caches),
        error => not_proven(&error.to_string()),
    })?;
    let closure = BTreeSet::new();
    proven.entitles(dir, drv_path, derivation, &closure).map_err(|error| not_proven(&error.to_string()))
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
