//! What is said of a request, of one build that succeeds, one that fails and one that is tried again; and that nothing depends on
//! it. That nothing is said twice, whatever breaks, every run of every scenario checks (`audit`).

use crate::line::Faults;
use crate::run::run;
use crate::scenarios::{self, Scenario};

const BEGIN: [&str; 6] =
    ["Accepted", "PodCreated", "Scheduled", "BuilderReady", "InputsCopied", "BuildStarted"];

fn said(scenario: &Scenario) -> Vec<String> {
    run(scenario, Faults::none(), None).unwrap_or_else(|why| panic!("{why}")).events
}

#[test]
fn each_transition_once_and_in_order() {
    assert_eq!(said(&scenarios::PLAIN), [&BEGIN[..], &["Succeeded"]].concat());
    assert_eq!(said(&scenarios::FAILING), [&BEGIN[..], &["Failed"]].concat());
    assert_eq!(said(&scenarios::EVICTED), [&BEGIN[..], &["Retrying"], &BEGIN[1..], &["Succeeded"]].concat());
}

#[test]
fn an_operator_that_may_say_nothing_builds_all_the_same() {
    let refused = Scenario {
        setup: |world| {
            scenarios::class(world);
            world.server.admit(Box::new(|key, _| match key.kind.plural {
                "events" => Err(crate::double::Failure::internal()),
                _ => Ok(()),
            }));
        },
        ..scenarios::PLAIN
    };
    assert_eq!(said(&refused), Vec::<String>::new());
}
