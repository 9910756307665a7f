//! The status that is being written: what was, and what a plan makes of it.
//!
//! [`Draft`] owns the rules of the status: conditions keep their transition times, a verdict is spoken once, and a
//! draft that equals what is stored is no write. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use drover_api::conditions::{self, Status};
use drover_api::{
    Attempt, BuildRequest, BuildRequestStatus, BuilderStatus, FailureStatus, LOG_TAIL_LINES, OutputStatus,
    Phase, Reason, format_duration,
};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use crate::world::PodView;

/// Longest message of a failure or an attempt. The log has the rest.
const MAX_MESSAGE: usize = 4096;
/// Longest line of the log's tail.
const MAX_LINE: usize = 1024;
/// Longest message of an attempt, and how many of them keep theirs: budgets allow [`drover_api::MAX_ATTEMPTS`], and an
/// object has to stay well below the 1.5 MiB that etcd takes.
const MAX_ATTEMPT_MESSAGE: usize = 1024;
const ATTEMPTS_WITH_MESSAGE: usize = 10;
/// Bytes of all outputs' references together, and of one output's signatures: what a build refers to is its maker's choice, and
/// what a cache signs the cache's. Lists that do not fit are left out as a whole.
const MAX_REFERENCES: usize = 128 << 10;
const MAX_SIGNATURES: usize = 4 << 10;

#[derive(Clone, Debug)]
pub struct Draft {
    before: BuildRequestStatus,
    pub status: BuildRequestStatus,
    generation: Option<i64>,
    created: Option<Timestamp>,
    now: Timestamp,
}

impl Draft {
    pub fn new(request: &BuildRequest, now: Timestamp) -> Self {
        let before = request.status.clone().unwrap_or_default();
        Self {
            status: before.clone(),
            before,
            generation: request.metadata.generation,
            created: request.metadata.creation_timestamp.as_ref().map(|time| time.0),
            now,
        }
    }

    /// Some if there is anything to write.
    pub fn finish(mut self) -> Option<BuildRequestStatus> {
        if self.status == self.before {
            return None;
        }
        self.status.observed_generation = self.generation;
        Some(self.status)
    }

    /// What to write of a request that has its verdict: that the newest spec was seen, or nothing. `kubectl wait` and kstatus
    /// take a status for old news where it is of an older generation, and a time to live can be changed after the end.
    pub fn restate(mut self) -> Option<BuildRequestStatus> {
        if self.status.observed_generation == self.generation {
            return None;
        }
        self.status.observed_generation = self.generation;
        for condition in &mut self.status.conditions {
            condition.observed_generation = self.generation;
        }
        Some(self.status)
    }

    /// Sets one of the phases' conditions.
    pub fn phase(&mut self, condition: &str, status: Status, reason: Reason, message: &str) {
        conditions::set(
            &mut self.status.conditions,
            condition,
            status,
            reason,
            &headline(message),
            self.generation,
            self.now,
        );
    }

    /// Says what the request does now. Sets the phases that nobody has spoken of to Unknown.
    pub fn progress(&mut self, phase: Phase, reason: Reason, message: &str) {
        for condition in conditions::PHASES {
            if conditions::find(&self.status.conditions, condition).is_none() {
                self.phase(condition, Status::Unknown, Reason::Pending, "");
            }
        }
        self.status.phase = Some(phase);
        self.summary(None, reason, message);
    }

    /// The attempt that has begun and not ended.
    pub fn open_attempt(&self) -> Option<&Attempt> {
        self.status.attempts.last().filter(|attempt| attempt.end_time.is_none())
    }

    /// The summary's reason and message.
    pub fn said(&self) -> Option<(&str, &str)> {
        let summary = conditions::find(&self.status.conditions, conditions::SUCCEEDED)?;
        Some((&summary.reason, &summary.message))
    }

    pub fn open_attempt_mut(&mut self) -> Option<&mut Attempt> {
        self.status.attempts.last_mut().filter(|attempt| attempt.end_time.is_none())
    }

