//! All requests that there are, and what they mean for each other.
//!
//! Pure and synchronous: no runtime, no clock, no client. It is fed with what the watch shows and with what the operator has
//! written itself, answers questions, and says which requests to look at. What is older than what it knows changes
//! nothing: a watch that lags cannot take back what was written.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use drover_api::{BuildRequest, Concurrency};
use drover_nix::BasicDerivation;
use jiff::Timestamp;
use kube::runtime::reflector::ObjectRef;
use kube::{Resource as _, ResourceExt as _};

use super::entry::{End, Fixed, Now, State, is_of_the_build};
use super::paths::Paths;
use super::slots::{Claim, Id, Place, Rank, Slots};
use crate::world::{Other, OtherState, Others, SameFailed, Slot};

/// Of failures of one build, the newest so many are looked through for one that another request shares.
const FAILURES_SEEN: usize = 16;

/// See the module.
#[derive(Default)]
pub struct Index {
    ids: HashMap<Arc<str>, Id>,
    pub(super) entries: HashMap<Id, Entry>,
    pub(super) namespaces: HashMap<Arc<str>, Namespace>,
    slots: Slots,
    next: Id,
    /// Number of the list that is being read, or was read last.
    list: u64,
    pub(super) news: Vec<(Id, News)>,
}

pub(super) struct Entry {
    uid: Arc<str>,
    pub fixed: Fixed,
    now: Now,
    /// Inputs that no cache had when it was last looked.
    pub waits: BTreeSet<Arc<str>>,
    /// The verdict of another that built the same while this one waited for it, and the class.
    shared: Option<(Arc<str>, SameFailed)>,
    /// Requests that wait for each other, this one among them.
    pub cycle: Option<Arc<[Id]>>,
    list: u64,
}

/// What requests of one namespace have to do with each other. No other namespace is ever looked at.
#[derive(Default)]
pub(super) struct Namespace {
    pub paths: Paths,
    /// Verdicts on builds, by what was built: when, and whose.
    failures: HashMap<Arc<str>, BTreeSet<(Timestamp, Id)>>,
    /// Unsettled requests of which nobody knows what they make.
    unread: BTreeSet<Id>,
    requests: usize,
}

/// Why a request is to be looked at.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum News {
    /// Something that it waits for has changed.
    Look,
    /// What is in caches has changed for it: it is to be asked again.
    LookUp,
    /// These inputs are there, while others are still to come.
    Arrived(Vec<Arc<str>>),
}

impl Index {
    /// A list begins: what it does not show by its end is gone.
    pub fn begin_list(&mut self) {
        self.list += 1;
    }

    pub fn end_list(&mut self) {
        let gone = self.entries.values().filter(|entry| entry.list != self.list);
        for uid in gone.map(|entry| entry.uid.clone()).collect::<Vec<_>>() {
            self.gone(&uid);
        }
    }

    /// The request as it is in the list that began last.
    pub fn listed(&mut self, request: &BuildRequest) {
        self.note(request, true);
    }

    /// The request as a watch, an answer to a write or a read shows it.
    pub fn seen(&mut self, request: &BuildRequest) {
        self.note(request, false);
    }

    /// A request that is there and cannot be read. What was known of it stays.
    pub fn unreadable(&mut self, uid: &str) {
        let list = self.list;
        if let Some(entry) = self.ids.get(uid).and_then(|id| self.entries.get_mut(id)) {
            entry.list = list;
        }
    }

    /// The request is gone, or about to go.
    pub fn gone(&mut self, uid: &str) {
        let Some(id) = self.ids.remove(uid) else { return };
        self.leave(id);
        let Some(entry) = self.entries.remove(&id) else { return };
        let fixed = &entry.fixed;
        self.tell_consumers(&fixed.namespace, &fixed.outputs, |_| News::LookUp);
        let Some(namespace) = self.namespaces.get_mut(&fixed.namespace) else { return };
        namespace.paths.remove_outputs(id, &fixed.outputs);
        namespace.paths.remove_inputs(id, &fixed.inputs);
        namespace.forget_failure(id, &entry);
        namespace.unread.remove(&id);
        namespace.requests -= 1;
        if namespace.requests == 0 {
            self.namespaces.remove(&fixed.namespace);
        }
    }

