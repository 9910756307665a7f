//! References first: the order in which things can be added to a store, or get their paths.

use std::collections::BTreeMap;

/// Orders `nodes` so that each comes behind those that it refers to, directly or not; those are what `references` gives
/// for it, and have to be nodes as well. What a node says of itself does not matter. Depth first without recursion: how
/// deep a graph is may be up to an enemy.
///
/// The error is two neighbours on a cycle: who refers, and to whom.
pub fn references_first<T, I>(
    nodes: impl IntoIterator<Item = T>,
    mut references: impl FnMut(T) -> I,
) -> Result<Vec<T>, (T, T)>
where
    T: Copy + Ord,
    I: Iterator<Item = T>,
{
    let mut order = Vec::new();
    // Whether a node that was met is in the order yet.
    let mut met: BTreeMap<T, bool> = BTreeMap::new();
    for root in nodes {
        if met.contains_key(&root) {
            continue;
        }
        met.insert(root, false);
        let mut open = vec![(root, references(root))];
        while let Some((node, rest)) = open.last_mut() {
            let node = *node;
            match rest.next() {
                None => {
                    met.insert(node, true);
                    order.push(node);
                    open.pop();
                }
                Some(next) if next == node => {}
                Some(next) => match met.get(&next) {
                    Some(true) => {}
                    Some(false) => return Err((node, next)),
                    None => {
                        met.insert(next, false);
                        let below = references(next);
                        open.push((next, below));
                    }
                },
            }
        }
    }
    Ok(order)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(graph: &[(u32, &[u32])]) -> Result<Vec<u32>, (u32, u32)> {
        let graph: BTreeMap<u32, &[u32]> = graph.iter().copied().collect();
        references_first(graph.keys().copied(), |node| graph[&node].iter().copied())
    }

    #[test]
    fn what_is_referred_to_comes_first() {
        assert_eq!(order(&[]).unwrap(), [0; 0]);
        assert_eq!(order(&[(1, &[2, 3]), (2, &[3]), (3, &[])]).unwrap(), [3, 2, 1]);
        assert_eq!(order(&[(1, &[]), (2, &[1]), (3, &[1, 2])]).unwrap(), [1, 2, 3]);
        assert_eq!(order(&[(1, &[2, 3, 1]), (2, &[4]), (3, &[4]), (4, &[])]).unwrap(), [4, 2, 3, 1]);
        // A chain whose names run against, with and across the order of references.
        for chain in [[1, 2, 3, 4], [4, 3, 2, 1], [2, 4, 1, 3]] {
            let edges: Vec<(u32, &[u32])> =
                chain.iter().enumerate().map(|(at, number)| (*number, &chain[..at])).collect();
            assert_eq!(order(&edges).unwrap(), chain);
        }
    }

    #[test]
    fn cycles_are_found() {
        assert_eq!(order(&[(1, &[2]), (2, &[1])]).unwrap_err(), (2, 1));
        assert_eq!(order(&[(1, &[2]), (2, &[3]), (3, &[2])]).unwrap_err(), (3, 2));
        assert_eq!(order(&[(1, &[1])]).unwrap(), [1]);
    }

    #[test]
    fn a_long_chain_needs_no_stack() {
        let chain = references_first([0_u32], |node| (node < 100_000).then_some(node + 1).into_iter());
        assert_eq!(chain.unwrap().len(), 100_001);
    }
}
