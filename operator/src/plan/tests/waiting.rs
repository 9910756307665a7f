//! What an attempt waits for before it begins, and what ends a request that never had one.

use drover_api::{BuildRequestSpec, Trust};
use jiff::SignedDuration;

use super::sim::*;
use super::*;
use crate::world::{Class, Resolution};

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

/// One that only names its derivation.
fn named(env: Env) -> Sim {
    let mut sim = Sim::new(BuildRequestSpec { derivation: None, ..spec() }, class());
    sim.env = env;
    sim.reconcile();
    sim
}

#[test]
fn a_derivation_that_is_only_named_is_read_first() {
    let mut sim = named(Env::GOOD);
    assert_eq!(sim.pods_created, 1);
    let status = sim.status().derivation.clone().unwrap();
    assert_eq!((status.system.as_str(), status.outputs.len()), ("x86_64-linux", 1));
    assert_eq!(sim.status().drv_path.as_deref(), Some(DRV));
    assert!(status.outputs["out"].ends_with("-hello"), "{status:?}");
    sim.settle();
    assert_eq!(sim.verdicts, [true]);
}

#[test]
fn a_derivation_that_is_nowhere_has_its_time() {
    let mut sim = named(Env { file: File::Absent, ..Env::GOOD });
    assert_eq!(sim.reason(), "WaitingForInput");
    assert!(sim.message().contains(DRV), "{}", sim.message());
    let mut came = sim.clone();
    came.env.file = File::There;
    came.reconcile();
    assert_eq!(came.pods_created, 1, "it is there: no more waiting");
    later(&mut sim, 100);
    sim.check_settled();
    assert_eq!((sim.reason(), sim.pods_created), ("InputMissing", 0));
    assert!(sim.message().contains("nix copy --derivation"), "{}", sim.message());
}

#[test]
fn a_derivation_below_that_is_nowhere_proves_nothing() {
    let below = "/nix/store/bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb-below.drv";
    let mut sim = named(Env { file: File::Absent, ..Env::GOOD });
    sim.now = sim.now.saturating_add(SignedDuration::from_secs(100)).unwrap();
    let mut world = sim.world(true);
    world.resolution = Resolution::Absent { path: below[11..].parse().unwrap() };
    let failure = |world: &World| plan(world, sim.now).status.unwrap().failure.unwrap();
    let trust = |world: &mut World, trust| {
        let Class::Found { spec, .. } = &mut world.class else { unreachable!() };
        spec.trust = trust;
    };
    trust(&mut world, Trust::Verified);
    let verified = failure(&world);
    assert_eq!(verified.reason, "PathNotProven");
    assert!(verified.message.contains(below) && verified.message.contains(DRV), "{}", verified.message);
    trust(&mut world, Trust::Claimed);
    assert_eq!(failure(&world).reason, "InputMissing");
}

#[test]
fn caches_that_cannot_be_asked_for_a_derivation_are_asked_again() {
    let mut sim = named(Env { file: File::Unreachable, ..Env::GOOD });
    says_once(&mut sim, "WaitingForInput", "no route");
    sim.env.file = File::There;
    sim.settle();
    assert_eq!(sim.verdicts, [true]);
}

/// The operator that knew the derivation is gone, and the caches as well.
#[test]
fn an_attempt_is_not_given_up_for_its_derivation() {
    for file in [File::Unreachable, File::Absent] {
        let mut sim = named(Env::GOOD);
        sim.happen(Event::Schedule);
        sim.reconcile();
        sim.happen(Event::Crash);
        sim.env.file = file;
        for _ in 0..20 {
            later(&mut sim, 36);
        }
        assert_eq!((sim.reason(), sim.pods.len()), ("WaitingForInput", 1), "{file:?}");
        assert!(conditions::is_true(&sim.status().conditions, conditions::ACCEPTED));
        assert!(sim.session.is_none());
        sim.settle();
        assert_eq!((sim.verdicts.as_slice(), sim.pods_created), ([true].as_slice(), 1), "{file:?}");
    }
}

#[test]
fn a_suspended_derivation_that_is_nowhere_stays_suspended() {
    let mut sim = Sim::new(BuildRequestSpec { derivation: None, ..spec() }, class());
    sim.request.spec.suspend = Some(true);
    sim.env.file = File::Absent;
    sim.reconcile();
    says_once(&mut sim, "Suspended", "spec.suspend is true");
}

#[test]
fn what_is_not_known_yet_may_make_an_input() {
    let mut sim = with(Env { input: Input::Orphan, has_unread: true, ..Env::GOOD });
    says_once(&mut sim, "WaitingForInput", "what request dark builds is not known yet");
    sim.env.has_unread = false;
    later(&mut sim, 36);
    assert_eq!(sim.reason(), "InputMissing");
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
