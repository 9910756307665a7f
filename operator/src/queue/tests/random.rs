//! Random events, and what must hold whatever happens.

use std::collections::{BTreeMap, BTreeSet};

use drover_api::{BuildRequest, Concurrency, Reason};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use proptest::prelude::*;

use super::super::index::News;
use super::{Both, request, time};
use crate::world::Slot;

/// Something that happens. Numbers choose a request, or something of it.
#[derive(Clone, Debug)]
enum Event {
    Apply {
        namespace: u8,
        build: u8,
        priority: i8,
    },
    Ask(usize),
    Release(usize),
    Begin(usize),
    EndAttempt(usize),
    Settle(usize, bool),
    Delete(usize),
    Suspend(usize, bool),
    /// An earlier version comes once more.
    Stale(usize),
    /// The watch begins anew.
    List,
    Limit {
        total: u8,
        per_namespace: u8,
    },
}

fn event() -> impl Strategy<Value = Event> {
    let which = || 0..64usize;
    prop_oneof![
        4 => (0..3u8, 0..4u8, -1..2i8)
            .prop_map(|(namespace, build, priority)| Event::Apply { namespace, build, priority }),
        8 => which().prop_map(Event::Ask),
        1 => which().prop_map(Event::Release),
        6 => which().prop_map(Event::Begin),
        3 => which().prop_map(Event::EndAttempt),
        3 => (which(), any::<bool>()).prop_map(|(which, fails)| Event::Settle(which, fails)),
        1 => which().prop_map(Event::Delete),
        1 => (which(), any::<bool>()).prop_map(|(which, on)| Event::Suspend(which, on)),
        2 => which().prop_map(Event::Stale),
        1 => Just(Event::List),
        1 => (1..5u8, 1..4u8).prop_map(|(total, per_namespace)| Event::Limit { total, per_namespace }),
    ]
}

/// The index, its server, and what a test knows by itself.
struct Run {
    both: Both,
    /// Every version that there was.
    history: Vec<BuildRequest>,
    limit: Concurrency,
    made: usize,
}

impl Run {
    fn new() -> Self {
        let limit = Concurrency { total: Some(2), per_namespace: Some(1) };
        Self { both: Both::default(), history: vec![], limit, made: 0 }
    }

    fn pick(&self, which: usize) -> Option<String> {
        let uids: Vec<&String> = self.both.server.requests.keys().collect();
        (!uids.is_empty()).then(|| uids[which % uids.len()].clone())
    }

    fn attempt(&self, uid: &str) -> u32 {
        self.both.server.requests[uid].status.as_ref().and_then(|status| status.attempt).unwrap_or(0)
    }

    fn is_open(&self, uid: &str) -> bool {
        let status = self.both.server.requests[uid].status.as_ref();
        status.and_then(|status| status.attempts.last()).is_some_and(|last| last.end_time.is_none())
    }

    fn is_settled(&self, uid: &str) -> bool {
        self.both.server.requests[uid].status.as_ref().is_some_and(|s| s.completion_time.is_some())
    }

    fn see(&mut self, request: BuildRequest) {
        self.both.index.seen(&request);
        self.history.push(request);
    }

    fn does(&mut self, event: &Event) {
        match event {
            Event::Apply { namespace, build, priority } => {
                let name = format!("r{}", self.made);
                let mut request = request(&format!("n{namespace}"), &name, &format!("b{build}"), &[]);
                request.spec.priority = Some((*priority).into());
                request.metadata.creation_timestamp = Some(Time(time(self.made as i64)));
                self.made += 1;
                let request = self.both.server.put(request);
                self.see(request);
            }
            Event::Limit { total, per_namespace } => {
                let (total, per_namespace) = (Some((*total).into()), Some((*per_namespace).into()));
                self.limit = Concurrency { total, per_namespace };
                self.both.index.limit("c", self.limit);
            }
            Event::List => {
                self.both.index.begin_list();
                for request in self.both.server.requests.values() {
                    self.both.index.listed(request);
                }
                self.both.index.end_list();
            }
            Event::Stale(which) => {
                if !self.history.is_empty() {
                    let old = &self.history[which % self.history.len()];
                    // What is deleted does not come back: watches of one process do not mix.
                    if self.both.server.requests.contains_key(old.metadata.uid.as_ref().unwrap()) {
                        self.both.index.seen(old);
                    }
                }
            }
            Event::Ask(which)
            | Event::Release(which)
            | Event::Begin(which)
            | Event::EndAttempt(which)
            | Event::Settle(which, _)
            | Event::Delete(which)
            | Event::Suspend(which, _) => {
                if let Some(uid) = self.pick(*which) {
                    self.does_to(event, &uid);
                }
            }
        }
    }

    fn does_to(&mut self, event: &Event, uid: &str) {
        let next = self.attempt(uid) + 1;
        match event {
            Event::Ask(_) => {
                self.both.index.ask(uid, next, "c", self.limit);
            }
            Event::Release(_) => self.both.index.release(uid),
            Event::Begin(_) if !self.is_open(uid) && self.both.index.slot(uid, next) == Slot::Granted => {
                let request = self.both.server.begin(uid);
                self.see(request);
            }
            Event::EndAttempt(_) if self.is_open(uid) => {
                let request = self.both.server.end_attempt(uid);
                self.see(request);
            }
            Event::Settle(_, fails) if !self.is_settled(uid) => {
                let request = self.both.server.settle(uid, fails.then_some(Reason::BuildFailed), 999);
                self.see(request);
            }
            Event::Delete(_) => {
                self.both.server.requests.remove(uid);
                self.both.index.gone(uid);
            }
            Event::Suspend(_, on) => {
                let on = *on;
                let request = self.both.server.change(uid, |request| request.spec.suspend = Some(on));
                self.see(request);
            }
            _ => {}
        }
    }

