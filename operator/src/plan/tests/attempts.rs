//! Attempts: budgets, what ends one and what does not, pods that are not made or do not start, memory.

use drover_api::Resources;
use jiff::SignedDuration;

use super::sim::*;
use super::*;
use crate::world::{Class, SessionEnd, Stage};

/// A new simulation in the middle of its build.
fn building(infrastructure: u32, build: u32) -> Sim {
    let mut spec = spec();
    (spec.retries.infrastructure, spec.retries.build) = (infrastructure, build);
    building_of(Sim::new(spec, class()))
}

fn building_of(mut sim: Sim) -> Sim {
    begin(&mut sim);
    sim
}

/// From nothing, or from an attempt that ended, to a build that runs.
fn begin(sim: &mut Sim) {
    for _ in 0..20 {
        for event in [Event::Wait, Event::Schedule, Event::Advance] {
            sim.happen(event);
            sim.reconcile();
            if sim
                .session
                .as_ref()
                .is_some_and(|session| session.stage == Stage::Building && session.end.is_none())
            {
                return;
            }
        }
    }
    panic!("no build: {:#?}", sim.request.status);
}

fn happens(sim: &mut Sim, event: Event) {
    assert!(sim.happen(event), "{event:?} cannot happen");
    sim.reconcile();
}

fn later(sim: &mut Sim, seconds: i64) -> Plan {
    sim.now = sim.now.saturating_add(SignedDuration::from_secs(seconds)).unwrap();
    sim.reconcile()
}

/// Not sampled but complete: one build in which all goes well, crashed after each of its effects.
#[test]
fn a_crash_after_any_effect_changes_nothing_in_the_end() {
    for crash_at in 0..40 {
        let mut sim = Sim::new(spec(), class());
        let mut effects = 0;
        for round in 0..60 {
            sim.happen([Event::Schedule, Event::Advance][round % 2]);
            let mut probe = sim.clone();
            let plan = probe.pass(usize::MAX);
            let here = usize::from(plan.status.is_some()) + plan.actions.len();
            let is_here = (effects..effects + here).contains(&crash_at);
            sim.pass(if is_here { crash_at - effects } else { usize::MAX });
            effects += here;
        }
        sim.settle();
        assert_eq!(
            (sim.verdicts.as_slice(), sim.pods_created),
            ([true].as_slice(), 1),
            "after effect {crash_at}"
        );
        assert_eq!(sim.status().attempts.len(), 1);
    }
}

#[test]
fn a_build_takes_few_writes_and_one_pod() {
    let mut sim = Sim::new(spec(), class());
    sim.settle();
    assert_eq!(sim.pods_created, 1);
    assert!(sim.writes <= 8, "{} writes", sim.writes);
    let status = sim.status();
    for condition in conditions::PHASES {
        assert!(conditions::is_true(&status.conditions, condition), "{condition}");
    }
    assert_eq!(status.builder.as_ref().unwrap().node.as_deref(), Some("node"));
}

#[test]
fn a_failed_build_is_not_repeated_and_keeps_its_log() {
    let mut sim = building(5, 0);
    let transfer = drover_api::Transfer { bytes_sent: 5, ..Default::default() };
    sim.session.as_mut().unwrap().counted = Some((transfer, Default::default()));
    happens(&mut sim, Event::Ends(Reason::BuildFailed));
    sim.check_settled();
    assert_eq!(sim.status().transfer, Some(transfer), "what was moved was moved");
    assert_eq!((sim.reason(), sim.pods_created), ("BuildFailed", 1));
    assert_eq!(sim.status().failure.as_ref().unwrap().log_tail, ["error: no"]);
}

#[test]
fn each_budget_pays_for_its_own() {
    let mut sim = building(2, 1);
    for event in [Event::PodEnds("Evicted", None), Event::Ends(Reason::BuildFailed), Event::PodGone] {
        happens(&mut sim, event);
        assert_eq!(sim.reason(), "Retrying");
        begin(&mut sim);
    }
    happens(&mut sim, Event::PodEnds("Evicted", None));
    sim.check_settled();
    assert_eq!((sim.reason(), sim.pods_created), ("Evicted", 4));
    assert!(sim.message().contains("no retries are left"), "{}", sim.message());
    assert_eq!(
        sim.attempts(),
        [("Evicted", true), ("BuildFailed", false), ("BuilderLost", true), ("Evicted", true)]
    );
    // What will come out the same has no second try, whatever the budget.
    for reason in [Reason::OutputHashMismatch, Reason::InputMissing, Reason::OutputRejected] {
        let mut sim = building(5, 5);
        happens(&mut sim, Event::Ends(reason));
        sim.check_settled();
        assert_eq!((sim.reason(), sim.pods_created), (reason.as_str(), 1));
    }
}

