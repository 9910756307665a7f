//! The order in which outputs get their paths: after those that they refer to.

use std::collections::{BTreeMap, BTreeSet};

use drover_nix::{OutputName, StorePath};

use super::Finished;
use super::made::Made;
use crate::error::Error;

/// The names of what was made. Outputs that were valid before the build have their paths already, and do not count.
pub(super) fn references_first(
    finished: &Finished<'_>,
    made: &BTreeMap<OutputName, Made>,
) -> Result<Vec<OutputName>, Error> {
    let by_path: BTreeMap<&StorePath, &OutputName> =
        made.keys().map(|name| (&finished.targets[name].scratch, name)).collect();
    let graph = made.iter().map(|(name, made)| {
        let others = made.references.iter().filter_map(|path| by_path.get(path).copied());
        (name, others.filter(|other| *other != name).collect())
    });
    sort(&graph.collect()).map_err(|(one, other)| {
        Error::output(format!(
            "cycle detected in build of '{}' in the references of output '{one}' from output '{other}'",
            finished.full(finished.drv_path)
        ))
    })
}

/// Depth first over a graph as small as the outputs of one derivation, without recursion all the same: their number is
/// the client's. Fails with two neighbours of a cycle.
fn sort<'a>(
    graph: &BTreeMap<&'a OutputName, BTreeSet<&'a OutputName>>,
) -> Result<Vec<OutputName>, (OutputName, OutputName)> {
    let mut sorted = Vec::new();
    let mut done = BTreeSet::new();
    for start in graph.keys().copied() {
        let mut open = Vec::new();
        let mut next = Some(start);
        while let Some(name) = next {
            if !done.contains(name) && !open.iter().any(|(other, _)| *other == name) {
                open.push((name, graph[name].iter().copied()));
            } else if !done.contains(name) {
                let parent = open.last().map_or(name, |(parent, _)| *parent);
                return Err((name.clone(), parent.clone()));
            }
            next = None;
            while let Some((name, references)) = open.last_mut() {
                next = references.next();
                if next.is_some() {
                    break;
                }
                sorted.push((*name).clone());
                done.insert(*name);
                open.pop();
            }
        }
    }
    Ok(sorted)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sorted(graph: &[(&str, &[&str])]) -> Result<Vec<String>, String> {
        let names: BTreeMap<&str, OutputName> =
            graph.iter().map(|(name, _)| (*name, name.parse().unwrap())).collect();
        let graph =
            graph.iter().map(|(name, others)| (&names[name], others.iter().map(|o| &names[o]).collect()));
        let sorted = sort(&graph.collect()).map_err(|(one, other)| format!("{other} -> {one}"))?;
        Ok(sorted.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn what_is_referred_to_comes_first() {
        assert_eq!(sorted(&[]).unwrap(), [""; 0]);
        assert_eq!(sorted(&[("a", &["b", "c"]), ("b", &["c"]), ("c", &[])]).unwrap(), ["c", "b", "a"]);
        assert_eq!(sorted(&[("a", &[]), ("b", &["a"]), ("c", &["a", "b"])]).unwrap(), ["a", "b", "c"]);
        assert_eq!(sorted(&[("a", &["c"]), ("b", &["c"]), ("c", &[])]).unwrap(), ["c", "a", "b"]);
    }

    #[test]
    fn cycles_are_found() {
        assert_eq!(sorted(&[("a", &["b"]), ("b", &["a"])]).unwrap_err(), "b -> a");
        assert_eq!(sorted(&[("a", &["b"]), ("b", &["c"]), ("c", &["b"])]).unwrap_err(), "c -> b");
    }
}
