//! Verdicts that need no builder, and what comes after a verdict.

use std::collections::BTreeSet;

use drover_api::{BuildRequestSpec, DerivationSpec, OutputSpec, Trust};
use drover_nix::StoreDir;
use jiff::SignedDuration;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::sim::*;
use super::*;
use crate::plan::accept::{MAX_SPEC, json_len};
use crate::status::Draft;
use crate::world::{Class, Lookup};

#[test]
fn what_can_never_be_built_ends_at_once() {
    let verdict = |spec: BuildRequestSpec, class: Class| {
        let mut sim = Sim::new(spec, class);
        sim.reconcile();
        assert_eq!(sim.verdicts, [false]);
        sim.check_settled();
        (sim.reason().to_owned(), sim.status().failure.clone().unwrap().message)
    };
    let with = |change: fn(&mut DerivationSpec)| {
        let mut derivation = derivation();
        change(&mut derivation);
        BuildRequestSpec { derivation: Some(derivation), ..spec() }
    };

    let (reason, message) = verdict(with(|d| d.system = "sparc-solaris".into()), class());
    assert_eq!(reason, "WrongSystem");
    assert!(message.contains("small") && message.contains("x86_64-linux"), "{message}");

    let (reason, message) =
        verdict(with(|d| drop(d.env.insert("requiredSystemFeatures".into(), "kvm".into()))), class());
    assert_eq!(reason, "WrongSystem");
    assert!(message.contains("kvm"), "{message}");

    let (reason, message) = verdict(with(|d| d.input_srcs = vec!["/nix/store/nonsense".into()]), class());
    assert_eq!(reason, "InvalidDerivation");
    assert!(message.contains("spec.derivation.inputSrcs[0]"), "{message}");

    let Class::Found { name, spec: class_spec, .. } = class() else { unreachable!() };
    let (reason, _) = verdict(spec(), Class::Found { name, spec: class_spec, allowed: false });
    assert_eq!(reason, "ClassNotAllowed");
}

#[test]
fn every_kind_of_output_gets_a_pod() {
    let algo = |hash: Option<&str>, method: &str| OutputSpec {
        path: None,
        hash_algo: Some("sha256".into()),
        hash: hash.map(str::to_owned),
        method: Some(method.into()),
    };
    let zeros = "0".repeat(64);
    for output in [
        OutputSpec::default(),
        algo(Some(&zeros), "nar"),
        algo(Some(&zeros), "text"),
        algo(None, "nar"),
        algo(None, "git"),
        algo(Some("impure"), "flat"),
    ] {
        let mut derivation = derivation();
        derivation.system = "builtin".into();
        derivation.builder = "builtin:fetchurl".into();
        derivation.env.insert("requiredSystemFeatures".into(), "ca-derivations".into());
        derivation.outputs.insert("out".into(), output.clone());
        let mut sim =
            Sim::new(BuildRequestSpec { derivation: Some(derivation), drv_path: None, ..spec() }, class());
        sim.settle();
        assert_eq!((sim.pods_created, sim.verdicts.as_slice()), (1, [true].as_slice()), "{output:?}");
        assert_eq!(sim.status().outputs, outputs());
    }
}

/// Its log would stand in the place of somebody else's.
#[test]
fn only_a_name_that_is_proven_names_the_build() {
    let dir = StoreDir::default();
    let named = |output: OutputSpec, trust: Trust| {
        let mut derivation = derivation();
        derivation.env.insert("out".into(), output.path.clone().unwrap_or_default());
        derivation.outputs.insert("out".into(), output);
        let Class::Found { name, mut spec, allowed } = class() else { unreachable!() };
        spec.trust = trust;
        let class = Class::Found { name, spec, allowed };
        let sim = Sim::new(BuildRequestSpec { derivation: Some(derivation), ..self::spec() }, class);
        let world = sim.world(true);
        let accepted = accept(&world).unwrap();
        let own = drover_session::drv_path_of(&dir, &accepted.derivation).unwrap();
        assert_ne!(dir.full(&own), DRV);
        if accepted.drv_path == own { "own" } else { "given" }
    };
    let fixed = || OutputSpec {
        hash_algo: Some("sha256".into()),
        hash: Some("0".repeat(64)),
        method: Some("nar".into()),
        ..OutputSpec::default()
    };
    let elsewhere =
        || OutputSpec { path: Some(format!("/nix/store/{}-hello", "0".repeat(32))), ..OutputSpec::default() };
    assert_eq!(named(fixed(), Trust::Verified), "own");
    assert_eq!(named(OutputSpec::default(), Trust::Verified), "own");
    // The proof goes through the file.
    assert_eq!(named(elsewhere(), Trust::Verified), "given");
    assert_eq!(named(fixed(), Trust::Claimed), "given");
}

