//! Output paths from derivations (Nix: derivation/modulo.cc): "hash modulo" fixed-output inputs.

use std::collections::BTreeMap;

use crate::{BasicDerivation, Derivation, Error, OutputName, Sha256, StoreDir, StorePath};

/// What a derivation contributes when it is another one's input.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum InputHash {
    /// Not fixed-output, all paths known.
    Whole(Sha256),
    /// Fixed-output: one hash an output.
    Fixed(BTreeMap<OutputName, Sha256>),
    /// It, or something below it, has paths that are not known.
    Deferred,
}

/// The hash that stands for `drv` where it is an input. `input` gives the same for its own inputs.
pub fn input_hash(
    _dir: &StoreDir,
    _drv: &Derivation,
    _input: &mut dyn FnMut(&StorePath) -> Result<InputHash, Error>,
) -> Result<InputHash, Error> {
    todo!()
}

/// The paths that the input-addressed outputs of `drv` must have. None if they depend on paths that are not known.
pub fn output_paths(
    _dir: &StoreDir,
    _drv: &Derivation,
    _input: &mut dyn FnMut(&StorePath) -> Result<InputHash, Error>,
) -> Result<Option<BTreeMap<OutputName, StorePath>>, Error> {
    todo!()
}

/// [`output_paths`] of a derivation that has no derivations as inputs.
pub fn basic_output_paths(
    _dir: &StoreDir,
    _drv: &BasicDerivation,
) -> Result<BTreeMap<OutputName, StorePath>, Error> {
    todo!()
}

/// The path that the `.drv` file of `drv` has.
pub fn drv_path(_dir: &StoreDir, _drv: &Derivation) -> Result<StorePath, Error> {
    todo!()
}
