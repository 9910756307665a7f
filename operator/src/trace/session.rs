//! Spans of one session, from its events. Pure: whoever hears an event brings the time.
//!
//! One phase is open at most; the next one's begin ends it, as does the end of the session, whose reason it then has. Builds that
//! failed have no [`collect`](super::NAMES): nothing is.

use drover_session::Event;
use jiff::Timestamp;

use super::{Context, Span, Value};
use crate::world::SessionEnd;

/// The reason of a session that was ended from outside: by a request's end, or with the operator. Nothing failed.
const STOPPED: &str = "Stopped";

/// A session that goes on.
#[derive(Debug)]
pub struct Recorder {
    context: Context,
    attempt: u32,
    pod: String,
    started: Timestamp,
    open: Option<Phase>,
    /// Phases that were opened, so that two of one name differ.
    opened: i128,
    is_over: bool,
}

#[derive(Debug)]
struct Phase {
    name: &'static str,
    started: Timestamp,
    number: i128,
}

/// A build that the builder says has failed; the session's own reason is finer.
const BUILD_FAILED: &str = "BuildFailed";

impl Recorder {
    /// A session begins with reaching its builder.
    pub fn new(context: Context, attempt: u32, pod: &str, now: Timestamp) -> Self {
        let open = Some(Phase { name: "connect", started: now, number: 0 });
        Self { context, attempt, pod: pod.to_owned(), started: now, open, opened: 1, is_over: false }
    }

    /// The span that the event ends, if it ends one. Those that come after the end are of a thread that nobody waits for.
    pub fn event(&mut self, event: &Event, now: Timestamp) -> Option<Span> {
        if self.is_over {
            return None;
        }
        let count = |paths: &usize, bytes: &u64| {
            vec![
                ("drover.paths", Value::from(u64::try_from(*paths).unwrap_or(u64::MAX))),
                ("drover.bytes", Value::from(*bytes)),
            ]
        };
        match event {
            Event::Connected { .. } => self.turn(Some("lock"), now, vec![]),
            Event::Locked { missing, missing_bytes, .. } => {
                self.turn(None, now, count(missing, missing_bytes))
            }
            Event::FetchStarted { .. } => self.turn(Some("fetch"), now, vec![]),
            Event::Fetched { paths, bytes } => self.turn(None, now, count(paths, bytes)),
            Event::CopyStarted { .. } if !self.is_in("copy") => self.turn(Some("copy"), now, vec![]),
            Event::InputsCopied { paths, bytes } => self.turn(None, now, count(paths, bytes)),
            Event::BuildStarted => self.turn(Some("build"), now, vec![]),
            Event::Built { result } if result.status.is_success() => self.turn(Some("collect"), now, vec![]),
            Event::Built { .. } => {
                let ended = self.turn(None, now, vec![]);
                ended.map(|span| Span { error: Some(BUILD_FAILED), ..span })
            }
            Event::OutputsVerified { outputs, bytes } => self.turn(Some("push"), now, count(outputs, bytes)),
            Event::OutputsCollected => self.turn(None, now, vec![]),
            _ => None,
        }
    }

    /// What the end ends: the phase that was open, with the session's reason, and the session. Nothing the second time.
    /// `was_stopped`: it was told to end, whatever it says of that.
    pub fn end(&mut self, end: &SessionEnd, was_stopped: bool, now: Timestamp) -> Vec<Span> {
        if std::mem::replace(&mut self.is_over, true) {
            return vec![];
        }
        let reason = match end {
            SessionEnd::Finished { .. } => None,
            SessionEnd::Failed { .. } if was_stopped => Some(STOPPED),
            SessionEnd::Failed { reason, .. } => Some(reason.as_str()),
        };
        let error = reason.filter(|_| !was_stopped);
        let last = self.turn(None, now, vec![]).map(|span| Span { error, ..span });
        let attempt = self.context.id("attempt", &[self.attempt.into()]);
        let mut session = self.context.span("session", &self.numbers(), attempt, self.started, now);
        session.error = error;
        session.attributes.extend(self.who());
        session.attributes.extend(reason.map(|reason| ("drover.reason", reason.into())));
        if let SessionEnd::Finished { transfer, .. } = end {
            session.attributes.push(("drover.bytes.stored", transfer.bytes_stored.into()));
        }
        last.into_iter().chain([session]).collect()
    }

    fn is_in(&self, name: &str) -> bool {
        self.open.as_ref().is_some_and(|phase| phase.name == name)
    }