    /// Begins attempt `number`, with this much memory if it is another amount than the request's or the class's. What the
    /// last one had reached no longer counts.
    pub fn begin_attempt(&mut self, number: u32, memory: Option<Quantity>) {
        let status = &mut self.status;
        status.attempt = Some(number);
        status.start_time.get_or_insert(Time(self.now));
        status.attempts.push(Attempt {
            number,
            start_time: Some(Time(self.now)),
            memory,
            ..Attempt::default()
        });
        let old = status.attempts.len().saturating_sub(ATTEMPTS_WITH_MESSAGE);
        for attempt in &mut status.attempts[..old] {
            attempt.message = None;
        }
        status.builder = None;
        status.timings = None;
        status.transfer = None;
        for condition in &conditions::PHASES[1..] {
            self.phase(condition, Status::Unknown, Reason::Pending, "");
        }
    }

    /// Records where the open attempt's pod is.
    pub fn pod(&mut self, pod: &PodView) {
        if let Some(attempt) = self.open_attempt_mut() {
            attempt.pod = Some(pod.name.clone());
            attempt.node.clone_from(&pod.node);
        }
        let builder = self.status.builder.get_or_insert_with(BuilderStatus::default);
        builder.pod = Some(pod.name.clone());
        builder.namespace = Some(pod.namespace.clone());
        builder.node.clone_from(&pod.node);
        // Image ids come late and would cost a write of their own: taken along when there is one.
        if pod.image.is_some() {
            builder.image.clone_from(&pod.image);
        }
    }

    /// Ends the open attempt.
    pub fn end_attempt(&mut self, reason: Reason, message: &str, infrastructure: bool) {
        let now = self.now;
        if let Some(attempt) = self.open_attempt_mut() {
            attempt.end_time = Some(Time(now));
            attempt.reason = Some(reason.as_str().to_owned());
            attempt.message =
                (!message.is_empty()).then(|| cut(&headline(message), MAX_ATTEMPT_MESSAGE).to_owned());
            attempt.infrastructure = infrastructure;
        }
    }

    /// Ended attempts whose failure was the machinery's, and those whose failure was the build's.
    pub fn failures(&self) -> (u32, u32) {
        let ended = self.status.attempts.iter().filter(|attempt| attempt.end_time.is_some());
        ended.fold((0, 0), |(infrastructure, build), attempt| match attempt.infrastructure {
            true => (infrastructure + 1, build),
            false => (infrastructure, build + 1),
        })
    }

    /// The good end.
    pub fn succeed(&mut self, reason: Reason, outputs: BTreeMap<String, OutputStatus>) {
        self.end_attempt(reason, "", false);
        let message = match outputs.first_key_value() {
            Some((_, output)) if outputs.len() == 1 => output.path.clone(),
            _ => format!("{} outputs are in the cache", outputs.len()),
        };
        self.status.outputs = shortened(outputs);
        let collected = if reason == Reason::Built { Reason::OutputsCollected } else { reason };
        self.phase(conditions::BUILT, Status::True, reason, "");
        self.phase(conditions::OUTPUTS_COLLECTED, Status::True, collected, "");
        self.end(Phase::Succeeded);
        self.summary(Some(true), reason, &message);
    }

    /// The bad end.
    pub fn fail(&mut self, reason: Reason, message: &str, log_tail: &[String]) {
        self.end_attempt(reason, message, reason.is_infrastructure());
        for condition in conditions::PHASES {
            let reached = conditions::is_true(&self.status.conditions, condition);
            // The first phase that was not reached is the one that failed.
            if !reached {
                self.phase(condition, Status::False, reason, message);
                break;
            }
        }
        let skip = log_tail.len().saturating_sub(LOG_TAIL_LINES);
        self.status.failure = Some(FailureStatus {
            reason: reason.as_str().to_owned(),
            message: plain(cut(message, MAX_MESSAGE)),
            log_tail: log_tail[skip..].iter().map(|line| cut(line, MAX_LINE).to_owned()).collect(),
        });
        self.end(Phase::Failed);
        self.summary(Some(false), reason, message);
    }

    fn end(&mut self, phase: Phase) {
        let status = &mut self.status;
        status.phase = Some(phase);
        status.completion_time = Some(Time(self.now));
        let began = status.start_time.as_ref().map(|time| time.0).or(self.created).unwrap_or(self.now);
        // A clock that was set back gives no negative duration.
        let took = Duration::try_from(self.now.duration_since(began)).unwrap_or_default();
        status.duration = Some(format_duration(took));
    }

