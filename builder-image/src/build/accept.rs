//! Whether a derivation can be built here, asked before anything is locked or made (Nix: derivation-building-goal.cc).

use drover_nix::derivation::DerivationType;
use drover_nix::{BasicDerivation, DerivationOutput, StorePath};

use super::attrs::Attributes;
use super::{Builder, builtins, outputs};
use crate::error::Error;

impl Builder {
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
        let lacking: Vec<String> =
            wanted.into_iter().filter(|feature| !self.settings.features.contains(feature)).collect();
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
        match kind {
            DerivationType::InputAddressed => Ok(kind),
            DerivationType::CaFixed => {
                let mut fixed = drv.outputs.values().filter_map(|output| match output {
                    DerivationOutput::CaFixed(ca) => Some(ca),
                    _ => None,
                });
                fixed.try_for_each(outputs::supported).map(|()| kind)
            }
            DerivationType::Deferred => {
                refuse("its output paths are not known: it has to be resolved first".into())
            }
            DerivationType::CaFloating | DerivationType::Impure => {
                refuse("content-addressed outputs without a fixed hash are not supported".into())
            }
        }
    }
}