#[test]
fn waits_between_attempts_grow_to_a_limit_and_differ_between_requests() {
    let pauses = |uid: &str| {
        let mut spec = spec();
        spec.retries.infrastructure = 12;
        let mut sim = Sim::new(spec, class());
        sim.request.metadata.uid = Some(uid.into());
        (0..12)
            .map(|_| {
                begin(&mut sim);
                sim.happen(Event::PodEnds("Evicted", None));
                let Requeue::After(pause) = sim.reconcile().requeue else { panic!("no wait") };
                assert!(sim.message().contains("the next begins in"), "{}", sim.message());
                pause.as_secs_f64()
            })
            .collect::<Vec<_>>()
    };
    let a = pauses("a");
    for (index, pause) in a.iter().enumerate() {
        let longest = 300f64.min(2f64.powi(index as i32 + 1));
        assert!((longest / 2.0..=longest).contains(pause), "{a:?}");
    }
    let differing = pauses("b").iter().zip(&a).filter(|(a, b)| a != b).count();
    assert!(differing > 8, "{differing}");
}

/// A thousand requests whose node went at the same moment do not come back in the same instant.
#[test]
fn retries_are_spread() {
    let mut at: Vec<_> = (0..1000)
        .map(|number| {
            let mut sim = Sim::new(spec(), class());
            sim.request.metadata.uid = Some(format!("7f3a9c1e-0000-4000-8000-{number:012}"));
            retry::spread(&sim.world(true), 1, Duration::from_secs(100)).as_secs()
        })
        .collect();
    assert!(at.iter().all(|second| (50..=100).contains(second)));
    at.sort_unstable();
    let most = at.chunk_by(|a, b| a == b).map(<[u64]>::len).max().unwrap();
    assert!(most <= 60, "{most} in one second");
}

#[test]
fn memory_is_doubled_once_within_the_class() {
    let ends = |resources: &str, class_resources: &str| {
        let mut spec = spec();
        spec.retries.infrastructure = 9;
        spec.resources =
            (!resources.is_empty()).then(|| serde_yaml::from_str::<Resources>(resources).unwrap());
        let Class::Found { name, spec: mut class_spec, allowed } = class() else { unreachable!() };
        class_spec.resources =
            (!class_resources.is_empty()).then(|| serde_yaml::from_str(class_resources).unwrap());
        let mut sim = building_of(Sim::new(spec, Class::Found { name, spec: class_spec, allowed }));
        happens(&mut sim, Event::Ends(Reason::OutOfMemory));
        if sim.verdicts.is_empty() {
            assert_eq!(sim.reason(), "Retrying");
            begin(&mut sim);
            // It keeps it, whatever else happens.
            happens(&mut sim, Event::PodEnds("Evicted", None));
            begin(&mut sim);
            happens(&mut sim, Event::PodEnds("OOMKilled", Some(137)));
        }
        sim.check_settled();
        assert_eq!(sim.reason(), "OutOfMemory");
        let memory = |attempt: &drover_api::Attempt| attempt.memory.as_ref().map(|memory| memory.0.clone());
        let had: Vec<_> = sim.status().attempts.iter().map(memory).collect();
        (had, sim.message().to_owned())
    };
    let raised = |to: &str| vec![None, Some(to.to_owned()), Some(to.to_owned())];
    for (resources, class, to) in [
        ("", "", "512Mi"),
        ("{limits: {memory: 1Gi}}", "", "2Gi"),
        ("{requests: {memory: 100M}}", "", "200000000"),
        ("{requests: {memory: 1Gi}, limits: {memory: 1536Mi}}", "", "3Gi"),
        ("", "{default: {limits: {memory: 64Mi}}}", "128Mi"),
        ("{limits: {memory: 1Gi}}", "{maximum: {memory: 1280Mi}}", "1280Mi"),
    ] {
        let (had, message) = ends(resources, class);
        assert_eq!(had, raised(to), "{resources} {class}");
        assert!(message.contains(&format!("it had {to} already")), "{message}");
    }
    let (had, message) = ends("{limits: {memory: 1Gi}}", "{maximum: {memory: 1024Mi}}");
    assert_eq!(had, [None]);
    assert!(message.contains("BuilderClass small allows no more than 1024Mi"), "{message}");
    // The build's own budget does not pay for it.
    let mut sim = building(0, 5);
    happens(&mut sim, Event::Ends(Reason::OutOfMemory));
    sim.check_settled();
    assert_eq!(sim.pods_created, 1);
}

