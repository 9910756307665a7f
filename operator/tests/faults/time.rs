//! The time of a run. It is the async runtime's own, which jumps wherever nothing is left to do, and it goes on over the
//! runtimes of several operators.

use std::sync::Mutex;

use jiff::{SignedDuration, Timestamp};
use tokio::time::Instant;

/// When every run begins; a whole second.
const BEGIN: i64 = 1_800_000_000;

pub(crate) struct Time(Mutex<(Timestamp, Option<Instant>)>);

impl Time {
    pub(crate) fn new() -> Self {
        Self(Mutex::new((Timestamp::from_second(BEGIN).expect("a time within its range"), None)))
    }

    pub(crate) fn now(&self) -> Timestamp {
        let (base, since) = *self.0.lock().expect("no panic in between");
        match since {
            Some(since) => base + SignedDuration::try_from(since.elapsed()).expect("hours at most"),
            None => base,
        }
    }

    /// A runtime begins: from here on its clock counts.
    pub(crate) fn enter(&self) {
        self.0.lock().expect("no panic in between").1 = Some(Instant::now());
    }

    /// The runtime ends. To be called within it.
    pub(crate) fn leave(&self) {
        let now = self.now();
        *self.0.lock().expect("no panic in between") = (now, None);
    }

    /// Seconds since the run began, for people.
    pub(crate) fn elapsed(at: Timestamp) -> f64 {
        at.as_millisecond() as f64 / 1000.0 - BEGIN as f64
    }
}
