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
//! In the order of a request's life: [`accept`] checks what was asked for, [`attempt`] leads one try from pod to
//! verdict, [`blame`] reads from a pod why it ended.

mod accept;
mod attempt;
mod blame;
#[cfg(test)]
mod tests;

use std::time::Duration;

use drover_api::conditions::{self, Status};
use drover_api::{BuildRequestStatus, Phase, Reason};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::Resource as _;

pub use accept::{Accepted, accept, required_features};

use crate::status::Draft;
use crate::world::{Lookup, World};

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
    /// Ask the class's caches for the outputs and, if they lack some, for the inputs; the answer is in the next world.
    LookUp { attempt: u32 },
    /// Forget that answer, so that it is asked again.
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
    /// At once, with a world that is read from the API server itself. Nothing else is to be done.
    Live,
    After(Duration),
}

/// Decides.
pub fn plan(world: &World, now: Timestamp) -> Plan {
    let request = &world.request;
    let verdict = request.status.as_ref().and_then(|status| conditions::verdict(&status.conditions));
    if request.meta().deletion_timestamp.is_some() {
        return Plan { status: None, actions: clean_up(world), requeue: Requeue::After(IDLE) };
    }
    if let Some(succeeded) = verdict {
        return settled(world, succeeded, now);
    }
    let mut draft = Draft::new(request, now);
    if request.spec.cancel == Some(true) {
        draft.fail(Reason::Cancelled, "spec.cancel was set", &tail(world));
        return end(world, draft);
    }
    let accepted = match accept(world) {
        Ok(accepted) => accepted,
        Err(refusal) => return refused(world, draft, refusal),
    };
    if draft.open_attempt().is_some() {
        return attempt::lead(world, draft, now);
    }
    if let Err(refusal) = accept::admit(world, &accepted) {
        return refused(world, draft, refusal);
    }
    if request.spec.suspend == Some(true) {
        draft.progress(Phase::Pending, Reason::Suspended, "spec.suspend is true");
        return go_on(draft, strays(world, None), IDLE);
    }
    if let Some(wait) = attempt::backoff(&draft, now) {
        return go_on(draft, strays(world, None), wait);
    }
    let number = draft.status.attempt.unwrap_or(0) + 1;
    match &world.lookup {
        Lookup::Unknown => {
            let mut actions = strays(world, None);
            actions.push(Action::LookUp { attempt: number });
            Plan { status: None, actions, requeue: Requeue::Now }
        }
        Lookup::Refused { reason, message } => {
            attempt::note_accepted(&mut draft, &accepted);
            draft.fail(*reason, message, &[]);
            end(world, draft)
        }
        Lookup::Present(outputs) => {
            attempt::note_accepted(&mut draft, &accepted);
            draft.succeed(Reason::AlreadyBuilt, outputs.clone());
            end(world, draft)
        }
        Lookup::Missing { .. } => {
            attempt::note_accepted(&mut draft, &accepted);
            draft.begin_attempt(number);
            draft.progress(Phase::Running, Reason::Accepted, "");
            let mut actions = strays(world, Some(number));
            actions.push(Action::CreatePod { attempt: number, memory: None });
            go_on(draft, actions, attempt::PATIENCE)
        }
    }
}

fn refused(world: &World, mut draft: Draft, refusal: accept::Refusal) -> Plan {
    match refusal {
        accept::Refusal::Wait { reason, message } => {
            draft.progress(Phase::Pending, reason, &message);
            draft.phase(conditions::ACCEPTED, Status::Unknown, reason, &message);
            go_on(draft, vec![], IDLE)
        }
        accept::Refusal::Never { reason, message } => {
            draft.fail(reason, &message, &[]);
            end(world, draft)
        }
    }
}

/// The verdict was spoken: only what it left behind is cleared away, and the request itself when its time comes. A spec that
/// was changed since is noted as seen.
fn settled(world: &World, succeeded: bool, now: Timestamp) -> Plan {
    let mut actions = clean_up(world);
    let spec = &world.request.spec;
    let ttl = if succeeded { spec.ttl_seconds_after_succeeded } else { spec.ttl_seconds_after_failed };
    let completed = world.request.status.as_ref().and_then(|status| status.completion_time.as_ref());
    let mut wait = IDLE;
    if let (Some(ttl), Some(completed)) = (ttl, completed) {
        let due = completed.0.saturating_add(SignedDuration::from_secs(ttl.into())).unwrap_or(Timestamp::MAX);
        match Duration::try_from(due.duration_since(now)) {
            Ok(left) if !left.is_zero() => wait = left.min(IDLE),
            _ => actions.push(Action::DeleteRequest),
        }
    }
    let status = Draft::new(&world.request, now).restate();
    Plan { status, actions, requeue: Requeue::After(wait) }
}

/// The verdict is in the draft: write it, then clean up.
fn end(world: &World, draft: Draft) -> Plan {
    Plan { status: draft.finish(), actions: clean_up(world), requeue: Requeue::After(IDLE) }
}

fn go_on(draft: Draft, actions: Vec<Action>, wait: Duration) -> Plan {
    Plan { status: draft.finish(), actions, requeue: Requeue::After(wait) }
}

/// Ends everything that was made for the request.
fn clean_up(world: &World) -> Vec<Action> {
    let mut actions = Vec::new();
    if world.session.is_some() {
        actions.push(Action::StopSession);
    }
    actions.extend(strays(world, None));
    actions
}

/// Deletion of every pod but that of attempt `keep`.
fn strays(world: &World, keep: Option<u32>) -> Vec<Action> {
    world
        .pods
        .iter()
        .filter(|pod| !pod.deleting && Some(pod.attempt) != keep)
        .map(|pod| Action::DeletePod {
            namespace: pod.namespace.clone(),
            name: pod.name.clone(),
            uid: pod.uid.clone(),
        })
        .collect()
}

fn tail(world: &World) -> Vec<String> {
    world.session.as_ref().map(|session| session.log_tail.clone()).unwrap_or_default()
}
