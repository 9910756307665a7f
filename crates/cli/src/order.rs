//! In which order requests are built: an output that another request has as an input comes first.
//!
//! Where an input's path follows from content, its user cannot even be written down before it is built: such a one waits
//! as a `.drv` and becomes a request when its turn comes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow};
use drover_api::convert::{self, Target};
use drover_cache::Cache;
use drover_nix::{OutputName, StoreDir, StorePath};
use drover_session::Unresolved;

use crate::exit::Fault;
use crate::manifest::Manifest;
use crate::resolve::{Resolved, Resolver, root_of};
use crate::{args, manifest, request};

/// Requests in the order in which they have to be built.
pub(crate) struct Queue {
    pub(crate) items: Vec<Item>,
    dir: StoreDir,
    resolver: Resolver,
}

/// What becomes of a request that only names its derivation.
#[derive(Clone, Copy)]
pub(crate) enum Named<'a> {
    /// It is sent as it is, and the cluster reads the derivation. So are `.drv` files, if `all`.
    Sent { all: bool },
    /// The derivation is read here: in the local store, or else from these caches.
    Read(&'a dyn Fn() -> Result<Vec<Arc<dyn Cache>>, Fault>),
}

/// A request, checked.
#[derive(Debug)]
pub(crate) struct Item {
    pub(crate) manifest: Manifest,
    /// None as long as the path of an input is not known.
    pub(crate) ready: Option<Resolved>,
    /// It has no derivation and gets none: who builds it reads that.
    pub(crate) is_named: bool,
    /// The `.drv` file that it was made of.
    source: Option<StorePath>,
    pub(crate) system: String,
    /// Whether it was asked for, and not found below what was.
    pub(crate) is_top: bool,
    /// Which items, by their places in the list, make its inputs.
    pub(crate) needs: BTreeSet<usize>,
}

impl Item {
    /// What the user calls it.
    pub(crate) fn name(&self) -> &str {
        self.manifest.request.metadata.name.as_deref().unwrap_or("request")
    }
}

impl Queue {
    /// Reads what is asked for, requests or `.drv` files.
    pub(crate) fn load(files: &args::Files, dir: &StoreDir, named: Named<'_>) -> Result<Self, Fault> {
        let (resolver, _) = request::open("local").map_err(Fault::Input)?;
        let mut queue = Self { items: Vec::new(), dir: dir.clone(), resolver };
        for file in &files.files {
            if is_drv(file) {
                let is_sent = matches!(named, Named::Sent { all: true });
                queue.add_drv(file, files.recursive, is_sent).map_err(Fault::Input)?;
            } else {
                for manifest in manifest::read(file)? {
                    queue.add_request(manifest, named)?;
                }
            }
        }
        queue.sort()?;
        queue.check_sources().map_err(Fault::Input)?;
        Ok(queue)
    }

    /// An item whose inputs are built, as a request with paths.
    pub(crate) fn resolve(&mut self, index: usize) -> Result<&Resolved> {
        let item = &mut self.items[index];
        if item.ready.is_none()
            && let Some(source) = &item.source
        {
            item.set(&self.dir, self.resolver.resolve(source)?)?;
        }
        item.ready.as_ref().with_context(|| format!("{} has no derivation", item.name()))
    }

