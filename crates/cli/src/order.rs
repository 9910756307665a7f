//! In which order requests are built: an output that another request has as an input comes first. Pure.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::anyhow;
use drover_api::convert::{self, Target};
use drover_nix::{BasicDerivation, StoreDir, StorePath};

use crate::exit::Fault;
use crate::manifest::Manifest;
use crate::{args, manifest, request};

/// A request, checked and ready to be built.
#[derive(Debug)]
pub(crate) struct Item {
    pub(crate) manifest: Manifest,
    pub(crate) drv_path: StorePath,
    pub(crate) derivation: BasicDerivation,
    /// Which items, by their places in the list, make its inputs.
    pub(crate) needs: BTreeSet<usize>,
}

impl Item {
    /// What the user calls it.
    pub(crate) fn name(&self) -> &str {
        self.manifest.request.metadata.name.as_deref().unwrap_or(&self.derivation.name)
    }
}

/// Reads what `files` name, requests or `.drv` files, in the order in which they have to be built.
pub(crate) fn load(files: &args::Files, dir: &StoreDir) -> Result<Vec<Item>, Fault> {
    let mut items = Vec::new();
    for file in &files.files {
        let manifests = if file.extension().is_some_and(|extension| extension == "drv") {
            vec![from_drv(file, dir).map_err(Fault::Input)?]
        } else {
            manifest::read(file)?
        };
        for manifest in manifests {
            items.push(item(manifest, dir)?);
        }
    }
    sort(items, dir)
}

/// The local store that a `.drv` file lies in, if it lies in one: its inputs are there too.
pub(crate) fn store_of(file: &std::path::Path) -> Option<String> {
    let file = std::fs::canonicalize(file).ok()?;
    let root = file.parent()?.to_str()?.strip_suffix("/nix/store")?;
    Some(if root.is_empty() { "local".into() } else { root.into() })
}

fn from_drv(file: &std::path::Path, dir: &StoreDir) -> anyhow::Result<Manifest> {
    let (mut resolver, _) = request::open("local")?;
    let path = resolver.add_file(file)?;
    let request = request::of(dir, &path, &resolver.resolve(&path)?)?;
    Ok(Manifest::made_from(file.display().to_string(), request))
}

fn item(manifest: Manifest, dir: &StoreDir) -> Result<Item, Fault> {
    let spec = &manifest.request.spec;
    let fault = |error| manifest.fault(&error);
    let derivation = match convert::target(spec, dir).map_err(fault)? {
        Target::Derivation(derivation) => derivation,
        Target::DrvPath(path) => {
            let from_store = || -> anyhow::Result<BasicDerivation> {
                let (mut resolver, _) = request::open("local")?;
                resolver.resolve(&path)
            };
            from_store().map_err(Fault::Input)?
        }
    };
    let drv_path = match convert::drv_path(spec, dir).map_err(fault)? {
        Some(path) => path,
        None => drover_session::drv_path_of(dir, &derivation).map_err(Fault::input)?,
    };
    Ok(Item { manifest, drv_path, derivation, needs: BTreeSet::new() })
}

/// Puts makers before users and keeps the given order otherwise.
fn sort(mut items: Vec<Item>, dir: &StoreDir) -> Result<Vec<Item>, Fault> {
    let mut makers: BTreeMap<StorePath, usize> = BTreeMap::new();
    for (i, item) in items.iter().enumerate() {
        for path in item.derivation.output_paths(dir).map_err(Fault::input)?.into_values().flatten() {
            makers.entry(path).or_insert(i);
        }
    }
    for item in &mut items {
        let inputs = item.derivation.input_srcs.iter();
        item.needs = inputs.filter_map(|input| makers.get(input).copied()).collect();
    }
    let mut order: Vec<usize> = Vec::with_capacity(items.len());
    while order.len() < items.len() {
        let is_ready =
            |i: &usize| !order.contains(i) && items[*i].needs.iter().all(|need| order.contains(need));
        let Some(next) = (0..items.len()).find(is_ready) else {
            let stuck: Vec<&str> =
                (0..items.len()).filter(|i| !order.contains(i)).map(|i| items[i].name()).collect();
            return Err(Fault::Input(anyhow!(
                "these requests need each other's outputs: {}",
                stuck.join(", ")
            )));
        };
        order.push(next);
    }
    let place: BTreeMap<usize, usize> = order.iter().enumerate().map(|(new, old)| (*old, new)).collect();
    let mut placed: Vec<(usize, Item)> =
        items.into_iter().enumerate().map(|(i, item)| (place[&i], item)).collect();
    placed.sort_by_key(|(new, _)| *new);
    for (_, item) in &mut placed {
        item.needs = item.needs.iter().map(|old| place[old]).collect();
    }
    Ok(placed.into_iter().map(|(_, item)| item).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const OF: [&str; 3] = [
        "/nix/store/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa-a",
        "/nix/store/bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb-b",
        "/nix/store/cccccccccccccccccccccccccccccccc-c",
    ];

    fn order(requests: &[(&str, &[&str])]) -> Result<Vec<Item>, Fault> {
        let dir = StoreDir::default();
        let text: String = requests
            .iter()
            .map(|(output, inputs)| {
                let name = output.rsplit('-').next().unwrap();
                format!(
                    "---\napiVersion: drover.build/v1alpha1\nkind: BuildRequest\nmetadata: {{name: {name}}}\nspec:\n  \
                     derivation:\n    name: {name}\n    system: s\n    builder: b\n    inputSrcs: {inputs:?}\n    \
                     outputs: {{out: {{path: {output}}}}}\n"
                )
            })
            .collect();
        let items = manifest::parse("f", &text)?.into_iter().map(|manifest| item(manifest, &dir));
        sort(items.collect::<Result<_, _>>()?, &dir)
    }

    #[test]
    fn makers_come_first() {
        let items = order(&[(OF[0], &[OF[1]]), (OF[1], &[OF[2]]), (OF[2], &[])]).unwrap();
        assert_eq!(items.iter().map(Item::name).collect::<Vec<_>>(), ["c", "b", "a"]);
        assert_eq!(items[2].needs, BTreeSet::from([1]));
        assert_eq!(items[0].needs, BTreeSet::new());
    }

    #[test]
    fn what_has_no_order_keeps_its_own() {
        let items = order(&[(OF[2], &[]), (OF[0], &[]), (OF[1], &[])]).unwrap();
        assert_eq!(items.iter().map(Item::name).collect::<Vec<_>>(), ["c", "a", "b"]);
    }

    #[test]
    fn circles_are_refused() {
        let Err(Fault::Input(error)) = order(&[(OF[0], &[OF[1]]), (OF[1], &[OF[0]]), (OF[2], &[])]) else {
            panic!("a circle was taken");
        };
        assert!(error.to_string().ends_with(": a, b"), "{error}");
    }
}
