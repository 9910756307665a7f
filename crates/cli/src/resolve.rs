//! Derivations from `.drv` files and from `nix derivation show`, and what they come to when their inputs are replaced
//! by paths.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, bail};
use drover_nix::derivation::{aterm, json, modulo};
use drover_nix::{BasicDerivation, Derivation, StoreDir, StorePath};

/// Derivations that were read, and where to look for more.
pub(crate) struct Resolver {
    dir: StoreDir,
    /// Directories with `.drv` files, the preferred one first.
    places: Vec<PathBuf>,
    known: BTreeMap<StorePath, Derivation>,
}

impl Resolver {
    /// `real_store_dir` is where the files of the store `dir` lie.
    pub(crate) fn new(dir: StoreDir, real_store_dir: PathBuf) -> Self {
        Self { dir, places: vec![real_store_dir], known: BTreeMap::new() }
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

    /// The derivation with its inputs as paths.
    pub(crate) fn resolve(&mut self, path: &StorePath) -> Result<BasicDerivation> {
        let drv = self.load(path)?;
        for input in drv.input_drvs.keys() {
            self.load(input).with_context(|| format!("{path} has it as an input"))?;
        }
        let output_path = |input: &StorePath, output: &drover_nix::OutputName| {
            let basic = &self.known.get(input)?.basic;
            basic.outputs.get(output)?.path(&self.dir, &basic.name, output).ok()?
        };
        drv.resolve(&self.dir, output_path).with_context(|| format!("cannot resolve {path}"))
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
