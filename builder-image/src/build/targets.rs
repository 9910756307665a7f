//! Where a derivation's outputs go: which of their paths are known before the build, where the builder is to write each,
//! and the names by which builds keep out of each other's way (Nix: derivation-builder.cc, makeFallbackPath;
//! derivation-building-goal.cc). Pure.

use std::collections::{BTreeMap, BTreeSet};

use drover_nix::derivation::DerivationType;
use drover_nix::{BasicDerivation, OutputName, Sha256, StoreDir, StorePath};

use crate::error::Error;

/// Outputs and where they ended up.
pub(crate) type Paths = BTreeMap<OutputName, StorePath>;

/// One output before the build.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Target {
    /// None where the path follows from the content.
    pub known: Option<StorePath>,
    /// Where the builder writes it. The known path if there is one: in a sandbox nothing else can be there.
    pub scratch: StorePath,
}

pub(crate) type Targets = BTreeMap<OutputName, Target>;

/// The targets of every output. `random` makes a hash part for each output of an impure derivation, which has another
/// one in every build.
pub(crate) fn targets(
    dir: &StoreDir,
    drv_path: &StorePath,
    drv: &BasicDerivation,
    mut random: impl FnMut() -> Result<[u8; 20], Error>,
) -> Result<Targets, Error> {
    let kind = drv.kind()?;
    let target = |(name, known): (OutputName, Option<StorePath>)| {
        let path_name = name.path_name(&drv.name);
        let scratch = match (&known, kind) {
            (Some(path), _) => path.clone(),
            (None, DerivationType::Impure) => StorePath::from_parts(random()?, &path_name)?,
            // A kind of path that nothing else has, so that it is no other object's.
            (None, _) => {
                dir.make_path(&format!("rewrite:{drv_path}:name:{name}"), Sha256([0; 32]), &path_name)?
            }
        };
        Ok((name, Target { known, scratch }))
    };
    drv.output_paths(dir)?.into_iter().map(target).collect()
}

/// What a build locks, without the `.lock` that each gets: its outputs, or what stands for those that are not known.
pub(crate) fn lock_names(
    drv_path: &StorePath,
    known: &BTreeMap<OutputName, Option<StorePath>>,
) -> BTreeSet<String> {
    let lock_name = |(name, path): (&OutputName, &Option<StorePath>)| match path {
        Some(path) => path.to_string(),
        None => format!("{drv_path}.{name}"),
    };
    known.iter().map(lock_name).collect()
}

#[cfg(test)]
mod tests {
    use drover_nix::{DerivationOutput, HashAlgo, Method};

    use super::*;
    use crate::build::testing::derivation;

    const DRV: &str = "q4mzjdlh5px6977h7v5fdsk1p33yg583-x.drv";

    fn with(output: DerivationOutput) -> (BasicDerivation, Targets) {
        let mut drv = derivation(&[]);
        drv.outputs = [(OutputName::out(), output.clone()), ("dev".parse().unwrap(), output)].into();
        if matches!(drv.outputs["out"], DerivationOutput::InputAddressed(_)) {
            drv.outputs.remove("dev");
        }
        let targets = targets(&StoreDir::default(), &DRV.parse().unwrap(), &drv, || Ok([7; 20])).unwrap();
        (drv, targets)
    }

    #[test]
    fn what_is_known_is_where_it_is_built() {
        let path: StorePath = "i00sflxqsj37lfmf95m8mn0grv615hpj-x".parse().unwrap();
        let (drv, targets) = with(DerivationOutput::InputAddressed(path.clone()));
        assert_eq!(targets["out"], Target { known: Some(path.clone()), scratch: path.clone() });
        let known = drv.output_paths(&StoreDir::default()).unwrap();
        assert_eq!(lock_names(&DRV.parse().unwrap(), &known), [path.to_string()].into());
    }

    #[test]
    fn what_is_not_known_has_nixs_fallback_path() {
        let (drv, targets) =
            with(DerivationOutput::CaFloating { method: Method::Nar, algo: HashAlgo::Sha256 });
        // sha256 of "rewrite:<DRV>:name:out:sha256:000…:/nix/store:x", folded to 20 bytes: computed apart from this.
        assert_eq!(targets["out"].scratch.to_string(), "xx3k5mi9yclfadsjqql70r4720pclksg-x");
        assert_eq!(targets["dev"].scratch.to_string(), "hs0a5mkg7x29h8pspqziajsw7fk1mapd-x-dev");
        assert_eq!(targets["out"].known, None);
        let known = drv.output_paths(&StoreDir::default()).unwrap();
        let names = lock_names(&DRV.parse().unwrap(), &known);
        assert_eq!(names, [format!("{DRV}.dev"), format!("{DRV}.out")].into());
    }

    #[test]
    fn what_is_impure_is_somewhere_else_each_time() {
        let (_, targets) = with(DerivationOutput::Impure { method: Method::Nar, algo: HashAlgo::Sha256 });
        assert_eq!(targets["out"].scratch, StorePath::from_parts([7; 20], "x").unwrap());
    }
}