#[test]
fn more_memory_is_asked_for() {
    let mut sim = building(1, 0);
    happens(&mut sim, Event::Ends(Reason::OutOfMemory));
    sim.happen(Event::Wait);
    let created = (0..6).flat_map(|_| sim.pass(usize::MAX).actions).find_map(|action| match action {
        Action::CreatePod { attempt, memory } => Some((attempt, memory.unwrap().0)),
        _ => None,
    });
    assert_eq!(created, Some((2, "512Mi".to_owned())));
}

#[test]
fn a_connection_that_broke_lets_the_pod_speak_first() {
    let mut sim = building(3, 0);
    sim.happen(Event::Ends(Reason::ConnectionLost));
    let plan = sim.reconcile();
    assert!(sim.attempts().is_empty(), "the pod may say why");
    assert!(matches!(plan.requeue, Requeue::After(wait) if wait <= Duration::from_secs(10)), "{plan:?}");
    happens(&mut sim, Event::PodEnds("OOMKilled", Some(137)));
    assert_eq!(sim.attempts(), [("OutOfMemory", true)]);

    // What the builder has said for certain stands, whatever became of its pod then.
    let mut sim = building(3, 0);
    sim.happen(Event::Ends(Reason::OutOfMemory));
    happens(&mut sim, Event::PodEnds("Evicted", None));
    assert_eq!(sim.attempts(), [("OutOfMemory", true)]);

    // It has nothing to do with the pod.
    let mut sim = building(3, 0);
    happens(&mut sim, Event::Ends(Reason::InfrastructureFailure));
    assert_eq!(sim.attempts(), [("InfrastructureFailure", true)]);

    // It is told to end, says so, and is called evicted later.
    let mut sim = building(3, 0);
    happens(&mut sim, Event::Ends(Reason::BuilderLost));
    happens(&mut sim, Event::ContainerEnds);
    assert!(sim.attempts().is_empty());
    happens(&mut sim, Event::PodEnds("Evicted", Some(143)));
    assert_eq!(sim.attempts(), [("Evicted", true)]);
}

#[test]
fn an_attempt_outlives_its_connection() {
    let mut sim = building(0, 0);
    happens(&mut sim, Event::Ends(Reason::ConnectionLost));
    later(&mut sim, 10);
    assert_eq!((sim.attempts(), sim.reason()), (vec![], "Connecting"));
    assert!(sim.session.as_ref().is_some_and(|session| session.end.is_none()));
    sim.settle();
    assert_eq!((sim.verdicts.as_slice(), sim.pods_created), ([true].as_slice(), 1));
    assert_eq!(sim.status().attempts[0].reconnects, 1);

    // A cache is set aside by now that gave something wrong, and another has it.
    let mut sim = building(0, 0);
    sim.happen(Event::Ends(Reason::InputHashMismatch));
    if let Some(SessionEnd::Failed { infrastructure, .. }) = &mut sim.session.as_mut().unwrap().end {
        *infrastructure = true;
    }
    later(&mut sim, 2);
    assert_eq!((sim.attempts(), sim.reason()), (vec![], "Connecting"));
    sim.settle();
    assert_eq!((sim.verdicts.as_slice(), sim.pods_created), ([true].as_slice(), 1));
    let mut sim = building(3, 3);
    happens(&mut sim, Event::Ends(Reason::InputHashMismatch));
    sim.check_settled();
    assert_eq!((sim.reason(), sim.pods_created), ("InputHashMismatch", 1));

    // What was built is there again, when it is this side that failed to take it in.
    let mut sim = building(0, 0);
    for _ in 0..2 {
        sim.happen(Event::Advance);
    }
    sim.happen(Event::Ends(Reason::InfrastructureFailure));
    later(&mut sim, 2);
    assert_eq!(sim.status().attempts[0].reconnects, 1);
    sim.settle();
    assert_eq!((sim.verdicts.as_slice(), sim.pods_created), ([true].as_slice(), 1));
}

#[test]
fn an_operator_that_comes_back_finds_its_build_and_writes_nothing_new() {
    let mut sim = building(0, 0);
    let writes = sim.writes;
    sim.happen(Event::Crash);
    sim.reconcile();
    assert!(sim.session.is_some());
    for _ in 0..4 {
        sim.happen(Event::Advance);
        sim.reconcile();
    }
    assert_eq!((sim.writes, sim.reason()), (writes, "Building"));
    sim.settle();
    assert_eq!((sim.verdicts.as_slice(), sim.status().attempts.len()), ([true].as_slice(), 1));
    assert_eq!(sim.status().attempts[0].reconnects, 0);
}

