//! What a Lease says, and what follows from it. Pure: no clock, no client.
//!
//! The times in a Lease are another machine's wall clock and are never compared with ours. What counts is how long *this*
//! process has seen the record unchanged, by its own monotonic clock; a holder that is alive changes it all the time.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use tokio::time::Instant;

/// A Lease as it was read, and since when it has been seen like that.
#[derive(Clone, Debug)]
pub struct Sighting {
    pub lease: Lease,
    /// When the answer came that showed it so first. It was written before that.
    pub since: Instant,
}

/// What to do about a Lease that was seen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Nobody holds it, or its holder has not been heard of for as long as it asked for: write it.
    Take,
    /// It is this process's: an answer that never came would have said so.
    Ours,
    /// Somebody else holds it, and may for this long without another word.
    Wait(Duration),
}

impl Sighting {
    /// The newest look at the Lease, given the one before: a record that has not changed keeps its age.
    pub fn next(before: Option<Self>, lease: Lease, now: Instant) -> Self {
        let since = before
            .filter(|before| {
                before.lease.spec == lease.spec && before.lease.metadata.uid == lease.metadata.uid
            })
            .map_or(now, |before| before.since);
        Self { lease, since }
    }

    /// What `me` should do. `duration` is for records that do not say how long they are good for.
    pub fn step(&self, me: &str, duration: Duration, now: Instant) -> Step {
        let Some(holder) = self.holder() else { return Step::Take };
        if holder == me {
            return Step::Ours;
        }
        let seconds = self.spec().and_then(|spec| spec.lease_duration_seconds);
        let duration =
            seconds.and_then(|seconds| u64::try_from(seconds).ok()).map_or(duration, Duration::from_secs);
        match duration.saturating_sub(now.saturating_duration_since(self.since)) {
            left if left.is_zero() => Step::Take,
            left => Step::Wait(left),
        }
    }

    /// Who holds it; None also for an empty name, which is how some programs give a Lease back.
    pub fn holder(&self) -> Option<&str> {
        self.spec()?.holder_identity.as_deref().filter(|holder| !holder.is_empty())
    }

    fn spec(&self) -> Option<&LeaseSpec> {
        self.lease.spec.as_ref()
    }
}

/// The first Lease of this name, held by `me`.
pub fn first(name: &str, me: &str, duration: Duration, now: Timestamp) -> Lease {
    let metadata = ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() };
    taken(&Lease { metadata, spec: None }, me, duration, now)
}

/// The Lease with `me` as its new holder. It keeps its resourceVersion: written over nothing else than what was read.
pub fn taken(lease: &Lease, me: &str, duration: Duration, now: Timestamp) -> Lease {
    let before = lease.spec.as_ref();
    let transitions =
        before.and_then(|spec| spec.lease_transitions).map_or(0, |count| count.saturating_add(1));
    let spec = LeaseSpec {
        holder_identity: Some(me.to_owned()),
        lease_duration_seconds: Some(seconds(duration)),
        acquire_time: Some(MicroTime(now)),
        renew_time: Some(MicroTime(now)),
        lease_transitions: Some(transitions),
        ..LeaseSpec::default()
    };
    with(lease, spec)
}

/// The Lease held for another while.
pub fn renewed(lease: &Lease, duration: Duration, now: Timestamp) -> Lease {
    let spec = LeaseSpec {
        lease_duration_seconds: Some(seconds(duration)),
        renew_time: Some(MicroTime(now)),
        ..lease.spec.clone().unwrap_or_default()
    };
    with(lease, spec)
}

/// The Lease given back: whoever sees it may take it at once.
pub fn released(lease: &Lease, now: Timestamp) -> Lease {
    let spec = LeaseSpec {
        holder_identity: None,
        acquire_time: None,
        renew_time: Some(MicroTime(now)),
        ..lease.spec.clone().unwrap_or_default()
    };
    with(lease, spec)
}

fn with(lease: &Lease, spec: LeaseSpec) -> Lease {
    let mut metadata = lease.metadata.clone();
    // What a client sends of them has to be what the server has, or nothing.
    metadata.managed_fields = None;
    Lease { metadata, spec: Some(spec) }
}

