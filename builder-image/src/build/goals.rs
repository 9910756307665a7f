//! Derivations of the store, built after what they depend on (Nix: derivation-goal.cc, derivation-resolution-goal.cc). One
//! after the other: a builder has one build of a session at a time.
//!
//! Where outputs of inputs have paths that follow from content, a derivation can be built only once these are built, and
//! then is another one, which gets a `.drv` of its own as Nix gives it.

use std::collections::{BTreeMap, BTreeSet};

use drover_nix::derivation::{DerivationType, aterm, modulo};
use drover_nix::nar::Writer;
use drover_nix::{
    BasicDerivation, ContentAddress, Derivation, Method, OutputName, PathInfo, Sha256, StorePath,
};
use drover_serve::{BuildOptions, BuildStatus, Cause};
use drover_store::TempRoots;

use super::cancel::Cancel;
use super::log::Log;
use super::targets::Paths;
use super::trust::Origin;
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

/// What one request made of impure derivations: for its other goals, and for no other request's.
#[derive(Default)]
pub(crate) struct Made {
    impure: BTreeMap<StorePath, Paths>,
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
    pub(crate) fn realise(&self, goal: &Goal<'_>, made: &mut Made) -> Result<(), Error> {
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
            if self.is_satisfied(goal, made, &top.drv_path, top.outputs.as_ref())? {
                expanded.remove(&top.drv_path);
                stack.pop();
                continue;
            }
            if top.expanded {
                let drv_path = top.drv_path.clone();
                self.build_from_store(goal, made, &drv_path)?;
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
        made: &Made,
        drv_path: &StorePath,
        wanted: Option<&BTreeSet<OutputName>>,
    ) -> Result<bool, Error> {
        goal.roots.add(drv_path)?;
        if !self.store.is_valid(drv_path)? {
            return Err(drover_store::Error::NotValid { path: drv_path.clone() }.into());
        }
        let mut known = self.store.derivation_outputs(drv_path)?;
        let complete = match wanted {
            Some(wanted) => wanted.iter().all(|name| known.contains_key(name)),
            None => !known.is_empty(),
        };
        let mut names: BTreeSet<OutputName> = known.keys().cloned().collect();
        if !complete {
            names = self.store.read_derivation(drv_path)?.basic.outputs.into_keys().collect();
            known.extend(self.made_paths(made, drv_path));
        }
        let wanted = wanted.unwrap_or(&names);
        if let Some(stray) = wanted.difference(&names).next() {
            return Err(Error::input(format!("derivation '{drv_path}' has no output `{stray}`")));
        }
        let paths = wanted.iter().map(|name| Some((name.clone(), known.get(name)?.clone())));
        match paths.collect::<Option<Paths>>() {
            Some(paths) => self.all_valid(&paths, goal.roots),
            // Not known before it is built.
            None => Ok(false),
        }
    }

    /// Outputs whose paths were not known before they were built, as far as this process has built them.
    fn made_paths(&self, made: &Made, drv_path: &StorePath) -> Paths {
        let impure = made.impure.get(drv_path).cloned();
        impure.or_else(|| self.realised.of_file(drv_path)).unwrap_or_default()
    }

    /// Builds a derivation whose inputs are all there.
    fn build_from_store(&self, goal: &Goal<'_>, made: &mut Made, drv_path: &StorePath) -> Result<(), Error> {
        let dir = self.store.store_dir();
        let drv = self.store.read_derivation(drv_path)?;
        let kind = drv.basic.kind()?;
        if !kind.may_use_impure() {
            self.refuse_impure_inputs(drv_path, &drv)?;
        }
        let resolved = drv.resolve(dir, |input, output| {
            let known = self.store.derivation_outputs(input).ok()?.remove(output);
            known.or_else(|| self.made_paths(made, input).remove(output))
        })?;
        let built_as = match drv.resolves_to_another()? {
            true => self.write_resolved(goal, &resolved)?,
            false => drv_path.clone(),
        };
        let result = self.build(&Request {
            drv_path: &built_as,
            drv: &resolved,
            origin: Origin::Store,
            options: goal.options,
            roots: goal.roots,
            log: goal.log,
            cancel: goal.cancel,
        });
        if result.status.is_success() {
            let built = result.built_outputs.into_iter();
            let paths = built.map(|(name, built)| (name, built.path)).collect();
            match kind {
                DerivationType::Impure => drop(made.impure.insert(drv_path.clone(), paths)),
                DerivationType::CaFloating | DerivationType::Deferred => {
                    self.realised.insert_of_file(drv_path.clone(), paths);
                }
                // The store knows.
                DerivationType::CaFixed | DerivationType::InputAddressed => {}
            }
            return Ok(());
        }
        if drv_path == goal.drv_path {
            return Err(Error::Verdict { status: result.status, message: result.error_message });
        }
        let message = format!(
            "cannot build '{}': '{}', which it depends on, failed: {}",
            dir.full(goal.drv_path),
            dir.full(drv_path),
            result.error_message
        );
        // What the machine has failed stays at the beginning, where it is looked for.
        let cause = Cause::of(&result);
        let message = cause.map(|cause| cause.say(&message)).unwrap_or(message);
        Err(Error::Verdict { status: BuildStatus::DependencyFailed, message })
    }

    /// What is impure cannot be built again, so that nothing which claims otherwise may depend on it.
    fn refuse_impure_inputs(&self, drv_path: &StorePath, drv: &Derivation) -> Result<(), Error> {
        let dir = self.store.store_dir();
        for input in drv.input_drvs.keys() {
            if self.store.read_derivation(input)?.basic.kind()? == DerivationType::Impure {
                return Err(Error::input(format!(
                    "pure derivation '{}' depends on impure derivation '{}'",
                    dir.full(drv_path),
                    dir.full(input)
                )));
            }
        }
        Ok(())
    }

    /// Adds the `.drv` of a resolved derivation, which becomes the deriver of what is built, to the store.
    fn write_resolved(&self, goal: &Goal<'_>, resolved: &BasicDerivation) -> Result<StorePath, Error> {
        let dir = self.store.store_dir();
        let drv = Derivation { basic: resolved.clone(), input_drvs: BTreeMap::new() };
        let text = aterm::print(dir, &drv)?;
        let mut writer = Writer::new(Vec::new());
        writer.file_bytes(false, &text)?;
        let nar = writer.finish()?;
        let path = modulo::drv_path(dir, &drv)?;
        let info = PathInfo {
            path: path.clone(),
            nar_hash: Sha256::of(&nar),
            nar_size: nar.len() as u64,
            references: resolved.input_srcs.clone(),
            deriver: None,
            signatures: Vec::new(),
            ca: Some(ContentAddress { method: Method::Text, hash: Sha256::of(&text).into() }),
        };
        goal.roots.add(&path)?;
        self.store.add_nar(&info, false, 0, &mut nar.as_slice())?;
        Ok(path)
    }
}
