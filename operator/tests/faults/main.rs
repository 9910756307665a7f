//! The real operator with its real kube client against an API server in memory: everything that can go wrong between the two,
//! at every place where it can, one at a time.
//!
//! A run is repeated with the fault at the first request that it fits, at the second and so on, until it no longer comes
//! so far: nothing is left to chance. A failure prints the place; `DROVER_FAULT='Before(Reset) 7'` runs that one alone.

mod audit;
mod builder;
mod cluster;
mod conformance;
mod double;
mod events;
mod line;
mod run;
mod scenarios;
mod silence;
mod time;
mod traces;
mod upsets;

use std::sync::Arc;

use line::{Fault, Faults, Line, Trouble};
use run::run;
use scenarios::Scenario;

/// No run has so many places.
const MOST: usize = 1000;

const ALL: [Fault; 14] = [
    Fault::Before(Trouble::Crash),
    Fault::After(Trouble::Crash),
    Fault::Broken,
    Fault::Expired,
    Fault::Lost,
    Fault::Late,
    Fault::Stale,
    Fault::Before(Trouble::Internal),
    Fault::After(Trouble::Internal),
    Fault::Before(Trouble::TooMany),
    Fault::Before(Trouble::Silence),
    Fault::After(Trouble::Silence),
    Fault::Before(Trouble::Reset),
    Fault::After(Trouble::Reset),
];

/// After so many failures a scenario says what it has found.
const ENOUGH: usize = 5;

/// Every fault at every place.
fn exhaust(scenario: &Scenario) {
    if let Ok(only) = std::env::var("DROVER_FAULT") {
        return replay(scenario, &only);
    }
    run(scenario, Faults::none(), None)
        .unwrap_or_else(|why| panic!("{} without a fault: {why}", scenario.name));
    let mut failures = vec![];
    let mut places = 0;
    for fault in ALL {
        for nth in 0.. {
            if failures.len() >= ENOUGH {
                break;
            }
            assert!(nth < MOST, "{}: {fault:?} never misses", scenario.name);
            match run(scenario, Faults::at(nth, fault), Some(fault)) {
                Ok(report) if report.hit.is_none() => break,
                Ok(_) => places += 1,
                Err(why) => {
                    failures.push(format!("{}: DROVER_FAULT='{fault:?} {nth}': {why}", scenario.name))
                }
            }
        }
    }
    println!("{}: {places} places", scenario.name);
    assert!(failures.is_empty(), "{} failed:\n{}", failures.len(), failures.join("\n"));
}

/// One place alone, with all that went over the line.
fn replay(scenario: &Scenario, only: &str) {
    let (fault, nth) = only.rsplit_once(' ').expect("a fault and a number");
    let fault = ALL.into_iter().find(|known| format!("{known:?}") == fault).expect("one of the faults");
    let faults = Faults::at(nth.parse().expect("a number"), fault);
    let report = run(scenario, faults, Some(fault)).unwrap_or_else(|why| panic!("{}: {why}", scenario.name));
    println!("{}\nhit: {:?}", report.trace.join("\n"), report.hit);
}

#[test]
fn plain() {
    exhaust(&scenarios::PLAIN);
}

#[test]
fn failing() {
    exhaust(&scenarios::FAILING);
}

#[test]
fn evicted() {
    exhaust(&scenarios::EVICTED);
}

#[test]
fn lost() {
    exhaust(&scenarios::LOST);
}

#[test]
fn dag() {
    exhaust(&scenarios::DAG);
}

#[test]
fn equal() {
    exhaust(&scenarios::EQUAL);
}

#[test]
fn cancelled() {
    exhaust(&scenarios::CANCELLED);
}

#[test]
fn deleted() {
    exhaust(&scenarios::DELETED);
}

#[test]
fn short_lived() {
    exhaust(&scenarios::SHORT_LIVED);
}

#[test]
fn by_path() {
    exhaust(&scenarios::BY_PATH);
}

/// The same script passes against a real API server.
#[test]
fn the_double_does_what_it_is_said_to_do() {
    let world = cluster::World::new(vec![]);
    world.make(
        double::Key::new("namespaces", "", conformance::NAMESPACE),
        serde_json::json!({"metadata": {}}),
    );
    let line = Line {
        server: world.server.clone(),
        faults: Arc::default(),
        client: 0,
        alive: Arc::new(true.into()),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let said = runtime.expect("a runtime").block_on(async {
        world.time.enter();
        conformance::script(kube::Client::new(line, "default")).await
    });
    assert_eq!(said, conformance::EXPECTED);
}