    /// Ends the phase that is open and begins another, or none.
    fn turn(
        &mut self,
        next: Option<&'static str>,
        now: Timestamp,
        said: Vec<(&'static str, Value)>,
    ) -> Option<Span> {
        let next = next.map(|name| Phase { name, started: now, number: self.opened });
        self.opened += i128::from(next.is_some());
        let phase = std::mem::replace(&mut self.open, next)?;
        let [attempt, started] = self.numbers();
        let session = self.context.id("session", &[attempt, started]);
        let numbers = [attempt, started, phase.number];
        let mut span = self.context.span(phase.name, &numbers, session, phase.started, now);
        span.attributes.extend(self.who());
        span.attributes.extend(said);
        Some(span)
    }

    /// An attempt has several sessions if connections break or operators are started again; one after the other.
    fn numbers(&self) -> [i128; 2] {
        [self.attempt.into(), self.started.as_nanosecond()]
    }

    fn who(&self) -> [(&'static str, Value); 2] {
        [("drover.attempt", u64::from(self.attempt).into()), ("k8s.pod.name", self.pod.as_str().into())]
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use drover_api::{BuildRequest, Reason, Timings, Transfer};
    use drover_serve::{BuildResult, BuildStatus, LATEST};

    use super::*;

    /// Seconds, errors and names of what was said: one event a second, from second 1 on, then the end.
    struct Story {
        recorder: Recorder,
        second: i64,
        seen: Vec<Span>,
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    impl Story {
        fn new() -> Self {
            let mut request = BuildRequest::new("hello", Default::default());
            request.metadata.uid = Some("uid".into());
            let recorder = Recorder::new(Context::of(&request), 2, "hello-2", at(0));
            Self { recorder, second: 0, seen: vec![] }
        }

        fn hear(mut self, events: impl IntoIterator<Item = Event>) -> Self {
            for event in events {
                self.second += 1;
                self.seen.extend(self.recorder.event(&event, at(self.second)));
            }
            self
        }

        fn end(mut self, end: &SessionEnd) -> Self {
            self.second += 1;
            self.seen.extend(self.recorder.end(end, false, at(self.second)));
            self
        }

        fn told(&self) -> Vec<(&'static str, i64, i64, Option<&'static str>)> {
            let short = |span: &Span| (span.name, span.start.as_second(), span.end.as_second(), span.error);
            self.seen.iter().map(short).collect()
        }
    }

    fn connected() -> Event {
        Event::Connected { version: LATEST }
    }

    fn locked() -> Event {
        Event::Locked { valid: 3, missing: 2, missing_bytes: 700 }
    }

    fn copy() -> Event {
        Event::CopyStarted { path: "f8g8x4m83da3b2f79iv84q2r3qlc58lr-lib".parse().unwrap(), nar_size: 5 }
    }

    fn built(status: BuildStatus) -> Event {
        Event::Built { result: BuildResult::new(status) }
    }

    fn finished() -> SessionEnd {
        let transfer = Transfer { bytes_stored: 9, ..Transfer::default() };
        SessionEnd::Finished { outputs: BTreeMap::new(), transfer, timings: Timings::default() }
    }

    fn failed(reason: Reason) -> SessionEnd {
        SessionEnd::Failed { reason, message: "a secret of the tenant's".into(), infrastructure: false }
    }

    #[test]
    fn a_session_has_a_span_for_each_phase() {
        let story = Story::new()
            .hear([
                connected(),
                Event::ClosureComputed { paths: 5 },
                locked(),
                Event::FetchStarted { paths: 2, bytes: 700 },
                Event::Fetched { paths: 1, bytes: 400 },
                copy(),
                copy(),
                Event::InputsCopied { paths: 2, bytes: 300 },
                Event::BuildStarted,
                built(BuildStatus::Built),
                Event::OutputsVerified { outputs: 1, bytes: 50 },
                Event::OutputsCollected,
            ])
            .end(&finished());
        assert_eq!(
            story.told(),
            [
                ("connect", 0, 1, None),
                ("lock", 1, 3, None),
                ("fetch", 4, 5, None),
                ("copy", 6, 8, None),
                ("build", 9, 10, None),
                ("collect", 10, 11, None),
                ("push", 11, 12, None),
                ("session", 0, 13, None),
            ]
        );
        let (session, phases) = story.seen.split_last().unwrap();
        assert_eq!(session.parent, Some(story.recorder.context.id("attempt", &[2])));
        assert!(phases.iter().all(|phase| phase.parent == Some(session.id)), "{phases:?}");
        let of = |name: &str, key: &str| {
            let span = story.seen.iter().find(|span| span.name == name).unwrap();
            span.attributes.iter().find(|(said, _)| *said == key).map(|(_, value)| value.clone())
        };
        assert_eq!(of("lock", "drover.paths"), Some(Value::Number(2)));
        assert_eq!(of("fetch", "drover.bytes"), Some(Value::Number(400)));
        assert_eq!(of("copy", "drover.bytes"), Some(Value::Number(300)));
        assert_eq!(of("build", "drover.attempt"), Some(Value::Number(2)));
        assert_eq!(of("session", "drover.bytes.stored"), Some(Value::Number(9)));
        assert_eq!(of("session", "k8s.pod.name"), Some("hello-2".into()));
    }

    #[test]
    fn a_build_that_failed_collects_nothing() {
        let story = Story::new()
            .hear([connected(), locked(), Event::BuildStarted, built(BuildStatus::PermanentFailure)])
            .end(&failed(Reason::BuildFailed));
        assert_eq!(
            story.told(),
            [
                ("connect", 0, 1, None),
                ("lock", 1, 2, None),
                ("build", 3, 4, Some("BuildFailed")),
                ("session", 0, 5, Some("BuildFailed")),
            ]
        );
        assert!(!format!("{:?}", story.seen).contains("secret"), "{:?}", story.seen);
    }

    /// After each event of a life: the phase that was under way has the reason, and there is one session, whatever comes later.
    #[test]
    fn a_session_that_breaks_ends_what_was_open() {
        let life = || {
            [
                (connected(), Some("lock")),
                (locked(), None),
                (Event::FetchStarted { paths: 2, bytes: 700 }, Some("fetch")),
                (Event::Fetched { paths: 1, bytes: 400 }, None),
                (copy(), Some("copy")),
                (Event::InputsCopied { paths: 2, bytes: 300 }, None),
                (Event::BuildStarted, Some("build")),
                (built(BuildStatus::Built), Some("collect")),
                (Event::OutputsVerified { outputs: 1, bytes: 50 }, Some("push")),
                (Event::OutputsCollected, None),
            ]
        };
        for came in 0..=life().len() {
            let open = came.checked_sub(1).map_or(Some("connect"), |last| life()[last].1);
            let events = life().into_iter().take(came).map(|(event, _)| event);
            let story = Story::new().hear(events).end(&failed(Reason::ConnectionLost));
            let broken: Vec<_> =
                story.seen.iter().filter(|span| span.error.is_some()).map(|span| span.name).collect();
            assert_eq!(broken, open.into_iter().chain(["session"]).collect::<Vec<_>>(), "after {came}");
            let said = story.seen.len();
            // A thread that nobody waits for goes on talking, and a second end is none.
            let late = life().into_iter().skip(came).map(|(event, _)| event);
            let story = story.hear(late).end(&finished());
            assert_eq!(story.seen.len(), said, "after {came}");
        }
    }

    #[test]
    fn what_was_stopped_did_not_fail() {
        let mut story = Story::new().hear([connected()]);
        let spans = story.recorder.end(&failed(Reason::InfrastructureFailure), true, at(7));
        assert_eq!(
            spans.iter().map(|span| (span.name, span.error)).collect::<Vec<_>>(),
            [("lock", None), ("session", None),]
        );
        assert!(spans[1].attributes.contains(&("drover.reason", STOPPED.into())), "{spans:?}");
    }

    /// Ids of two sessions of one attempt, and of two phases of one name.
    #[test]
    fn no_two_spans_have_one_id() {
        let fetch = || [Event::FetchStarted { paths: 1, bytes: 1 }, Event::Fetched { paths: 1, bytes: 1 }];
        let first = Story::new().hear(fetch()).hear(fetch()).end(&finished());
        let mut second = Story::new();
        second.recorder = Recorder::new(first.recorder.context.clone(), 2, "hello-2", at(50));
        second.second = 50;
        let second = second.hear(fetch()).end(&finished());
        let ids: Vec<_> = first.seen.iter().chain(&second.seen).map(|span| span.id).collect();
        assert!(ids.iter().enumerate().all(|(place, id)| !ids[..place].contains(id)), "{ids:?}");
        assert_eq!(ids.len(), 7);
    }
}
