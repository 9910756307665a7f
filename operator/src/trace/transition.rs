//! Spans that a write of a request's status has ended. Pure: from the status before and the one after.
//!
//! As with metrics, the write names the version that `before` was read from, so that exactly one writer is told that it was taken,
//! and says each span once. Times are the status's own; Kubernetes keeps those of conditions to the second.

use drover_api::conditions::{self, Status};
use drover_api::{Attempt, BuildRequest, BuildRequestStatus, Reason, ReasonKind};
use jiff::Timestamp;

use super::{Context, Span, SpanId, Value};

/// A reason that no list has, as after a downgrade.
const OTHER: &str = "other";

/// The spans in the order of their begins; children behind their parents where they end with them.
pub fn spans_of(before: &BuildRequest, after: &BuildRequestStatus, now: Timestamp) -> Vec<Span> {
    let none = BuildRequestStatus::default();
    let was = before.status.as_ref().unwrap_or(&none);
    if conditions::verdict(&was.conditions).is_some() {
        return vec![];
    }
    let context = Context::of(before);
    let created = before.metadata.creation_timestamp.as_ref().map_or(now, |time| time.0);
    let root = context.id("request", &[]);
    let mut spans = Vec::new();
    if let Some(succeeded) = conditions::verdict(&after.conditions) {
        spans.push(whole(&context, before, after, succeeded, created, now));
    }
    for (at, attempt) in after.attempts.iter().enumerate() {
        let old = was.attempts.get(at);
        let Some(begun) = attempt.start_time.as_ref().map(|time| time.0) else { continue };
        let number = [i128::from(attempt.number)];
        let since = match at.checked_sub(1).and_then(|before| after.attempts.get(before)) {
            None => Some(created),
            Some(before) => before.end_time.as_ref().map(|time| time.0),
        };
        if let (None, Some(since)) = (old, since) {
            let mut span = context.span("wait", &number, root, since, begun);
            span.attributes.push(("drover.attempt", u64::from(attempt.number).into()));
            spans.push(span);
        }
        if attempt.end_time.is_some() && old.is_none_or(|old| old.end_time.is_none()) {
            spans.push(one_attempt(&context, attempt, root, begun, now));
        }
    }
    arrival(&context, was, after, &mut spans);
    spans
}

fn whole(
    context: &Context,
    request: &BuildRequest,
    is: &BuildRequestStatus,
    succeeded: bool,
    created: Timestamp,
    now: Timestamp,
) -> Span {
    let ended = is.completion_time.as_ref().map_or(now, |time| time.0);
    let mut span = context.root(created, ended);
    let reason = conditions::find(&is.conditions, conditions::SUCCEEDED)
        .map_or(OTHER, |summary| word(Some(&summary.reason)).0);
    span.error = (!succeeded).then_some(reason);
    span.attributes.push(("drover.reason", reason.into()));
    let spec = request.spec.derivation.as_ref().map(|derivation| &derivation.system);
    let system = spec.or_else(|| is.derivation.as_ref().map(|derivation| &derivation.system));
    span.attributes.extend(system.map(|system| ("drover.system", Value::from(&**system))));
    span.attributes.extend(is.class.as_deref().map(|class| ("drover.class", class.into())));
    span.attributes.push(("drover.attempts", (is.attempts.len() as u64).into()));
    span
}

fn one_attempt(context: &Context, attempt: &Attempt, root: SpanId, begun: Timestamp, now: Timestamp) -> Span {
    let ended = attempt.end_time.as_ref().map_or(now, |time| time.0);
    let mut span = context.span("attempt", &[attempt.number.into()], root, begun, ended);
    let (reason, kind) = word(attempt.reason.as_deref());
    span.error = (kind != Some(ReasonKind::Success)).then_some(reason);
    span.attributes.push(("drover.attempt", u64::from(attempt.number).into()));
    span.attributes.push(("drover.reason", reason.into()));
    span.attributes.push(("drover.infrastructure", attempt.infrastructure.into()));
    span.attributes.extend(attempt.pod.as_deref().map(|pod| ("k8s.pod.name", pod.into())));
    span.attributes.extend(attempt.node.as_deref().map(|node| ("k8s.node.name", node.into())));
    if attempt.reconnects > 0 {
        span.attributes.push(("drover.reconnects", u64::from(attempt.reconnects).into()));
    }
    span
}

/// How the last attempt's builder came to be there: its pod has a node, and then it answers.
fn arrival(context: &Context, was: &BuildRequestStatus, is: &BuildRequestStatus, spans: &mut Vec<Span>) {
    let Some(attempt) = is.attempts.last() else { return };
    let Some(begun) = attempt.start_time.as_ref().map(|time| time.0) else { return };
    let same = was.attempts.last().is_some_and(|last| last.number == attempt.number);
    let new = |condition: &str| {
        let at = |status: &BuildRequestStatus| {
            let found = conditions::find(&status.conditions, condition)?;
            has_happened(&found.status, &found.reason).then_some(found.last_transition_time.0)
        };
        at(is).map(|at_is| (at_is, !same || at(was).is_none()))
    };
    let parent = context.id("attempt", &[attempt.number.into()]);
    let mut say = |name, since, until| {
        let mut span = context.span(name, &[attempt.number.into()], parent, since, until);
        span.attributes.push(("drover.attempt", u64::from(attempt.number).into()));
        span.attributes.extend(attempt.pod.as_deref().map(|pod| ("k8s.pod.name", pod.into())));
        spans.push(span);
    };
    let scheduled = new(conditions::SCHEDULED);
    if let Some((at, true)) = scheduled {
        say("schedule", begun, at);
    }
    if let Some((at, true)) = new(conditions::BUILDER_READY) {
        say("start", scheduled.map_or(begun, |(at, _)| at), at);
    }
}

