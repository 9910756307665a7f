//! What Nix up to 2.34 calls a derivation's output in its table of realisations, where it notes the paths that were
//! not known before the build (Nix 2.34: derivations.cc, hashDerivationModulo; realisation.hh, DrvOutput).
//!
//! It is a hash like the one that output paths are made of, but one that goes on where a path is not known. Since 2.35
//! Nix notes the path of the resolved `.drv` instead, for which nothing needs to be computed.

use std::collections::BTreeMap;

use super::modulo::{self, InputHash};
use super::{DerivationType, OutputName};
use crate::{Derivation, Error, Sha256, StoreDir, StorePath};

/// The hash that stands for each output of `drv`. `input` gives [`input_hash`] of its inputs.
pub fn keys(
    dir: &StoreDir,
    drv: &Derivation,
    input: &mut dyn FnMut(&StorePath) -> Result<InputHash, Error>,
) -> Result<BTreeMap<OutputName, Sha256>, Error> {
    Ok(match stand_in(dir, drv, input, true)? {
        InputHash::Fixed(hashes) => hashes,
        InputHash::Whole(hash) => drv.basic.outputs.keys().map(|name| (name.clone(), hash)).collect(),
        InputHash::Deferred => BTreeMap::new(),
    })
}

/// What stands for `drv` in the [`keys`] of what it is an input of. Never [`InputHash::Deferred`], unless `input` says
/// so.
pub fn input_hash(
    dir: &StoreDir,
    drv: &Derivation,
    input: &mut dyn FnMut(&StorePath) -> Result<InputHash, Error>,
) -> Result<InputHash, Error> {
    stand_in(dir, drv, input, false)
}

fn stand_in(
    dir: &StoreDir,
    drv: &Derivation,
    input: &mut dyn FnMut(&StorePath) -> Result<InputHash, Error>,
    blank: bool,
) -> Result<InputHash, Error> {
    if drv.basic.kind()? == DerivationType::CaFixed {
        return modulo::input_hash(dir, drv, input);
    }
    Ok(modulo::hash(dir, drv, input, blank)?.map_or(InputHash::Deferred, InputHash::Whole))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::derivation::aterm;

    /// From Nix 2.34's table, after it built what is in testdata/content-addressed.
    const KEYS: [(&str, &str, &[u8]); 5] = [
        (
            "base",
            "d49dddeaeaca070f24064498f92144430ec95d6372614b7060103fe017a9bd93",
            include_bytes!("../../testdata/content-addressed/7papim1jhqjlq8kcsnwmjyxbdgmw9pgv-base.drv"),
        ),
        (
            "plain.txt",
            "5842744903bc9ecd16700ea7e3e9b966eb8b96a274ab17017bc6e19625025fa1",
            include_bytes!("../../testdata/content-addressed/pasxmlj21192xg67r22ip97bxly96ycx-plain.txt.drv"),
        ),
        (
            "fixed",
            "2f819b31cbce1425ce9a9bd40807a46da54e569c8402080737892552a0075bd5",
            include_bytes!("../../testdata/content-addressed/ssqnvrc6cpwwl3csijv225ns3zqipp42-fixed.drv"),
        ),
        (
            "above",
            "ff01a6515b807f703e7817cdd3b27ada50536b4500f96bf10f96b026186fed65",
            include_bytes!("../../testdata/content-addressed/kvl5syg3n9r7rmmrdzkpd0ca7mf4pwyl-above.drv"),
        ),
        (
            "deferred",
            "05f15b919cd57837870fe2f8ae6a49e673538edc596e89966245bea421b11e6d",
            include_bytes!("../../testdata/content-addressed/gm4wzcsawaihldpc37262n1n3ism6xgj-deferred.drv"),
        ),
    ];

    #[test]
    fn nix_uses_the_same_keys() {
        let dir = StoreDir::default();
        let mut hashes: BTreeMap<StorePath, InputHash> = BTreeMap::new();
        for (name, key, text) in KEYS {
            let drv = aterm::parse(&dir, name, text).unwrap();
            let mut input = |path: &StorePath| Ok(hashes[path].clone());
            let keys = keys(&dir, &drv, &mut input).unwrap();
            assert_eq!(keys.len(), drv.basic.outputs.len());
            assert!(keys.values().all(|hash| hash.to_hex() == key), "{name}: {keys:?}");
            let hash = input_hash(&dir, &drv, &mut input).unwrap();
            hashes.insert(modulo::drv_path(&dir, &drv).unwrap(), hash);
        }
    }
}
