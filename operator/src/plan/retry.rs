//! Whether there is another attempt, when, and with how much memory. Pure.

use std::time::Duration;

use drover_api::{Budget, BuilderClassSpec, Reason};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::blame::Failure;
use crate::pod;
use crate::quantity::nanos;
use crate::status::Draft;
use crate::world::{Class, World};

/// Wait before the second attempt; doubled for each further one.
const FIRST_BACKOFF: Duration = Duration::from_secs(2);
const LONGEST_BACKOFF: Duration = Duration::from_secs(300);
/// Units of `nanos` in one.
const UNIT: i128 = 1_000_000_000;

/// How long to wait until the next attempt may begin; None: now.
pub(super) fn backoff(world: &World, draft: &Draft, now: Timestamp) -> Option<Duration> {
    let last = draft.status.attempts.last()?.end_time.as_ref()?.0;
    if last > now {
        // An operator wrote that whose clock was ahead. How far, nobody knows, and it is not waited for.
        return None;
    }
    left(last, pause(world, draft.status.attempts.len()), now)
}

/// The wait after so many attempts.
fn pause(world: &World, attempts: usize) -> Duration {
    let doublings = u32::try_from(attempts.saturating_sub(1)).unwrap_or(u32::MAX);
    let wait = FIRST_BACKOFF.saturating_mul(2u32.saturating_pow(doublings)).min(LONGEST_BACKOFF);
    spread(world, attempts, wait)
}

/// Something between half of `wait` and all of it, which follows from the request's uid: what hits a thousand requests at
/// once, such as a node that goes, does not bring them back in the same second, and a plan that is made again says the same.
pub(super) fn spread(world: &World, salt: usize, wait: Duration) -> Duration {
    const PARTS: u64 = 1000;
    let uid = world.request.metadata.uid.as_deref().unwrap_or_default();
    // FNV-1a. The standard library's hashers may change between versions.
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    let hash = uid.as_bytes().iter().chain(&salt.to_le_bytes()).fold(0xcbf2_9ce4_8422_2325, step);
    // Below 2000: no loss in the conversion.
    let parts = PARTS + (hash >> 16) % (PARTS + 1);
    wait.saturating_mul(parts as u32) / (2 * PARTS as u32)
}

/// What of `wait` is left, counted from `since`; None if it is over.
pub(super) fn left(since: Timestamp, wait: Duration, now: Timestamp) -> Option<Duration> {
    let wait = SignedDuration::try_from(wait).unwrap_or(SignedDuration::MAX);
    let due = since.saturating_add(wait).unwrap_or(Timestamp::MAX);
    Duration::try_from(due.duration_since(now)).ok().filter(|left| !left.is_zero())
}

/// Whether there is another attempt after this failure, which the draft has recorded already: how long until then, or the
/// message of the end.
pub(super) fn again(world: &World, draft: &Draft, failure: &Failure) -> Result<Duration, String> {
    let (infrastructure, build) = draft.failures();
    let budget = world.request.spec.retries;
    let Failure { reason, message, .. } = failure;
    if !failure.infrastructure {
        let may = build <= budget.build && reason.budget() == Some(Budget::Build);
        return if may { Ok(pause(world, draft.status.attempts.len())) } else { Err(message.clone()) };
    }
    if infrastructure > budget.infrastructure {
        return Err(format!("{message} (attempt {infrastructure} that failed so; no retries are left)"));
    }
    if let (Reason::OutOfMemory, Class::Found { name, spec, .. }) = (*reason, &world.class) {
        more_memory(world, draft, name, spec).map_err(|why| format!("{message} ({why})"))?;
    }
    Ok(pause(world, draft.status.attempts.len()))
}

/// The memory of the attempt that comes next, if it is another amount than the request's or the class's.
pub(super) fn memory(world: &World, draft: &Draft) -> Option<Quantity> {
    let attempts = &draft.status.attempts;
    if let Some(raised) = attempts.iter().rev().find_map(|attempt| attempt.memory.clone()) {
        return Some(raised);
    }
    let out_of_memory = Some(Reason::OutOfMemory.as_str());
    match &world.class {
        Class::Found { name, spec, .. }
            if attempts.iter().any(|one| one.reason.as_deref() == out_of_memory) =>
        {
            more_memory(world, draft, name, spec).ok()
        }
        _ => None,
    }
}

/// Twice the memory of the attempts so far, within the class's maximum; or why there is no more.
fn more_memory(
    world: &World,
    draft: &Draft,
    class_name: &str,
    class: &BuilderClassSpec,
) -> Result<Quantity, String> {
    if let Some(raised) = draft.status.attempts.iter().rev().find_map(|attempt| attempt.memory.as_ref()) {
        return Err(format!("it had {} already, more than the attempt before", raised.0));
    }
    let had = memory_of(world, class);
    let unreadable = |quantity: &Quantity| format!("{:?} is no amount of memory", quantity.0);
    let amount = nanos(&had).ok_or_else(|| unreadable(&had))?;
    let mut more = amount.saturating_mul(2);
    if let Some(most) = class.resources.as_ref().and_then(|resources| resources.maximum.get("memory")) {
        more = more.min(nanos(most).ok_or_else(|| unreadable(most))?);
        if more <= amount {
            return Err(format!("BuilderClass {class_name} allows no more than {}", most.0));
        }
    }
    Ok(bytes(more / UNIT))
}

/// What an attempt gets by itself: the limit or, without one, what is set aside.
fn memory_of(world: &World, class: &BuilderClassSpec) -> Quantity {
    let resources = pod::resources(&world.request.spec, class);
    let given = resources.limits.get("memory").or_else(|| resources.requests.get("memory"));
    given.cloned().unwrap_or_else(|| Quantity(pod::DEFAULT_MEMORY.into()))
}

/// In the largest unit that divides it.
fn bytes(amount: i128) -> Quantity {
    let units = [(1 << 30, "Gi"), (1 << 20, "Mi"), (1 << 10, "Ki")];
    let unit = units.into_iter().find(|(size, _)| amount % size == 0);
    let (size, suffix) = unit.unwrap_or((1, ""));
    Quantity(format!("{}{suffix}", amount / size))
}