/// A connection that broke was there before.
fn has_happened(status: &str, reason: &str) -> bool {
    status == Status::True.as_str()
        || (status == Status::Unknown.as_str() && reason == Reason::ConnectionLost.as_str())
}

fn word(reason: Option<&str>) -> (&'static str, Option<ReasonKind>) {
    let reason = reason.and_then(Reason::parse);
    (reason.map_or(OTHER, Reason::as_str), reason.map(Reason::kind))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    use super::*;
    use crate::status::Draft;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    /// A request made at second 100, and what every write of its status has ended.
    struct Story {
        request: BuildRequest,
        seen: Vec<Span>,
    }

    impl Story {
        fn new() -> Self {
            let mut request = BuildRequest::new("a", Default::default());
            request.metadata.creation_timestamp = Some(Time(at(100)));
            request.metadata.uid = Some("uid".into());
            Self { request, seen: vec![] }
        }

        fn write(mut self, second: i64, change: impl FnOnce(&mut Draft)) -> Self {
            let mut draft = Draft::new(&self.request, at(second));
            change(&mut draft);
            let status = draft.finish().expect("a change");
            self.seen.extend(spans_of(&self.request, &status, at(second)));
            self.request.status = Some(status.clone());
            // A second writer of the same says nothing.
            assert_eq!(spans_of(&self.request, &status, at(second + 1000)), []);
            self
        }

        /// Name, begin, end and error of each.
        fn told(&self) -> Vec<(&'static str, i64, i64, Option<&'static str>)> {
            let short = |span: &Span| (span.name, span.start.as_second(), span.end.as_second(), span.error);
            self.seen.iter().map(short).collect()
        }
    }

    fn scheduled(draft: &mut Draft) {
        draft.phase(conditions::SCHEDULED, Status::True, Reason::Scheduled, "");
    }

    fn ready(draft: &mut Draft) {
        draft.phase(conditions::BUILDER_READY, Status::True, Reason::BuilderReady, "");
    }

    #[test]
    fn a_build_is_one_tree() {
        let story = Story::new()
            .write(101, |draft| {
                draft.progress(drover_api::Phase::Pending, Reason::WaitingForConcurrency, "full")
            })
            .write(130, |draft| draft.begin_attempt(1, None))
            .write(133, scheduled)
            .write(142, ready)
            .write(200, |draft| draft.succeed(Reason::Built, BTreeMap::new()));
        assert_eq!(
            story.told(),
            [
                ("wait", 100, 130, None),
                ("schedule", 130, 133, None),
                ("start", 133, 142, None),
                ("request", 100, 200, None),
                ("attempt", 130, 200, None),
            ]
        );
        let id = |name| story.seen.iter().find(|span| span.name == name).unwrap().id;
        for span in &story.seen {
            let parent = match span.name {
                "request" => None,
                "wait" | "attempt" => Some(id("request")),
                _ => Some(id("attempt")),
            };
            assert_eq!((span.parent, span.trace), (parent, story.seen[0].trace), "{}", span.name);
        }
    }

    #[test]
    fn attempts_that_fail_say_why_and_count_on() {
        let story = Story::new()
            .write(100, |draft| draft.begin_attempt(1, None))
            .write(105, |draft| {
                scheduled(draft);
                ready(draft);
            })
            .write(106, |draft| {
                draft.phase(conditions::BUILDER_READY, Status::Unknown, Reason::ConnectionLost, "it broke");
            })
            .write(107, ready)
            .write(110, |draft| draft.end_attempt(Reason::Evicted, "", true))
            .write(112, |draft| draft.begin_attempt(2, None))
            .write(120, |draft| draft.fail(Reason::BuildFailed, "exit code 1", &[]));
        assert_eq!(
            story.told(),
            [
                ("wait", 100, 100, None),
                ("schedule", 100, 105, None),
                ("start", 105, 105, None),
                ("attempt", 100, 110, Some("Evicted")),
                ("wait", 110, 112, None),
                ("request", 100, 120, Some("BuildFailed")),
                ("attempt", 112, 120, Some("BuildFailed")),
            ]
        );
        let ids: Vec<_> = story.seen.iter().map(|span| span.id).collect();
        assert!(ids.iter().enumerate().all(|(at, id)| !ids[..at].contains(id)), "{:?}", story.seen);
    }

    #[test]
    fn what_needs_no_builder_is_a_request_alone() {
        let story = Story::new().write(102, |draft| draft.succeed(Reason::AlreadyBuilt, BTreeMap::new()));
        assert_eq!(story.told(), [("request", 100, 102, None)]);
        let reason = ("drover.reason", Value::from("AlreadyBuilt"));
        assert!(story.seen[0].attributes.contains(&reason), "{:?}", story.seen);
    }

    /// As after an operator was away: one write ends an attempt and begins the next.
    #[test]
    fn two_changes_in_one_write() {
        let story = Story::new().write(103, |draft| draft.begin_attempt(1, None)).write(120, |draft| {
            draft.end_attempt(Reason::BuilderLost, "", true);
            draft.begin_attempt(2, None);
        });
        assert_eq!(
            story.told(),
            [("wait", 100, 103, None), ("attempt", 103, 120, Some("BuilderLost")), ("wait", 120, 120, None),]
        );
    }

    #[test]
    fn a_clock_that_was_set_back_gives_no_negative_span() {
        let story = Story::new().write(90, |draft| draft.succeed(Reason::AlreadyBuilt, BTreeMap::new()));
        assert_eq!(story.told(), [("request", 100, 100, None)]);
    }
}
