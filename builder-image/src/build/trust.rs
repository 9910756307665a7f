//! Whose word counts for the paths that a client says its outputs have (Nix: daemon.cc, which leaves input-addressed
//! derivations without a `.drv` to trusted users). Pure.
//!
//! The path of an input-addressed output says nothing of its content: whoever may claim one at will puts what he likes in
//! anybody's place. The operator has asked for proofs before; this asks again for what the derivation alone can prove. Paths
//! of the other kinds follow from content, and are checked where that is, whatever is said here. A `.drv` file that is valid
//! in the store was proven when it became so.

use std::collections::BTreeSet;

use drover_nix::derivation::modulo;
use drover_nix::derivation::proof::prove_alone;
use drover_nix::{BasicDerivation, StoreDir, StorePath};
use drover_serve::BuildStatus;

use crate::error::Error;

/// Where a derivation comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Origin {
    /// As the client sent it.
    Client,
    /// From a valid `.drv` file.
    Store,
}

/// What is believed, and what is built at all. Derivations are named as their `.drv` files would be if they had no
/// derivations as inputs: that says every field of them.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub(crate) struct Trust {
    /// The client's word is not enough for paths.
    pub verified: bool,
    /// Nobody can prove these from themselves, but who started this has proven them.
    pub proven: BTreeSet<StorePath>,
    /// If there are any, nothing else is built.
    pub only: BTreeSet<StorePath>,
}

impl Trust {
    /// Refuses a derivation that this builder is not for, or whose paths are not proven.
    pub(super) fn check(
        &self,
        dir: &StoreDir,
        origin: Origin,
        drv_path: &StorePath,
        drv: &BasicDerivation,
    ) -> Result<(), Error> {
        let full = dir.full(drv_path);
        if self.only.is_empty() && (!self.verified || origin == Origin::Store) {
            return Ok(());
        }
        let own = modulo::basic_drv_path(dir, drv)?;
        if !self.only.is_empty() && !self.only.contains(&own) {
            // Not the derivation's fault: whoever started this expected another one.
            let status = BuildStatus::MiscFailure;
            let message = format!(
                "cannot build '{full}': this builder was started for other builds, by --only-derivation; this one is {own}"
            );
            return Err(Error::Verdict { status, message });
        }
        if !self.verified || origin == Origin::Store || self.proven.contains(&own) {
            return Ok(());
        }
        prove_alone(dir, drv).map_err(|error| {
            Error::input(format!(
                "cannot build '{full}': its output paths are not proven: {error}. This builder believes no others \
                 (--trust verified); where they are proven in another way, start it with --proven-derivation {own}"
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use drover_nix::{DerivationOutput, OutputName};

    use super::*;
    use crate::build::testing::derivation;

    const DRV: &str = "q4mzjdlh5px6977h7v5fdsk1p33yg583-x.drv";

    /// With the path that follows from the rest.
    fn honest() -> BasicDerivation {
        let mut drv = derivation(&[("a", "b")]);
        drv.outputs = [(OutputName::out(), DerivationOutput::Deferred)].into();
        modulo::fill_output_paths(&StoreDir::default(), &mut drv).unwrap();
        drv
    }

    /// With a path of somebody else.
    fn liar() -> BasicDerivation {
        let mut drv = honest();
        drv.args.push("changed".into());
        drv
    }

    fn own(drv: &BasicDerivation) -> BTreeSet<StorePath> {
        [modulo::basic_drv_path(&StoreDir::default(), drv).unwrap()].into()
    }

    fn check(trust: &Trust, origin: Origin, drv: &BasicDerivation) -> Result<(), Error> {
        trust.check(&StoreDir::default(), origin, &DRV.parse().unwrap(), drv)
    }

    #[test]
    fn a_claim_is_believed_only_where_that_was_said() {
        let claimed = Trust::default();
        let verified = Trust { verified: true, ..Trust::default() };
        check(&claimed, Origin::Client, &liar()).unwrap();
        check(&verified, Origin::Client, &honest()).unwrap();
        check(&verified, Origin::Store, &liar()).unwrap();
        let error = check(&verified, Origin::Client, &liar()).unwrap_err();
        assert_eq!(error.status(), BuildStatus::InputRejected);
        for said in ["not proven", "output out of x claims", "--proven-derivation"] {
            assert!(error.to_string().contains(said), "{error}");
        }
    }

    #[test]
    fn a_proof_is_for_one_derivation_and_every_field_of_it() {
        let trust = Trust { verified: true, proven: own(&liar()), ..Trust::default() };
        check(&trust, Origin::Client, &liar()).unwrap();
        let mut other = liar();
        other.env.insert("a".into(), "c".into());
        assert!(check(&trust, Origin::Client, &other).is_err(), "the same outputs, another derivation");
    }

    #[test]
    fn nothing_is_built_but_what_a_builder_is_for() {
        for verified in [false, true] {
            let trust = Trust { verified, only: own(&honest()), ..Trust::default() };
            check(&trust, Origin::Client, &honest()).unwrap();
            let mut other = derivation(&[("another", "one")]);
            other.outputs = [(OutputName::out(), DerivationOutput::Deferred)].into();
            modulo::fill_output_paths(&StoreDir::default(), &mut other).unwrap();
            for origin in [Origin::Client, Origin::Store] {
                let error = check(&trust, origin, &other).unwrap_err();
                assert_eq!(error.status(), BuildStatus::MiscFailure, "{error}");
            }
        }
    }

    #[test]
    fn what_a_builder_is_for_still_has_to_be_proven() {
        let trust = Trust { verified: true, only: own(&liar()), ..Trust::default() };
        assert_eq!(check(&trust, Origin::Client, &liar()).unwrap_err().status(), BuildStatus::InputRejected);
    }
}