    fn summary(&mut self, verdict: Option<bool>, reason: Reason, message: &str) {
        let conditions = &mut self.status.conditions;
        conditions::set_summary(conditions, verdict, reason, &headline(message), self.generation, self.now);
    }
}

/// As much of the outputs as an object can hold. The shortest lists stay.
fn shortened(mut outputs: BTreeMap<String, OutputStatus>) -> BTreeMap<String, OutputStatus> {
    let size = |list: &[String]| list.iter().map(|item| item.len() + "\"\",".len()).sum::<usize>();
    let mut by_size: Vec<&mut OutputStatus> = outputs.values_mut().collect();
    by_size.sort_by_key(|output| size(&output.references));
    let mut total: usize = 0;
    for output in by_size {
        total = total.saturating_add(size(&output.references));
        if total > MAX_REFERENCES {
            output.references_omitted = Some(output.references.len() as u64);
            output.references = Vec::new();
        }
        let mut signatures: usize = 0;
        output.signatures.retain(|signature| {
            signatures = signatures.saturating_add(signature.len());
            signatures <= MAX_SIGNATURES
        });
    }
    outputs
}

/// The first line: conditions stand in tables. `failure` has the rest.
fn headline(message: &str) -> String {
    let first = cut(message.lines().next().unwrap_or_default(), MAX_MESSAGE);
    plain(first).trim_end_matches([';', ':']).to_owned()
}

/// Without what a terminal would take for an order: builders, and through them builds, have a say in messages.
fn plain(text: &str) -> String {
    text.replace(|c: char| c.is_control() && !matches!(c, '\n' | '\t'), "")
}

