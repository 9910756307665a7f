//! One attempt, from its pod to its end; and how long to wait before the next. Pure.

use std::time::Duration;

use drover_api::conditions::{self, Status};
use drover_api::{Phase, Reason};
use drover_nix::StoreDir;
use jiff::{SignedDuration, Timestamp};

use super::blame::{Failure, POD_LAG, word};
use super::{Accepted, Action, Plan, Requeue, end, go_on, strays};
use crate::status::Draft;
use crate::world::{PodView, SessionEnd, SessionView, Stage, World};

/// A running attempt is looked at again after this long even if nothing happened.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
/// Wait before the second attempt; doubled for each further one.
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
const LONGEST_BACKOFF: Duration = Duration::from_secs(300);
/// A pod finds its node in milliseconds. Only one that takes longer is worth a write that says so.
const SCHEDULING_GRACE: Duration = Duration::from_secs(2);

/// What is known once the request has a class.
pub(super) fn note_accepted(draft: &mut Draft, accepted: &Accepted<'_>) {
    draft.status.class = Some(accepted.class_name.to_owned());
    draft.status.drv_path = Some(StoreDir::default().full(&accepted.drv_path));
    draft.phase(conditions::ACCEPTED, Status::True, Reason::Accepted, "");
}

/// How long to wait until the next attempt may begin; None: now.
pub(super) fn backoff(draft: &Draft, now: Timestamp) -> Option<Duration> {
    let last = draft.status.attempts.last()?.end_time.as_ref()?.0;
    let failures = u32::try_from(draft.status.attempts.len()).unwrap_or(u32::MAX);
    let factor = 2u32.saturating_pow(failures.saturating_sub(1));
    let wait = FIRST_BACKOFF.saturating_mul(factor).min(LONGEST_BACKOFF);
    // At most 300 s: no overflow.
    let due = last.saturating_add(SignedDuration::try_from(wait).unwrap_or_default()).unwrap_or(last);
    Duration::try_from(due.duration_since(now)).ok().filter(|left| !left.is_zero())
}

/// Leads the open attempt one step on.
pub(super) fn lead(world: &World, mut draft: Draft, now: Timestamp) -> Plan {
    let Some((number, pod_was_seen)) =
        draft.open_attempt().map(|attempt| (attempt.number, attempt.pod.is_some()))
    else {
        return go_on(draft, vec![], PATIENCE);
    };
    let pod = world.pod_of(number);
    if let Some(pod) = pod {
        note_pod(&mut draft, pod);
    }
    let session = world.session_of(number);
    if let Some(session) = session {
        note_session(&mut draft, session);
        match &session.end {
            Some(SessionEnd::Finished { outputs, transfer, timings }) => {
                draft.status.transfer = Some(*transfer);
                draft.status.timings = Some(*timings);
                draft.succeed(Reason::Built, outputs.clone());
                return end(world, draft);
            }
            Some(SessionEnd::Failed { reason, message, infrastructure }) => {
                let said =
                    Failure { reason: *reason, message: message.clone(), infrastructure: *infrastructure };
                return match blame(said, pod, session.end_time, now) {
                    Ok(failure) => failed(world, draft, failure, now),
                    Err(wait) => go_on(draft, strays(world, Some(number)), wait),
                };
            }
            None => {}
        }
    }
    match pod {
        None if pod_was_seen || session.is_some() => {
            let message = "the builder's pod is gone: it was deleted, or its node was".into();
            failed(world, draft, Failure::infrastructure(Reason::BuilderLost, message), now)
        }
        None => {
            let mut actions = strays(world, Some(number));
            actions.push(Action::CreatePod { attempt: number, memory: None });
            go_on(draft, actions, PATIENCE)
        }
        Some(pod) => match word(pod, now) {
            Ok(Some(failure)) => failed(world, draft, failure, now),
            Ok(None) => wait_for(world, draft, pod, session, now),
            Err(wait) => go_on(draft, strays(world, Some(number)), wait),
        },
    }
}

/// Who is to blame for a session that failed; or how long the pod may still take to say so.
fn blame(
    said: Failure,
    pod: Option<&PodView>,
    end_time: Option<Timestamp>,
    now: Timestamp,
) -> Result<Failure, Duration> {
    // What a session knows for certain stands; a connection that broke is only what the pod's end looks like from here.
    let vague =
        matches!(said.reason, Reason::ConnectionLost | Reason::BuilderLost | Reason::InfrastructureFailure);
    let Some(pod) = pod.filter(|_| vague) else { return Ok(said) };
    if let Some(failure) = word(pod, now)? {
        return Ok(failure);
    }
    let since = end_time.and_then(|end| Duration::try_from(now.duration_since(end)).ok());
    match POD_LAG.saturating_sub(since.unwrap_or(POD_LAG)) {
        left if left.is_zero() || said.reason != Reason::ConnectionLost => Ok(said),
        left => Err(left),
    }
}

