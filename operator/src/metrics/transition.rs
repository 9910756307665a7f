//! What a write of a request's status has changed, for counting. Pure: from the status before and the one after.
//!
//! The write names the version that `before` was read from, so that of all who ever write a change exactly one is told that it
//! was taken, and observes it.

use std::time::Duration;

use drover_api::conditions::{self, Status};
use drover_api::{Attempt, BuildRequest, BuildRequestStatus, Reason, ReasonKind};
use jiff::Timestamp;

use super::table;

/// Something to be counted.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Observation {
    /// The request came to its end, so long after it was made.
    Ended {
        result: &'static str,
        reason: &'static str,
        took: Duration,
    },
    /// It did so without a build of its own.
    Saved {
        by: &'static str,
    },
    AttemptEnded {
        fault: &'static str,
        reason: &'static str,
    },
    /// Another attempt follows.
    Retried {
        budget: &'static str,
        reason: &'static str,
    },
    /// Connections were made again.
    Reconnected {
        times: u32,
    },
    /// An attempt began, so long after the request was made or the attempt before had ended.
    Begun {
        waited: Duration,
    },
    /// The attempt's builder has answered for the first time, so long after the attempt began.
    Answered {
        took: Duration,
    },
    Phase {
        phase: &'static str,
        took: Duration,
    },
    Moved {
        route: &'static str,
        bytes: u64,
    },
    Inputs {
        source: &'static str,
        paths: u64,
    },
}

/// Compares. A request that had its verdict before changes nothing that counts.
pub fn observe(before: &BuildRequest, after: &BuildRequestStatus, now: Timestamp) -> Vec<Observation> {
    let none = BuildRequestStatus::default();
    let was = before.status.as_ref().unwrap_or(&none);
    if conditions::verdict(&was.conditions).is_some() {
        return vec![];
    }
    let mut seen = Vec::new();
    let verdict = conditions::verdict(&after.conditions);
    let created = before.metadata.creation_timestamp.as_ref().map_or(now, |time| time.0);
    for (at, attempt) in after.attempts.iter().enumerate() {
        let since = match at.checked_sub(1).and_then(|before| after.attempts.get(before)) {
            None => Some(created),
            Some(before) => before.end_time.as_ref().map(|time| time.0),
        };
        if let (None, Some(since), Some(begun)) = (was.attempts.get(at), since, &attempt.start_time) {
            seen.push(Observation::Begun { waited: between(since, begun.0) });
        }
        attempts(was.attempts.get(at), attempt, verdict.is_none(), &mut seen);
    }
    answered(was, after, now, &mut seen);
    if let Some(succeeded) = verdict {
        ended(was, after, succeeded, between(created, now), &mut seen);
    }
    worked(was, after, &mut seen);
    seen
}

fn attempts(was: Option<&Attempt>, is: &Attempt, goes_on: bool, seen: &mut Vec<Observation>) {
    let times = is.reconnects.saturating_sub(was.map_or(0, |was| was.reconnects));
    if times > 0 {
        seen.push(Observation::Reconnected { times });
    }
    if is.end_time.is_none() || was.is_some_and(|was| was.end_time.is_some()) {
        return;
    }
    let reason = is.reason.as_deref().and_then(Reason::parse);
    let word = reason.map_or(table::OTHER, Reason::as_str);
    let failed = if is.infrastructure { table::OF_INFRASTRUCTURE } else { table::OF_BUILD };
    let fault = match reason.map(Reason::kind) {
        Some(ReasonKind::Success) => table::NOBODY,
        _ => failed,
    };
    seen.push(Observation::AttemptEnded { fault, reason: word });
    if goes_on {
        seen.push(Observation::Retried { budget: failed, reason: word });
    }
}