    /// Takes note of where the outputs of an item are, for those that wait for it.
    pub(crate) fn record<'a>(
        &mut self,
        index: usize,
        outputs: impl IntoIterator<Item = (&'a OutputName, &'a StorePath)>,
    ) {
        let Some(source) = &self.items[index].source else { return };
        for (output, path) in outputs {
            self.resolver.record(source, output, path);
        }
    }

    /// The paths of all of an item's outputs, if they are known.
    pub(crate) fn outputs(&mut self, index: usize) -> Result<Option<BTreeMap<OutputName, StorePath>>> {
        let item = &self.items[index];
        if let Some(source) = &item.source
            && let Some(outputs) = self.resolver.outputs(source)?
        {
            return Ok(Some(outputs));
        }
        let Some(Resolved { derivation, .. }) = &item.ready else { return Ok(None) };
        let outputs = derivation.output_paths(&self.dir)?;
        Ok(outputs.into_iter().map(|(name, path)| Some((name, path?))).collect())
    }

    fn add_drv(&mut self, file: &Path, recursive: bool, is_sent: bool) -> Result<()> {
        let top = self.resolver.add_file(file)?;
        let wanted = if recursive { self.resolver.closure(&top)? } else { vec![top.clone()] };
        for path in wanted {
            let is_top = path == top;
            if let Some(known) = self.items.iter_mut().find(|item| item.source.as_ref() == Some(&path)) {
                known.is_top |= is_top;
                continue;
            }
            // Its derivation, if it is to have one, comes when it is resolved.
            let request = request::by_path(&self.dir, &path);
            let manifest = Manifest::made_from(file.display().to_string(), request);
            if is_sent {
                self.items.push(Item { source: Some(path), is_top, ..Item::named(manifest) });
            } else {
                self.add(manifest, path, is_top)?;
            }
        }
        Ok(())
    }

    fn add_request(&mut self, manifest: Manifest, named: Named<'_>) -> Result<(), Fault> {
        let spec = &manifest.request.spec;
        let fault = |error| manifest.fault(&error);
        let given = convert::drv_path(spec, &self.dir).map_err(fault)?;
        let derivation = match convert::target(spec, &self.dir).map_err(fault)? {
            Target::Derivation(derivation) => derivation,
            Target::DrvPath(path) => return self.add_named(manifest, path, named),
        };
        let drv_path = match given {
            Some(path) => path,
            None => drover_session::drv_path_of(&self.dir, &derivation).map_err(Fault::input)?,
        };
        let system = derivation.system.to_string();
        let ready = Some(Resolved { drv_path, derivation });
        self.items.push(Item { ready, system, is_named: false, ..Item::named(manifest) });
        Ok(())
    }

    /// A request that has nothing but the path of its `.drv`.
    fn add_named(&mut self, manifest: Manifest, path: StorePath, named: Named<'_>) -> Result<(), Fault> {
        let Named::Read(caches) = named else {
            self.items.push(Item::named(manifest));
            return Ok(());
        };
        // A file that is there and wrong is said so when it is looked for elsewhere in vain.
        let Err(here) = self.resolver.derivation(&path) else {
            return self.add(manifest, path, true).map_err(Fault::Input);
        };
        let caches = caches()?;
        let resolved = drover_session::resolve(&self.dir, &path, &caches).map_err(|error| match error {
            Unresolved::Absent(absent) => {
                let urls: Vec<String> = caches.iter().map(|cache| cache.url()).collect();
                Fault::Input(here.context(format!("{absent} is in no cache (asked: {})", urls.join(", "))))
            }
            Unresolved::Failed(failure) if failure.infrastructure => Fault::Infrastructure(failure.into()),
            Unresolved::Failed(failure) => Fault::Input(failure.into()),
        })?;
        let system = resolved.derivation.system.to_string();
        let ready = Some(resolved);
        self.items.push(Item { ready, system, is_named: false, ..Item::named(manifest) });
        Ok(())
    }

    fn add(&mut self, manifest: Manifest, source: StorePath, is_top: bool) -> Result<()> {
        let system = self.resolver.derivation(&source)?.basic.system.to_string();
        let resolved = self.resolver.try_resolve(&source)?;
        let source = Some(source);
        let mut item = Item { source, system, is_top, is_named: false, ..Item::named(manifest) };
        if let Ok(resolved) = resolved {
            item.set(&self.dir, resolved)?;
        }
        self.items.push(item);
        Ok(())
    }

    /// Puts makers before users and keeps the given order otherwise.
    fn sort(&mut self) -> Result<(), Fault> {
        self.find_needs().map_err(Fault::Input)?;
        let items = &self.items;
        let mut order: Vec<usize> = Vec::with_capacity(items.len());
        let mut is_placed = vec![false; items.len()];
        while order.len() < items.len() {
            let is_next = |i: &usize| !is_placed[*i] && items[*i].needs.iter().all(|need| is_placed[*need]);
            let Some(next) = (0..items.len()).find(is_next) else {
                let stuck: Vec<&str> =
                    (0..items.len()).filter(|i| !is_placed[*i]).map(|i| items[i].name()).collect();
                return Err(Fault::Input(anyhow!(
                    "these requests need each other's outputs: {}",
                    stuck.join(", ")
                )));
            };
            is_placed[next] = true;
            order.push(next);
        }
        let place: BTreeMap<usize, usize> = order.iter().enumerate().map(|(new, old)| (*old, new)).collect();
        let mut placed: Vec<(usize, Item)> =
            self.items.drain(..).enumerate().map(|(i, item)| (place[&i], item)).collect();
        placed.sort_by_key(|(new, _)| *new);
        for (_, item) in &mut placed {
            item.needs = item.needs.iter().map(|old| place[old]).collect();
        }
        self.items = placed.into_iter().map(|(_, item)| item).collect();
        Ok(())
    }

    /// By the paths of outputs, and by their derivations where the paths are not known.
    fn find_needs(&mut self) -> Result<()> {
        let mut makers: BTreeMap<StorePath, usize> = BTreeMap::new();
        let mut sources: BTreeMap<StorePath, usize> = BTreeMap::new();
        for i in 0..self.items.len() {
            for path in self.outputs(i)?.unwrap_or_default().into_values() {
                makers.entry(path).or_insert(i);
            }
            if let Some(source) = &self.items[i].source {
                sources.entry(source.clone()).or_insert(i);
            }
        }
        for item in &mut self.items {
            let mut needs = BTreeSet::new();
            if let Some(Resolved { derivation, .. }) = &item.ready {
                needs.extend(derivation.input_srcs.iter().filter_map(|input| makers.get(input).copied()));
            }
            if let Some(source) = &item.source {
                let drv = self.resolver.derivation(source)?;
                needs.extend(drv.input_drvs.keys().filter_map(|input| sources.get(input).copied()));
            }
            item.needs = needs;
        }
        Ok(())
    }

    /// Whatever is not resolved yet must be so once the items that it needs are built.
    fn check_sources(&mut self) -> Result<()> {
        let sources: BTreeSet<_> = self.items.iter().filter_map(|item| item.source.clone()).collect();
        for item in &self.items {
            if let (None, Some(source), false) = (&item.ready, &item.source, item.is_named)
                && let Err(missing) = self.resolver.try_resolve(source)?
                && missing.keys().any(|drv| !sources.contains(drv))
            {
                self.resolver.resolve(source)?;
            }
        }
        Ok(())
    }
}

