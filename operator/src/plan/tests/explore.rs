//! All reachable worlds, breadth first: every event and every cut of every plan from every state, until nothing new comes.
//!
//! Each of the scenarios lets some things go wrong and leaves out others, so that it closes. What holds at every effect is
//! checked by the simulation itself; here: plans are deterministic, what was done is not done again, and from every state there
//! is an end as soon as nothing fails any more (DESIGN.md: S12, L1).

use std::collections::{BTreeSet, HashMap, VecDeque};

use super::sim::*;
use super::*;
use crate::world::Stage;

/// The longest way from any state to the end when all goes well, in steps of [`Sim::go_well`].
const MAX_STEPS_TO_THE_END: u32 = 60;

/// What a scenario may have, so that all of them stay within seconds.
const MAX_STATES: usize = 15_000;

struct Explored {
    name: &'static str,
    states: usize,
    ends: BTreeSet<String>,
    longest: u32,
}

fn explore(name: &'static str, start: Sim, events: impl Fn(&Sim) -> Vec<Event>) -> Explored {
    let mut seen: HashMap<String, ()> = HashMap::from([(start.key(), ())]);
    let mut distances = HashMap::new();
    let mut queue = VecDeque::from([start]);
    let mut explored = Explored { name, states: 0, ends: BTreeSet::new(), longest: 0 };
    while let Some(sim) = queue.pop_front() {
        explored.states += 1;
        assert!(explored.states <= MAX_STATES, "{name} does not close");
        explored.longest = explored.longest.max(distance(&sim, &mut distances));
        for next in successors(&sim, &events) {
            if next.is_settled() {
                next.check_settled();
                explored.ends.insert(next.reason().to_owned());
            } else if seen.insert(next.key(), ()).is_none() {
                queue.push_back(next);
            }
        }
    }
    println!("{name}: {} states, {} steps to the end at most", explored.states, explored.longest);
    explored
}

fn successors(sim: &Sim, events: &impl Fn(&Sim) -> Vec<Event>) -> Vec<Sim> {
    let mut all = vec![];
    for event in events(sim) {
        let mut next = sim.clone();
        if next.happen(event) {
            all.push(next);
        }
    }
    for cut in 0.. {
        let mut next = sim.clone();
        let plan = next.pass(cut);
        let effects = usize::from(plan.status.is_some()) + plan.actions.len();
        if cut >= effects {
            check_repeated(sim, &next, &plan);
            all.push(next);
            break;
        }
        all.push(next);
    }
    if sim.lags {
        let mut next = sim.clone();
        next.stale_pass(usize::MAX);
        all.push(next);
    }
    all
}

/// What was done is not said again: with the same world, there is nothing more to write.
fn check_repeated(before: &Sim, after: &Sim, done: &Plan) {
    let again = plan(&before.world(false), before.now);
    assert_eq!(again, plan(&before.world(false), before.now), "nothing is random");
    let changes = |action: &Action| {
        matches!(action, Action::CreatePod { .. } | Action::StartSession { .. } | Action::StopSession)
    };
    if matches!(done.requeue, Requeue::After(_)) && !done.actions.iter().any(changes) {
        let again = plan(&after.world(false), after.now);
        assert_eq!(again.status, None, "after {done:#?}");
    }
}

/// How many steps of going well lead to the end. Each state is asked once.
fn distance(sim: &Sim, known: &mut HashMap<String, u32>) -> u32 {
    let mut path = vec![];
    let mut sim = sim.clone();
    let mut steps = loop {
        if sim.is_settled() {
            break 0;
        }
        let key = sim.key();
        if let Some(steps) = known.get(&key) {
            break *steps;
        }
        path.push(key);
        assert!(path.len() as u32 <= MAX_STEPS_TO_THE_END, "no end in sight: {:#?}", sim.request.status);
        sim.go_well();
    };
    for key in path.into_iter().rev() {
        steps += 1;
        known.insert(key, steps);
    }
    assert!(steps <= MAX_STEPS_TO_THE_END, "{steps} steps to the end");
    steps
}

impl Explored {
    fn ends_with(&self, reasons: &[&str]) {
        assert_eq!(self.ends.iter().map(String::as_str).collect::<Vec<_>>(), reasons, "{}", self.name);
    }
}

/// A request with budgets of so many retries, and a class; sessions that stop at few stages.
fn start(infrastructure: u32, build: u32) -> Sim {
    let mut spec = spec();
    (spec.retries.infrastructure, spec.retries.build) = (infrastructure, build);
    let mut sim = Sim::new(spec, class());
    sim.stages = &[Stage::Connecting, Stage::Building];
    sim
}

/// A crash is in every scenario: each plan is cut before its first effect as well.
const LIFE: [Event; 3] = [Event::Wait, Event::Schedule, Event::Advance];

fn explore_events(name: &'static str, start: Sim, events: &[Event]) -> Explored {
    let all: Vec<_> = events.iter().copied().chain(LIFE).collect();
    explore(name, start, |_| all.clone())
}

/// What becomes of a builder's pod.
#[test]
fn pods_that_end() {
    let events = [Event::PodEnds("Evicted", None), Event::PodGone, Event::Crash];
    explore_events("pods", start(1, 0), &events).ends_with(&[
        "AlreadyBuilt",
        "BuilderLost",
        "Built",
        "Evicted",
        "StartTimedOut",
        "Unplaceable",
    ]);
}

