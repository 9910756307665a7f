//! One attempt, from its pod to its end. Pure.
//!
//! A connection that breaks does not end it: while the pod lives, its builder goes on, and another session finds the build
//! again. What ends it is the pod's end, a verdict of the builder's, or time that has run out.

use std::time::Duration;

use drover_api::conditions::{self, Status};
use drover_api::{Phase, Reason, format_duration};
use jiff::Timestamp;

use super::accept::Refusal;
use super::blame::{Failure, POD_LAG, word};
use super::{Accepted, Action, Plan, Requeue, clean_up, end, go_on, refused, retry, unusable};
use crate::status::Draft;
use crate::world::{PodRefusal, PodView, RefusalKind, SessionEnd, SessionView, Stage, World};

/// A running attempt is looked at again after this long even if nothing happened.
const PATIENCE: Duration = Duration::from_secs(60);
/// A pod finds its node in milliseconds, and the API server refuses one at once. Only what takes longer is worth a write that
/// says so.
pub(super) const SCHEDULING_GRACE: Duration = Duration::from_secs(2);
/// Wait before a pod that a quota refuses is tried again, first and longest.
const FIRST_QUOTA_WAIT: Duration = Duration::from_secs(2);
const LONGEST_QUOTA_WAIT: Duration = Duration::from_secs(60);
/// A builder that runs answers within this, however late the operator comes.
const ANSWER_GRACE: Duration = Duration::from_secs(60);
/// How far behind its deadline a pod may be before the operator does what its kubelet should have done.
const OVERDUE: Duration = Duration::from_secs(600);
/// How often in one attempt a connection may break that stood, and the wait before the next, first and longest.
const MAX_RECONNECTS: u32 = 20;
const FIRST_PAUSE: Duration = Duration::from_secs(2);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

const NO_TURN: &str =
    "the operator talks with as many builders as it may (--max-sessions); this one waits for its turn";
const POD_GONE: &str = "the builder's pod is gone: it was deleted, or its node was";

