//! Derivations from `.drv` files and from `nix derivation show`, and what they come to when their inputs are replaced
//! by paths.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, bail};
use drover_nix::derivation::resolve::DrvOutputs;
use drover_nix::derivation::{DerivationType, aterm, json, modulo};
use drover_nix::{BasicDerivation, Derivation, Error, OutputName, StoreDir, StorePath};
use drover_store::StoreLayout;

use crate::realised::Realised;

pub(crate) use drover_session::Resolved;

/// Derivations that were read, and where to look for more.
pub(crate) struct Resolver {
    dir: StoreDir,
    /// Directories with `.drv` files, the preferred one first.
    places: Vec<PathBuf>,
    known: BTreeMap<StorePath, Derivation>,
    realised: Realised,
}

impl Resolver {
    /// Reads derivations from this store, and what it knows of their outputs.
    pub(crate) fn new(layout: StoreLayout) -> Self {
        let (dir, place) = (layout.store_dir.clone(), layout.real_store_dir.clone());
        let mut realised = Realised::new(dir.clone());
        realised.add_store(layout);
        Self { dir, places: vec![place], known: BTreeMap::new(), realised }
    }

    /// Takes in a `.drv` file, given as a file or by the path that it has in the store.
    pub(crate) fn add_file(&mut self, file: &Path) -> Result<StorePath> {
        let base_name = file.file_name().unwrap_or_default();
        let path = StorePath::from_base_name(base_name.as_encoded_bytes()).map_err(|_| {
            anyhow!(
                "{}: a .drv file is called HASH-NAME.drv, as in the store; its hash is part of it",
                file.display()
            )
        })?;
        if !path.is_derivation() {
            bail!("{}: its name does not end with .drv", file.display());
        }
        if file.exists()
            && let Some(place) = file.parent()
            && !self.places.iter().any(|known| known == place)
        {
            self.places.push(place.to_path_buf());
        }
        if let Some(root) = root_of(file) {
            self.realised.add_store(StoreLayout::in_root(root));
        }
        self.load(&path)?;
        Ok(path)
    }

    /// Takes in the output of `nix derivation show`, of any Nix.
    pub(crate) fn add_json(&mut self, text: &[u8]) -> Result<Vec<StorePath>> {
        let shown = json::parse(&self.dir, text)?;
        // Nix prints a derivation before or after its inputs, by their names: those that are no others' inputs are
        // what was asked for.
        let inputs: BTreeSet<_> = shown.values().flat_map(|drv| drv.input_drvs.keys().cloned()).collect();
        let tops = shown.keys().filter(|path| !inputs.contains(*path)).cloned().collect();
        self.known.extend(shown);
        Ok(tops)
    }

    /// The derivation with its inputs as paths. What the stores know of paths that follow from content is used.
    pub(crate) fn resolve(&mut self, path: &StorePath) -> Result<Resolved> {
        self.try_resolve(path)?.map_err(|missing| {
            let error = Error::Unresolved { missing };
            let troubles = self.realised.troubles().iter().map(|trouble| format!("; not asked: {trouble}"));
            anyhow!(
                "cannot resolve {path}: {error}. Build it with `drover build --recursive`, or its inputs with Nix in the \
                 store that has the .drv files{}",
                troubles.collect::<String>()
            )
        })
    }

    /// As [`Self::resolve`]; the outer result is about the files, the inner one names what has to be built first.
    pub(crate) fn try_resolve(
        &mut self,
        path: &StorePath,
    ) -> Result<std::result::Result<Resolved, DrvOutputs>> {
        let drv = self.load(path)?;
        for input in drv.input_drvs.keys() {
            self.load(input).with_context(|| format!("{path} has it as an input"))?;
        }
        self.check_inputs(path, &drv)?;
        let derivation = match self.with_known_paths(&drv) {
            Err(Error::Unresolved { .. }) => {
                let order = self.closure(path)?;
                let drvs: Vec<_> = order.iter().map(|path| (path.clone(), &self.known[path])).collect();
                self.realised.look_up(&drvs)?;
                self.with_known_paths(&drv)
            }
            result => result,
        };
        let derivation = match derivation {
            Err(Error::Unresolved { missing }) => return Ok(Err(missing)),
            result => result.with_context(|| format!("cannot resolve {path}"))?,
        };
        let drv_path = match drv.resolves_to_another()? {
            true => modulo::basic_drv_path(&self.dir, &derivation)?,
            false => path.clone(),
        };
        Ok(Ok(Resolved { drv_path, derivation }))
    }