#[test]
fn paths_that_are_not_proven_get_no_pod() {
    let mut sim = Sim::new(spec(), class());
    let message = "output out claims another's path".to_owned();
    let refused = Lookup::Refused { reason: Reason::PathNotProven, message };
    let mut world = sim.world(true);
    world.lookup = refused;
    sim.request.status = plan(&world, sim.now).status;
    assert_eq!((sim.reason(), sim.pods_created), ("PathNotProven", 0));
    world.live = false;
    let plan = plan(&world, sim.now);
    assert_eq!((plan.status, plan.actions, plan.requeue), (None, vec![Action::ForgetLookUp], Requeue::Live));
}

#[test]
fn a_spec_that_leaves_no_room_for_a_status_is_refused_at_once() {
    let of = |bytes: usize, text: &str| {
        let mut spec = spec();
        let derivation = spec.derivation.as_mut().unwrap();
        derivation.args = vec![text.repeat(bytes / text.len())];
        Sim::new(spec, class())
    };
    let mut fits = of(MAX_SPEC - 1000, "x");
    fits.settle();
    assert_eq!(fits.verdicts, [true]);
    // As an API server writes them, some of these take six bytes each.
    for mut sim in [of(MAX_SPEC, "x"), of(MAX_SPEC / 6, "<"), of(MAX_SPEC / 4, "a&&")] {
        sim.settle();
        assert_eq!((sim.reason(), sim.pods_created), ("InvalidDerivation", 0));
        assert!(sim.message().contains("spec.drvPath"), "{}", sim.message());
    }
}

/// The longest of everything that a status has, in the most expensive characters.
#[test]
fn every_status_has_room_beside_the_largest_spec() {
    // etcd's limit, and what kubectl may keep in annotations.
    const ETCD: usize = 3 << 19;
    const ANNOTATIONS: usize = 256 << 10;
    let (text, path) = ("<".repeat(10_000), format!("/nix/store/{}", "x".repeat(244)));
    let sim = Sim::new(spec(), class());
    let mut draft = Draft::new(&sim.request, sim.now);
    for number in 1..=u32::try_from(drover_api::MAX_ATTEMPTS).unwrap() {
        draft.begin_attempt(number, None);
        let attempt = draft.open_attempt_mut().unwrap();
        (attempt.pod, attempt.node) = (Some("p".repeat(63)), Some("n".repeat(253)));
        draft.end_attempt(Reason::InfrastructureFailure, &text, true);
    }
    for condition in conditions::PHASES {
        draft.phase(condition, Status::Unknown, Reason::Pending, &text);
    }
    let mut failed = draft.clone();
    failed.fail(Reason::InfrastructureFailure, &text, &vec![text.clone(); 100]);
    let output = drover_api::OutputStatus {
        path: path.clone(),
        nar_hash: "h".repeat(59),
        nar_size: u64::MAX,
        references: vec![path; 400],
        references_omitted: None,
        signatures: vec!["s".repeat(1000); 100],
        ca: Some("c".repeat(300)),
    };
    let outputs = (0..drover_api::MAX_OUTPUTS).map(|n| (format!("{n:0>211}"), output.clone()));
    draft.succeed(Reason::Built, outputs.collect());
    for status in [draft.finish().unwrap(), failed.finish().unwrap()] {
        let len = json_len(&status);
        assert!(MAX_SPEC + ANNOTATIONS + len < ETCD, "{len}");
    }
}

#[test]
fn a_class_bounds_what_begins_and_not_what_runs() {
    let Class::Found { name, spec: class_spec, allowed } = class() else { unreachable!() };
    let mut narrow = class_spec.clone();
    narrow.resources = Some(serde_yaml::from_str("{maximum: {memory: 1Gi}}").unwrap());
    let narrow = Class::Found { name: name.clone(), spec: narrow, allowed };
    let wants = || BuildRequestSpec {
        resources: Some(serde_yaml::from_str("{limits: {memory: 2Gi}}").unwrap()),
        ..spec()
    };
    let mut sim = Sim::new(wants(), narrow.clone());
    sim.settle();
    assert_eq!((sim.reason(), sim.pods_created), ("Unplaceable", 0));

    let mut sim = Sim::new(wants(), class());
    sim.reconcile();
    assert_eq!(sim.pods_created, 1);
    sim.class = narrow;
    sim.settle();
    assert_eq!(sim.verdicts, [true]);

    let mut elsewhere = class_spec;
    elsewhere.placement = drover_api::Placement::RequestNamespace;
    let mut sim = Sim::new(spec(), Class::Found { name, spec: elsewhere, allowed });
    sim.reconcile();
    assert_eq!((sim.reason(), sim.pods_created), ("WaitingForClass", 0));
}

#[test]
fn a_request_that_is_being_deleted_loses_its_pod_and_gets_no_status() {
    let mut sim = Sim::new(spec(), class());
    sim.reconcile();
    assert_eq!(sim.pods.len(), 1);
    sim.request.metadata.deletion_timestamp = Some(Time(sim.now));
    let writes = sim.writes;
    sim.reconcile();
    assert_eq!((sim.pods.len(), sim.writes), (0, writes));
}