    /// What other requests of its namespace mean for this one, which gets this class.
    pub fn others(&self, uid: &str, class: Option<&str>) -> Others {
        let Some((id, entry)) = self.find(uid) else { return Others::default() };
        let Some(namespace) = self.namespaces.get(&entry.fixed.namespace) else { return Others::default() };
        let mut producers = BTreeMap::new();
        for path in &entry.fixed.inputs {
            let others = namespace.paths.producers(path).filter(|producer| *producer != id);
            // Where several make it: one that still may, else one that did, else the newest word on why not.
            let best =
                others.filter_map(|id| self.entries.get(&id)).min_by_key(|other| match &other.now.state {
                    State::Between(_) | State::Open(_) => (0, Reverse(None), &other.fixed.name),
                    State::Settled(End { state: OtherState::Failed { .. }, at }) => {
                        (2, Reverse(*at), &other.fixed.name)
                    }
                    State::Settled(_) => (1, Reverse(None), &other.fixed.name),
                });
            if let Some(other) = best {
                producers.insert(path.to_string(), other.other());
            }
        }
        let mut unread = namespace.unread.iter().filter(|other| **other != id);
        let unread = unread.find_map(|other| self.entries.get(other).filter(|other| !other.now.is_stuck));
        Others {
            producers,
            same_failed: class.and_then(|class| self.same_failed(id, entry, class)),
            cycle: self.cycle(id, entry),
            unread: unread.map(|other| other.fixed.name.to_string()),
        }
    }

    /// Where this attempt stands.
    pub fn slot(&self, uid: &str, attempt: u32) -> Slot {
        let Some((id, _)) = self.find(uid) else { return Slot::Unasked };
        let Some((claim, place)) = self.slots.claim(id).filter(|(claim, _)| claim.attempt == attempt) else {
            return Slot::Unasked;
        };
        match place {
            Place::Running => Slot::Granted,
            Place::BehindSame => {
                let same = self.slots.same(claim).and_then(|same| self.entries.get(&same));
                let request = same.map(|same| same.fixed.name.to_string()).unwrap_or_default();
                Slot::WaitForSame { request }
            }
            Place::Waiting => Slot::WaitForConcurrency { message: self.why_not(claim) },
        }
    }

    /// Asks for leave to begin this attempt in this class. Asking again changes nothing.
    pub fn ask(&mut self, uid: &str, attempt: u32, class: &str, concurrency: Concurrency) -> Slot {
        let Some(id) = self.ids.get(uid).copied() else { return Slot::Unasked };
        let Some(entry) = self.entries.get(&id) else { return Slot::Unasked };
        let may_begin = match entry.now.state {
            State::Between(last) => attempt > last,
            State::Open(open) => attempt == open,
            State::Settled(_) => false,
        };
        if !may_begin || entry.now.is_held {
            return Slot::Unasked;
        }
        let claim = entry.claim(id, attempt, class);
        match self.slots.claim(id) {
            Some((before, _)) if before.attempt == attempt && before.class == claim.class => {
                self.limit(class, concurrency);
            }
            before => {
                if before.is_some() {
                    self.leave(id);
                }
                self.slots.wait(id, claim, concurrency);
                self.promote(class, Some(id));
            }
        }
        self.slot(uid, attempt)
    }

    /// Gives leave, or the place in line, back. Not that of an attempt that has begun: who says so has an old view.
    pub fn release(&mut self, uid: &str) {
        let Some(id) = self.ids.get(uid).copied() else { return };
        if self.entries.get(&id).is_some_and(|entry| !matches!(entry.now.state, State::Open(_))) {
            self.leave(id);
        }
    }

    /// What the class allows now.
    pub fn limit(&mut self, class: &str, concurrency: Concurrency) {
        if self.slots.limit(class, concurrency) {
            self.promote(class, None);
        }
    }

    /// What a lookup has found missing: inputs that no cache has.
    pub fn waits(&mut self, uid: &str, absent: &BTreeSet<String>) {
        let Some(id) = self.ids.get(uid).copied() else { return };
        let Some(entry) = self.entries.get_mut(&id) else { return };
        let needed = entry.fixed.inputs.iter().filter(|path| absent.contains(&***path));
        let waits: BTreeSet<Arc<str>> = needed.cloned().collect();
        if entry.waits != waits {
            entry.waits = waits;
            self.find_cycle(id);
        }
    }

