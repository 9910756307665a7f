//! Kubernetes Events about requests: what happened, in the order in which it did, for `kubectl describe` and
//! `kubectl events --for`.
//!
//! Events follow from the status alone: [`transitions`] compares what was stored with what was written. So no restart says
//! anything twice, and nothing is said that is not so. It is pure. [`publish`] brings events to the API server, which is allowed
//! to fail: an event that is lost is lost, and no build waits for one.
//!
//! Notes are made of what the status says, and of nothing else: there is no secret in one that is not there.

pub mod publish;
#[cfg(test)]
mod tests;

use drover_api::conditions::{self, find, is_true};
use drover_api::{Attempt, BuildRequestStatus, Reason};

macro_rules! words {
    ($($name:ident $kind:ident $text:literal,)*) => {
        /// An event's `reason`: a closed list.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub enum Word {
            $(#[doc = $text] $name,)*
        }

        impl Word {
            /// All of them, in the order of a request's life.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// As it stands in the event's `reason`.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)* }
            }

            /// Whether the event's `type` is `Warning`: somebody may have to do something.
            pub const fn is_warning(self) -> bool {
                match self { $(Self::$name => matches!(Type::$kind, Type::Warning),)* }
            }

            /// What it means.
            pub const fn description(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

enum Type {
    Normal,
    Warning,
}

words! {
    Accepted Normal "The spec is valid and its class may be used.",
    Suspended Normal "`spec.suspend` is true.",
    WaitingForClass Warning "The class does not exist, no class is the default, or it names a Secret that is not as it should be.",
    WaitingForInput Normal "An input is in none of the class's caches yet.",
    WaitingForSameBuild Normal "Another request is building the same derivation.",
    WaitingForConcurrency Normal "The class's `concurrency` is used up.",
    WaitingForQuota Warning "A quota, an admission policy or the lack of the builders' namespace keeps the pod from being made.",
    PodCreated Normal "An attempt has its pod; the note names both.",
    WaitingForNode Normal "No node has room for the pod.",
    Scheduled Normal "The pod has a node; the note names it.",
    ImagePull Warning "The builder's image cannot be pulled yet.",
    BuilderReady Normal "The builder answered.",
    InputsCopied Normal "Every input is in the builder's store, and locked.",
    BuildStarted Normal "The builder runs.",
    ConnectionLost Warning "The connection to the builder broke; another one is made, and the build goes on.",
    Retrying Warning "An attempt failed and another one will be made; the note says why and when.",
    Cancelled Normal "`spec.cancel` was set.",
    Failed Warning "The end: the note begins with the reason, a word of the table of reasons.",
    Succeeded Normal "The end: the note has the output, or how many there are.",
}

/// The table for the documentation (`cargo xtask docs`).
pub fn markdown() -> String {
    let row = |word: &Word| {
        let kind = if word.is_warning() { "Warning" } else { "Normal" };
        format!("| `{}` | {kind} | {} |\n", word.as_str(), word.description())
    };
    let head = "| reason | type | what it means |\n|---|---|---|\n".to_owned();
    [head].into_iter().chain(Word::ALL.iter().map(row)).collect()
}

/// Something that happened to a request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Event {
    pub word: Word,
    /// For people. May be empty, and as long as a condition's message.
    pub note: String,
    /// Namespace and name of the pod of the attempt that it is about.
    pub pod: Option<(String, String)>,
}

/// What happened between these two, the status that was stored before and the one that was written over it; in order. None of
/// a request that had its verdict.
pub fn transitions(before: Option<&BuildRequestStatus>, after: &BuildRequestStatus) -> Vec<Event> {
    let nothing = BuildRequestStatus::default();
    let before = before.unwrap_or(&nothing);
    if conditions::verdict(&before.conditions).is_some() {
        return vec![];
    }
    let step = Step { before, after };
    let mut events = vec![];
    let mut say = |word, note: String| events.push(Event { word, note, pod: step.pod() });
    if step.reaches(conditions::ACCEPTED) {
        let class = after.class.as_deref().unwrap_or_default();
        say(Word::Accepted, format!("BuilderClass {class} builds {}", step.drv_path()));
    }
    if let Some((number, pod)) = step.new_pod() {
        say(Word::PodCreated, format!("attempt {number} has pod {pod}"));
    }
    if step.reaches(conditions::SCHEDULED) {
        say(Word::Scheduled, step.message(conditions::SCHEDULED).to_owned());
    }
    if let Some(word) = step.new_reason().and_then(waits) {
        say(word, step.message(conditions::SUCCEEDED).to_owned());
    }
    if step.reaches(conditions::BUILDER_READY) {
        let sandbox = after.builder.as_ref().and_then(|builder| builder.sandbox.as_deref());
        let sandbox = sandbox.map_or_else(String::new, |sandbox| format!("; sandbox: {sandbox}"));
        say(Word::BuilderReady, format!("the builder answered{sandbox}"));
    }
    if step.reaches(conditions::INPUTS_COPIED) {
        say(Word::InputsCopied, "every input is in the builder's store".into());
        say(Word::BuildStarted, format!("building {}", step.drv_path()));
    }
    if step.loses_connection() {
        say(Word::ConnectionLost, step.message(conditions::BUILDER_READY).to_owned());
    }
    if step.new_reason() == Some(Reason::Retrying) {
        say(Word::Retrying, step.message(conditions::SUCCEEDED).to_owned());
    }
    if let Some(succeeded) = conditions::verdict(&after.conditions) {
        let reason = step.reason_after().unwrap_or_default();
        let message = step.message(conditions::SUCCEEDED);
        match succeeded {
            true => say(Word::Succeeded, format!("{reason}: {message}")),
            false if reason == Reason::Cancelled.as_str() => say(Word::Cancelled, message.to_owned()),
            false => say(Word::Failed, format!("{reason}: {message}")),
        }
    }
    events
}

/// The word for what a request waits for, if it does.
fn waits(reason: Reason) -> Option<Word> {
    Some(match reason {
        Reason::Suspended => Word::Suspended,
        Reason::WaitingForClass => Word::WaitingForClass,
        Reason::WaitingForInput => Word::WaitingForInput,
        Reason::WaitingForSameBuild => Word::WaitingForSameBuild,
        Reason::WaitingForConcurrency => Word::WaitingForConcurrency,
        Reason::WaitingForQuota => Word::WaitingForQuota,
        Reason::WaitingForNode => Word::WaitingForNode,
        Reason::ImagePull => Word::ImagePull,
        _ => return None,
    })
}

struct Step<'a> {
    before: &'a BuildRequestStatus,
    after: &'a BuildRequestStatus,
}

impl<'a> Step<'a> {
    /// Whether the condition has become true. Those of an attempt before do not count for the next one, except the request's
    /// own: that it was accepted.
    fn reaches(&self, condition: &str) -> bool {
        let counts = condition == conditions::ACCEPTED || self.before.attempt == self.after.attempt;
        let was = counts && is_true(&self.before.conditions, condition);
        is_true(&self.after.conditions, condition) && !was
    }

    fn loses_connection(&self) -> bool {
        let is_lost = |status: &BuildRequestStatus| {
            find(&status.conditions, conditions::BUILDER_READY)
                .is_some_and(|ready| ready.reason == Reason::ConnectionLost.as_str())
        };
        is_lost(self.after) && !is_lost(self.before)
    }

    /// Number of the attempt whose pod was seen, and the pod.
    fn new_pod(&self) -> Option<(u32, &'a str)> {
        let Attempt { number, pod, .. } = self.after.attempts.last()?;
        let was_known = self.before.attempts.iter().any(|one| one.number == *number && one.pod.is_some());
        pod.as_deref().filter(|_| !was_known).map(|pod| (*number, pod))
    }

    /// The pod of the last attempt.
    fn pod(&self) -> Option<(String, String)> {
        let pod = self.after.attempts.last()?.pod.clone()?;
        Some((self.after.builder.as_ref()?.namespace.clone()?, pod))
    }

    /// The summary's reason, if it is another one than before.
    fn new_reason(&self) -> Option<Reason> {
        let reason = self.reason_after()?;
        let was = find(&self.before.conditions, conditions::SUCCEEDED).map(|summary| summary.reason.as_str());
        Reason::parse(reason).filter(|_| was != Some(reason))
    }

    fn reason_after(&self) -> Option<&'a str> {
        find(&self.after.conditions, conditions::SUCCEEDED).map(|summary| summary.reason.as_str())
    }

    fn message(&self, condition: &str) -> &'a str {
        find(&self.after.conditions, condition).map(|found| found.message.as_str()).unwrap_or_default()
    }

    fn drv_path(&self) -> &'a str {
        self.after.drv_path.as_deref().unwrap_or_default()
    }
}

/// The table for the documentation (`cargo xtask docs`).
pub fn markdown_table() -> String {
    let mut table = String::from("| event | type | meaning |\n|---|---|---|\n");
    for word in Word::ALL {
        let kind = if word.is_warning() { "Warning" } else { "Normal" };
        table.push_str(&format!("| `{}` | {kind} | {} |\n", word.as_str(), word.description()));
    }
    table
}
