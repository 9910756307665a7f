//! `drover plan`: what building would take, without building.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::sync::Arc;

use anyhow::{Context as _, anyhow};
use drover_cache::Cache;
use drover_nix::{NarInfo, StoreDir, StorePath};

use crate::args;
use crate::build::{open_caches, own_cache};
use crate::exit::{self, Fault, Outcome};
use crate::order::{self, Named, Queue};
use crate::output;

pub(crate) fn run(args: &args::Plan) -> Outcome {
    let dir = StoreDir::default();
    let mut urls = args.caches.clone();
    urls.extend(
        args.files.files.iter().filter(|file| order::is_drv(file)).filter_map(|file| order::store_of(file)),
    );
    if urls.is_empty() {
        urls.push(own_cache().map_err(Fault::Input)?);
    }
    let caches = open_caches(&urls, &[], None, &dir)?;
    let mut queue = Queue::load(&args.files, &dir, Named::Read(&|| Ok(caches.clone())))?;

    let mut made = BTreeSet::new();
    let mut text = String::new();
    for index in 0..queue.items.len() {
        let outputs = queue.outputs(index).map_err(Fault::Input)?;
        let paths: Vec<&StorePath> = outputs.iter().flatten().map(|(_, path)| path).collect();
        let mut absent = 0;
        for path in &paths {
            absent += usize::from(find(&caches, path)?.is_none());
        }
        let item = &queue.items[index];
        if outputs.is_some() && absent == 0 {
            say(&mut text, format_args!("{}: in the cache\n", item.name()))?;
        } else {
            say(&mut text, format_args!("{}: to be built for {}\n", item.name(), item.system))?;
            let closure = match &item.ready {
                Some(resolved) => Closure::find(&resolved.derivation.input_srcs, &made, &caches)?,
                None => Closure::default(),
            };
            let (found, bytes) = (closure.found, closure.nar_bytes);
            match &item.ready {
                Some(_) => {
                    say(&mut text, format_args!("  inputs: {found} paths in the caches, {bytes} bytes\n"))?
                }
                None => say(&mut text, format_args!("  inputs: known when what makes them is built\n"))?,
            }
            for need in &item.needs {
                say(&mut text, format_args!("  after: {}\n", queue.items[*need].name()))?;
            }
            for path in &closure.missing {
                say(&mut text, format_args!("  missing: {}\n", dir.full(path)))?;
            }
        }
        made.extend(paths.into_iter().cloned());
    }
    output::print_text(&text)?;
    Ok(exit::DONE)
}

/// What inputs need, as far as the caches know.
#[derive(Default)]
struct Closure {
    found: usize,
    nar_bytes: u64,
    missing: BTreeSet<StorePath>,
}

impl Closure {
    /// `made` are paths that requests before this one make.
    fn find(
        inputs: &BTreeSet<StorePath>,
        made: &BTreeSet<StorePath>,
        caches: &[Arc<dyn Cache>],
    ) -> Result<Self, Fault> {
        let mut closure = Self { found: 0, nar_bytes: 0, missing: BTreeSet::new() };
        let mut seen = BTreeSet::new();
        let mut queue: Vec<StorePath> = inputs.iter().cloned().collect();
        while let Some(path) = queue.pop() {
            if !seen.insert(path.clone()) {
                continue;
            }
            match find(caches, &path)? {
                Some(narinfo) => {
                    closure.found += 1;
                    closure.nar_bytes += narinfo.info.nar_size;
                    queue.extend(narinfo.info.references);
                }
                None if made.contains(&path) => {}
                None => drop(closure.missing.insert(path)),
            }
        }
        Ok(closure)
    }
}

fn find(caches: &[Arc<dyn Cache>], path: &StorePath) -> Result<Option<NarInfo>, Fault> {
    for cache in caches {
        let found = cache.narinfo(path).with_context(|| cache.url()).map_err(Fault::Infrastructure)?;
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

fn say(text: &mut String, line: std::fmt::Arguments<'_>) -> Result<(), Fault> {
    text.write_fmt(line).map_err(|_| Fault::Infrastructure(anyhow!("out of memory")))
}
