//! Conditions: their names, and how they change.
//!
//! `kubectl wait`, kstatus, Helm and Argo CD each look at another one; together they understand a request. Setting a
//! condition to what it is already changes nothing, its time included, so that a settled request is never written.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;

use crate::Reason;

/// The spec is valid and its class may be used.
pub const ACCEPTED: &str = "Accepted";
/// The pod has a node.
pub const SCHEDULED: &str = "Scheduled";
/// The builder answered.
pub const BUILDER_READY: &str = "BuilderReady";
/// Every input is in the builder's store, and locked.
pub const INPUTS_COPIED: &str = "InputsCopied";
/// The builder ended well.
pub const BUILT: &str = "Built";
/// Every output was received, checked and stored.
pub const OUTPUTS_COLLECTED: &str = "OutputsCollected";
/// The summary: Unknown while work goes on, then True or False for ever.
pub const SUCCEEDED: &str = "Succeeded";
/// True if and only if Succeeded is (kstatus, Argo CD).
pub const READY: &str = "Ready";
/// True while work goes on (kstatus).
pub const RECONCILING: &str = "Reconciling";
/// True after a final failure (kstatus).
pub const STALLED: &str = "Stalled";

/// The phases of a build, in order.
pub const PHASES: [&str; 6] = [ACCEPTED, SCHEDULED, BUILDER_READY, INPUTS_COPIED, BUILT, OUTPUTS_COLLECTED];

/// Longest message that a condition may have (Kubernetes: meta/v1, Condition).
pub const MAX_MESSAGE: usize = 32_768;

/// A condition's status.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Status {
    True,
    False,
    Unknown,
}

impl Status {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::True => "True",
            Self::False => "False",
            Self::Unknown => "Unknown",
        }
    }
}

impl From<bool> for Status {
    fn from(is_true: bool) -> Self {
        if is_true { Self::True } else { Self::False }
    }
}

/// Sets the condition `type_` and says whether anything changed. `now` becomes the time of transition only if the
/// status changed.
pub fn set(
    conditions: &mut Vec<Condition>,
    type_: &str,
    status: Status,
    reason: Reason,
    message: &str,
    generation: Option<i64>,
    now: Timestamp,
) -> bool {
    let mut next = Condition {
        type_: type_.to_owned(),
        status: status.as_str().to_owned(),
        reason: reason.as_str().to_owned(),
        message: shorten(message).to_owned(),
        observed_generation: generation,
        last_transition_time: Time(now),
    };
    match conditions.iter_mut().find(|condition| condition.type_ == type_) {
        Some(current) => {
            if current.status == next.status {
                next.last_transition_time = current.last_transition_time.clone();
            }
            let changed = *current != next;
            *current = next;
            changed
        }
        None => {
            conditions.push(next);
            true
        }
    }
}

/// Sets the four summaries from one verdict: None while work goes on.
pub fn set_summary(
    conditions: &mut Vec<Condition>,
    verdict: Option<bool>,
    reason: Reason,
    message: &str,
    generation: Option<i64>,
    now: Timestamp,
) -> bool {
    let succeeded = verdict.map_or(Status::Unknown, Status::from);
    let summaries = [
        (SUCCEEDED, succeeded),
        (READY, (verdict == Some(true)).into()),
        (RECONCILING, verdict.is_none().into()),
        (STALLED, (verdict == Some(false)).into()),
    ];
    let mut changed = false;
    for (type_, status) in summaries {
        changed |= set(conditions, type_, status, reason, message, generation, now);
    }
    changed
}

pub fn find<'a>(conditions: &'a [Condition], type_: &str) -> Option<&'a Condition> {
    conditions.iter().find(|condition| condition.type_ == type_)
}

pub fn is_true(conditions: &[Condition], type_: &str) -> bool {
    find(conditions, type_).is_some_and(|condition| condition.status == "True")
}

/// The final word, if it was spoken: whether the request succeeded.
pub fn verdict(conditions: &[Condition]) -> Option<bool> {
    match find(conditions, SUCCEEDED)?.status.as_str() {
        "True" => Some(true),
        "False" => Some(false),
        _ => None,
    }
}

fn shorten(message: &str) -> &str {
    let mut end = message.len().min(MAX_MESSAGE);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    &message[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn what_is_already_so_changes_nothing() {
        let mut conditions = vec![];
        assert!(set_summary(&mut conditions, None, Reason::Building, "", Some(1), at(1)));
        let before = conditions.clone();
        assert!(!set_summary(&mut conditions, None, Reason::Building, "", Some(1), at(2)));
        assert_eq!(conditions, before);
    }

    #[test]
    fn time_moves_with_the_status_only() {
        let mut conditions = vec![];
        set(&mut conditions, SUCCEEDED, Status::Unknown, Reason::Pending, "", None, at(1));
        assert!(set(&mut conditions, SUCCEEDED, Status::Unknown, Reason::Building, "", None, at(2)));
        assert_eq!(conditions[0].last_transition_time, Time(at(1)));
        assert!(set(&mut conditions, SUCCEEDED, Status::True, Reason::Built, "", None, at(3)));
        assert_eq!(conditions[0].last_transition_time, Time(at(3)));
    }

    #[test]
    fn summaries_agree() {
        for (given, ready, reconciling, stalled) in
            [(None, false, true, false), (Some(true), true, false, false), (Some(false), false, false, true)]
        {
            let mut conditions = vec![];
            set_summary(&mut conditions, given, Reason::Pending, "", None, at(1));
            assert_eq!(verdict(&conditions), given);
            assert_eq!(is_true(&conditions, READY), ready);
            assert_eq!(is_true(&conditions, RECONCILING), reconciling);
            assert_eq!(is_true(&conditions, STALLED), stalled);
        }
    }

    #[test]
    fn long_messages_are_cut_between_characters() {
        let message = "ä".repeat(MAX_MESSAGE);
        assert_eq!(shorten(&message).len(), MAX_MESSAGE);
        assert_eq!(shorten(&message[..MAX_MESSAGE + 2]).len(), MAX_MESSAGE);
        assert_eq!(shorten(&format!("x{message}")).len(), MAX_MESSAGE - 1);
    }
}
