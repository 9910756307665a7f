//! What is said of a request as spans; and that none is said twice, whatever breaks, which every run of every scenario checks.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use drover_operator::trace::{Sink, Span};

use crate::line::Faults;
use crate::run::run;
use crate::scenarios::{self, Scenario};

/// Keeps what it gets, from all operators of a run.
#[derive(Default)]
pub(crate) struct Spans(Mutex<Vec<Span>>);

impl Sink for Spans {
    fn take(&self, span: Span) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(span);
    }
}

impl Spans {
    /// Each once, and of a request no more than one whole.
    pub(crate) fn check(&self) -> Result<(), String> {
        let spans = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut ids = HashSet::new();
        match spans.iter().find(|span| !ids.insert((span.trace, span.id))) {
            Some(twice) => Err(format!("a span was said twice: {twice:?}")),
            None => Ok(()),
        }
    }

    /// Names and errors in the order of their ends; of those that end together, children first.
    pub(crate) fn told(&self) -> Vec<String> {
        let mut spans = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        spans.sort_by_key(|span| (span.end.as_second(), span.parent.is_none(), span.name == "attempt"));
        let word = |span: &Span| span.error.map(|why| format!(" {why}")).unwrap_or_default();
        spans.iter().map(|span| format!("{}{}", span.name, word(span))).collect()
    }
}

fn told(scenario: &Scenario) -> Vec<String> {
    run(scenario, Faults::none(), None).unwrap_or_else(|why| panic!("{why}")).spans
}

/// Of a session there is its begin and its end: conversations of these tests have no phases.
#[test]
fn a_life_is_said_as_it_goes() {
    let arrival = ["wait", "schedule", "start"];
    let ended = ["connect", "session", "attempt", "request"];
    assert_eq!(told(&scenarios::PLAIN), [&arrival[..], &ended].concat());
    let failed = ended.map(|name| format!("{name} BuildFailed"));
    assert_eq!(told(&scenarios::FAILING), [&arrival.map(str::to_owned)[..], &failed].concat());
    let evicted = ["connect ConnectionLost", "session ConnectionLost", "attempt Evicted"];
    assert_eq!(told(&scenarios::EVICTED), [&arrival[..], &evicted, &arrival, &ended].concat());
    // Its session was told to end, and did not fail.
    let cancelled = ["connect", "session", "attempt Cancelled", "request Cancelled"];
    assert_eq!(told(&scenarios::CANCELLED), [&arrival[..], &cancelled].concat());
}
