//! Which simulations are the same, as far as anything that can still come depends on them.

use std::fmt::Write as _;

use drover_api::conditions;
use drover_api::{BuildRequest, Reason};
use jiff::Timestamp;

use super::{File, Input, OLDEST, STEP, Sim};
use crate::world::{Lookup, PodView, Resolution, SessionEnd, Stage};

impl Sim {
    /// All that decides what can come next: times as ages, and only those that something still depends on.
    pub(in crate::plan::tests) fn key(&self) -> String {
        let mut key = self.key_of(&self.request, &self.pods);
        let age = |time: Timestamp| self.age(time, STEP);
        let created = self.request.metadata.creation_timestamp.as_ref();
        let waits = self.env.input != Input::Cached || self.env.file != File::There;
        let created = created.filter(|_| waits).map(|time| self.age(time.0, OLDEST));
        let session = self.session.as_ref().map(|session| {
            let ours = self.pods.iter().any(|pod| pod.uid == session.pod_uid);
            let end = match &session.end {
                Some(SessionEnd::Failed { reason, .. }) => reason.as_str(),
                Some(SessionEnd::Finished { .. }) => "Finished",
                None => "",
            };
            let started = (session.stage == Stage::Connecting).then(|| self.age(session.started, OLDEST));
            (session.attempt, ours, session.stage, end, session.end_time.map(age), started)
        });
        let lookup = self.lookup.as_ref().map(|(attempt, lookup)| match lookup {
            Lookup::Missing { absent } => (attempt, absent.len()),
            _ => (attempt, 9),
        });
        let read = match &self.resolution {
            Resolution::Unknown => '0',
            Resolution::Absent { .. } => 'a',
            Resolution::Unreadable { .. } => 'u',
            Resolution::Refused { .. } => 'r',
            Resolution::Found(_) => 'f',
        };
        let refusal = self.refusal.as_ref().map(|refusal| (refusal.attempt, refusal.kind, age(refusal.at)));
        let _ = write!(
            key,
            ">{created:?}{session:?}{lookup:?}{refusal:?}{read}{:?}{:?}{:?}{}",
            self.env, self.asked, self.granted, self.wants_live
        );
        if self.lags {
            key.push('<');
            key.push_str(&self.key_of(&self.before.0, &self.before.1));
        }
        key
    }

    pub(super) fn age(&self, time: Timestamp, oldest: i64) -> i64 {
        self.now.duration_since(time).as_secs().clamp(0, oldest)
    }

    fn key_of(&self, request: &BuildRequest, pods: &[PodView]) -> String {
        let mut key = String::new();
        let _ = write!(key, "{:?}{:?}", request.spec.cancel, request.spec.suspend);
        for condition in request.status.iter().flat_map(|status| &status.conditions) {
            let (kind, reason) = (condition.type_.as_str(), condition.reason.as_str());
            if [conditions::READY, conditions::RECONCILING, conditions::STALLED].contains(&kind) {
                continue;
            }
            let is_lost = kind == conditions::BUILDER_READY && reason == Reason::ConnectionLost.as_str();
            let since = is_lost.then(|| self.age(condition.last_transition_time.0, OLDEST));
            let _ = write!(key, ";{}{reason}{since:?}", &condition.status[..1]);
        }
        for attempt in request.status.iter().flat_map(|status| &status.attempts) {
            let ended = attempt.end_time.as_ref().map(|time| self.age(time.0, STEP));
            let began = attempt.start_time.as_ref().map(|time| self.age(time.0, OLDEST));
            let began = began.filter(|_| attempt.pod.is_none() && ended.is_none());
            let (pod, memory) = (attempt.pod.is_some(), attempt.memory.is_some());
            // What depends on more of them has a test of its own.
            let times = attempt.reconnects.min(2);
            let _ = write!(key, "/{pod}{began:?}{ended:?}{:?}{memory}{times}", attempt.reason);
        }
        for pod in pods {
            let ended = pod.ended.as_ref();
            let ended =
                ended.map(|end| (&end.reason, end.only_container_since.map(|time| self.age(time, STEP))));
            let created = pod.node.is_none().then(|| self.age(pod.created, OLDEST));
            let waits = self.session.as_ref().is_none_or(|session| session.stage == Stage::Connecting);
            let scheduled = pod.scheduled.filter(|_| waits).map(|time| self.age(time, OLDEST));
            let (attempt, deleting, waiting) = (pod.attempt, pod.deleting, pod.waiting.is_some());
            let _ = write!(key, "|{attempt}{created:?}{scheduled:?}{deleting}{ended:?}{waiting}");
        }
        key
    }
}