/// The builder of the last attempt has answered, whatever has become of it since. One that is found again after its
/// connection broke has done so before.
fn answered(was: &BuildRequestStatus, is: &BuildRequestStatus, now: Timestamp, seen: &mut Vec<Observation>) {
    let has_answered = |status: &BuildRequestStatus| {
        conditions::find(&status.conditions, conditions::BUILDER_READY).is_some_and(|ready| {
            ready.status == Status::True.as_str()
                || (ready.reason == Reason::ConnectionLost.as_str()
                    && ready.status == Status::Unknown.as_str())
        })
    };
    let Some(attempt) = is.attempts.last().filter(|_| has_answered(is)) else { return };
    let same = was.attempts.last().is_some_and(|last| last.number == attempt.number);
    let Some(begun) = attempt.start_time.as_ref().filter(|_| !same || !has_answered(was)) else { return };
    let at = conditions::find(&is.conditions, conditions::BUILDER_READY)
        .map_or(now, |ready| ready.last_transition_time.0);
    seen.push(Observation::Answered { took: between(begun.0, at) });
}

fn ended(
    was: &BuildRequestStatus,
    is: &BuildRequestStatus,
    succeeded: bool,
    took: Duration,
    seen: &mut Vec<Observation>,
) {
    let reason_of = |status: &BuildRequestStatus| {
        let summary = conditions::find(&status.conditions, conditions::SUCCEEDED)?;
        Reason::parse(&summary.reason)
    };
    let reason = reason_of(is);
    let result = if succeeded { table::SUCCEEDED } else { table::FAILED };
    seen.push(Observation::Ended { result, reason: reason.map_or(table::OTHER, Reason::as_str), took });
    if is.attempts.is_empty() {
        let waited = reason_of(was) == Some(Reason::WaitingForSameBuild);
        match reason {
            Some(Reason::Cancelled) => {}
            _ if waited => seen.push(Observation::Saved { by: table::BY_SAME_BUILD }),
            Some(Reason::AlreadyBuilt) => seen.push(Observation::Saved { by: table::BY_CACHE }),
            _ => {}
        }
    }
}

/// What the last attempt has taken and moved, where it has just ended.
fn worked(was: &BuildRequestStatus, is: &BuildRequestStatus, seen: &mut Vec<Observation>) {
    let ended = |status: &BuildRequestStatus| {
        status.attempts.last().filter(|last| last.end_time.is_some()).map(|last| last.number)
    };
    if ended(is).is_none() || ended(is) == ended(was) {
        return;
    }
    if let Some(timings) = &is.timings {
        let phases = [
            timings.pod_start_millis,
            timings.connect_millis,
            timings.copy_in_millis,
            timings.build_millis,
            timings.collect_millis,
        ];
        seen.extend(table::PHASE_NAMES.into_iter().zip(phases).filter_map(|(phase, millis)| {
            Some(Observation::Phase { phase, took: Duration::from_millis(millis?) })
        }));
    }
    if let Some(moved) = &is.transfer {
        let bytes = [
            (table::SENT, moved.bytes_sent),
            (table::FETCHED, moved.bytes_fetched),
            (table::RECEIVED, moved.bytes_received),
            (table::STORED, moved.bytes_stored),
        ];
        seen.extend(bytes.map(|(route, bytes)| Observation::Moved { route, bytes }));
        let paths = [
            (table::PRESENT, moved.paths_present),
            (table::FETCHED, moved.paths_fetched),
            (table::SENT, moved.paths_sent),
        ];
        seen.extend(paths.map(|(source, paths)| Observation::Inputs { source, paths }));
    }
}

