//! The decision: what to do for one request, given all that is known of it.
//!
//! [`plan`] is a pure function. It may not know tokio, the clock, the network or the environment; time comes in as an
//! argument. It says three things: which actions to take, which status to write, and when to look again.
//!
//! Order of execution: the status first, then the actions. A status that was written and actions that were not is what
//! a crash leaves; the next plan finds the attempt open and its pod absent, or the verdict spoken and its pod there,
//! and goes on from that. The other order could lose outputs: with the pod gone and no verdict, all would be built
//! again. Every action can be repeated.
//!
//! A failure, of an attempt or of the request, is never said from a world that watches alone have shown: such a plan does
//! nothing and asks for a live one ([`Requeue::Live`]).
//!
//! In the order of a request's life: [`accept`] checks what was asked for, `unread` has it read where the request only names
//! it, `begin` says what an attempt waits for before it
//! begins, `attempt` leads it from pod to verdict, `blame` reads from a pod why it ended, `retry` says whether there is
//! another one.

mod accept;
mod attempt;
mod begin;
mod blame;
mod retry;
#[cfg(test)]
mod tests;
mod unread;

use std::time::Duration;

use drover_api::conditions::{self, Status};
use drover_api::{BuildRequestStatus, Phase, Reason};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::Resource as _;

use accept::Refusal;
pub use accept::{Accepted, accept, required_features};

use crate::status::Draft;
use crate::world::{Slot, World};

/// A settled request is looked at again after this long even if nothing happened.
const IDLE: Duration = Duration::from_secs(1800);

/// What to do, in order; the status is written before.
#[derive(Clone, PartialEq, Debug)]
pub struct Plan {
    /// None: it stays as it is.
    pub status: Option<BuildRequestStatus>,
    pub actions: Vec<Action>,
    pub requeue: Requeue,
}

/// Something to be done. Each can be repeated, and each may meet what an earlier one did.
#[derive(Clone, PartialEq, Debug)]
pub enum Action {
    /// Read the derivation that the request only names from the class's caches; the answer is in the next world.
    ReadDerivation,
    /// Ask the class's caches for the outputs and, if they lack some, for the inputs; the answer is in the next world.
    LookUp { attempt: u32 },
    /// Forget what caches have answered, so that they are asked again. A derivation that was found stays: it is what it is.
    ForgetLookUp,
    /// Ask the queue for leave to begin this attempt; the answer is in the next world.
    AskForSlot { attempt: u32 },
    /// Give the leave back, if there is one.
    ReleaseSlot,
    /// Create the pod of this attempt, with this much memory where it is not the request's or the class's. One that is there
    /// already is the same one.
    CreatePod { attempt: u32, memory: Option<Quantity> },
    /// Connect to the pod and have it build. A session that runs already is the same one.
    StartSession { attempt: u32, namespace: String, pod: String, pod_uid: String },
    /// End the session, if there is one, and forget what it said.
    StopSession,
    /// Delete this pod and no later one of the same name.
    DeletePod { namespace: String, name: String, uid: String },
    /// Delete the request itself: its time to live is over.
    DeleteRequest,
}

/// When to look again, if nothing happens before.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Requeue {
    /// At once: an action changes what is known.
    Now,
    /// At once, with a world that is read from the API server itself: what this one suggests is not said before.
    Live,
    After(Duration),
}

/// Decides.
pub fn plan(world: &World, now: Timestamp) -> Plan {
    let plan = decide(world, now);
    if !world.live && (is_behind(world) || is_grave(world, &plan)) {
        // What caches have answered before is asked again as well: what others make may have come in between.
        let actions = vec![Action::ForgetLookUp];
        return Plan { status: None, actions, requeue: Requeue::Live };
    }
    plan
}

fn decide(world: &World, now: Timestamp) -> Plan {
    let request = &world.request;
    let verdict = request.status.as_ref().and_then(|status| conditions::verdict(&status.conditions));
    if request.meta().deletion_timestamp.is_some() {
        return Plan { status: None, actions: clean_up(world, None), requeue: Requeue::After(IDLE) };
    }
    if let Some(succeeded) = verdict {
        return settled(world, succeeded, now);
    }
    let mut draft = Draft::new(request, now);
    unread::note(world, &mut draft);
    if request.spec.cancel == Some(true) {
        draft.fail(Reason::Cancelled, "spec.cancel was set", &tail(world));
        return end(world, draft, now);
    }
    let accepted = accept(world);
    if draft.open_attempt().is_some() {
        return attempt::lead(world, draft, accepted, now);
    }
    let accepted = match accepted.and_then(|accepted| accept::admit(world, &accepted).map(|()| accepted)) {
        Ok(accepted) => accepted,
        Err(refusal) => return refused(world, draft, refusal, now),
    };
    if request.spec.suspend == Some(true) {
        draft.progress(Phase::Pending, Reason::Suspended, "spec.suspend is true");
        return go_on(draft, hold_back(world), IDLE);
    }
    if let Some(wait) = retry::backoff(world, &draft, now) {
        return go_on(draft, hold_back(world), wait);
    }
    begin::begin(world, draft, &accepted, now)
}

