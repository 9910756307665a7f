//! Which output paths a derivation is entitled to, proven from the request alone or from the closure of its `.drv`.
//!
//! An input-addressed path is a function of the derivation and of every derivation below it, so whoever believes a
//! bare claim lets anyone fill anyone's path (Nix: daemon.cc, BuildDerivation). Here a claim is recomputed. Pure: the
//! caller brings the text of `.drv` files; each one is proven by its own name ([`DrvFile`]), the paths that it states by
//! those below it ([`Proven`]), and a request by the derivation that it says it is of ([`Proven::entitles`]).

mod proven;
mod request;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::convert::Infallible;

use super::modulo;
use super::{BasicDerivation, Derivation, DerivationType, OutputName, aterm};
use crate::{Error, StoreDir, StorePath};

pub use proven::{Proven, ReadFile};

/// Most `.drv` files that one proof may take in.
pub const MAX_DERIVATIONS: usize = 100_000;

/// A `.drv` file that is what its name says. What it states of its outputs is another matter.
#[derive(Debug)]
pub struct DrvFile {
    path: StorePath,
    derivation: Derivation,
    len: usize,
}

/// Why a claim does not stand.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProofError<E> {
    /// The request differs from the derivation that its `drvPath` names.
    #[error("{field} is not what {drv} says: the request has {claimed}, the derivation {proven}")]
    Differs { field: String, drv: StorePath, claimed: String, proven: String },
    /// A derivation, or the file that should hold one, is not what it should be.
    #[error("derivation {drv}: {source}")]
    Invalid { drv: String, source: Error },
    /// A `.drv` file is not to be had.
    #[error("{0} is needed for the proof, and no cache has it")]
    Missing(StorePath),
    /// A file's content does not lead to its name.
    #[error("the file {path} is not what its name says: its content belongs at {computed}")]
    Name { path: StorePath, computed: StorePath },
    /// A file's text is another than that of the derivation that it was understood as.
    #[error("the file {0} is not written as Nix writes derivations, so that its name proves nothing")]
    Spelling(StorePath),
    /// An output path is not the one that the derivation leads to.
    #[error("output {output} of {drv} claims {claimed}, but its path is {computed}")]
    Path { drv: String, output: OutputName, claimed: String, computed: String },
    /// The variable that tells a builder where an output goes says something else.
    #[error("env.{output} of {drv} is {value}, but the output's path is {computed}")]
    Variable { drv: String, output: OutputName, value: String, computed: String },
    /// The path depends on content that is not known yet.
    #[error("output {output} of {drv} cannot be proven: its path depends on outputs that are not built yet")]
    Deferred { drv: String, output: OutputName },
    /// The caller could not read a file.
    #[error("cannot read {drv}")]
    Read { drv: StorePath, source: E },
    /// The closure is larger than [`MAX_DERIVATIONS`].
    #[error("more than {MAX_DERIVATIONS} derivations are below {0}")]
    TooMany(StorePath),
}

impl ProofError<Infallible> {
    /// The same where reading can fail.
    pub fn widen<E>(self) -> ProofError<E> {
        match self {
            Self::Differs { field, drv, claimed, proven } => {
                ProofError::Differs { field, drv, claimed, proven }
            }
            Self::Invalid { drv, source } => ProofError::Invalid { drv, source },
            Self::Missing(path) => ProofError::Missing(path),
            Self::Name { path, computed } => ProofError::Name { path, computed },
            Self::Spelling(path) => ProofError::Spelling(path),
            Self::Path { drv, output, claimed, computed } => {
                ProofError::Path { drv, output, claimed, computed }
            }
            Self::Variable { drv, output, value, computed } => {
                ProofError::Variable { drv, output, value, computed }
            }
            Self::Deferred { drv, output } => ProofError::Deferred { drv, output },
            Self::TooMany(path) => ProofError::TooMany(path),
        }
    }
}

impl DrvFile {
    /// Parses the text of the file that should be at `path`. Fails if its content does not lead to that name, and if it is
    /// not written as Nix writes it.
    pub fn parse(dir: &StoreDir, path: &StorePath, text: &[u8]) -> Result<Self, ProofError<Infallible>> {
        let invalid = |source| ProofError::Invalid { drv: path.to_string(), source };
        let name = path.derivation_name().ok_or_else(|| {
            invalid(Error::StorePath { path: path.as_str().into(), why: "it does not end with .drv".into() })
        })?;
        let derivation = aterm::parse(dir, name, text).map_err(invalid)?;
        let computed = modulo::text_path(dir, &derivation, text).map_err(invalid)?;
        if computed != *path {
            return Err(ProofError::Name { path: path.clone(), computed });
        }
        // What the name stands for is this text, and what is believed is what was understood: they must be one.
        if aterm::print(dir, &derivation).map_err(invalid)? != text {
            return Err(ProofError::Spelling(path.clone()));
        }
        Ok(Self { path: path.clone(), derivation, len: text.len() })
    }

    pub fn path(&self) -> &StorePath {
        &self.path
    }

    pub fn derivation(&self) -> &Derivation {
        &self.derivation
    }

    /// The derivations of which outputs are its inputs.
    pub fn inputs(&self) -> impl Iterator<Item = &StorePath> {
        self.derivation.input_drvs.keys()
    }

    /// Bytes of its text.
    #[expect(clippy::len_without_is_empty, reason = "none is empty")]
    pub fn len(&self) -> usize {
        self.len
    }
}

/// Proves the paths of `drv` from nothing but itself: for derivations that no other derivation is an input of.
pub fn prove_alone(dir: &StoreDir, drv: &BasicDerivation) -> Result<(), ProofError<Infallible>> {
    let invalid = |source| ProofError::Invalid { drv: drv.name.clone(), source };
    match drv.kind().map_err(invalid)? {
        // Paths of these follow from content, which is checked when it is there.
        DerivationType::CaFixed | DerivationType::CaFloating | DerivationType::Impure => return Ok(()),
        DerivationType::Deferred => {
            let output = drv.outputs.keys().next().cloned().unwrap_or_else(OutputName::out);
            return Err(ProofError::Deferred { drv: drv.name.clone(), output });
        }
        DerivationType::InputAddressed => {}
    }
    let computed = modulo::basic_output_paths(dir, drv).map_err(invalid)?;
    let claimed = drv.output_paths(dir).map_err(invalid)?;
    compare(dir, &drv.name, drv, &claimed, &computed)
}

/// Output paths, and the variables by which a builder finds them: their values are no part of what paths are made of, so
/// that a builder could be led to put one output in another's place (Nix: derivations.cc, checkInvariants).
fn compare<E>(
    dir: &StoreDir,
    drv: &str,
    basic: &BasicDerivation,
    claimed: &BTreeMap<OutputName, Option<StorePath>>,
    computed: &BTreeMap<OutputName, StorePath>,
) -> Result<(), ProofError<E>> {
    for (output, computed) in computed {
        let claimed = claimed.get(output).and_then(Option::as_ref);
        if claimed != Some(computed) {
            return Err(ProofError::Path {
                drv: drv.to_owned(),
                output: output.clone(),
                claimed: claimed.map_or_else(|| "no path".to_owned(), |path| dir.full(path)),
                computed: dir.full(computed),
            });
        }
        let variable = basic.env(output.as_str());
        if variable.is_none_or(|value| *value != dir.full(computed).as_bytes()) {
            return Err(ProofError::Variable {
                drv: drv.to_owned(),
                output: output.clone(),
                value: variable.map_or_else(|| "missing".to_owned(), |value| format!("{value:?}")),
                computed: dir.full(computed),
            });
        }
    }
    Ok(())
}