    /// Whoever has leave, as the index says it.
    fn granted(&self) -> Vec<String> {
        let uids = self.both.server.requests.keys();
        let has_leave = |uid: &&String| {
            let attempt = self.attempt(uid);
            let at = if self.is_open(uid) { attempt } else { attempt + 1 };
            self.both.index.slot(uid, at) == Slot::Granted
        };
        uids.filter(has_leave).cloned().collect()
    }

    /// How many have leave beyond what had it before the last event.
    fn check(&self, before: &BTreeSet<String>) {
        let granted = self.granted();
        let of = |uid: &str| self.both.server.requests[uid].clone();
        let mut by_namespace: BTreeMap<String, usize> = BTreeMap::new();
        let mut builds = BTreeSet::new();
        for uid in &granted {
            let request = of(uid);
            let namespace = request.metadata.namespace.clone().unwrap();
            *by_namespace.entry(namespace.clone()).or_default() += 1;
            let build = request.spec.derivation.unwrap().name;
            assert!(builds.insert((namespace, build)), "the same is granted twice: {granted:?}");
            assert!(!self.is_settled(uid), "{uid} is settled");
        }
        // A limit that was lowered stops nobody; but nobody new may begin above it.
        let new: Vec<&String> = granted.iter().filter(|uid| !before.contains(*uid)).collect();
        let (total, per_namespace) =
            (self.limit.total.unwrap() as usize, self.limit.per_namespace.unwrap() as usize);
        assert!(new.is_empty() || granted.len() <= total, "{granted:?} with {total}");
        for uid in new {
            let namespace = of(uid).metadata.namespace.unwrap();
            assert!(by_namespace[&namespace] <= per_namespace, "{granted:?} with {per_namespace}");
        }
        for uid in self.both.server.requests.keys() {
            if self.is_open(uid) && !self.is_settled(uid) {
                assert!(granted.contains(uid), "{uid} runs without leave");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    /// Limits hold at every moment, the same is never built twice at a time, and everybody has a turn.
    #[test]
    fn random_lives(events in prop::collection::vec(event(), 1..80)) {
        let mut run = Run::new();
        for event in &events {
            let before = run.granted().into_iter().collect();
            run.does(event);
            run.check(&before);
        }
        // From here on all goes well: whoever is told, or has not asked, looks; whoever has leave builds.
        for uid in run.both.server.requests.keys().cloned().collect::<Vec<_>>() {
            run.does_to(&Event::Suspend(0, false), &uid);
        }
        let unsettled = |run: &Run| {
            run.both.server.requests.keys().filter(|uid| !run.is_settled(uid)).cloned().collect::<Vec<_>>()
        };
        for uid in unsettled(&run) {
            if !run.is_open(&uid) {
                run.does_to(&Event::Ask(0), &uid);
            }
        }
        let mut rounds = unsettled(&run).len() * 3 + 3;
        while let Some(uid) = run.granted().into_iter().next() {
            run.does_to(&Event::Begin(0), &uid);
            let before = run.granted().into_iter().collect();
            run.does_to(&Event::Settle(0, false), &uid);
            run.check(&before);
            for (uid, news) in run.both.news() {
                // Those who are told ask again, as their plans would; nobody else does.
                prop_assert_eq!(news, News::LookUp);
                if !run.is_settled(&uid) && !run.is_open(&uid) {
                    run.does_to(&Event::Ask(0), &uid);
                }
            }
            prop_assert!(rounds > 0, "it goes on for ever");
            rounds -= 1;
        }
        prop_assert_eq!(unsettled(&run), Vec::<String>::new());
    }

    /// What the search says is what a plain one says.
    #[test]
    fn circles(edges in prop::collection::vec((0..7usize, 0..7usize), 0..14), order in any::<[u8; 7]>()) {
        let names: Vec<String> = (0..7).map(|n| format!("b{n}")).collect();
        let inputs = |n: usize| -> BTreeSet<usize> {
            edges.iter().filter(|(from, _)| *from == n).map(|(_, to)| *to).collect()
        };
        let mut both = Both::default();
        let mut sorted: Vec<usize> = (0..7).collect();
        sorted.sort_by_key(|n| order[*n]);
        for n in sorted {
            let needs: Vec<&str> = inputs(n).into_iter().map(|to| &*names[to]).collect();
            both.apply(request("a", &names[n], &names[n], &needs));
            both.looks(&format!("a/{}", names[n]), &needs);
        }
        let reaches_itself = |n: usize| {
            let mut seen = inputs(n);
            let mut to_visit: Vec<usize> = seen.iter().copied().collect();
            while let Some(next) = to_visit.pop() {
                to_visit.extend(inputs(next).into_iter().filter(|to| seen.insert(*to)));
            }
            seen.contains(&n)
        };
        let mut told = 0;
        for n in 0..7 {
            let cycle = both.index.others(&format!("a/{}", names[n]), Some("c")).cycle;
            if cycle.is_empty() {
                continue;
            }
            told += 1;
            prop_assert_eq!(&cycle[0], &names[n]);
            for (from, to) in cycle.iter().zip(cycle.iter().skip(1).chain(cycle.first())) {
                let number = |name: &String| names.iter().position(|known| known == name).unwrap();
                prop_assert!(inputs(number(from)).contains(&number(to)), "{:?}", cycle);
            }
        }
        prop_assert_eq!(told > 0, (0..7).any(reaches_itself));
    }
}