    /// What a request builds that only names its derivation. Whoever needs what it makes can say so now.
    pub fn resolved(&mut self, uid: &str, derivation: &BasicDerivation) {
        let Some(id) = self.ids.get(uid).copied() else { return };
        let Some(entry) = self.entries.get_mut(&id).filter(|entry| entry.fixed.build.is_none()) else {
            return;
        };
        let (outputs, inputs) = (entry.fixed.outputs.clone(), entry.fixed.inputs.clone());
        entry.fixed.learn(derivation);
        let is_settled = entry.is_settled();
        let fixed = &mut entry.fixed;
        if is_settled {
            fixed.inputs.clear();
        }
        if let Some(namespace) = self.namespaces.get_mut(&fixed.namespace) {
            namespace.unread.remove(&id);
            namespace.paths.remove_outputs(id, &outputs);
            namespace.paths.remove_inputs(id, &inputs);
            namespace.paths.add(id, &mut fixed.outputs, &mut fixed.inputs);
        }
        let (in_namespace, outputs, build) =
            (fixed.namespace.clone(), fixed.outputs.clone(), fixed.build.clone());
        if let Some(build) = build {
            self.slots.builds(id, build);
        }
        self.tell_consumers(&in_namespace, &outputs, |_| News::Look);
    }

    /// Whether some request of the namespace, not this one, may still make the path.
    pub fn is_coming(&self, uid: &str, path: &str) -> bool {
        let Some((id, entry)) = self.find(uid) else { return false };
        self.makers(&entry.fixed.namespace, path).any(|maker| maker != id)
    }

    /// The requests to look at since this was asked last, each once.
    pub fn take_news(&mut self) -> Vec<(Arc<str>, ObjectRef<BuildRequest>, News)> {
        let mut by_id: BTreeMap<Id, News> = BTreeMap::new();
        for (id, news) in self.news.drain(..) {
            let news = match by_id.remove(&id) {
                Some(before) => before.and(news),
                None => news,
            };
            by_id.insert(id, news);
        }
        let known = by_id.into_iter().filter_map(|(id, news)| Some((self.entries.get(&id)?, news)));
        known.map(|(entry, news)| (entry.uid.clone(), entry.reference(), news)).collect()
    }

