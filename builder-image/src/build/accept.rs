//! Whether a derivation can be built here, asked before anything is locked or made (Nix: derivation-building-goal.cc).

use drover_nix::derivation::DerivationType;
use drover_nix::{BasicDerivation, DerivationOutput, StorePath};

use super::attrs::Attributes;
use super::{Builder, builtins, checks};
use crate::error::Error;

/// What derivations without known output paths need in Nix, implied or said (Nix: derivation-options.cc).
const CONTENT_ADDRESSED: &str = "ca-derivations";

impl Builder {
    fn has(&self, feature: &str) -> bool {
        feature == CONTENT_ADDRESSED || self.settings.features.contains(feature)
    }

    /// Refuses what this builder cannot build at all.
    pub(super) fn accept(
        &self,
        drv_path: &StorePath,
        drv: &BasicDerivation,
        attributes: &Attributes<'_>,
    ) -> Result<DerivationType, Error> {
        let kind = drv.kind()?;
        let full = self.store.store_dir().full(drv_path);
        let refuse = |why: String| Err(Error::input(format!("cannot build '{full}': {why}")));
        let system = drv.system.to_string();
        // What is part of this program runs wherever this program does.
        if !builtins::is_builtin(drv) && !self.settings.systems.contains(&system) {
            let have = self.settings.systems.join(", ");
            return refuse(format!("it is for system `{system}`, and this builder builds for: {have}"));
        }
        let wanted = attributes.strings("requiredSystemFeatures")?.unwrap_or_default();
        let lacking: Vec<String> = wanted.into_iter().filter(|feature| !self.has(feature)).collect();
        if !lacking.is_empty() {
            let have: Vec<&str> = self.settings.features.iter().map(String::as_str).collect();
            return refuse(format!(
                "it needs the features {{{}}}, and this builder has {{{}}}",
                lacking.join(", "),
                have.join(", ")
            ));
        }
        if attributes.flag("__noChroot") {
            return refuse("it has `__noChroot` set, and this builder builds in the sandbox only".into());
        }
        if kind == DerivationType::Deferred {
            return refuse("its output paths are not known: it has to be resolved first".into());
        }
        attributes.discards_references()?;
        drv.outputs.iter().try_for_each(|(name, output)| {
            checks::understand(attributes, name)?;
            addressable(output)
                .map_err(|why| Error::input(format!("cannot build '{full}': output `{name}`: {why}")))
        })?;
        Ok(kind)
    }
}

/// Whether an output's content can be addressed at all in the way that it asks for.
fn addressable(output: &DerivationOutput) -> Result<(), drover_nix::Error> {
    match output {
        DerivationOutput::CaFixed(ca) => ca.method.check_algo(ca.hash.algo),
        DerivationOutput::CaFloating { method, algo } | DerivationOutput::Impure { method, algo } => {
            method.check_algo(*algo)
        }
        DerivationOutput::Deferred | DerivationOutput::InputAddressed(_) => Ok(()),
    }
}
