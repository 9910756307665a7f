//! Who runs, who waits and who is next: the concurrency of each class, shared out between namespaces.
//!
//! Pure and synchronous. Knows requests by number, and nothing of inputs: whoever is here has asked to begin, or has begun.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use drover_api::Concurrency;
use jiff::Timestamp;

/// A request, by the order in which the process has first seen it.
pub(super) type Id = u64;

/// Order within a namespace: the highest priority, then the oldest, then the first by name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Rank {
    pub priority: Reverse<i32>,
    pub created: Timestamp,
    pub name: Arc<str>,
    pub id: Id,
}

/// What an attempt asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Claim {
    pub class: Arc<str>,
    pub namespace: Arc<str>,
    /// What is built; of equal ones in a namespace and class, one at a time.
    pub build: Arc<str>,
    pub attempt: u32,
    pub rank: Rank,
}

/// Where a claim stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Place {
    Running,
    /// For its turn.
    Waiting,
    /// For another that runs and builds the same.
    BehindSame,
}

#[derive(Default)]
pub(super) struct Slots {
    claims: HashMap<Id, (Claim, Place)>,
    classes: HashMap<Arc<str>, Class>,
}

/// What a class has out.
#[derive(Default)]
struct Class {
    concurrency: Concurrency,
    running: usize,
    shares: BTreeMap<Arc<str>, Share>,
    /// How many have begun; lost with the process.
    begun: u64,
}

/// One namespace's part of a class.
#[derive(Default)]
struct Share {
    running: usize,
    /// The class's count when the last of its own began; 0 if none has since it has had anything here.
    last: u64,
    waiting: BTreeSet<Rank>,
    /// What is claimed, by what is built.
    builds: HashMap<Arc<str>, Same>,
}

/// Requests for one build.
#[derive(Default)]
struct Same {
    /// More than one only where several ran already when the process began.
    running: BTreeSet<Id>,
    /// Those that wait, for their turn or for one that runs.
    line: BTreeSet<Id>,
}

impl Slots {
    /// What the request claims and where it stands; None if it has not asked.
    pub(super) fn claim(&self, id: Id) -> Option<(&Claim, Place)> {
        self.claims.get(&id).map(|(claim, place)| (claim, *place))
    }

    /// The request that runs and builds what this one claims.
    pub(super) fn same(&self, claim: &Claim) -> Option<Id> {
        let same = self.classes.get(&claim.class)?.shares.get(&claim.namespace)?.builds.get(&claim.build)?;
        same.running.first().copied()
    }

    /// What the class allows; true if that is new.
    pub(super) fn limit(&mut self, class: &str, concurrency: Concurrency) -> bool {
        let Some(class) = self.classes.get_mut(class) else { return false };
        std::mem::replace(&mut class.concurrency, concurrency) != concurrency
    }

    pub(super) fn concurrency(&self, class: &str) -> Concurrency {
        self.classes.get(class).map(|class| class.concurrency).unwrap_or_default()
    }

    /// Whether the namespace itself has all that the class allows it, rather than all namespaces together.
    pub(super) fn is_share_full(&self, class: &str, namespace: &str) -> bool {
        let Some(class) = self.classes.get(class) else { return false };
        let Some(share) = class.shares.get(namespace) else { return false };
        is_full(class.concurrency.per_namespace, share.running)
    }

    /// Puts a request in line that is not in it. It runs when [`Self::promote`] says so.
    pub(super) fn wait(&mut self, id: Id, claim: Claim, concurrency: Concurrency) {
        let class = self.classes.entry(claim.class.clone()).or_default();
        class.concurrency = concurrency;
        let share = class.shares.entry(claim.namespace.clone()).or_default();
        let same = share.builds.entry(claim.build.clone()).or_default();
        same.line.insert(id);
        let place = if same.running.is_empty() { Place::Waiting } else { Place::BehindSame };
        if place == Place::Waiting {
            share.waiting.insert(claim.rank.clone());
        }
        self.claims.insert(id, (claim, place));
    }

    /// Takes in a request that is not in line and runs already, whatever the limits are.
    pub(super) fn adopt(&mut self, id: Id, claim: Claim) {
        self.claims.insert(id, (claim, Place::Waiting));
        self.run(id);
    }

    /// Sets the request's place in its order.
    pub(super) fn rank(&mut self, id: Id, priority: i32) {
        let Some((claim, place)) = self.claims.get_mut(&id) else { return };
        let rank = Rank { priority: Reverse(priority), ..claim.rank.clone() };
        let before = std::mem::replace(&mut claim.rank, rank.clone());
        if *place == Place::Waiting
            && let Some(share) = share(&mut self.classes, claim)
        {
            share.waiting.remove(&before);
            share.waiting.insert(rank);
        }
    }