/// Zero where a clock was set back.
fn between(from: Timestamp, to: Timestamp) -> Duration {
    Duration::try_from(to.duration_since(from)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use drover_api::{Timings, Transfer};
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    use super::*;
    use crate::status::Draft;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    /// A request made at second 100, and what every write of its status gave to count.
    struct Story {
        request: BuildRequest,
        seen: Vec<Observation>,
    }

    impl Story {
        fn new() -> Self {
            let mut request = BuildRequest::new("a", Default::default());
            request.metadata.creation_timestamp = Some(Time(at(100)));
            Self { request, seen: vec![] }
        }

        /// One write. What it makes of the status is observed as it comes back.
        fn write(&mut self, second: i64, change: impl FnOnce(&mut Draft)) -> &mut Self {
            let mut draft = Draft::new(&self.request, at(second));
            change(&mut draft);
            let status = draft.finish().expect("a change");
            self.seen.extend(observe(&self.request, &status, at(second)));
            self.request.status = Some(status);
            // A second writer of the same sees nothing new.
            let again = self.request.status.clone().unwrap();
            assert_eq!(observe(&self.request, &again, at(second + 1000)), []);
            self
        }
    }

    fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_build_is_counted_once_with_all_that_it_took() {
        let mut story = Story::new();
        story
            .write(101, |draft| {
                draft.progress(drover_api::Phase::Pending, Reason::WaitingForConcurrency, "full")
            })
            .write(130, |draft| draft.begin_attempt(1, None))
            .write(142, |draft| {
                draft.phase(conditions::BUILDER_READY, Status::True, Reason::BuilderReady, "")
            })
            .write(150, |draft| {
                draft.phase(conditions::INPUTS_COPIED, Status::True, Reason::InputsCopied, "")
            })
            .write(200, |draft| {
                draft.status.timings = Some(Timings {
                    pod_start_millis: Some(1500),
                    build_millis: Some(50_000),
                    ..Timings::default()
                });
                draft.status.transfer = Some(Transfer {
                    paths_present: 3,
                    paths_sent: 2,
                    bytes_sent: 1000,
                    bytes_stored: 7,
                    ..Transfer::default()
                });
                draft.succeed(Reason::Built, BTreeMap::new());
            });
        use Observation::*;
        assert_eq!(
            story.seen,
            [
                Begun { waited: secs(30) },
                Answered { took: secs(12) },
                AttemptEnded { fault: "none", reason: "Built" },
                Ended { result: "succeeded", reason: "Built", took: secs(100) },
                Phase { phase: "start", took: Duration::from_millis(1500) },
                Phase { phase: "build", took: secs(50) },
                Moved { route: "sent", bytes: 1000 },
                Moved { route: "fetched", bytes: 0 },
                Moved { route: "received", bytes: 0 },
                Moved { route: "stored", bytes: 7 },
                Inputs { source: "present", paths: 3 },
                Inputs { source: "fetched", paths: 0 },
                Inputs { source: "sent", paths: 2 },
            ]
        );
    }

    #[test]
    fn a_failed_attempt_has_worked_as_well() {
        let mut story = Story::new();
        let work = |draft: &mut Draft, millis: u64| {
            draft.status.timings = Some(Timings { copy_in_millis: Some(millis), ..Timings::default() });
            draft.status.transfer = Some(Transfer { bytes_sent: millis, ..Transfer::default() });
        };
        story
            .write(100, |draft| draft.begin_attempt(1, None))
            .write(110, |draft| {
                work(draft, 5);
                draft.end_attempt(Reason::Evicted, "", true);
            })
            .write(112, |draft| draft.progress(drover_api::Phase::Pending, Reason::Retrying, "later"))
            .write(115, |draft| draft.begin_attempt(2, None))
            .write(120, |draft| {
                work(draft, 7);
                draft.fail(Reason::BuildFailed, "exit code 1", &[]);
            });
        let worked: Vec<Observation> = story
            .seen
            .into_iter()
            .filter(|seen| matches!(seen, Observation::Phase { .. } | Observation::Moved { bytes: 1.., .. }))
            .collect();
        let expected = [5, 7].map(|millis| {
            let took = Duration::from_millis(millis);
            [
                Observation::Phase { phase: "copy_in", took },
                Observation::Moved { route: "sent", bytes: millis },
            ]
        });
        assert_eq!(worked, expected.concat());
    }

    #[test]
    fn attempts_and_what_pays_for_the_next() {
        let mut story = Story::new();
        story
            .write(100, |draft| draft.begin_attempt(1, None))
            .write(105, |draft| {
                draft.phase(conditions::BUILDER_READY, Status::True, Reason::BuilderReady, "")
            })
            .write(106, |draft| {
                draft.open_attempt_mut().unwrap().reconnects = 2;
                draft.phase(conditions::BUILDER_READY, Status::Unknown, Reason::ConnectionLost, "it broke");
            })
            .write(107, |draft| {
                draft.phase(conditions::BUILDER_READY, Status::True, Reason::BuilderReady, "")
            })
            .write(110, |draft| draft.end_attempt(Reason::Evicted, "", true))
            .write(112, |draft| draft.begin_attempt(2, None))
            .write(114, |draft| {
                draft.phase(conditions::BUILDER_READY, Status::True, Reason::BuilderReady, "")
            })
            .write(120, |draft| draft.fail(Reason::BuildFailed, "exit code 1", &[]));
        use Observation::*;
        assert_eq!(
            story.seen,
            [
                Begun { waited: secs(0) },
                Answered { took: secs(5) },
                Reconnected { times: 2 },
                AttemptEnded { fault: "infrastructure", reason: "Evicted" },
                Retried { budget: "infrastructure", reason: "Evicted" },
                Begun { waited: secs(2) },
                Answered { took: secs(2) },
                AttemptEnded { fault: "build", reason: "BuildFailed" },
                Ended { result: "failed", reason: "BuildFailed", took: secs(20) },
            ]
        );
    }

    /// What was waited for counts, whatever the attempt comes to, and also where one write tells all of it.
    #[test]
    fn an_attempt_counts_as_far_as_it_got() {
        use Observation::*;
        let ready: fn(&mut Draft) =
            |draft| draft.phase(conditions::BUILDER_READY, Status::True, Reason::BuilderReady, "");
        let waits = |story: &Story| -> Vec<Observation> {
            let waits = story.seen.iter().copied();
            waits.filter(|seen| matches!(seen, Begun { .. } | Answered { .. })).collect()
        };
        // Its builder never answered.
        let mut story = Story::new();
        story.write(103, |draft| draft.begin_attempt(1, None)).write(110, |draft| {
            draft.fail(Reason::StartTimedOut, "no answer", &[]);
        });
        assert_eq!(waits(&story), [Begun { waited: secs(3) }]);
        // It answered, and that is heard of together with its end, or with the break of its connection.
        let mut story = Story::new();
        story.write(103, |draft| draft.begin_attempt(1, None)).write(110, |draft| {
            ready(draft);
            draft.fail(Reason::BuildFailed, "exit code 1", &[]);
        });
        assert_eq!(waits(&story), [Begun { waited: secs(3) }, Answered { took: secs(7) }]);
        let mut story = Story::new();
        story
            .write(103, |draft| draft.begin_attempt(1, None))
            .write(110, |draft| {
                ready(draft);
                draft.phase(conditions::BUILDER_READY, Status::Unknown, Reason::ConnectionLost, "broke");
            })
            .write(115, ready);
        assert_eq!(waits(&story), [Begun { waited: secs(3) }, Answered { took: secs(7) }]);
        // An old end and a new begin in one write, as after an operator was away.
        let mut story = Story::new();
        story.write(103, |draft| draft.begin_attempt(1, None)).write(120, |draft| {
            draft.end_attempt(Reason::BuilderLost, "", true);
            draft.begin_attempt(2, None);
        });
        assert_eq!(waits(&story), [Begun { waited: secs(3) }, Begun { waited: secs(0) }]);
    }

    #[test]
    fn what_needed_no_build() {
        let end = |reason: Option<Reason>, end: fn(&mut Draft)| {
            let mut story = Story::new();
            if let Some(reason) = reason {
                story.write(101, |draft| draft.progress(drover_api::Phase::Pending, reason, "x"));
            }
            story.write(102, end);
            story
                .seen
                .into_iter()
                .filter(|seen| matches!(seen, Observation::Saved { .. }))
                .collect::<Vec<_>>()
        };
        let found: fn(&mut Draft) = |draft| draft.succeed(Reason::AlreadyBuilt, BTreeMap::new());
        let failed: fn(&mut Draft) = |draft| draft.fail(Reason::BuildFailed, "as the other", &[]);
        let cancelled: fn(&mut Draft) = |draft| draft.fail(Reason::Cancelled, "", &[]);
        let waits = Some(Reason::WaitingForSameBuild);
        let by = |by| vec![Observation::Saved { by }];
        assert_eq!(end(None, found), by("cache"));
        assert_eq!(end(Some(Reason::WaitingForInput), found), by("cache"));
        assert_eq!(end(waits, found), by("same_build"));
        assert_eq!(end(waits, failed), by("same_build"));
        assert_eq!(end(waits, cancelled), []);
        assert_eq!(end(None, cancelled), []);
    }
}