/// At least one: the API server takes no other (Kubernetes: pkg/apis/coordination/validation).
fn seconds(duration: Duration) -> i32 {
    i32::try_from(duration.as_secs()).unwrap_or(i32::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: &str = "drover-1";
    const OTHER: &str = "drover-2";
    const FIFTEEN: Duration = Duration::from_secs(15);

    #[test]
    fn only_our_own_clock_says_when_a_holder_is_gone() {
        let start = Instant::now();
        // Its wall clock may be years behind or ahead of ours.
        for wall in [Timestamp::MIN, Timestamp::UNIX_EPOCH, Timestamp::MAX] {
            let lease = first("drover", OTHER, FIFTEEN, wall);
            let seen = Sighting::next(None, lease.clone(), start);
            assert_eq!(seen.step(ME, FIFTEEN, start), Step::Wait(FIFTEEN));
            let later = start + Duration::from_secs(14);
            let seen = Sighting::next(Some(seen), lease, later);
            assert_eq!(seen.step(ME, FIFTEEN, later), Step::Wait(Duration::from_secs(1)));
            let seen = Sighting::next(Some(seen.clone()), seen.lease, start + FIFTEEN);
            assert_eq!(seen.step(ME, FIFTEEN, start + FIFTEEN), Step::Take);
        }
    }

    #[test]
    fn a_renewal_or_a_new_holder_starts_the_wait_anew() {
        let start = Instant::now();
        let lease = first("drover", OTHER, FIFTEEN, Timestamp::UNIX_EPOCH);
        let seen = Sighting::next(None, lease.clone(), start);
        let later = start + Duration::from_secs(14);
        let renewal = renewed(&lease, FIFTEEN, Timestamp::MAX);
        let seen = Sighting::next(Some(seen), renewal.clone(), later);
        assert_eq!(seen.step(ME, FIFTEEN, later), Step::Wait(FIFTEEN));
        // Deleted and made again with the same words.
        let mut again = renewal;
        again.metadata.uid = Some("2".into());
        let seen = Sighting::next(Some(seen), again, later + FIFTEEN);
        assert_eq!(seen.step(ME, FIFTEEN, later + FIFTEEN), Step::Wait(FIFTEEN));
    }

    #[test]
    fn the_holder_says_how_long_it_is_good_for() {
        let now = Instant::now();
        let minute = Duration::from_secs(60);
        let seen = Sighting::next(None, first("drover", OTHER, minute, Timestamp::UNIX_EPOCH), now);
        assert_eq!(seen.step(ME, FIFTEEN, now), Step::Wait(minute));
        for unsaid in [None, Some(-1)] {
            let mut silent = seen.clone();
            if let Some(spec) = &mut silent.lease.spec {
                spec.lease_duration_seconds = unsaid;
            }
            assert_eq!(silent.step(ME, FIFTEEN, now), Step::Wait(FIFTEEN));
        }
    }

    #[test]
    fn what_nobody_holds_can_be_taken() {
        let now = Instant::now();
        let mine = first("drover", ME, FIFTEEN, Timestamp::UNIX_EPOCH);
        assert_eq!(Sighting::next(None, mine.clone(), now).step(ME, FIFTEEN, now), Step::Ours);
        let free = released(&mine, Timestamp::UNIX_EPOCH);
        assert_eq!(Sighting::next(None, free.clone(), now).step(OTHER, FIFTEEN, now), Step::Take);
        let mut nameless = mine;
        if let Some(spec) = &mut nameless.spec {
            spec.holder_identity = Some(String::new());
        }
        assert_eq!(Sighting::next(None, nameless, now).step(OTHER, FIFTEEN, now), Step::Take);
        assert_eq!(Sighting::next(None, Lease::default(), now).step(OTHER, FIFTEEN, now), Step::Take);

        let next = taken(&free, OTHER, FIFTEEN, Timestamp::UNIX_EPOCH);
        assert_eq!(next.spec.and_then(|spec| spec.lease_transitions), Some(1));
    }
}