/// Leads the open attempt one step on.
pub(super) fn lead(
    world: &World,
    mut draft: Draft,
    accepted: Result<Accepted<'_>, Refusal>,
    now: Timestamp,
) -> Plan {
    let Some((number, pod_was_seen)) =
        draft.open_attempt().map(|attempt| (attempt.number, attempt.pod.is_some()))
    else {
        return go_on(draft, vec![], PATIENCE);
    };
    let pod = world.pod_of(number);
    if let Some(pod) = pod {
        note_pod(&mut draft, pod);
    }
    let session = world.session_of(number).filter(|session| pod.is_none_or(|pod| pod.uid == session.pod_uid));
    if let Some(session) = session {
        note_session(&mut draft, session);
        match &session.end {
            Some(SessionEnd::Finished { outputs, transfer, timings }) => {
                draft.status.transfer = Some(*transfer);
                draft.status.timings = Some(*timings);
                draft.succeed(Reason::Built, outputs.clone());
                return end(world, draft, now);
            }
            Some(SessionEnd::Failed { reason, message, infrastructure }) => {
                let said =
                    Failure { reason: *reason, message: message.clone(), infrastructure: *infrastructure };
                return match blame(said, pod, session.end_time, now) {
                    Err(wait) => go_on(draft, clean_up(world, Some(number)), wait),
                    Ok(failure) => match pod.filter(|pod| may_go_on(&failure, pod, session, now)) {
                        Some(pod) => go_on_with(world, draft, accepted, (pod, session), failure, now),
                        None => {
                            if let Some((transfer, timings)) = session.counted {
                                draft.status.transfer = Some(transfer);
                                draft.status.timings = Some(timings);
                            }
                            failed(world, draft, failure, now)
                        }
                    },
                };
            }
            None => {}
        }
    }
    match pod {
        None if pod_was_seen || session.is_some() => {
            failed(world, draft, Failure::infrastructure(Reason::BuilderLost, POD_GONE.into()), now)
        }
        None => make_pod(world, draft, accepted, now),
        Some(pod) => match word(pod, now) {
            Ok(Some(failure)) => failed(world, draft, failure, now),
            Ok(None) => wait_for(world, draft, accepted, pod, session, now),
            Err(wait) => go_on(draft, clean_up(world, Some(number)), wait),
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
    if !vague {
        return Ok(said);
    }
    let Some(pod) = pod else {
        return Ok(Failure::infrastructure(Reason::BuilderLost, format!("{POD_GONE} ({})", said.message)));
    };
    if let Some(failure) = word(pod, now)? {
        return Ok(failure);
    }
    if said.reason == Reason::InfrastructureFailure {
        return Ok(said);
    }
    match end_time.and_then(|end| retry::left(end, POD_LAG, now)) {
        Some(left) => Err(left.min(POD_LAG)),
        None => Ok(said),
    }
}

/// Whether another session with the same pod can find what this one has lost: the build that goes on, or its result.
fn may_go_on(failure: &Failure, pod: &PodView, session: &SessionView, now: Timestamp) -> bool {
    let lives = !pod.deleting && matches!(word(pod, now), Ok(None));
    lives
        && match failure.reason {
            Reason::ConnectionLost => true,
            // A cache is to blame that the next session does not ask any more: another one has what it gave wrong.
            Reason::InputHashMismatch => failure.infrastructure,
            // The build is over and well; what failed is on this side of it.
            Reason::InfrastructureFailure => session.stage >= Stage::Built,
            _ => false,
        }
}

/// A session has ended and its pod lives: another one, unless that has been tried for too long.
fn go_on_with(
    world: &World,
    mut draft: Draft,
    accepted: Result<Accepted<'_>, Refusal>,
    (pod, session): (&PodView, &SessionView),
    failure: Failure,
    now: Timestamp,
) -> Plan {
    let message = &failure.message;
    let times = draft.open_attempt().map_or(0, |attempt| attempt.reconnects);
    let pause = FIRST_PAUSE.saturating_mul(2u32.saturating_pow(times)).min(LONGEST_PAUSE);
    if let Some(left) = session.end_time.and_then(|end| retry::left(end, pause, now)) {
        return go_on(draft, clean_up(world, Some(pod.attempt)), left.min(LONGEST_PAUSE));
    }
    if session.stage >= Stage::Ready {
        let times = draft.open_attempt_mut().map_or(0, |attempt| {
            attempt.reconnects = attempt.reconnects.saturating_add(1);
            attempt.reconnects
        });
        if times > MAX_RECONNECTS {
            let message = format!("{message} (this was session {times} of the attempt)");
            return failed(world, draft, Failure { message, ..failure }, now);
        }
    }
    if has_answered(&draft) {
        draft.phase(conditions::BUILDER_READY, Status::Unknown, Reason::ConnectionLost, message);
        if let Some(failure) = lost_for_good(world, &draft, now) {
            return failed(world, draft, failure, now);
        }
        let message = format!("the session with pod {} ended, and another one begins: {message}", pod.name);
        draft.progress(Phase::Running, Reason::Connecting, &message);
    } else if retry::left(pod.scheduled.unwrap_or(pod.created), world.timeouts.start, now).is_none() {
        let failure = start_timed_out(world, pod, Some(message));
        return failed(world, draft, failure, now);
    }
    if let Err(refusal) = accepted {
        return refused(world, draft, refusal, now);
    }
    let mut actions = clean_up(world, Some(pod.attempt));
    actions.push(Action::StopSession);
    actions.push(start_session(pod));
    go_on(draft, actions, PATIENCE)
}

/// The attempt has no pod, and never had one that was seen.
fn make_pod(
    world: &World,
    mut draft: Draft,
    accepted: Result<Accepted<'_>, Refusal>,
    now: Timestamp,
) -> Plan {
    let Some(attempt) = draft.open_attempt().cloned() else { return go_on(draft, vec![], PATIENCE) };
    let mut actions = clean_up(world, Some(attempt.number));
    if let Err(refusal) = accepted {
        return refused(world, draft, refusal, now);
    }
    if let Some(PodRefusal { kind, message, at, .. }) =
        world.refusal.as_ref().filter(|refusal| refusal.attempt == attempt.number)
    {
        let began = attempt.start_time.map_or(*at, |time| time.0);
        // What counts is the last try: the request may have been suspended since.
        let patience = retry::left(began, world.timeouts.scheduling, *at);
        if *kind == RefusalKind::Invalid || patience.is_none() {
            let message = format!("the API server makes no such pod: {message}");
            let failure = Failure { reason: Reason::Unplaceable, message, infrastructure: false };
            return failed(world, draft, failure, now);
        }
        if world.request.spec.suspend == Some(true) {
            draft.progress(Phase::Pending, Reason::Suspended, "spec.suspend is true");
            return go_on(draft, actions, PATIENCE);
        }
        draft.phase(conditions::SCHEDULED, Status::False, Reason::WaitingForQuota, message);
        draft.progress(Phase::Pending, Reason::WaitingForQuota, message);
        let tried = Duration::try_from(at.duration_since(began)).unwrap_or_default();
        let wait = (tried / 2).clamp(FIRST_QUOTA_WAIT, LONGEST_QUOTA_WAIT);
        if let Some(wait) = retry::left(*at, retry::spread(world, 0, wait), now) {
            return go_on(draft, actions, wait.min(LONGEST_QUOTA_WAIT));
        }
    }
    actions.push(Action::CreatePod { attempt: attempt.number, memory: attempt.memory });
    go_on(draft, actions, SCHEDULING_GRACE)
}

/// The pod lives: start a session as soon as it has a node, and say what is waited for.
fn wait_for(
    world: &World,
    mut draft: Draft,
    accepted: Result<Accepted<'_>, Refusal>,
    pod: &PodView,
    session: Option<&SessionView>,
    now: Timestamp,
) -> Plan {
    let mut actions = clean_up(world, Some(pod.attempt));
    if let Some(failure) = out_of_time(world, &draft, pod, session, now) {
        return failed(world, draft, failure, now);
    }
    if pod.node.is_some() {
        let obstacle = world.obstacle.as_ref().filter(|_| session.is_none());
        if let (Some(why), Ok(accepted)) = (obstacle, &accepted) {
            let message = unusable(accepted, why);
            draft.progress(Phase::Running, Reason::WaitingForClass, &message);
        } else if let Some((reason, message)) = doing(&draft, pod, session) {
            draft.progress(Phase::Running, reason, &message);
        }
        if session.is_none() {
            if let Err(refusal) = accepted {
                return refused(world, draft, refusal, now);
            }
            actions.push(start_session(pod));
        }
        return go_on(draft, actions, PATIENCE);
    }
    // The API server's clock may be ahead of this one, which is no reason to say nothing.
    let age = now.duration_since(pod.created).unsigned_abs();
    if age < SCHEDULING_GRACE {
        // No word yet, and so nothing of what was noted above either: it comes with the next write.
        return Plan { status: None, actions, requeue: Requeue::After(SCHEDULING_GRACE - age) };
    }
    let message = pod.unschedulable.as_deref().unwrap_or("the scheduler has not found a node yet");
    draft.phase(conditions::SCHEDULED, Status::False, Reason::WaitingForNode, message);
    draft.progress(Phase::Pending, Reason::WaitingForNode, message);
    go_on(draft, actions, PATIENCE)
}

/// What a pod that has a node is about; None where the status says it already.
fn doing(draft: &Draft, pod: &PodView, session: Option<&SessionView>) -> Option<(Reason, String)> {
    let reached = |condition| conditions::is_true(&draft.status.conditions, condition);
    // A builder that is found again has done already what its new session comes to.
    let stage = session.map_or(Stage::Connecting, |session| session.stage);
    let stage = match stage {
        Stage::Connecting if has_answered(draft) => return None,
        Stage::Connecting if session.is_some_and(|session| session.waits) => {
            return Some((Reason::StartingBuilder, NO_TURN.into()));
        }
        stage if stage >= Stage::Ready && reached(conditions::BUILT) => stage.max(Stage::Built),
        stage if stage >= Stage::Ready && reached(conditions::INPUTS_COPIED) => {
            stage.max(Stage::InputsCopied)
        }
        stage => stage,
    };
    let said = match stage {
        Stage::Connecting => match &pod.waiting {
            Some((why, message)) if why.contains("Image") => {
                // The kubelet takes turns with two words for it; the first one is enough.
                let known = draft.said().filter(|(reason, _)| *reason == Reason::ImagePull.as_str());
                let message =
                    known.map_or_else(|| format!("{why}: {message}"), |(_, known)| known.to_owned());
                (Reason::ImagePull, message)
            }
            Some((why, message)) if why != "ContainerCreating" => {
                (Reason::StartingBuilder, format!("{why}: {message}"))
            }
            _ => (Reason::StartingBuilder, String::new()),
        },
        Stage::Ready | Stage::CopyingInputs => (Reason::CopyingInputs, String::new()),
        Stage::InputsCopied | Stage::Building => (Reason::Building, String::new()),
        Stage::Built | Stage::Collecting => (Reason::CollectingOutputs, String::new()),
    };
    Some(said)
}

/// Which of the phases' times has run out, if one has.
fn out_of_time(
    world: &World,
    draft: &Draft,
    pod: &PodView,
    session: Option<&SessionView>,
    now: Timestamp,
) -> Option<Failure> {
    let timeouts = &world.timeouts;
    let over = |since, wait| retry::left(since, wait, now).is_none();
    if pod.node.is_none() {
        let why = pod.unschedulable.as_deref().unwrap_or("the scheduler says nothing");
        let message = format!("no node has taken the pod in {}: {why}", format_duration(timeouts.scheduling));
        return over(pod.created, timeouts.scheduling).then_some(Failure {
            reason: Reason::Unplaceable,
            message,
            infrastructure: false,
        });
    }
    let scheduled = pod.scheduled.unwrap_or(pod.created);
    if let Some(deadline) = pod.deadline
        && over(scheduled, deadline.saturating_add(OVERDUE))
    {
        let message =
            format!("the pod was to end after {}, and its node has not ended it", format_duration(deadline));
        return Some(Failure { reason: Reason::TimedOut, message, infrastructure: false });
    }
    // One that waits for its turn has not asked the builder anything.
    let session = session.filter(|session| session.stage == Stage::Connecting && !session.waits)?;
    if has_answered(draft) {
        return lost_for_good(world, draft, now);
    }
    (over(scheduled, timeouts.start) && over(session.started, ANSWER_GRACE))
        .then(|| start_timed_out(world, pod, None))
}

fn start_timed_out(world: &World, pod: &PodView, said: Option<&str>) -> Failure {
    let limit = format_duration(world.timeouts.start);
    let mut message = format!("the builder in pod {} did not answer within {limit}", pod.name);
    if let Some((why, what)) = &pod.waiting {
        message.push_str(&format!("; {why}: {what}"));
    } else if let Some(said) = said {
        message.push_str(&format!("; {said}"));
    }
    Failure::infrastructure(Reason::StartTimedOut, message)
}

/// Whether the attempt's builder has answered, be it lost again.
fn has_answered(draft: &Draft) -> bool {
    let ready = conditions::find(&draft.status.conditions, conditions::BUILDER_READY);
    ready.is_some_and(|ready| ready.status == Status::True.as_str() || is_lost(&ready.reason))
}

fn is_lost(reason: &str) -> bool {
    reason == Reason::ConnectionLost.as_str()
}

/// The failure of a builder that has not been reached for longer than it would linger.
fn lost_for_good(world: &World, draft: &Draft, now: Timestamp) -> Option<Failure> {
    let linger = world.timeouts.linger;
    let ready = conditions::find(&draft.status.conditions, conditions::BUILDER_READY)?;
    let is_over = is_lost(&ready.reason) && retry::left(ready.last_transition_time.0, linger, now).is_none();
    let message =
        format!("the builder was not reached again within {}: {}", format_duration(linger), ready.message);
    is_over.then(|| Failure::infrastructure(Reason::ConnectionLost, message))
}

/// Ends the attempt; the request as well if its budget is used up.
fn failed(world: &World, mut draft: Draft, failure: Failure, now: Timestamp) -> Plan {
    let log_tail = super::tail(world);
    draft.end_attempt(failure.reason, &failure.message, failure.infrastructure);
    match retry::again(world, &draft, &failure) {
        Ok(pause) => {
            let Failure { reason, message, .. } = failure;
            let number = draft.status.attempt.unwrap_or_default();
            let message = format!(
                "attempt {number} failed, the next begins in {}: {reason}: {message}",
                format_duration(pause)
            );
            draft.progress(Phase::Pending, Reason::Retrying, &message);
            go_on(draft, clean_up(world, None), pause)
        }
        Err(message) => {
            draft.fail(failure.reason, &message, &log_tail);
            end(world, draft, now)
        }
    }
}

fn start_session(pod: &PodView) -> Action {
    Action::StartSession {
        attempt: pod.attempt,
        namespace: pod.namespace.clone(),
        pod: pod.name.clone(),
        pod_uid: pod.uid.clone(),
    }
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
    if let Some(builder) = &mut draft.status.builder {
        builder.sandbox = session.sandbox.clone().or_else(|| builder.sandbox.take());
        builder.host_key = session.host_key.clone().or_else(|| builder.host_key.take());
    }
}
