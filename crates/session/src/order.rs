//! References first: the order in which paths can be added to a store.

use std::collections::{BTreeMap, BTreeSet};

use drover_nix::StorePath;

/// Orders the keys so that each comes behind those that it refers to, directly or not. References to itself and to
/// paths that are no keys do not matter. Err is a path that is part of a cycle, which no honest store has.
pub(crate) fn references_first<'a>(
    references: &BTreeMap<&'a StorePath, &'a BTreeSet<StorePath>>,
) -> Result<Vec<&'a StorePath>, &'a StorePath> {
    let mut order = Vec::with_capacity(references.len());
    let mut state: BTreeMap<&StorePath, Visit> = BTreeMap::new();
    for root in references.keys() {
        let mut stack = vec![(*root, false)];
        while let Some((path, references_done)) = stack.pop() {
            if references_done {
                state.insert(path, Visit::Done);
                order.push(path);
                continue;
            }
            match state.get(path) {
                Some(Visit::Done) => continue,
                // Entered, not left, and met again below itself. A path that merely waits on the stack twice is not
                // entered yet.
                Some(Visit::Entered) => return Err(path),
                None => {}
            }
            state.insert(path, Visit::Entered);
            stack.push((path, true));
            let below = references[path].iter().filter(|reference| *reference != path);
            stack
                .extend(below.filter_map(|reference| Some((*references.get_key_value(reference)?.0, false))));
        }
    }
    Ok(order)
}

enum Visit {
    Done,
    Entered,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(number: u8) -> StorePath {
        StorePath::from_parts([number; 20], "x").unwrap()
    }

    fn order(edges: &[(u8, &[u8])]) -> Result<Vec<StorePath>, StorePath> {
        let graph: BTreeMap<StorePath, BTreeSet<StorePath>> = edges
            .iter()
            .map(|(from, to)| (path(*from), to.iter().map(|number| path(*number)).collect()))
            .collect();
        let result = references_first(&graph.iter().collect());
        result.map(|order| order.into_iter().cloned().collect()).map_err(Clone::clone)
    }

    #[test]
    fn a_diamond() {
        let order = order(&[(1, &[2, 3, 1]), (2, &[4]), (3, &[4, 9]), (4, &[])]).unwrap();
        let position = |number| order.iter().position(|item| *item == path(number)).unwrap();
        assert_eq!(order.len(), 4);
        for (from, to) in [(1, 2), (1, 3), (2, 4), (3, 4)] {
            assert!(position(to) < position(from));
        }
    }

    #[test]
    fn every_order_of_names() {
        // A chain whose names run against, with and across the order of references.
        for chain in [[1, 2, 3, 4], [4, 3, 2, 1], [2, 4, 1, 3]] {
            let edges: Vec<(u8, Vec<u8>)> =
                chain.iter().enumerate().map(|(at, number)| (*number, chain[..at].to_vec())).collect();
            let edges: Vec<(u8, &[u8])> = edges.iter().map(|(from, to)| (*from, to.as_slice())).collect();
            assert_eq!(order(&edges).unwrap(), chain.map(path));
        }
    }

    #[test]
    fn cycles() {
        assert!(order(&[(1, &[2]), (2, &[3]), (3, &[1])]).is_err());
        assert!(order(&[(1, &[1])]).is_ok());
    }

    #[test]
    fn a_long_chain_needs_no_stack() {
        let graph: BTreeMap<StorePath, BTreeSet<StorePath>> = (0..100_000u32)
            .map(|number| {
                let path = |number: u32| {
                    let mut hash = [0; 20];
                    hash[..4].copy_from_slice(&number.to_be_bytes());
                    StorePath::from_parts(hash, "x").unwrap()
                };
                (path(number), [path(number + 1)].into())
            })
            .collect();
        assert_eq!(references_first(&graph.iter().collect()).unwrap().len(), 100_000);
    }
}