/// What becomes of a session while its pod lives.
#[test]
fn sessions_that_end() {
    let events = [Event::Ends(Reason::ConnectionLost)];
    explore_events("connections", start(1, 0), &events).ends_with(&[
        "AlreadyBuilt",
        "Built",
        "ConnectionLost",
        "StartTimedOut",
        "Unplaceable",
    ]);
    let mut start = start(0, 0);
    start.stages = &[Stage::Connecting, Stage::Built];
    let events = [Event::Ends(Reason::InfrastructureFailure)];
    explore_events("collecting", start, &events).ends_with(&[
        "Built",
        "ConnectionLost",
        "InfrastructureFailure",
        "StartTimedOut",
        "Unplaceable",
    ]);
}

/// What builders say, and what their pods say after them.
#[test]
fn builds_that_fail() {
    let events = [Event::Ends(Reason::BuildFailed), Event::ContainerEnds, Event::PodEnds("Evicted", None)];
    explore_events("builds", start(0, 1), &events).ends_with(&[
        "AlreadyBuilt",
        "BuildFailed",
        "BuilderLost",
        "Built",
        "Evicted",
        "StartTimedOut",
        "Unplaceable",
    ]);
    explore_events("memory", start(2, 0), &[Event::Ends(Reason::OutOfMemory)]).ends_with(&[
        "AlreadyBuilt",
        "Built",
        "OutOfMemory",
        "StartTimedOut",
        "Unplaceable",
    ]);
}

/// Watches that show what was before the last write.
#[test]
fn watches_that_lag() {
    let mut start = start(1, 0);
    start.lags = true;
    explore_events("lags", start, &[Event::PodEnds("Evicted", None)]).ends_with(&[
        "AlreadyBuilt",
        "Built",
        "Evicted",
        "StartTimedOut",
        "Unplaceable",
    ]);
}

/// What keeps a pod from being made, and a builder from its start.
#[test]
fn pods_that_do_not_start() {
    let events = |sim: &Sim| {
        let admissions = [Admission::Open, Admission::Quota, Admission::Invalid];
        let changes = admissions.map(|admission| Event::Env(Env { admission, ..sim.env }));
        changes.into_iter().chain([Event::Suspend(true), Event::Suspend(false)]).chain(LIFE).collect()
    };
    explore("admission", start(0, 0), events).ends_with(&["Built", "StartTimedOut", "Unplaceable"]);
    let events = [Event::ImageFails, Event::Drain, Event::Cancel];
    explore_events("starts", start(0, 0), &events).ends_with(&[
        "Built",
        "Cancelled",
        "Evicted",
        "StartTimedOut",
        "Unplaceable",
    ]);
}

/// What other requests do, the queue, and the class.
#[test]
fn requests_that_wait() {
    let inputs = |sim: &Sim| {
        let to: &[Input] = match sim.env.input {
            // Nothing in a circle comes to an end.
            Input::Going if sim.env.has_cycle => &[],
            Input::Going => &[Input::Cached, Input::Failed, Input::Lost],
            // Whoever comes later than that is not waited for.
            Input::Orphan if sim.is_young() => &[Input::Going],
            _ => &[],
        };
        let mut events = vec![Event::Wait, Event::Crash];
        events.extend(to.iter().map(|input| Event::Env(Env { input: *input, ..sim.env })));
        let has_unread = !sim.env.has_unread;
        events.push(Event::Env(Env { has_unread, ..sim.env }));
        let has_cycle = sim.env.has_cycle || sim.env.input == Input::Going;
        events.push(Event::Env(Env { has_cycle, ..sim.env }));
        events
    };
    let mut waits = start(0, 0);
    waits.env.input = Input::Orphan;
    explore("inputs", waits, inputs).ends_with(&[
        "DependencyCycle",
        "DependencyFailed",
        "InputMissing",
        // Here, no pod finds a node.
        "Unplaceable",
    ]);
    let sames = |sim: &Sim| {
        let to: &[Same] = match sim.env.same {
            Same::Running => &[Same::None, Same::Failed],
            Same::None => &[Same::Running],
            Same::Failed => &[],
        };
        let mut events = vec![Event::Wait, Event::Suspend(true), Event::Suspend(false)];
        events.extend(to.iter().map(|same| Event::Env(Env { same: *same, ..sim.env })));
        events.push(Event::Env(Env { has_room: !sim.env.has_room, ..sim.env }));
        events.push(Event::Env(Env { outputs: true, ..sim.env }));
        events
    };
    explore("queue", start(0, 0), sames).ends_with(&["AlreadyBuilt", "BuildFailed", "Unplaceable"]);
    let classes = |sim: &Sim| {
        let change = Event::Env(Env { has_class: !sim.env.has_class, ..sim.env });
        [change, Event::Suspend(true), Event::Suspend(false)].into_iter().chain(LIFE).collect()
    };
    explore("class", start(0, 0), classes).ends_with(&["Built", "StartTimedOut", "Unplaceable"]);
}

/// A request that only names its derivation: what caches have of that, before an attempt and while one runs.
#[test]
fn derivations_that_are_read() {
    let files = |to: &'static [File]| {
        move |sim: &Sim| {
            let changes = to.iter().map(|file| Event::Env(Env { file: *file, ..sim.env }));
            changes.chain([Event::Crash]).chain(LIFE).collect::<Vec<_>>()
        }
    };
    let mut named = start(0, 0);
    named.request.spec.derivation = None;
    named.before.0.spec.derivation = None;
    named.env.file = File::Absent;
    let comes_and_goes = files(&[File::There, File::Absent, File::Unreachable]);
    explore("files", named.clone(), comes_and_goes).ends_with(&[
        "Built",
        "InputMissing",
        "StartTimedOut",
        "Unplaceable",
    ]);
    named.lags = true;
    let is_wrong = files(&[File::There, File::Wrong]);
    explore("forgeries", named, is_wrong).ends_with(&[
        "Built",
        "InputMissing",
        "PathNotProven",
        "StartTimedOut",
        "Unplaceable",
    ]);
}
