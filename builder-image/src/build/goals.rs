//! Derivations of the store, built after what they depend on (Nix: derivation-goal.cc). One after the other: a builder
//! has one build of a session at a time.

use std::collections::BTreeSet;

use drover_nix::{OutputName, StorePath};
use drover_serve::{BuildOptions, BuildStatus};
use drover_store::TempRoots;

use super::cancel::Cancel;
use super::log::Log;
use super::{Builder, Request};
use crate::error::Error;

/// What a session wants: some outputs of a valid `.drv`.
pub(crate) struct Goal<'a> {
    pub drv_path: &'a StorePath,
    /// None for all.
    pub outputs: Option<&'a BTreeSet<OutputName>>,
    pub options: &'a BuildOptions,
    pub roots: &'a TempRoots,
    pub log: &'a Log,
    pub cancel: &'a Cancel,
}

/// A derivation on the way: below it on the stack is what waits for it.
struct Open {
    drv_path: StorePath,
    outputs: Option<BTreeSet<OutputName>>,
    /// Its inputs were looked at, and lie above it as far as they are missing.
    expanded: bool,
}

impl Builder {
    /// Makes the outputs valid. The failure of an input is a failed dependency, with the input's own message.
    pub(crate) fn realise(&self, goal: &Goal<'_>) -> Result<(), Error> {
        let open = |drv_path: &StorePath, outputs: Option<&BTreeSet<OutputName>>| Open {
            drv_path: drv_path.clone(),
            outputs: outputs.cloned(),
            expanded: false,
        };
        let mut stack = vec![open(goal.drv_path, goal.outputs)];
        // Chains of derivations are as long as someone likes: no recursion, and only names are kept.
        let mut expanded = BTreeSet::new();
        while let Some(top) = stack.last_mut() {
            if goal.cancel.is_cancelled() {
                return Err(Error::gone());
            }
            if self.is_satisfied(goal, &top.drv_path, top.outputs.as_ref())? {
                expanded.remove(&top.drv_path);
                stack.pop();
                continue;
            }
            if top.expanded {
                let drv_path = top.drv_path.clone();
                self.build_from_store(goal, &drv_path)?;
                expanded.remove(&drv_path);
                stack.pop();
                continue;
            }
            top.expanded = true;
            let drv_path = top.drv_path.clone();
            if !expanded.insert(drv_path.clone()) {
                return Err(Error::input(format!("derivation '{drv_path}' depends on itself")));
            }
            let drv = self.store.read_derivation(&drv_path)?;
            stack.extend(drv.input_drvs.iter().map(|(input, outputs)| open(input, Some(outputs))));
        }
        Ok(())
    }

    /// Whether all wanted outputs are valid; keeps them from the collector first.
    fn is_satisfied(
        &self,
        goal: &Goal<'_>,
        drv_path: &StorePath,
        wanted: Option<&BTreeSet<OutputName>>,
    ) -> Result<bool, Error> {
        goal.roots.add(drv_path)?;
        if !self.store.is_valid(drv_path)? {
            return Err(drover_store::Error::NotValid { path: drv_path.clone() }.into());
        }
        let known = self.store.derivation_outputs(drv_path)?;
        let Some(wanted) = wanted else {
            let paths: BTreeSet<StorePath> = known.into_values().collect();
            goal.roots.add_all(&paths)?;
            return Ok(!paths.is_empty() && self.store.valid_paths(&paths)?.len() == paths.len());
        };
        let mut paths = BTreeSet::new();
        for name in wanted {
            // Outputs that are not known before they are built have no path here; whoever builds them says so.
            match known.get(name) {
                Some(path) => paths.insert(path.clone()),
                None if self.store.read_derivation(drv_path)?.basic.outputs.contains_key(name) => {
                    return Ok(false);
                }
                None => {
                    return Err(Error::input(format!("derivation '{drv_path}' has no output `{name}`")));
                }
            };
        }
        goal.roots.add_all(&paths)?;
        Ok(self.store.valid_paths(&paths)?.len() == paths.len())
    }

    /// Builds a derivation whose inputs are all there.
    fn build_from_store(&self, goal: &Goal<'_>, drv_path: &StorePath) -> Result<(), Error> {
        let drv = self.store.read_derivation(drv_path)?;
        let resolved = drv.resolve(self.store.store_dir(), |input, output| {
            self.store.derivation_outputs(input).ok()?.get(output).cloned()
        })?;
        let result = self.build(&Request {
            drv_path,
            drv: &resolved,
            options: goal.options,
            roots: goal.roots,
            log: goal.log,
            cancel: goal.cancel,
        });
        if result.status.is_success() {
            return Ok(());
        }
        if drv_path == goal.drv_path {
            return Err(Error::Verdict { status: result.status, message: result.error_message });
        }
        let dir = self.store.store_dir();
        Err(Error::Verdict {
            status: BuildStatus::DependencyFailed,
            message: format!(
                "cannot build '{}': '{}', which it depends on, failed: {}",
                dir.full(goal.drv_path),
                dir.full(drv_path),
                result.error_message
            ),
        })
    }
}
