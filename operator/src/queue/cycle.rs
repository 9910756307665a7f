//! Requests that wait for each other in a circle. Pure.
//!
//! An edge leads from a request to each that may still make an input that it lacks. A circle is closed by its last edge, and
//! edges come only when a lookup has found inputs missing: so each such request is searched from once. The search goes
//! both ways in turn and ends with the shorter one: of thousands of requests in a row, applied in any order, it sees few.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use drover_api::Reason;

use super::index::{Index, News};
use super::slots::Id;
use crate::world::OtherState;

impl Index {
    /// Looks for a circle through this request and tells all that are in it.
    pub(super) fn find_cycle(&mut self, id: Id) {
        let Some(cycle) = self.search(id) else { return };
        let cycle: Arc<[Id]> = cycle.into();
        for member in &*cycle {
            if let Some(entry) = self.entries.get_mut(member) {
                entry.cycle = Some(cycle.clone());
                self.news.push((*member, News::Look));
            }
        }
    }

    /// Names of the requests in the circle, this one first; empty if there is none, or none any more.
    pub(super) fn cycle(&self, id: Id, entry: &super::index::Entry) -> Vec<String> {
        let Some(cycle) = entry.cycle.as_ref().filter(|cycle| self.stands(cycle)) else { return vec![] };
        let Some(start) = cycle.iter().position(|member| *member == id) else { return vec![] };
        let members = cycle[start..].iter().chain(&cycle[..start]);
        members.filter_map(|member| Some(self.entries.get(member)?.fixed.name.to_string())).collect()
    }

    /// Whether each still waits for the next. One that has ended for this very reason is still part of it.
    fn stands(&self, cycle: &[Id]) -> bool {
        let ended_so = |end: Option<&OtherState>| {
            matches!(end, Some(OtherState::Failed { reason: Reason::DependencyCycle, .. }))
        };
        let next = cycle.iter().skip(1).chain(cycle.first());
        cycle.iter().zip(next).all(|(id, next)| {
            let (Some(entry), Some(other)) = (self.entries.get(id), self.entries.get(next)) else {
                return false;
            };
            if entry.is_settled() {
                return ended_so(entry.end());
            }
            (other.end().is_none() || ended_so(other.end()))
                && other.fixed.outputs.iter().any(|path| entry.waits.contains(path))
        })
    }

    fn search(&self, start: Id) -> Option<Vec<Id>> {
        let (mut ahead, mut behind) = (Search::new(start), Search::new(start));
        loop {
            if ahead.step(|id| self.waits_for(id))? {
                return Some(ahead.path());
            }
            if behind.step(|id| self.waited_for_by(id))? {
                let mut path = behind.path();
                path[1..].reverse();
                return Some(path);
            }
        }
    }

    fn waits_for(&self, id: Id) -> Vec<Id> {
        let Some(entry) = self.entries.get(&id) else { return vec![] };
        entry.waits.iter().flat_map(|path| self.makers(&entry.fixed.namespace, path)).collect()
    }

    fn waited_for_by(&self, id: Id) -> Vec<Id> {
        let Some(entry) = self.entries.get(&id) else { return vec![] };
        let Some(namespace) = self.namespaces.get(&entry.fixed.namespace) else { return vec![] };
        let consumers = |path: &Arc<str>| {
            let path = path.clone();
            namespace
                .paths
                .consumers(&path.clone())
                .filter(move |id| self.entries.get(id).is_some_and(|entry| entry.waits.contains(&path)))
                .collect::<Vec<_>>()
        };
        entry.fixed.outputs.iter().flat_map(consumers).collect()
    }
}

/// Breadth first, so that the circle found is the shortest.
struct Search {
    start: Id,
    from: HashMap<Id, Id>,
    to_visit: VecDeque<Id>,
}

impl Search {
    fn new(start: Id) -> Self {
        Self { start, from: HashMap::new(), to_visit: VecDeque::from([start]) }
    }

    /// Visits one: whether that has led back to the start; None if there is nowhere left to go.
    fn step(&mut self, next: impl Fn(Id) -> Vec<Id>) -> Option<bool> {
        let id = self.to_visit.pop_front()?;
        for next in next(id) {
            if self.from.contains_key(&next) {
                continue;
            }
            self.from.insert(next, id);
            if next == self.start {
                return Some(true);
            }
            self.to_visit.push_back(next);
        }
        Some(false)
    }

    /// From the start, in the order of the steps.
    fn path(&self) -> Vec<Id> {
        let mut path = vec![self.start];
        let mut id = self.start;
        while let Some(from) = self.from.get(&id).filter(|from| **from != self.start) {
            path.push(*from);
            id = *from;
        }
        path[1..].reverse();
        path
    }
}
