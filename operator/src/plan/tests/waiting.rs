//! What an attempt waits for before it begins, and what ends a request that never had one.

use jiff::SignedDuration;

use super::sim::*;
use super::*;

/// A new request in such surroundings, after its first look.
fn with(env: Env) -> Sim {
    let mut sim = Sim::new(spec(), class());
    sim.env = env;
    sim.reconcile();
    sim
}

fn later(sim: &mut Sim, seconds: i64) -> Plan {
    sim.now = sim.now.saturating_add(SignedDuration::from_secs(seconds)).unwrap();
    sim.reconcile()
}

/// It says this, and says it once, however often it is looked at.
fn says_once(sim: &mut Sim, reason: &str, words: &str) {
    assert_eq!(sim.reason(), reason);
    assert!(sim.message().contains(words), "{}", sim.message());
    let writes = sim.writes;
    for _ in 0..100 {
        let plan = later(sim, 36);
        assert!(matches!(plan.requeue, Requeue::After(wait) if wait >= Duration::from_secs(5)), "{plan:?}");
    }
    assert_eq!((sim.writes, sim.pods_created), (writes, 0));
}

#[test]
fn outputs_that_are_there_need_no_pod() {
    let sim = with(Env { outputs: true, ..Env::GOOD });
    sim.check_settled();
    assert_eq!((sim.reason(), sim.pods_created), ("AlreadyBuilt", 0));
}

#[test]
fn an_input_that_another_request_builds_is_waited_for() {
    let mut sim = with(Env { input: Input::Going, ..Env::GOOD });
    says_once(&mut sim, "WaitingForInput", &format!("input {INPUT} is what request maker builds"));
    sim.env.input = Input::Cached;
    sim.reconcile();
    assert_eq!(sim.pods_created, 1, "it is there: no more waiting");
    sim.settle();
    assert_eq!(sim.verdicts, [true]);
}

#[test]
fn a_dependency_that_fails_fails_its_dependents() {
    let mut sim = with(Env { input: Input::Going, ..Env::GOOD });
    sim.env.input = Input::Failed;
    sim.reconcile();
    sim.check_settled();
    assert_eq!((sim.reason(), sim.pods_created), ("DependencyFailed", 0));
    let words = format!("input {INPUT} is what request maker builds, which failed: BuildFailed: exit code 1");
    assert_eq!(sim.message(), words);
}

#[test]
fn an_input_that_nobody_builds_has_its_time() {
    let mut sim = with(Env { input: Input::Orphan, ..Env::GOOD });
    assert_eq!(sim.reason(), "WaitingForInput");
    let plan = later(&mut sim, 39);
    assert!(matches!(plan.requeue, Requeue::After(wait) if wait <= Duration::from_secs(1)), "{plan:?}");
    later(&mut sim, 1);
    sim.check_settled();
    assert_eq!((sim.reason(), sim.pods_created), ("InputMissing", 0));
    assert!(sim.message().contains(INPUT), "{}", sim.message());

    // The request that builds it comes in time.
    let mut sim = with(Env { input: Input::Orphan, ..Env::GOOD });
    sim.env.input = Input::Going;
    later(&mut sim, 1000);
    assert_eq!(sim.reason(), "WaitingForInput");
}

/// Between the question to the caches and the verdict, the request that builds the input may end, and even be deleted.
#[test]
fn an_old_answer_of_the_caches_is_no_ground_for_a_verdict() {
    let mut sim = with(Env { input: Input::Going, ..Env::GOOD });
    sim.now = sim.now.saturating_add(SignedDuration::from_secs(1000)).unwrap();
    // Asked, and not yet looked at.
    sim.pass(usize::MAX);
    assert!(sim.lookup.is_some());
    sim.env.input = Input::Cached;
    sim.settle();
    assert_eq!(sim.verdicts, [true]);
}

#[test]
fn requests_that_wait_for_each_other_say_so() {
    let mut sim = with(Env { input: Input::Going, has_cycle: true, ..Env::GOOD });
    sim.check_settled();
    assert_eq!(sim.reason(), "DependencyCycle");
    assert_eq!(sim.message(), "hello waits for maker, which waits for hello");
    // What is there already, nobody waits for.
    sim = with(Env { has_cycle: true, ..Env::GOOD });
    sim.settle();
    assert_eq!(sim.verdicts, [true]);
}

#[test]
fn equal_builds_are_made_once() {
    let mut sim = with(Env { same: Same::Running, ..Env::GOOD });
    says_once(&mut sim, "WaitingForSameBuild", "request twin is building the same derivation");
    let mut failed = sim.clone();
    failed.env.same = Same::Failed;
    failed.reconcile();
    failed.check_settled();
    assert_eq!((failed.reason(), failed.pods_created), ("BuildFailed", 0));
    assert_eq!(failed.message(), "request twin for the same derivation failed: exit code 1");
    sim.env = Env { outputs: true, ..Env::GOOD };
    sim.reconcile();
    assert_eq!((sim.reason(), sim.pods_created), ("AlreadyBuilt", 0));
}

#[test]
fn a_class_that_is_full_is_waited_for() {
    let mut sim = with(Env { has_room: false, ..Env::GOOD });
    says_once(&mut sim, "WaitingForConcurrency", "1 of 1 in use");
    sim.happen(Event::Env(Env::GOOD));
    sim.reconcile();
    assert_eq!(sim.pods_created, 1);
}

#[test]
fn leave_that_is_not_used_is_given_back() {
    let mut sim = with(Env { has_room: false, ..Env::GOOD });
    sim.happen(Event::Env(Env::GOOD));
    sim.request.spec.suspend = Some(true);
    let plan = sim.reconcile();
    assert_eq!(plan.actions, [Action::ReleaseSlot]);
    assert_eq!((sim.reason(), sim.pods_created), ("Suspended", 0));
    sim.settle();
    assert_eq!(sim.verdicts, [true]);
}

#[test]
fn a_request_without_a_class_waits_and_says_so_once() {
    let mut sim = with(Env { has_class: false, ..Env::GOOD });
    says_once(&mut sim, "WaitingForClass", "no BuilderClass is the default");
    sim.settle();
    assert_eq!(sim.verdicts, [true]);
}

#[test]
fn suspended_requests_start_nothing() {
    let mut sim = Sim::new(spec(), class());
    sim.request.spec.suspend = Some(true);
    sim.reconcile();
    says_once(&mut sim, "Suspended", "spec.suspend is true");
    sim.settle();
    assert_eq!(sim.verdicts, [true]);
}

/// Thousands may wait: the longer one has, the less often it asks the caches.
#[test]
fn those_who_wait_long_look_less_often() {
    let wait = |seconds| {
        let mut sim = with(Env { input: Input::Going, ..Env::GOOD });
        let Requeue::After(wait) = later(&mut sim, seconds).requeue else { panic!("no wait") };
        wait.as_secs()
    };
    assert!((5..=10).contains(&wait(1)), "{}", wait(1));
    assert!((50..=100).contains(&wait(1000)), "{}", wait(1000));
    assert!((150..=300).contains(&wait(100_000)), "{}", wait(100_000));
}