/// Each end has a time to live of its own, and nothing but the clock is needed for it.
#[test]
fn time_to_live_counts_from_the_end() {
    for (succeeds, succeeded, failed) in [(true, Some(60), None), (false, None, Some(60))] {
        let spec = BuildRequestSpec {
            ttl_seconds_after_succeeded: succeeded,
            ttl_seconds_after_failed: failed,
            cancel: (!succeeds).then_some(true),
            ..spec()
        };
        let mut sim = Sim::new(spec, class());
        let last = loop {
            sim.happen(Event::Schedule);
            sim.happen(Event::Advance);
            let plan = sim.reconcile();
            if !sim.verdicts.is_empty() {
                break plan;
            }
        };
        assert_eq!((sim.verdicts.as_slice(), last.requeue), ([succeeds].as_slice(), after(60)));
        let completed = sim.status().completion_time.clone().unwrap().0;
        let at = |seconds| completed.saturating_add(SignedDuration::from_secs(seconds)).unwrap();
        let early = plan(&sim.world(false), at(59));
        assert_eq!((early.actions, early.requeue), (vec![], after(1)));
        assert_eq!(plan(&sim.world(false), at(60)).actions, [Action::DeleteRequest]);
        // The other end's time does not count.
        let mut world = sim.world(false);
        let spec = &mut world.request.spec;
        std::mem::swap(&mut spec.ttl_seconds_after_succeeded, &mut spec.ttl_seconds_after_failed);
        assert_eq!(plan(&world, at(1000)).actions, []);
    }
}

fn after(seconds: u64) -> Requeue {
    Requeue::After(Duration::from_secs(seconds))
}

#[test]
fn a_time_to_live_of_nothing_follows_the_verdict_at_once() {
    let spec = BuildRequestSpec { ttl_seconds_after_failed: Some(0), cancel: Some(true), ..spec() };
    let mut sim = Sim::new(spec, class());
    let plans: Vec<_> = (0..2).map(|_| sim.pass(usize::MAX)).collect();
    assert_eq!((plans[0].requeue, plans[1].requeue), (Requeue::Live, Requeue::Now));
    assert_eq!(plan(&sim.world(false), sim.now).actions, [Action::DeleteRequest]);
}

/// Every word that a session can end by becomes the request's, and every other word of the table is said somewhere.
#[test]
fn every_reason_is_reached() {
    let mut reached: BTreeSet<String> = BTreeSet::new();
    let mut ends = |event: Option<Event>, env: Env, stages: usize| {
        let mut spec = spec();
        spec.retries.infrastructure = 0;
        let mut sim = Sim::new(spec, class());
        sim.env = env;
        for step in 0..40 {
            sim.happen(Event::Schedule);
            if step > stages
                && let Some(event) = event
            {
                sim.happen(event);
            }
            sim.happen(Event::Advance);
            sim.now = sim.now.saturating_add(SignedDuration::from_secs(3)).unwrap();
            sim.reconcile();
        }
        reached.extend(sim.reasons);
    };
    for reason in Reason::ALL.iter().filter(|reason| !matches!(reason.kind(), ReasonKind::Success)) {
        if reason.is_terminal() {
            ends(Some(Event::Ends(*reason)), Env::GOOD, 4);
        }
    }
    ends(Some(Event::PodEnds("NodeLost", None)), Env::GOOD, 4);
    ends(Some(Event::ImageFails), Env::GOOD, 1);
    ends(Some(Event::Suspend(true)), Env { has_room: false, ..Env::GOOD }, 1);
    for env in [
        Env::GOOD,
        Env { has_class: false, ..Env::GOOD },
        Env { outputs: true, ..Env::GOOD },
        Env { input: Input::Going, ..Env::GOOD },
        Env { input: Input::Failed, ..Env::GOOD },
        Env { input: Input::Orphan, ..Env::GOOD },
        Env { input: Input::Going, has_cycle: true, ..Env::GOOD },
        Env { same: Same::Running, ..Env::GOOD },
        Env { has_room: false, ..Env::GOOD },
        Env { admission: Admission::Quota, ..Env::GOOD },
        Env { admission: Admission::Invalid, ..Env::GOOD },
    ] {
        ends(None, env, 0);
    }
    let mut sim = Sim::new(spec(), class());
    sim.reconcile();
    sim.happen(Event::Wait);
    sim.reconcile();
    for event in [Event::Schedule, Event::Advance, Event::Advance, Event::PodEnds("Evicted", None)] {
        sim.happen(event);
        sim.reconcile();
    }
    reached.extend(sim.reasons);
    let all: BTreeSet<String> = Reason::ALL.iter().map(ToString::to_string).collect();
    assert_eq!(all.difference(&reached).collect::<Vec<_>>(), Vec::<&String>::new());
}
