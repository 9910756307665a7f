//! Whether a request is entitled to the output paths that it claims, and what a `.drv` in a cache says.
//!
//! The proofs themselves are `drover_nix::derivation::proof`'s; this brings the files from caches and puts the result
//! into the API's words. What was proven once is kept in the caller's [`Proven`].

use std::sync::{Arc, Mutex, PoisonError};

use drover_cache::Cache;
use drover_nix::derivation::aterm;
use drover_nix::derivation::proof::{self, ProofError, Proven};
use drover_nix::{BasicDerivation, StoreDir, StorePath};

use crate::{Failure, Reason};

/// Checks that the paths of input-addressed outputs follow from the derivation's own fields. Content-addressed outputs
/// are checked when their content is there.
pub fn prove_output_paths(dir: &StoreDir, derivation: &BasicDerivation) -> Result<(), Failure> {
    proof::prove_alone(dir, derivation).map_err(|error| not_proven(&error.to_string()))
}

/// As [`prove_output_paths`], and if the derivation alone proves nothing, from the closure of its `.drv`, which the
/// caches may have.
pub fn prove_output_paths_with(
    dir: &StoreDir,
    derivation: &BasicDerivation,
    drv_path: Option<&StorePath>,
    caches: &[Arc<dyn Cache>],
    proven: &Mutex<Proven>,
) -> Result<(), Failure> {
    let alone = match prove_output_paths(dir, derivation) {
        Ok(()) => return Ok(()),
        Err(failure) => failure,
    };
    let Some(drv_path) = drv_path else {
        let message = format!(
            "{}. If it has derivations as inputs, name its .drv in spec.drvPath and copy that and the .drv files below \
             it to the class's cache (nix copy --derivation)",
            alone.message
        );
        return Err(Failure::verdict(Reason::PathNotProven, message));
    };
    // Only ever extended by what is true, so what a panicking thread left is good.
    let mut proven = proven.lock().unwrap_or_else(PoisonError::into_inner);
    take_in(dir, drv_path, caches, &mut proven, Reason::PathNotProven)?;
    let closure = std::collections::BTreeSet::new();
    proven.entitles(dir, drv_path, derivation, &closure).map_err(|error| not_proven(&error.to_string()))
}

/// The derivation that a `.drv` in one of the caches describes, resolved, and entitled to its output paths.
pub fn derivation_of(
    dir: &StoreDir,
    drv_path: &StorePath,
    caches: &[Arc<dyn Cache>],
    proven: &Mutex<Proven>,
) -> Result<BasicDerivation, Failure> {
    let mut proven = proven.lock().unwrap_or_else(PoisonError::into_inner);
    take_in(dir, drv_path, caches, &mut proven, Reason::InputMissing)?;
    proven.resolve(drv_path).map_err(|error| Failure::verdict(Reason::InvalidDerivation, error.to_string()))
}

/// `missing` is the reason if a `.drv` file is in no cache.
fn take_in(
    dir: &StoreDir,
    drv_path: &StorePath,
    caches: &[Arc<dyn Cache>],
    proven: &mut Proven,
    missing: Reason,
) -> Result<(), Failure> {
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
        ProofError::Missing(path) => {
            let asked: Vec<String> = caches.iter().map(|cache| cache.url()).collect();
            let message = format!(
                "{path} is needed to prove the output paths, and no cache has it (asked: {}). Copy it there with the \
                 .drv files below it: nix copy --derivation",
                asked.join(", ")
            );
            Failure::verdict(missing, message)
        }
        error => not_proven(&error.to_string()),
    })
}

fn not_proven(why: &str) -> Failure {
    Failure::verdict(Reason::PathNotProven, why)
}
