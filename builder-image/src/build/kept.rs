//! How builds ended that someone may still ask for: a client whose connection broke asks again when it is back, and shall
//! get what it would have got. Each is kept for as long as a build may linger, with its log, and within limits.
//!
//! It is not known whether an answer that was sent has arrived. So every end is kept, not only those that nobody was
//! there to hear, and given to whoever asks for the very same, as often as it is asked for.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::shared::{Identity, Outputs, Shared};

/// Builds whose ends are kept, at most: each has up to 256 KiB of its log in memory.
const MAX_KEPT: usize = 32;
/// Bytes of their logs on the disk, at most.
const MAX_KEPT_LOGS: u64 = 256 << 20;

/// The oldest first.
#[derive(Default)]
pub(super) struct Kept {
    ends: VecDeque<End>,
}

struct End {
    outputs: Outputs,
    shared: Arc<Shared>,
    until: Instant,
}

impl Kept {
    /// Keeps a build's end. A later one of the same outputs takes its place, and the oldest go where there are too many.
    pub(super) fn keep(&mut self, outputs: Outputs, shared: Arc<Shared>, time: Duration, now: Instant) {
        self.expire(now);
        self.ends.retain(|end| end.outputs != outputs);
        // A time beyond what a clock can say is for ever.
        let until = now.checked_add(time).unwrap_or_else(|| now + Duration::from_secs(u32::MAX.into()));
        self.ends.push_back(End { outputs, shared, until });
        let logs = |ends: &VecDeque<End>| ends.iter().map(|end| end.shared.log().spooled()).sum::<u64>();
        while self.ends.len() > 1 && (self.ends.len() > MAX_KEPT || logs(&self.ends) > MAX_KEPT_LOGS) {
            self.ends.pop_front();
        }
    }

    /// The end of the same build.
    pub(super) fn find(
        &mut self,
        identity: &Identity,
        outputs: &Outputs,
        now: Instant,
    ) -> Option<Arc<Shared>> {
        self.expire(now);
        let same = |end: &&End| end.outputs == *outputs && end.shared.identity() == identity;
        self.ends.iter().find(same).map(|end| Arc::clone(&end.shared))
    }

    pub(super) fn forget(&mut self, shared: &Arc<Shared>) {
        self.ends.retain(|end| !Arc::ptr_eq(&end.shared, shared));
    }

    fn expire(&mut self, now: Instant) {
        self.ends.retain(|end| now < end.until);
    }
}

#[cfg(test)]
mod tests {
    use super::super::shared::testing::{identity, shared};
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn outputs(name: &str) -> Outputs {
        [name.to_owned()].into()
    }

    #[test]
    fn an_end_is_kept_for_its_time_and_for_the_very_same() {
        let (mut kept, now) = (Kept::default(), Instant::now());
        kept.keep(outputs("a"), Arc::new(shared()), HOUR, now);
        let mut found = |timeout, name, at| kept.find(&identity(timeout), &outputs(name), at).is_some();
        assert!(found(0, "a", now) && found(0, "a", now), "as often as it is asked for");
        assert!(!found(7, "a", now), "with another limit it might have come out otherwise");
        assert!(!found(0, "b", now));
        assert!(found(0, "a", now + HOUR / 2));
        assert!(!found(0, "a", now + HOUR));
        assert!(kept.ends.is_empty());
        kept.keep(outputs("a"), Arc::new(shared()), Duration::MAX, now);
        assert!(kept.find(&identity(0), &outputs("a"), now + 1000 * HOUR).is_some());
    }

    #[test]
    fn the_last_one_counts_and_can_be_forgotten() {
        let (mut kept, now) = (Kept::default(), Instant::now());
        let (first, second) = (Arc::new(shared()), Arc::new(shared()));
        kept.keep(outputs("a"), Arc::clone(&first), HOUR, now);
        kept.keep(outputs("a"), Arc::clone(&second), HOUR, now);
        let found = kept.find(&identity(0), &outputs("a"), now).unwrap();
        assert!(Arc::ptr_eq(&found, &second));
        kept.forget(&first);
        assert!(kept.find(&identity(0), &outputs("a"), now).is_some());
        kept.forget(&second);
        assert!(kept.find(&identity(0), &outputs("a"), now).is_none());
    }

    #[test]
    fn there_are_never_too_many() {
        let (mut kept, now) = (Kept::default(), Instant::now());
        for number in 0..MAX_KEPT + 5 {
            kept.keep(outputs(&number.to_string()), Arc::new(shared()), HOUR, now);
        }
        assert_eq!(kept.ends.len(), MAX_KEPT);
        assert!(kept.find(&identity(0), &outputs("4"), now).is_none());
        assert!(kept.find(&identity(0), &outputs("5"), now).is_some());
    }
}
