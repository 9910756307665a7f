//! From events to the API server (`events.k8s.io/v1`), behind everybody's back.
//!
//! Events wait in a queue of bounded length for one task. What has no place there, what a request has had too many of, and what
//! the API server refuses is counted and gone.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use drover_api::BuildRequest;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{self, EventType, Recorder};
use kube::{Client, Resource as _, ResourceExt as _};
use tokio::sync::{mpsc, oneshot};

use super::{Event, transitions};
use crate::error::Error;
use crate::metrics::Metrics;
use crate::operator::call_within;

/// What `kubectl describe` shows as `From`.
pub const CONTROLLER: &str = "drover.build/operator";
/// What the operator is doing in all of them.
const ACTION: &str = "Build";
/// Events that wait. A hundred builds have no more that begin and end at once.
const QUEUE: usize = 1024;
/// The longest that one may take.
const LIMIT: Duration = Duration::from_secs(5);
/// Longest note, in bytes (Kubernetes: pkg/apis/core/validation/events.go, NoteLengthLimit).
const MAX_NOTE: usize = 1024;
/// Events of one request at once, and the time after which it may have one more; as client-go limits them by object
/// (tools/record/events_cache.go). The last one of a request always goes.
const BURST: u32 = 25;
const REFILL: SignedDuration = SignedDuration::from_mins(5);

/// Where events are handed in.
pub struct Events {
    queue: mpsc::Sender<Job>,
    allowances: Mutex<HashMap<String, Allowance>>,
    metrics: Arc<Metrics>,
}

enum Job {
    Publish(Box<Event>, Box<ObjectReference>),
    /// All before it are done.
    Mark(oneshot::Sender<()>),
}

/// How many events a request may have now.
#[derive(Clone, Copy, Debug)]
struct Allowance {
    left: u32,
    /// Since when it grows.
    since: Timestamp,
}

impl Events {
    /// The queue, and the task that empties it.
    pub fn new(client: Client, metrics: Arc<Metrics>) -> (Self, impl Future<Output = ()> + Send + use<>) {
        let (queue, jobs) = mpsc::channel(QUEUE);
        let task = publish(client, jobs, metrics.clone());
        (Self { queue, allowances: Mutex::default(), metrics }, task)
    }

    /// Says what happened to the request between these two versions of it. Never waits.
    pub fn say(&self, before: &BuildRequest, after: &BuildRequest, now: Timestamp) {
        let Some(status) = &after.status else { return };
        let reference = ObjectReference {
            // It would make an object of its own of each version, and nothing a series.
            resource_version: None,
            ..after.object_ref(&())
        };
        let uid = after.uid().unwrap_or_default();
        for event in transitions(before.status.as_ref(), status) {
            let is_last = drover_api::conditions::verdict(&status.conditions).is_some();
            let may = self.may(&uid, now) || is_last;
            let job = Job::Publish(Box::new(event), Box::new(reference.clone()));
            if !may || self.queue.try_send(job).is_err() {
                self.metrics.event_errors.inc();
            }
        }
    }

    /// Forgets all requests but these.
    pub fn retain(&self, mut is_there: impl FnMut(&str) -> bool) {
        self.lock().retain(|uid, _| is_there(uid));
    }

    /// Waits until what was said so far is said to the API server, at most so long.
    pub async fn settle(&self, limit: Duration) {
        let settled = async {
            let (mark, reached) = oneshot::channel();
            if self.queue.send(Job::Mark(mark)).await.is_ok() {
                // An error is the task's end.
                let _ = reached.await;
            }
        };
        // What was not said in time is not said.
        let _ = tokio::time::timeout(limit, settled).await;
    }

    fn may(&self, uid: &str, now: Timestamp) -> bool {
        let mut allowances = self.lock();
        match allowances.get_mut(uid) {
            Some(allowance) => allowance.take(now),
            None => {
                allowances.entry(uid.to_owned()).or_insert(Allowance { left: BURST, since: now }).take(now)
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Allowance>> {
        // Numbers: fit for use after a panic.
        self.allowances.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Allowance {
    fn take(&mut self, now: Timestamp) -> bool {
        let more = now.duration_since(self.since).as_secs() / REFILL.as_secs();
        // A clock that was set back gives nothing.
        if let Some(more) = u32::try_from(more).ok().filter(|more| *more > 0) {
            self.left = self.left.saturating_add(more).min(BURST);
            self.since = now;
        }
        let may = self.left > 0;
        self.left = self.left.saturating_sub(1);
        may
    }
}

async fn publish(client: Client, mut jobs: mpsc::Receiver<Job>, metrics: Arc<Metrics>) {
    let recorder = Recorder::new(client, CONTROLLER.into());
    // Said once for a row of them: an operator without the right to it would say nothing else.
    let mut is_refused = false;
    while let Some(job) = jobs.recv().await {
        let (event, about) = match job {
            Job::Publish(event, about) => (event, about),
            Job::Mark(mark) => {
                // Nobody waits any more.
                let _ = mark.send(());
                continue;
            }
        };
        let result =
            call_within(LIMIT, "record an event", recorder.publish(&translated(&event), &about)).await;
        match &result {
            Ok(()) => is_refused = false,
            Err(error) => {
                metrics.event_errors.inc();
                if !std::mem::replace(&mut is_refused, true) {
                    told(error, &event, &about);
                }
            }
        }
    }
    // The queue is gone only with the operator.
}

fn told(error: &Error, event: &Event, about: &ObjectReference) {
    tracing::warn!(
        namespace = about.namespace,
        request = about.name,
        uid = about.uid,
        event = event.word.as_str(),
        error = error as &dyn std::error::Error,
        "an event was not recorded; nothing else depends on it, and further ones that fail are only counted"
    );
}

fn translated(event: &Event) -> events::Event {
    let Event { word, note, pod } = event;
    events::Event {
        type_: if word.is_warning() { EventType::Warning } else { EventType::Normal },
        reason: word.as_str().into(),
        note: Some(cut(note).to_owned()),
        action: ACTION.into(),
        // What is about another attempt is another event, and no repetition: series keep the first one's note.
        secondary: pod.as_ref().map(|(namespace, name)| ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Pod".into()),
            namespace: Some(namespace.clone()),
            name: Some(name.clone()),
            ..ObjectReference::default()
        }),
    }
}

/// At most [`MAX_NOTE`] bytes, ending between two characters.
fn cut(note: &str) -> &str {
    let mut end = note.len().min(MAX_NOTE);
    while !note.is_char_boundary(end) {
        end -= 1;
    }
    &note[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn a_request_has_so_many_and_one_more_now_and_then() {
        let mut allowance = Allowance { left: BURST, since: at(0) };
        assert_eq!((0..100).filter(|_| allowance.take(at(1))).count(), BURST as usize);
        assert!(!allowance.take(at(299)));
        assert!(allowance.take(at(300)) && !allowance.take(at(301)));
        // It does not save up for more than a burst, and time that runs backwards gives nothing.
        assert_eq!((0..100).filter(|_| allowance.take(at(1_000_000))).count(), BURST as usize);
        assert!(!allowance.take(at(0)));
    }

    #[test]
    fn notes_are_cut_between_characters() {
        assert_eq!(cut("short"), "short");
        assert_eq!(cut(&"ä".repeat(MAX_NOTE)).len(), MAX_NOTE);
        assert_eq!(cut(&format!("x{}", "ä".repeat(MAX_NOTE))).len(), MAX_NOTE - 1);
    }
}