#[test]
fn connections_break_so_often_and_no_more() {
    let mut sim = building(0, 0);
    for times in 1..=21 {
        assert!(sim.verdicts.is_empty(), "after {times}");
        happens(&mut sim, Event::Ends(Reason::ConnectionLost));
        later(&mut sim, 60);
        while sim.session.is_some() && sim.happen(Event::Advance) {
            sim.reconcile();
            if sim.session.as_ref().is_some_and(|session| session.stage == Stage::Building) {
                break;
            }
        }
    }
    sim.check_settled();
    assert_eq!((sim.reason(), sim.pods_created), ("ConnectionLost", 1));
}

#[test]
fn a_builder_that_is_not_reached_again_is_given_up_when_it_has_lingered() {
    let mut sim = building(0, 0);
    happens(&mut sim, Event::Ends(Reason::ConnectionLost));
    later(&mut sim, 10);
    later(&mut sim, 39);
    assert!(sim.verdicts.is_empty());
    later(&mut sim, 1);
    sim.check_settled();
    assert_eq!(sim.reason(), "ConnectionLost");
    assert!(sim.message().contains("was not reached again within 40s"), "{}", sim.message());
}

#[test]
fn a_builder_that_refuses_is_asked_once() {
    let mut sim = building(5, 5);
    happens(&mut sim, Event::PodEnds("Error", Some(78)));
    sim.check_settled();
    assert_eq!((sim.reason(), sim.pods_created), ("Unplaceable", 1));
    assert!(sim.message().ends_with("no sandbox here"), "{}", sim.message());
}

/// A pod of the first attempt.
fn with_pod(infrastructure: u32, events: &[Event]) -> Sim {
    let mut spec = spec();
    spec.retries.infrastructure = infrastructure;
    let mut sim = Sim::new(spec, class());
    sim.reconcile();
    for event in events {
        happens(&mut sim, *event);
    }
    sim
}

#[test]
fn a_pod_without_a_node_says_what_the_scheduler_says_and_is_not_waited_for_without_end() {
    let mut sim = with_pod(5, &[]);
    later(&mut sim, 2);
    let scheduled = conditions::find(&sim.status().conditions, conditions::SCHEDULED).unwrap();
    assert_eq!(
        (scheduled.reason.as_str(), scheduled.message.as_str()),
        ("WaitingForNode", "0/1 nodes are available")
    );
    let writes = sim.writes;
    later(&mut sim, 57);
    assert_eq!((sim.writes, sim.verdicts.len()), (writes, 0));
    later(&mut sim, 1);
    sim.check_settled();
    assert_eq!((sim.reason(), sim.pods_created), ("Unplaceable", 1));
    assert!(sim.message().contains("in 1m: 0/1 nodes"), "{}", sim.message());
}

/// The API server's clock is ahead, and so was that of the operator before.
#[test]
fn clocks_that_disagree_keep_nothing_back() {
    let mut sim = with_pod(5, &[]);
    sim.pods[0].created = sim.now.saturating_add(SignedDuration::from_hours(2)).unwrap();
    sim.reconcile();
    assert_eq!(sim.reason(), "WaitingForNode");

    let mut sim = building(1, 0);
    happens(&mut sim, Event::PodGone);
    assert_eq!((sim.reason(), sim.pods_created), ("Retrying", 1));
    sim.now = sim.now.saturating_sub(SignedDuration::from_hours(2)).unwrap();
    sim.reconcile();
    assert_eq!(sim.pods_created, 2);
}

#[test]
fn an_image_that_does_not_come_is_named_once_and_not_waited_for_without_end() {
    let mut sim = with_pod(0, &[Event::Schedule, Event::ImageFails]);
    assert_eq!((sim.reason(), sim.message()), ("ImagePull", "ErrImagePull: not found"));
    let writes = sim.writes;
    sim.pods[0].waiting = Some(("ImagePullBackOff".into(), "Back-off".into()));
    later(&mut sim, 39);
    assert_eq!((sim.writes, sim.message()), (writes, "ErrImagePull: not found"));
    // The session of this process is young, but the builder could have answered it.
    later(&mut sim, 21);
    sim.check_settled();
    assert_eq!(sim.reason(), "StartTimedOut");
    assert!(sim.message().contains("within 40s; ImagePullBackOff"), "{}", sim.message());
}

/// The time of the start was over while nobody was there.
#[test]
fn a_late_operator_gives_the_builder_time_to_answer() {
    let mut sim = with_pod(0, &[Event::Schedule]);
    sim.happen(Event::Crash);
    later(&mut sim, 1000);
    later(&mut sim, 1);
    assert!(sim.verdicts.is_empty() && sim.session.is_some());
    sim.settle();
    assert_eq!(sim.verdicts, [true]);
}