impl Item {
    /// One that has no more than its manifest.
    fn named(manifest: Manifest) -> Self {
        let (system, needs) = (String::new(), BTreeSet::new());
        Self { manifest, ready: None, is_named: true, source: None, system, is_top: true, needs }
    }

    fn set(&mut self, dir: &StoreDir, resolved: Resolved) -> Result<()> {
        let made = request::of(dir, &resolved)?;
        if self.manifest.is_made() {
            self.manifest.request = made;
        } else {
            self.manifest.request.spec.derivation = made.spec.derivation;
        }
        self.ready = Some(resolved);
        Ok(())
    }
}

/// Whether a file is a derivation rather than a request.
pub(crate) fn is_drv(file: &Path) -> bool {
    file.extension().is_some_and(|extension| extension == "drv")
}

/// The local store that a `.drv` file lies in, if it lies in one: its inputs are there too.
pub(crate) fn store_of(file: &Path) -> Option<String> {
    let root = root_of(file)?;
    Some(if root == Path::new("/") { "local".into() } else { root.to_str()?.to_owned() })
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
        let (resolver, _) = request::open("local").unwrap();
        let mut queue = Queue { items: Vec::new(), dir, resolver };
        manifest::parse("f", &text)?
            .into_iter()
            .try_for_each(|manifest| queue.add_request(manifest, Named::Sent { all: false }))?;
        queue.sort()?;
        Ok(queue.items)
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