/// The world has something of an attempt that the request, as it is seen here, has not begun: it is an old version. Pods of
/// that attempt are not strays.
fn is_behind(world: &World) -> bool {
    let attempt = world.request.status.as_ref().and_then(|status| status.attempt).unwrap_or(0);
    let later = |number: u32| number > attempt;
    world.pods.iter().any(|pod| later(pod.attempt))
        || world.session.as_ref().is_some_and(|one| later(one.attempt))
}

/// The plan says that something has failed: the request, or an attempt. Watches may show what is no longer so, and such
/// words are not taken back.
fn is_grave(world: &World, plan: &Plan) -> bool {
    let Some(status) = plan.status.as_ref().filter(|_| !is_settled(world)) else { return false };
    match conditions::verdict(&status.conditions) {
        Some(succeeded) => !succeeded,
        None => is_open(world) && status.attempts.last().is_some_and(|last| last.end_time.is_some()),
    }
}

fn is_settled(world: &World) -> bool {
    let status = world.request.status.as_ref();
    status.is_some_and(|status| conditions::verdict(&status.conditions).is_some())
}

/// Whether an attempt has begun and not ended.
fn is_open(world: &World) -> bool {
    let last = world.request.status.as_ref().and_then(|status| status.attempts.last());
    last.is_some_and(|attempt| attempt.end_time.is_none())
}

fn refused(world: &World, mut draft: Draft, refusal: Refusal, now: Timestamp) -> Plan {
    match refusal {
        Refusal::Wait { reason, message } => {
            draft.progress(Phase::Pending, reason, &message);
            draft.phase(conditions::ACCEPTED, Status::Unknown, reason, &message);
            let actions = if is_open(world) { vec![] } else { hold_back(world) };
            go_on(draft, actions, IDLE)
        }
        Refusal::Never { reason, message } => {
            draft.fail(reason, &message, &tail(world));
            end(world, draft, now)
        }
        Refusal::Unread => unread::wait(world, draft, now),
    }
}

/// The verdict was spoken: only what it left behind is cleared away, and the request itself when its time comes. A spec that
/// was changed since is noted as seen.
fn settled(world: &World, succeeded: bool, now: Timestamp) -> Plan {
    let mut actions = clean_up(world, None);
    let status = world.request.status.as_ref();
    let completed = status.and_then(|status| status.completion_time.as_ref()).map(|time| time.0);
    let mut wait = IDLE;
    if let (Some(ttl), Some(completed)) = (time_to_live(world, succeeded), completed) {
        match retry::left(completed, ttl, now) {
            Some(left) => wait = left.min(IDLE),
            None => actions.push(Action::DeleteRequest),
        }
    }
    let status = Draft::new(&world.request, now).restate();
    Plan { status, actions, requeue: Requeue::After(wait) }
}

fn time_to_live(world: &World, succeeded: bool) -> Option<Duration> {
    let spec = &world.request.spec;
    let seconds = if succeeded { spec.ttl_seconds_after_succeeded } else { spec.ttl_seconds_after_failed };
    seconds.map(|seconds| Duration::from_secs(seconds.into()))
}

/// The verdict is in the draft: write it, then clean up.
fn end(world: &World, draft: Draft, now: Timestamp) -> Plan {
    let succeeded = conditions::verdict(&draft.status.conditions) == Some(true);
    let completed = draft.status.completion_time.as_ref().map(|time| time.0);
    let wait = time_to_live(world, succeeded)
        .zip(completed)
        .map(|(ttl, completed)| retry::left(completed, ttl, now));
    let requeue = match wait {
        Some(Some(left)) => Requeue::After(left.min(IDLE)),
        Some(None) => Requeue::Now,
        None => Requeue::After(IDLE),
    };
    Plan { status: draft.finish(), actions: clean_up(world, None), requeue }
}

fn go_on(draft: Draft, actions: Vec<Action>, wait: Duration) -> Plan {
    Plan { status: draft.finish(), actions, requeue: Requeue::After(wait) }
}

/// Nothing runs, and nothing is to begin now: what is left of earlier attempts goes, and so does leave that was given.
fn hold_back(world: &World) -> Vec<Action> {
    let mut actions = clean_up(world, None);
    if world.slot == Slot::Granted {
        actions.push(Action::ReleaseSlot);
    }
    actions
}

/// Ends everything that was made for the request's attempts, but for that of attempt `keep`.
fn clean_up(world: &World, keep: Option<u32>) -> Vec<Action> {
    let mut actions = Vec::new();
    if world.session.as_ref().is_some_and(|session| Some(session.attempt) != keep) {
        actions.push(Action::StopSession);
    }
    let strays = world.pods.iter().filter(|pod| !pod.deleting && Some(pod.attempt) != keep);
    actions.extend(strays.map(|pod| Action::DeletePod {
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        uid: pod.uid.clone(),
    }));
    actions
}

/// What a request says whose class names something that is not there.
fn unusable(accepted: &Accepted<'_>, why: &str) -> String {
    format!("BuilderClass {} cannot be used: {why}", accepted.class_name)
}

fn tail(world: &World) -> Vec<String> {
    world.session.as_ref().map(|session| session.log_tail.clone()).unwrap_or_default()
}
