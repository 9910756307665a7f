//! Output paths from derivations (Nix: derivation/modulo.cc): "hash modulo" fixed-output inputs.
//!
//! The path of an input-addressed output is a hash of the derivation's text in which each input derivation is replaced
//! by a hash that stands for it, so that it does not matter how a fixed-output input is fetched.

use std::collections::{BTreeMap, BTreeSet};

use bstr::BString;

use super::{DerivationType, aterm};
use crate::{
    BasicDerivation, ContentAddress, Derivation, DerivationOutput, Error, Hash, Method, OutputName, Sha256,
    StoreDir, StorePath,
};

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
    dir: &StoreDir,
    drv: &Derivation,
    input: &mut dyn FnMut(&StorePath) -> Result<InputHash, Error>,
) -> Result<InputHash, Error> {
    match drv.basic.kind()? {
        DerivationType::CaFixed => {
            let hashes = drv.basic.outputs.iter().map(|(name, output)| {
                let (path, algo, hash) = output.to_triple(dir, &drv.basic.name, name)?;
                Ok((name.clone(), Sha256::of(format!("fixed:out:{algo}:{hash}:{path}").as_bytes())))
            });
            Ok(InputHash::Fixed(hashes.collect::<Result<_, Error>>()?))
        }
        DerivationType::CaFloating | DerivationType::Deferred | DerivationType::Impure => {
            Ok(InputHash::Deferred)
        }
        DerivationType::InputAddressed => {
            Ok(hash(dir, drv, input, false)?.map_or(InputHash::Deferred, InputHash::Whole))
        }
    }
}

/// The paths that the outputs of `drv` must have, whether it states them or not. None if they depend on paths that are
/// not known, or on what the build will make.
pub fn output_paths(
    dir: &StoreDir,
    drv: &Derivation,
    input: &mut dyn FnMut(&StorePath) -> Result<InputHash, Error>,
) -> Result<Option<BTreeMap<OutputName, StorePath>>, Error> {
    match drv.basic.kind()? {
        DerivationType::CaFixed => {
            // Such an output's path is always known.
            Ok(drv.basic.output_paths(dir)?.into_iter().map(|(name, path)| Some((name, path?))).collect())
        }
        DerivationType::CaFloating | DerivationType::Impure => Ok(None),
        DerivationType::Deferred | DerivationType::InputAddressed => {
            let Some(hash) = hash(dir, drv, input, true)? else {
                return Ok(None);
            };
            let path = |output: &OutputName| {
                dir.make_path(&format!("output:{output}"), hash, &output.path_name(&drv.basic.name))
            };
            let paths = drv.basic.outputs.keys().map(|output| Ok((output.clone(), path(output)?)));
            paths.collect::<Result<_, Error>>().map(Some)
        }
    }
}

/// [`output_paths`] of a derivation that has no derivations as inputs. Fails for outputs whose paths only the build
/// can tell.
pub fn basic_output_paths(
    dir: &StoreDir,
    drv: &BasicDerivation,
) -> Result<BTreeMap<OutputName, StorePath>, Error> {
    let whole = Derivation { basic: drv.clone(), input_drvs: BTreeMap::new() };
    output_paths(dir, &whole, &mut |_| Ok(InputHash::Deferred))?.ok_or_else(|| Error::Derivation {
        why: "the paths of its outputs follow from their content, which is not known before it is built"
            .into(),
    })
}

/// Fills in the output paths that a derivation without derivations as inputs leaves out (`Deferred`), in its outputs
/// and in the env entries named like them, which Nix's own derivations always have. Does nothing to other kinds.
pub fn fill_output_paths(dir: &StoreDir, drv: &mut BasicDerivation) -> Result<(), Error> {
    if drv.kind()? != DerivationType::Deferred {
        return Ok(());
    }
    for output in drv.outputs.keys() {
        drv.env.entry(output.as_str().into()).or_default();
    }
    for (output, path) in basic_output_paths(dir, drv)? {
        drv.env.insert(output.as_str().into(), BString::from(dir.full(&path)));
        drv.outputs.insert(output, DerivationOutput::InputAddressed(path));
    }
    Ok(())
}

/// The path that the `.drv` file of `drv` has.
pub fn drv_path(dir: &StoreDir, drv: &Derivation) -> Result<StorePath, Error> {
    text_path(dir, drv, &aterm::print(dir, drv)?)
}

/// The path of a file with this text, which was understood as `drv`.
pub(super) fn text_path(dir: &StoreDir, drv: &Derivation, text: &[u8]) -> Result<StorePath, Error> {
    let hash = Hash::from(Sha256::of(text));
    let references = drv.basic.input_srcs.iter().chain(drv.input_drvs.keys()).cloned().collect();
    let address = ContentAddress { method: Method::Text, hash };
    address.store_path(dir, &format!("{}.drv", drv.basic.name), &references, false)
}

/// The path that the `.drv` file of a resolved derivation has.
pub fn basic_drv_path(dir: &StoreDir, drv: &BasicDerivation) -> Result<StorePath, Error> {
    drv_path(dir, &Derivation { basic: drv.clone(), input_drvs: BTreeMap::new() })
}

/// The hash of the text with its inputs replaced. None if one of them is deferred.
pub(super) fn hash(
    dir: &StoreDir,
    drv: &Derivation,
    input: &mut dyn FnMut(&StorePath) -> Result<InputHash, Error>,
    blank: bool,
) -> Result<Option<Sha256>, Error> {
    // Inputs with one hash become one, with all their outputs.
    let mut inputs = BTreeMap::<String, BTreeSet<OutputName>>::new();
    for (path, outputs) in &drv.input_drvs {
        match input(path)? {
            InputHash::Deferred => return Ok(None),
            InputHash::Whole(hash) => {
                inputs.entry(hash.to_hex()).or_default().extend(outputs.iter().cloned());
            }
            InputHash::Fixed(hashes) => {
                for output in outputs {
                    let hash = hashes.get(output).ok_or_else(|| Error::Derivation {
                        why: format!("its input {path} has no output {output}"),
                    })?;
                    inputs.entry(hash.to_hex()).or_default().insert(OutputName::out());
                }
            }
        }
    }
    let inputs = inputs.iter().map(|(hash, outputs)| (hash.clone(), outputs));
    Ok(Some(Sha256::of(&aterm::print_with(dir, &drv.basic, inputs, blank)?)))
}
