//! Which of Drover's invariants an API server's audit log shows to be broken.
//!
//! [`audit`] is a pure function of the log: it asks nobody, and least of all the operator. It cannot see what no request to
//! the API server tells, such as what happens inside of a pod. The log needs the bodies of writes of requests, pods and
//! leases (the policy of `cargo xtask cluster` has them).

mod checks;
mod event;
mod history;
#[cfg(test)]
mod tests;

use std::fmt;

use jiff::SignedDuration;

pub use event::{Event, Log};
pub use history::{History, Pod, Request, StatusWrite};

/// Drover's API group.
pub const GROUP: &str = "drover.build";

/// What the checks have to know of the installation, and how long things may take.
#[derive(Clone, Debug)]
pub struct Rules {
    /// The operator as the API server names it: `system:serviceaccount:NAMESPACE:NAME`.
    pub operator: String,
    /// Its namespace, where its lease is.
    pub namespace: String,
    /// Where builders are.
    pub builders: String,
    /// A pod's creation that was sent before the request's deletion was answered may arrive this much later. No API can
    /// make the two one act: they are different objects.
    pub race: SignedDuration,
    /// Until all that was made for a deleted request has to be gone.
    pub gone_within: SignedDuration,
    /// How old the last look at the API server itself may be when a failure is written.
    pub fresh: SignedDuration,
    /// The clocks of operator and API server, and a request's way.
    pub skew: SignedDuration,
}

impl Rules {
    /// Of a release of the chart, with the times that DESIGN.md gives.
    pub fn new(namespace: &str, service_account: &str, builders: &str) -> Self {
        Self {
            operator: format!("system:serviceaccount:{namespace}:{service_account}"),
            namespace: namespace.to_owned(),
            builders: builders.to_owned(),
            race: SignedDuration::from_secs(5),
            gone_within: SignedDuration::from_secs(60),
            fresh: SignedDuration::from_secs(30),
            skew: SignedDuration::from_secs(2),
        }
    }
}

/// An invariant that does not hold.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Violation {
    /// As DESIGN.md numbers them; `Lease` for writes of an operator that does not lead.
    pub invariant: &'static str,
    /// The request, pod or write.
    pub about: String,
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.invariant, self.about, self.what)
    }
}

/// All violations that the log shows, in order.
pub fn audit(events: &[Event], rules: &Rules) -> Vec<Violation> {
    let history = History::new(events, rules);
    let mut found = checks::all(events, &history, rules);
    found.sort();
    found.dedup();
    found
}

/// Lines of a text in which one of the secrets stands (S8): their numbers, from 1. Never the secret itself.
pub fn leaks(text: &str, secrets: &[String]) -> Vec<usize> {
    let secrets: Vec<&str> = secrets.iter().map(String::as_str).filter(|secret| !secret.is_empty()).collect();
    let lines = text.lines().enumerate();
    lines
        .filter(|(_, line)| secrets.iter().any(|secret| line.contains(secret)))
        .map(|(index, _)| index + 1)
        .collect()
}