    /// Unsettled requests that have the path among their outputs.
    pub(super) fn makers(&self, namespace: &str, path: &str) -> impl Iterator<Item = Id> + '_ {
        let producers = self.namespaces.get(namespace).map(|namespace| namespace.paths.producers(path));
        producers
            .into_iter()
            .flatten()
            .filter(|id| self.entries.get(id).is_some_and(|entry| !entry.is_settled()))
    }

    fn find(&self, uid: &str) -> Option<(Id, &Entry)> {
        let id = *self.ids.get(uid)?;
        Some((id, self.entries.get(&id)?))
    }

    fn note(&mut self, request: &BuildRequest, listed: bool) {
        let uid = request.uid().unwrap_or_default();
        if request.meta().deletion_timestamp.is_some() {
            return self.gone(&uid);
        }
        let now = Now::of(request);
        let Some(id) = self.ids.get(&*uid).copied() else { return self.add(uid, request, now) };
        let list = self.list;
        let Some(entry) = self.entries.get_mut(&id) else { return };
        if listed {
            entry.list = list;
        } else if now.version < entry.now.version {
            return;
        }
        if entry.is_settled() && !matches!(now.state, State::Settled(_)) {
            // Somebody has taken the verdict out of the status: as good as a new one.
            self.gone(&uid);
            return self.add(uid, request, now);
        }
        let before = std::mem::replace(&mut entry.now, now);
        self.changed(id, Some(before));
    }

    fn add(&mut self, uid: String, request: &BuildRequest, now: Now) {
        let (id, uid) = (self.next, Arc::<str>::from(uid));
        self.next += 1;
        let mut fixed = Fixed::of(request);
        let namespace = self.namespaces.entry(fixed.namespace.clone()).or_default();
        namespace.requests += 1;
        if fixed.is_unread && !matches!(now.state, State::Settled(_)) {
            namespace.unread.insert(id);
        }
        namespace.paths.add(id, &mut fixed.outputs, &mut fixed.inputs);
        // Whoever waits for what this one makes can say so now.
        let (in_namespace, outputs) = (fixed.namespace.clone(), fixed.outputs.clone());
        let (waits, list) = (BTreeSet::new(), self.list);
        let entry = Entry { uid: uid.clone(), fixed, now, waits, shared: None, cycle: None, list };
        self.ids.insert(uid, id);
        self.entries.insert(id, entry);
        self.tell_consumers(&in_namespace, &outputs, |_| News::Look);
        self.changed(id, None);
    }

    /// Draws the consequences of what is new about a request.
    fn changed(&mut self, id: Id, before: Option<Now>) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        let (state, is_held) = (entry.now.state.clone(), entry.now.is_held);
        let was_settled = before.as_ref().is_some_and(|before| matches!(before.state, State::Settled(_)));
        if before.is_some_and(|before| before.priority != entry.now.priority) {
            self.slots.rank(id, entry.now.priority);
        }
        match state {
            State::Settled(end) if !was_settled => self.settled(id, &end),
            State::Settled(_) => {}
            State::Open(attempt) => {
                entry.waits.clear();
                let class = entry.now.class.clone().unwrap_or_default();
                let runs = self
                    .slots
                    .claim(id)
                    .is_some_and(|(claim, place)| claim.attempt == attempt && place == Place::Running);
                if !runs {
                    // It began before this process did.
                    let claim = entry.claim(id, attempt, &class);
                    self.leave(id);
                    self.slots.adopt(id, claim);
                }
            }
            State::Between(last) => {
                let is_over = self.slots.claim(id).is_some_and(|(claim, _)| claim.attempt <= last || is_held);
                if is_over {
                    self.leave(id);
                }
            }
        }
    }

    /// A request has come to its end, or is at its end when it is first seen.
    fn settled(&mut self, id: Id, end: &End) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        entry.waits.clear();
        entry.shared = None;
        let fixed = entry.fixed.clone();
        let class = entry.now.class.clone().unwrap_or_default();
        let inputs = std::mem::take(&mut entry.fixed.inputs);
        if let Some(namespace) = self.namespaces.get_mut(&fixed.namespace) {
            namespace.paths.remove_inputs(id, &inputs);
            namespace.unread.remove(&id);
        }
        let freed = self.leave(id);
        if let (OtherState::Failed { reason, message }, Some(build)) = (&end.state, &fixed.build)
            && is_of_the_build(*reason)
        {
            if let (Some(at), Some(namespace)) = (end.at, self.namespaces.get_mut(&fixed.namespace)) {
                namespace.failures.entry(build.clone()).or_default().insert((at, id));
            }
            let (request, message) = (fixed.name.to_string(), message.clone());
            let shared = SameFailed { request, reason: *reason, message };
            for other in freed {
                if let Some(other) = self.entries.get_mut(&other)
                    && other.fixed.limits == fixed.limits
                {
                    other.shared = Some((class.clone(), shared.clone()));
                }
            }
        }
        let has_failed = matches!(end.state, OtherState::Failed { .. });
        self.tell_consumers(&fixed.namespace, &fixed.outputs, |still_waits| match still_waits {
            true if !has_failed => News::Arrived(fixed.outputs.clone()),
            _ => News::LookUp,
        });
    }

    /// Tells those that need one of these paths and have not begun. `news` gets whether the request waits for others as
    /// well that are still to be made.
    fn tell_consumers(&mut self, namespace: &str, paths: &[Arc<str>], news: impl Fn(bool) -> News) {
        let Some(known) = self.namespaces.get(namespace) else { return };
        let consumers: BTreeSet<Id> = paths.iter().flat_map(|path| known.paths.consumers(path)).collect();
        let mut told = vec![];
        for id in consumers {
            let Some(entry) = self.entries.get(&id) else { continue };
            if !matches!(entry.now.state, State::Between(_)) {
                continue;
            }
            let mut others = entry.waits.iter().filter(|path| !paths.contains(path));
            let still_waits = others.any(|path| self.makers(namespace, path).next().is_some());
            told.push((id, news(still_waits)));
        }
        for (id, news) in &told {
            if let (News::Arrived(paths), Some(entry)) = (news, self.entries.get_mut(id)) {
                entry.waits.retain(|path| !paths.contains(path));
            }
        }
        self.news.extend(told);
    }

    /// Ends the request's turn or its place in line. Those that waited for it to build the same have to ask again.
    fn leave(&mut self, id: Id) -> Vec<Id> {
        let Some((claim, _)) = self.slots.claim(id) else { return vec![] };
        let class = claim.class.clone();
        let freed = self.slots.leave(id);
        self.news.extend(freed.iter().map(|id| (*id, News::LookUp)));
        self.promote(&class, None);
        freed
    }

    /// `asking` is told by the answer.
    fn promote(&mut self, class: &str, asking: Option<Id>) {
        let begun = self.slots.promote(class).into_iter().filter(|id| Some(*id) != asking);
        // They may have waited for long.
        self.news.extend(begun.map(|id| (id, News::LookUp)));
    }

    fn why_not(&self, claim: &Claim) -> String {
        let Concurrency { total, per_namespace } = self.slots.concurrency(&claim.class);
        let (limit, field, scope) = match self.slots.is_share_full(&claim.class, &claim.namespace) {
            true => (per_namespace, "perNamespace", format!(" for namespace {}", claim.namespace)),
            false => (total, "total", String::new()),
        };
        let limit = limit.unwrap_or_default();
        format!("BuilderClass {} has {limit} at once{scope} (spec.concurrency.{field})", claim.class)
    }

    fn same_failed(&self, id: Id, entry: &Entry, class: &str) -> Option<SameFailed> {
        if let Some((of, shared)) = &entry.shared
            && **of == *class
        {
            return Some(shared.clone());
        }
        let failures =
            self.namespaces.get(&entry.fixed.namespace)?.failures.get(entry.fixed.build.as_ref()?)?;
        let mut since =
            failures.iter().rev().take(FAILURES_SEEN).take_while(|(at, _)| *at > entry.fixed.created);
        since.find_map(|(_, other)| {
            let other = self.entries.get(other).filter(|_| *other != id)?;
            let State::Settled(End { state: OtherState::Failed { reason, message }, .. }) = &other.now.state
            else {
                return None;
            };
            let same = other.now.class.as_deref() == Some(class) && other.fixed.limits == entry.fixed.limits;
            let request = other.fixed.name.to_string();
            same.then(|| SameFailed { request, reason: *reason, message: message.clone() })
        })
    }
}