    /// Says what a request builds that was taken in before that was known. Those that wait for their turn to build the same wait
    /// for this one now.
    pub(super) fn builds(&mut self, id: Id, build: Arc<str>) {
        let Some((claim, Place::Running)) = self.claims.get_mut(&id) else { return };
        let before = std::mem::replace(&mut claim.build, build);
        let claim = claim.clone();
        let Some(share) = share(&mut self.classes, &claim) else { return };
        if let Some(same) = share.builds.get_mut(&before) {
            same.running.remove(&id);
            if same.running.is_empty() && same.line.is_empty() {
                share.builds.remove(&before);
            }
        }
        self.joins(id, &claim);
    }

    /// Takes a request out of line, or ends its turn. Those that were behind it are out of line as well, since what they
    /// wait for may be there now: they are returned, and have to ask again.
    pub(super) fn leave(&mut self, id: Id) -> Vec<Id> {
        let Some((claim, place)) = self.claims.remove(&id) else { return vec![] };
        let Some(class) = self.classes.get_mut(&claim.class) else { return vec![] };
        let Some(share) = class.shares.get_mut(&claim.namespace) else { return vec![] };
        let mut freed = vec![];
        let Some(same) = share.builds.get_mut(&claim.build) else { return vec![] };
        match place {
            Place::Waiting | Place::BehindSame => {
                share.waiting.remove(&claim.rank);
                same.line.remove(&id);
            }
            Place::Running => {
                class.running = class.running.saturating_sub(1);
                share.running = share.running.saturating_sub(1);
                same.running.remove(&id);
                if same.running.is_empty() {
                    freed.extend(std::mem::take(&mut same.line));
                }
            }
        }
        if same.running.is_empty() && same.line.is_empty() {
            share.builds.remove(&claim.build);
        }
        for id in &freed {
            if let Some((claim, _)) = self.claims.remove(id) {
                share.waiting.remove(&claim.rank);
            }
        }
        if share.running == 0 && share.waiting.is_empty() {
            class.shares.remove(&claim.namespace);
        }
        if class.shares.is_empty() {
            self.classes.remove(&claim.class);
        }
        freed
    }

    /// Lets begin who may: those are returned. The namespace with the fewest running comes first, of those the one whose turn is
    /// longest ago, and of its requests the first by its own order. So neither thousands of requests nor their priority, which
    /// is their makers' choice, keep other namespaces waiting.
    pub(super) fn promote(&mut self, class_name: &str) -> Vec<Id> {
        let mut begun = vec![];
        while let Some(class) = self.classes.get(class_name) {
            let limits = class.concurrency;
            if is_full(limits.total, class.running) {
                break;
            }
            let open = class.shares.values().filter(|share| !is_full(limits.per_namespace, share.running));
            let next = open
                .filter_map(|share| Some((share.waiting.first()?, share)))
                .min_by_key(|(rank, share)| (share.running, share.last, rank.created, &rank.name, rank.id))
                .map(|(rank, _)| rank.id);
            let Some(id) = next else { break };
            self.run(id);
            begun.push(id);
        }
        begun
    }

    /// From its place in line to running. Those that wait for their turn to build the same wait for this one now.
    fn run(&mut self, id: Id) {
        let Some((claim, place)) = self.claims.get_mut(&id) else { return };
        *place = Place::Running;
        let claim = claim.clone();
        let class = self.classes.entry(claim.class.clone()).or_default();
        class.running += 1;
        class.begun += 1;
        let begun = class.begun;
        let share = class.shares.entry(claim.namespace.clone()).or_default();
        share.running += 1;
        share.last = begun;
        share.waiting.remove(&claim.rank);
        self.joins(id, &claim);
    }

    /// Counts a request that runs to those that build the same.
    fn joins(&mut self, id: Id, claim: &Claim) {
        let Some(share) = share(&mut self.classes, claim) else { return };
        let same = share.builds.entry(claim.build.clone()).or_default();
        same.line.remove(&id);
        same.running.insert(id);
        for other in &same.line {
            let Some((claim, place)) = self.claims.get_mut(other) else { continue };
            if *place == Place::Waiting {
                share.waiting.remove(&claim.rank);
                *place = Place::BehindSame;
            }
        }
    }
}

fn share<'a>(classes: &'a mut HashMap<Arc<str>, Class>, claim: &Claim) -> Option<&'a mut Share> {
    classes.get_mut(&claim.class)?.shares.get_mut(&claim.namespace)
}

fn is_full(limit: Option<u32>, running: usize) -> bool {
    limit.is_some_and(|limit| running >= limit as usize)
}
