//! Where outputs are whose paths follow from their content: what was built in this run, and what Nix has noted in the
//! stores at hand.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result};
use drover_nix::derivation::modulo::{self, InputHash};
use drover_nix::derivation::{DerivationType, realisation};
use drover_nix::{BasicDerivation, Derivation, Error, OutputName, StoreDir, StorePath};
use drover_store::{Access, LocalStore, StoreLayout};

pub(crate) struct Realised {
    dir: StoreDir,
    /// Stores that are open, and those that will be when they are needed.
    stores: Vec<LocalStore>,
    closed: Vec<StoreLayout>,
    /// Stands for derivations in the stores' tables.
    hashes: BTreeMap<StorePath, InputHash>,
    outputs: BTreeMap<(StorePath, OutputName), StorePath>,
    /// Why a store could not be asked.
    troubles: Vec<String>,
}

impl Realised {
    pub(crate) fn new(dir: StoreDir) -> Self {
        let (stores, closed, troubles) = (Vec::new(), Vec::new(), Vec::new());
        Self { dir, stores, closed, hashes: BTreeMap::new(), outputs: BTreeMap::new(), troubles }
    }

    /// Asks this store as well.
    pub(crate) fn add_store(&mut self, layout: StoreLayout) {
        let is_known =
            self.closed.contains(&layout) || self.stores.iter().any(|store| store.layout() == &layout);
        if !is_known {
            self.closed.push(layout);
            // Whatever was asked for has to be asked for again.
            self.hashes.clear();
        }
    }

    pub(crate) fn record(&mut self, drv: &StorePath, output: &OutputName, path: StorePath) {
        self.outputs.insert((drv.clone(), output.clone()), path);
    }

    /// Where the output is: known from its derivation, recorded or found.
    pub(crate) fn output_path(
        &self,
        path: &StorePath,
        drv: &Derivation,
        output: &OutputName,
    ) -> Option<StorePath> {
        let stated = drv.basic.outputs.get(output)?.path(&self.dir, &drv.basic.name, output).ok()?;
        stated.or_else(|| self.outputs.get(&(path.clone(), output.clone())).cloned())
    }

    /// Why stores could not be asked, for messages.
    pub(crate) fn troubles(&self) -> &[String] {
        &self.troubles
    }

    /// Looks for what is not known of `drvs`, which come with all that is below them, inputs first.
    pub(crate) fn look_up(&mut self, drvs: &[(StorePath, &Derivation)]) -> Result<()> {
        for layout in std::mem::take(&mut self.closed) {
            let place = layout.state_dir.display().to_string();
            match LocalStore::open(layout, Access::ReadOnly) {
                Ok(store) => self.stores.push(store),
                Err(error) => self.troubles.push(format!("{place}: {error}")),
            }
        }
        let known: BTreeMap<&StorePath, &Derivation> = drvs.iter().map(|(path, drv)| (path, *drv)).collect();
        for (path, drv) in drvs {
            if self.hashes.contains_key(path) {
                continue;
            }
            self.look_up_one(path, drv, &known)
                .with_context(|| format!("looking for the outputs of {path}"))?;
        }
        Ok(())
    }

    fn look_up_one(
        &mut self,
        path: &StorePath,
        drv: &Derivation,
        known: &BTreeMap<&StorePath, &Derivation>,
    ) -> Result<()> {
        let hashes = &self.hashes;
        let mut input = |input: &StorePath| {
            let why = || Error::Derivation { why: format!("its input {input} is not known") };
            hashes.get(input).cloned().ok_or_else(why)
        };
        let keys = realisation::keys(&self.dir, drv, &mut input)?;
        let hash = realisation::input_hash(&self.dir, drv, &mut input)?;
        self.hashes.insert(path.clone(), hash);
        let kind = drv.basic.kind()?;
        // What an impure derivation made before is no answer to what it makes now.
        if kind == DerivationType::Impure {
            return Ok(());
        }
        let unknown: BTreeSet<&OutputName> =
            drv.basic.outputs.keys().filter(|output| self.output_path(path, drv, output).is_none()).collect();
        if unknown.is_empty() {
            return Ok(());
        }
        // Nix notes what it built under the resolved derivation, up to 2.34 under the other one too.
        let resolved =
            drv.resolve(&self.dir, |input, output| self.output_path(input, known.get(input)?, output));
        let resolved = match resolved {
            Ok(basic) => Some(self.names(basic)?),
            Err(Error::Unresolved { .. }) => None,
            Err(error) => return Err(error.into()),
        };
        for output in unknown {
            let mut found = self.ask(path, &keys, output)?;
            if let (None, Some((path, keys, basic))) = (&found, &resolved) {
                found = match basic.outputs[output].path(&self.dir, &basic.name, output)? {
                    Some(path) => Some(path),
                    None => self.ask(path, keys, output)?,
                };
            }
            if let Some(found) = found {
                self.record(path, output, found);
            }
        }
        Ok(())
    }

    /// What a resolved derivation is called in the tables.
    fn names(&self, basic: BasicDerivation) -> Result<(StorePath, Keys, BasicDerivation)> {
        let path = modulo::basic_drv_path(&self.dir, &basic)?;
        let drv = Derivation { basic, input_drvs: BTreeMap::new() };
        let keys = realisation::keys(&self.dir, &drv, &mut |_| Ok(InputHash::Deferred))?;
        Ok((path, keys, drv.basic))
    }

    fn ask(&self, path: &StorePath, keys: &Keys, output: &OutputName) -> Result<Option<StorePath>> {
        let Some(key) = keys.get(output) else {
            return Ok(None);
        };
        for store in &self.stores {
            if let Some(found) = store.realised_output(path, key, output)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }
}

type Keys = BTreeMap<OutputName, drover_nix::Sha256>;