impl Entry {
    pub(super) fn is_settled(&self) -> bool {
        matches!(self.now.state, State::Settled(_))
    }

    /// How it ended, if it has.
    pub(super) fn end(&self) -> Option<&OtherState> {
        match &self.now.state {
            State::Settled(end) => Some(&end.state),
            _ => None,
        }
    }

    fn claim(&self, id: Id, attempt: u32, class: &str) -> Claim {
        let fixed = &self.fixed;
        Claim {
            class: class.into(),
            namespace: fixed.namespace.clone(),
            // One that makes no sense is equal to none.
            build: fixed.build.clone().unwrap_or_else(|| self.uid.clone()),
            attempt,
            rank: Rank {
                priority: Reverse(self.now.priority),
                created: fixed.created,
                name: fixed.name.clone(),
                id,
            },
        }
    }

    fn other(&self) -> Other {
        let state = self.end().cloned().unwrap_or(OtherState::Going);
        Other { request: self.fixed.name.to_string(), state }
    }

    fn reference(&self) -> ObjectRef<BuildRequest> {
        ObjectRef::new(&self.fixed.name).within(&self.fixed.namespace)
    }
}

impl Namespace {
    fn forget_failure(&mut self, id: Id, entry: &Entry) {
        let (State::Settled(End { at: Some(at), .. }), Some(build)) = (&entry.now.state, &entry.fixed.build)
        else {
            return;
        };
        if let Some(failures) = self.failures.get_mut(build) {
            failures.remove(&(*at, id));
            if failures.is_empty() {
                self.failures.remove(build);
            }
        }
    }
}

impl News {
    /// Both at once.
    fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::LookUp, _) | (_, Self::LookUp) => Self::LookUp,
            (Self::Arrived(mut paths), Self::Arrived(more)) => {
                paths.extend(more);
                Self::Arrived(paths)
            }
            (arrived @ Self::Arrived(_), Self::Look) | (Self::Look, arrived @ Self::Arrived(_)) => arrived,
            (Self::Look, Self::Look) => Self::Look,
        }
    }
}
