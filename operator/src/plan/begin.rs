//! Before an attempt: what is there already, what it waits for, and whose turn it is. Pure.
//!
//! A request that waits forgets what its caches said, so that whatever wakes it asks them again; the queue wakes it when
//! another request ends that it waits for, and it looks by itself now and then.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use drover_api::conditions::{self, Status};
use drover_api::{Phase, Reason};
use drover_nix::StoreDir;
use jiff::Timestamp;

use super::{Accepted, Action, Plan, Requeue, clean_up, end, go_on, hold_back, retry, unusable};
use crate::status::Draft;
use crate::world::{Lookup, Other, OtherState, SameFailed, Slot, World};

/// A request that waits for others looks at its caches after this long at least; the longer it has waited, the later, since
/// there may be thousands of them.
const SHORTEST_LOOK: Duration = Duration::from_secs(10);
const LONGEST_LOOK: Duration = Duration::from_secs(300);

/// Why an attempt does not begin now.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Hold {
    reason: Reason,
    message: String,
    /// Until when it is worth waiting, at most; None: as long as it takes.
    within: Option<Duration>,
}

/// Begins the next attempt, or says what it waits for, or that there is none.
pub(super) fn begin(world: &World, mut draft: Draft, accepted: &Accepted<'_>, now: Timestamp) -> Plan {
    let number = draft.status.attempt.unwrap_or(0) + 1;
    let absent = match &world.lookup {
        Lookup::Unknown => {
            let mut actions = clean_up(world, None);
            actions.push(Action::LookUp { attempt: number });
            let requeue = if world.live && !is_coming(world) { Requeue::Live } else { Requeue::Now };
            return Plan { status: None, actions, requeue };
        }
        Lookup::Unusable { why } => {
            let message = unusable(accepted, why);
            let reason = Reason::WaitingForClass;
            draft.phase(conditions::ACCEPTED, Status::Unknown, reason, &message);
            return wait(world, draft, Hold { reason, message, within: None }, now);
        }
        Lookup::Refused { reason, message } => {
            note_accepted(&mut draft, accepted);
            draft.fail(*reason, message, &[]);
            return end(world, draft, now);
        }
        Lookup::Present(outputs) => {
            note_accepted(&mut draft, accepted);
            draft.succeed(Reason::AlreadyBuilt, outputs.clone());
            return end(world, draft, now);
        }
        Lookup::Missing { absent } => absent,
    };
    note_accepted(&mut draft, accepted);
    if let Some(hold) = inputs(world, absent, now).or_else(|| same_failed(world)) {
        if hold.reason.is_terminal() {
            draft.fail(hold.reason, &hold.message, &[]);
            return end(world, draft, now);
        }
        return wait(world, draft, hold, now);
    }
    let (reason, message) = match &world.slot {
        Slot::Unasked => {
            let mut actions = clean_up(world, None);
            actions.push(Action::AskForSlot { attempt: number });
            return Plan { status: None, actions, requeue: Requeue::Now };
        }
        Slot::Granted => {
            let memory = retry::memory(world, &draft);
            draft.begin_attempt(number, memory.clone());
            draft.progress(Phase::Running, Reason::Accepted, "");
            let mut actions = clean_up(world, Some(number));
            actions.push(Action::CreatePod { attempt: number, memory });
            return go_on(draft, actions, super::attempt::SCHEDULING_GRACE);
        }
        Slot::WaitForSame { request } => {
            (Reason::WaitingForSameBuild, format!("request {request} is building the same derivation"))
        }
        Slot::WaitForConcurrency { message } => (Reason::WaitingForConcurrency, message.clone()),
    };
    wait(world, draft, Hold { reason, message, within: None }, now)
}

/// An input is on its way and nothing else is wrong with others. An answer that says of it that it is absent may be old in the
/// next moment: no verdict is to be built on that one.
fn is_coming(world: &World) -> bool {
    let states = || world.others.producers.values().map(|other| &other.state);
    let has_failed = states().any(|state| matches!(state, OtherState::Failed { .. }));
    world.others.cycle.is_empty() && !has_failed && states().any(|state| *state == OtherState::Going)
}