    /// Takes note of where an output was found when it was built.
    pub(crate) fn record(&mut self, drv: &StorePath, output: &OutputName, path: &StorePath) {
        self.realised.record(drv, output, path.clone());
    }

    /// The paths of all outputs, if they are known.
    pub(crate) fn outputs(&mut self, path: &StorePath) -> Result<Option<BTreeMap<OutputName, StorePath>>> {
        let drv = self.load(path)?;
        let known =
            |output: &OutputName| Some((output.clone(), self.realised.output_path(path, &drv, output)?));
        Ok(drv.basic.outputs.keys().map(known).collect())
    }

    /// The derivation as its file has it.
    pub(crate) fn derivation(&mut self, path: &StorePath) -> Result<Derivation> {
        self.load(path)
    }

    fn with_known_paths(&self, drv: &Derivation) -> Result<BasicDerivation, Error> {
        drv.resolve(&self.dir, |input, output| {
            self.realised.output_path(input, self.known.get(input)?, output)
        })
    }

    fn check_inputs(&self, path: &StorePath, drv: &Derivation) -> Result<()> {
        let kind = drv.basic.kind().with_context(|| path.to_string())?;
        for (input, outputs) in &drv.input_drvs {
            let there = &self.known[input].basic;
            if let Some(absent) = outputs.iter().find(|output| !there.outputs.contains_key(*output)) {
                bail!("{path} needs output {absent} of {input}, which has no such output");
            }
            if !kind.may_use_impure() && there.kind()? == DerivationType::Impure {
                bail!(
                    "{path} depends on {input}, which is impure: only impure and fixed-output derivations may do that"
                );
            }
        }
        Ok(())
    }

    /// `path` and all derivations below it, inputs first.
    pub(crate) fn closure(&mut self, path: &StorePath) -> Result<Vec<StorePath>> {
        let mut order = Vec::new();
        let mut seen = BTreeSet::new();
        // Chains are long: a stack of our own. The flag says that the inputs are in `order` already.
        let mut stack = vec![(path.clone(), false)];
        while let Some((path, inputs_done)) = stack.pop() {
            if inputs_done {
                order.push(path);
            } else if seen.insert(path.clone()) {
                let drv = self.load(&path)?;
                stack.push((path, true));
                stack.extend(drv.input_drvs.into_keys().rev().map(|input| (input, false)));
            }
        }
        Ok(order)
    }

    fn load(&mut self, path: &StorePath) -> Result<Derivation> {
        if let Some(drv) = self.known.get(path) {
            return Ok(drv.clone());
        }
        let drv = self.read(path)?;
        self.known.insert(path.clone(), drv.clone());
        Ok(drv)
    }

    fn read(&self, path: &StorePath) -> Result<Derivation> {
        let name = path.derivation_name().with_context(|| format!("{path} is no derivation"))?;
        let mut files = self.places.iter().map(|place| place.join(path.as_str()));
        let file = files.find(|file| file.exists()).with_context(|| {
            let places: Vec<String> = self.places.iter().map(|place| place.display().to_string()).collect();
            format!("there is no {path} in {}; --store says where .drv files are", places.join(" or "))
        })?;
        let read = || -> std::io::Result<Vec<u8>> {
            let mut text = Vec::new();
            File::open(&file)?.take(aterm::MAX_LEN as u64 + 1).read_to_end(&mut text)?;
            Ok(text)
        };
        let text = read().with_context(|| format!("cannot read {}", file.display()))?;
        let drv = aterm::parse(&self.dir, name, &text).with_context(|| file.display().to_string())?;
        let computed = modulo::drv_path(&self.dir, &drv).with_context(|| file.display().to_string())?;
        if computed != *path {
            bail!("{}: its content belongs at {computed}: the file was renamed or changed", file.display());
        }
        Ok(drv)
    }
}

/// The root of the local store that a `.drv` file lies in, if it lies in one.
pub(crate) fn root_of(file: &Path) -> Option<PathBuf> {
    let file = std::fs::canonicalize(file).ok()?;
    let root = file.parent()?.to_str()?.strip_suffix("/nix/store")?;
    Some(if root.is_empty() { "/".into() } else { root.into() })
}