#[test]
fn a_pod_that_outlives_its_deadline_is_ended() {
    let mut sim = building(5, 0);
    let scheduled = sim.pods[0].scheduled.unwrap();
    sim.pods[0].deadline = Some(Duration::from_secs(3600));
    let since = sim.now.duration_since(scheduled).as_secs();
    later(&mut sim, 4199 - since);
    assert!(sim.verdicts.is_empty());
    later(&mut sim, 1);
    sim.check_settled();
    assert_eq!((sim.reason(), sim.attempts()), ("TimedOut", vec![("TimedOut", false)]));
}

#[test]
fn a_pod_that_a_quota_refuses_is_tried_again_and_says_so() {
    let mut sim = Sim::new(spec(), class());
    sim.env.admission = Admission::Quota;
    sim.reconcile();
    sim.reconcile();
    assert_eq!((sim.reason(), sim.message()), ("WaitingForQuota", "exceeded quota: pods"));
    let writes = sim.writes;
    for _ in 0..10 {
        later(&mut sim, 3);
    }
    assert_eq!(sim.writes, writes, "it is said once");
    sim.request.spec.suspend = Some(true);
    sim.env.admission = Admission::Open;
    later(&mut sim, 10);
    assert_eq!((sim.reason(), sim.pods_created), ("Suspended", 0));
    sim.settle();
    assert_eq!((sim.verdicts.as_slice(), sim.status().attempts.len()), ([true].as_slice(), 1));

    let mut sim = Sim::new(spec(), class());
    sim.env.admission = Admission::Quota;
    sim.reconcile();
    later(&mut sim, 60);
    assert!(sim.verdicts.is_empty(), "it is tried once more");
    later(&mut sim, 2);
    sim.check_settled();
    assert_eq!(sim.reason(), "Unplaceable");
}

#[test]
fn a_pod_that_cannot_be_is_not_tried_again() {
    let mut sim = Sim::new(spec(), class());
    sim.env.admission = Admission::Invalid;
    sim.reconcile();
    sim.reconcile();
    sim.check_settled();
    assert_eq!((sim.reason(), sim.attempts()), ("Unplaceable", vec![("Unplaceable", false)]));
}

#[test]
fn cancel_ends_a_running_build() {
    let mut sim = building(5, 5);
    happens(&mut sim, Event::Cancel);
    sim.check_settled();
    assert_eq!(sim.reason(), "Cancelled");
    assert_eq!(sim.status().failure.as_ref().unwrap().log_tail, Vec::<String>::new());
}

#[test]
fn suspend_and_a_class_that_goes_leave_alone_what_runs() {
    let mut sim = building(0, 0);
    sim.happen(Event::Suspend(true));
    sim.env.has_class = false;
    for _ in 0..3 {
        assert!(sim.happen(Event::Advance));
        sim.reconcile();
    }
    assert_eq!(sim.reason(), "Built");
}

/// An old version of the request, and newer pods: what the newest version has begun is no stray.
#[test]
fn what_an_old_version_does_not_know_is_not_deleted() {
    let mut sim = building(1, 0);
    happens(&mut sim, Event::PodEnds("Evicted", None));
    let old = sim.request.clone();
    begin(&mut sim);
    let mut world = sim.world(false);
    world.request = old;
    let plan = plan(&world, sim.now.saturating_add(SignedDuration::from_secs(600)).unwrap());
    assert_eq!((plan.status, plan.requeue), (None, Requeue::Live));
    assert!(
        !plan.actions.iter().any(|action| matches!(action, Action::DeletePod { .. })),
        "{:?}",
        plan.actions
    );
}

/// Success needs no second look: a session has it from the builder itself.
#[test]
fn failures_are_said_from_live_worlds_only() {
    let end = |end: SessionEnd| {
        let sim = building(0, 0);
        let mut world = sim.world(false);
        let session = world.session.as_mut().unwrap();
        (session.end, session.end_time) = (Some(end), Some(sim.now));
        plan(&world, sim.now)
    };
    let failed =
        SessionEnd::Failed { reason: Reason::BuildFailed, message: "no".into(), infrastructure: false };
    let plan = end(failed);
    assert_eq!((plan.status, plan.actions, plan.requeue), (None, vec![Action::ForgetLookUp], Requeue::Live));
    let finished = SessionEnd::Finished {
        outputs: outputs(),
        transfer: Default::default(),
        timings: Default::default(),
    };
    assert!(end(finished).status.is_some());
}