/// What is known once the request has a class.
fn note_accepted(draft: &mut Draft, accepted: &Accepted<'_>) {
    draft.status.class = Some(accepted.class_name.to_owned());
    draft.status.drv_path = Some(StoreDir::default().full(&accepted.drv_path));
    draft.phase(conditions::ACCEPTED, Status::True, Reason::Accepted, "");
}

fn wait(world: &World, mut draft: Draft, hold: Hold, now: Timestamp) -> Plan {
    draft.progress(Phase::Pending, hold.reason, &hold.message);
    let look = look(world, now).min(hold.within.unwrap_or(Duration::MAX));
    // Leave to begin is for those who can.
    let mut actions = hold_back(world);
    actions.push(Action::ForgetLookUp);
    go_on(draft, actions, look)
}

/// What of the inputs that no cache has holds the attempt back.
fn inputs(world: &World, absent: &BTreeSet<String>, now: Timestamp) -> Option<Hold> {
    let never = |reason, message| Some(Hold { reason, message, within: None });
    let others = &world.others;
    let makers: BTreeMap<&str, Option<&Other>> =
        absent.iter().map(|path| (path.as_str(), others.producers.get(path))).collect();
    if is_in_cycle(&others.cycle, &makers) {
        let (first, rest) = others.cycle.split_first()?;
        let chain = [rest, std::slice::from_ref(first)].concat().join(", which waits for ");
        return never(Reason::DependencyCycle, format!("{first} waits for {chain}"));
    }
    for (path, maker) in &makers {
        if let Some(Other { request, state: OtherState::Failed { reason, message } }) = maker {
            let message =
                format!("input {path} is what request {request} builds, which failed: {reason}: {message}");
            return never(Reason::DependencyFailed, message);
        }
    }
    let is_going = |maker: &Option<&Other>| maker.is_some_and(|other| other.state == OtherState::Going);
    let mut going = makers.iter().filter(|(_, maker)| is_going(maker));
    if let Some((path, Some(Other { request, .. }))) = going.next() {
        let more = going.count();
        let more = if more == 0 { String::new() } else { format!(", and {more} more inputs for others") };
        let message = format!("input {path} is what request {request} builds{more}");
        return Some(Hold { reason: Reason::WaitingForInput, message, within: None });
    }
    // Nobody is there who would build it; whoever applies many requests at once may not have come to that one yet.
    let path = absent.first()?;
    if let Some(request) = &others.unread {
        let message = format!(
            "input {path} is in none of the class's caches, and what request {request} builds is not known yet"
        );
        return Some(Hold { reason: Reason::WaitingForInput, message, within: None });
    }
    match world.timeouts.input_grace.saturating_sub(age(world, now)) {
        left if left.is_zero() => {
            let message = format!("input {path} is in none of the class's caches, and no request builds it");
            never(Reason::InputMissing, message)
        }
        left => {
            let message =
                format!("input {path} is in none of the class's caches, and no request builds it yet");
            Some(Hold { reason: Reason::WaitingForInput, message, within: Some(left) })
        }
    }
}

/// Whether the cycle begins with something that is waited for in fact: what caches have, nobody waits for.
fn is_in_cycle(cycle: &[String], makers: &BTreeMap<&str, Option<&Other>>) -> bool {
    match cycle {
        [] => false,
        [_] => !makers.is_empty(),
        [_, next, ..] => makers.values().flatten().any(|other| other.request == *next),
    }
}

fn same_failed(world: &World) -> Option<Hold> {
    let SameFailed { request, reason, message } = world.others.same_failed.as_ref()?;
    let message = format!("request {request} for the same derivation failed: {message}");
    Some(Hold { reason: *reason, message, within: None })
}

/// When a request that waits looks again.
pub(super) fn look(world: &World, now: Timestamp) -> Duration {
    retry::spread(world, 0, (age(world, now) / 10).clamp(SHORTEST_LOOK, LONGEST_LOOK))
}

/// How long ago the request was made.
pub(super) fn age(world: &World, now: Timestamp) -> Duration {
    let created = world.request.metadata.creation_timestamp.as_ref().map(|time| time.0);
    created.and_then(|created| Duration::try_from(now.duration_since(created)).ok()).unwrap_or_default()
}