/// At most `limit` bytes of `text`, ending between two characters.
fn cut(text: &str, limit: usize) -> &str {
    let mut end = text.len().min(limit);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn nothing_new_is_no_write() {
        let mut request = BuildRequest::new("a", Default::default());
        let mut draft = Draft::new(&request, at(1));
        draft.progress(Phase::Pending, Reason::WaitingForClass, "no class");
        request.status = draft.finish();
        assert!(request.status.is_some());
        let mut draft = Draft::new(&request, at(2));
        draft.progress(Phase::Pending, Reason::WaitingForClass, "no class");
        assert_eq!(draft.finish(), None);
    }

    #[test]
    fn a_failure_marks_the_phase_that_was_not_reached() {
        let request = BuildRequest::new("a", Default::default());
        let mut draft = Draft::new(&request, at(1));
        draft.progress(Phase::Pending, Reason::Accepted, "");
        draft.phase(conditions::ACCEPTED, Status::True, Reason::Accepted, "");
        draft.begin_attempt(1, None);
        let mut later = draft.clone();
        later.now = at(93);
        later.fail(Reason::InputMissing, "no cache has x", &["line".into()]);
        let status = later.finish().unwrap();
        let condition = conditions::find(&status.conditions, conditions::SCHEDULED).unwrap();
        assert_eq!((condition.status.as_str(), condition.reason.as_str()), ("False", "InputMissing"));
        assert_eq!(status.duration.as_deref(), Some("1m32s"));
        assert_eq!(status.attempts[0].reason.as_deref(), Some("InputMissing"));
        assert_eq!(status.failure.unwrap().log_tail, ["line"]);
        assert_eq!(conditions::verdict(&status.conditions), Some(false));
    }

    /// With both budgets at their largest and a build that says a lot each time.
    #[test]
    fn the_longest_history_stays_small() {
        let mut request = BuildRequest::new("a", Default::default());
        for number in 1..=drover_api::MAX_ATTEMPTS {
            let mut draft = Draft::new(&request, at(number as i64));
            draft.begin_attempt(number as u32, Some(Quantity("1Gi".into())));
            draft.end_attempt(Reason::Evicted, &"x".repeat(100_000), true);
            request.status = draft.finish();
        }
        let attempts = &request.status.as_ref().unwrap().attempts;
        assert_eq!(attempts.len(), drover_api::MAX_ATTEMPTS);
        assert!(attempts.iter().all(|attempt| attempt.reason.as_deref() == Some("Evicted")));
        assert_eq!(
            attempts.iter().filter(|attempt| attempt.message.is_some()).count(),
            ATTEMPTS_WITH_MESSAGE
        );
        let size = serde_json::to_vec(&request.status).unwrap().len();
        assert!(size < 64 << 10, "{size} bytes");
    }

    /// Outputs that refer to all of their inputs, and caches that sign without end.
    #[test]
    fn the_largest_outputs_stay_small() {
        let output = |references: usize, signatures: usize| OutputStatus {
            path: "/nix/store/x".into(),
            references: (0..references)
                .map(|number| format!("/nix/store/{number:032}-{}", "n".repeat(200)))
                .collect(),
            signatures: (0..signatures).map(|number| format!("key-{number}:{}", "s".repeat(88))).collect(),
            ..OutputStatus::default()
        };
        let mut outputs: BTreeMap<_, _> = (0..15).map(|n| (format!("o{n}"), output(16_384, 5000))).collect();
        outputs.insert("out".into(), output(100, 3));
        let mut draft = Draft::new(&BuildRequest::new("a", Default::default()), at(1));
        draft.succeed(Reason::Built, outputs);
        let status = draft.finish().unwrap();
        let size = serde_json::to_vec(&status).unwrap().len();
        assert!(size < 256 << 10, "{size} bytes");
        // What is there is whole, and what is not says so.
        let (out, other) = (&status.outputs["out"], &status.outputs["o0"]);
        assert_eq!((out.references.len(), out.references_omitted, out.signatures.len()), (100, None, 3));
        assert_eq!((other.references.len(), other.references_omitted), (0, Some(16_384)));
        assert!(!other.signatures.is_empty());
    }

    #[test]
    fn a_verdict_is_said_again_of_a_spec_that_changed_and_of_no_other() {
        let mut request = BuildRequest::new("a", Default::default());
        request.metadata.generation = Some(1);
        let mut draft = Draft::new(&request, at(1));
        draft.progress(Phase::Pending, Reason::Accepted, "");
        draft.fail(Reason::Cancelled, "no", &[]);
        request.status = draft.finish();
        assert_eq!(Draft::new(&request, at(2)).restate(), None);
        request.metadata.generation = Some(2);
        let status = Draft::new(&request, at(2)).restate().unwrap();
        assert_eq!(status.observed_generation, Some(2));
        assert!(status.conditions.iter().all(|condition| condition.observed_generation == Some(2)));
        let mut before = request.status.clone().unwrap();
        assert!(before.conditions.iter().all(|condition| condition.observed_generation == Some(1)));
        // Nothing else of it is new.
        before.observed_generation = Some(2);
        for condition in &mut before.conditions {
            condition.observed_generation = Some(2);
        }
        assert_eq!(status, before);
        request.status = Some(status);
        assert_eq!(Draft::new(&request, at(3)).restate(), None);
    }

    #[test]
    fn conditions_get_the_first_line() {
        assert_eq!(headline("failed with exit code 7;\nlast 2 log lines:"), "failed with exit code 7");
        assert_eq!(headline(""), "");
    }

    /// A build prints what it likes, and its last lines are part of its builder's message.
    #[test]
    fn nobody_orders_a_terminal_about() {
        let request = BuildRequest::new("a", Default::default());
        let mut draft = Draft::new(&request, at(1));
        draft.progress(Phase::Running, Reason::Connecting, "lost\u{1b}[2J");
        draft.begin_attempt(1, None);
        draft.fail(Reason::BuildFailed, "exit\u{9b}31m code\r 7;\n> \u{8}\u{7}ä\tb", &[]);
        let status = draft.finish().unwrap();
        let said = serde_json::to_value(&status).unwrap();
        fn texts<'a>(value: &'a serde_json::Value, all: &mut Vec<&'a str>) {
            match value {
                serde_json::Value::String(text) => all.push(text),
                serde_json::Value::Array(list) => list.iter().for_each(|value| texts(value, all)),
                serde_json::Value::Object(map) => map.values().for_each(|value| texts(value, all)),
                _ => {}
            }
        }
        let mut all = vec![];
        texts(&said, &mut all);
        assert!(
            all.iter().all(|text| !text.contains(['\u{1b}', '\u{9b}', '\r', '\u{8}', '\u{7}'])),
            "{all:?}"
        );
        assert_eq!(status.failure.unwrap().message, "exit31m code 7;\n> ä\tb");
    }

    #[test]
    fn text_is_cut_between_characters() {
        assert_eq!(cut("aä", 2), "a");
        assert_eq!(cut("aä", 3), "aä");
    }
}