/// The pod lives: start a session as soon as it has a node, and say what is waited for.
fn wait_for(
    world: &World,
    mut draft: Draft,
    pod: &PodView,
    session: Option<&SessionView>,
    now: Timestamp,
) -> Plan {
    let mut actions = strays(world, Some(pod.attempt));
    if let Some(session) = session {
        let (reason, message) = match (&pod.waiting, session.stage) {
            (Some((why, message)), Stage::Connecting) if why.contains("Image") => {
                (Reason::ImagePull, format!("{why}: {message}"))
            }
            (Some((why, message)), Stage::Connecting) if why != "ContainerCreating" => {
                (Reason::StartingBuilder, format!("{why}: {message}"))
            }
            (_, Stage::Connecting) => (Reason::StartingBuilder, String::new()),
            (_, Stage::Ready | Stage::CopyingInputs) => (Reason::CopyingInputs, String::new()),
            (_, Stage::InputsCopied | Stage::Building) => (Reason::Building, String::new()),
            (_, Stage::Built | Stage::Collecting) => (Reason::CollectingOutputs, String::new()),
        };
        draft.progress(Phase::Running, reason, &message);
        return go_on(draft, actions, PATIENCE);
    }
    if pod.node.is_some() {
        draft.progress(Phase::Running, Reason::StartingBuilder, "");
        actions.push(Action::StartSession {
            attempt: pod.attempt,
            namespace: pod.namespace.clone(),
            pod: pod.name.clone(),
            pod_uid: pod.uid.clone(),
        });
        return go_on(draft, actions, PATIENCE);
    }
    let age = Duration::try_from(now.duration_since(pod.created)).unwrap_or_default();
    if age < SCHEDULING_GRACE {
        // No word yet, and so nothing of what was noted above either: it comes with the next write.
        return Plan { status: None, actions, requeue: Requeue::After(SCHEDULING_GRACE - age) };
    }
    let message = pod.unschedulable.as_deref().unwrap_or("the scheduler has not found a node yet");
    draft.phase(conditions::SCHEDULED, Status::False, Reason::WaitingForNode, message);
    draft.progress(Phase::Pending, Reason::WaitingForNode, message);
    go_on(draft, actions, PATIENCE)
}

/// Ends the attempt; the request as well if its budget is used up.
fn failed(world: &World, mut draft: Draft, failure: Failure, now: Timestamp) -> Plan {
    let Failure { reason, message, infrastructure } = failure;
    let log_tail = super::tail(world);
    draft.end_attempt(reason, &message, infrastructure);
    let (infrastructure_failures, build_failures) = draft.failures();
    let budget = world.request.spec.retries;
    let again = match infrastructure {
        true => infrastructure_failures <= budget.infrastructure,
        // Only the build itself can come out otherwise; a hash or a missing input stays what it is.
        false => build_failures <= budget.build && is_worth_another(reason),
    };
    if !again {
        let message = match infrastructure {
            true => {
                format!("{message} (attempt {infrastructure_failures} that failed so; no retries are left)")
            }
            false => message,
        };
        draft.fail(reason, &message, &log_tail);
        return end(world, draft);
    }
    let wait = backoff(&draft, now).unwrap_or_default();
    draft.progress(Phase::Pending, Reason::Retrying, &format!("{reason}: {message}"));
    go_on(draft, super::clean_up(world), wait)
}

fn is_worth_another(reason: Reason) -> bool {
    matches!(reason, Reason::BuildFailed | Reason::TimedOut | Reason::MaxSilentExceeded)
}

fn note_pod(draft: &mut Draft, pod: &PodView) {
    draft.pod(pod);
    if let Some(node) = &pod.node {
        draft.phase(conditions::SCHEDULED, Status::True, Reason::Scheduled, &format!("on node {node}"));
    }
}

fn note_session(draft: &mut Draft, session: &SessionView) {
    let reached = [
        (Stage::Ready, conditions::BUILDER_READY, Reason::BuilderReady),
        (Stage::InputsCopied, conditions::INPUTS_COPIED, Reason::InputsCopied),
        (Stage::Built, conditions::BUILT, Reason::Built),
    ];
    for (stage, condition, reason) in reached {
        if session.stage >= stage {
            draft.phase(condition, Status::True, reason, "");
        }
    }
    if let (Some(builder), Some(sandbox)) = (&mut draft.status.builder, &session.sandbox) {
        builder.sandbox = Some(sandbox.clone());
    }
}
