//! One story a test.

use std::collections::BTreeMap;

use drover_api::convert::{Target, target};
use drover_api::{BuildRequest, BuildRequestStatus, Concurrency, DerivationStatus, Reason, conditions};
use drover_nix::{BasicDerivation, StoreDir};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::super::index::{Index, News};
use super::{Both, NO_LIMIT, ONE, look_up, path, request, time};
use crate::world::{OtherState, Slot};

#[test]
fn the_same_build_runs_once_and_the_others_look_again() {
    let mut both = Both::default();
    for name in ["1", "2", "3"] {
        both.apply(request("a", name, "x", &[]));
    }
    both.apply(request("b", "1", "x", &[]));
    assert_eq!(both.ask("a/1", NO_LIMIT), Slot::Granted);
    for uid in ["a/2", "a/3"] {
        assert_eq!(both.ask(uid, NO_LIMIT), Slot::WaitForSame { request: "1".into() });
    }
    assert_eq!(both.ask("b/1", NO_LIMIT), Slot::Granted, "another namespace is another world");
    both.begin("a/1");
    both.settle("a/1", None);
    assert_eq!(both.news(), look_up(&["a/2", "a/3"]));
    assert_eq!(both.index.slot("a/2", 1), Slot::Unasked);
    assert_eq!(both.ask("a/3", NO_LIMIT), Slot::Granted);
    assert_eq!(both.ask("a/2", NO_LIMIT), Slot::WaitForSame { request: "3".into() });
    // One that is taken back lets the next one go.
    both.index.release("a/3");
    assert_eq!(both.news(), look_up(&["a/2"]));
}

#[test]
fn a_verdict_is_shared_by_those_who_waited_for_it() {
    let mut both = Both::default();
    both.apply(request("a", "1", "x", &[]));
    both.apply(request("a", "2", "x", &[]));
    let mut patient = request("a", "patient", "x", &[]);
    patient.spec.timeout_seconds = Some(9);
    both.apply(patient);
    for uid in ["a/1", "a/2", "a/patient"] {
        both.ask(uid, NO_LIMIT);
    }
    both.begin("a/1");
    both.settle("a/1", Some(Reason::BuildFailed));
    both.apply(request("a", "late", "x", &[]));
    // Also when the one who failed is deleted at once.
    both.index.gone("a/1");
    let shared = |uid: &str, class: &str| both.index.others(uid, Some(class)).same_failed;
    let same = shared("a/2", "c").unwrap();
    assert_eq!((&*same.request, same.reason, &*same.message), ("1", Reason::BuildFailed, "it said so"));
    assert_eq!(shared("a/2", "other"), None);
    assert_eq!(shared("a/patient", "c"), None, "its limits are others");
    assert_eq!(shared("a/late", "c"), None);
}

#[test]
fn a_verdict_is_found_again_by_its_time_after_a_restart() {
    let mut both = Both::default();
    for name in ["1", "2", "cancelled"] {
        both.apply(request("a", name, "x", &[]));
    }
    both.server.settle("a/1", Some(Reason::TimedOut), 300);
    both.server.settle("a/cancelled", Some(Reason::Cancelled), 400);
    let mut late = request("a", "late", "x", &[]);
    late.metadata.creation_timestamp = Some(Time(time(300)));
    both.server.put(late);
    both.index = Index::default();
    for request in both.server.requests.values() {
        both.index.listed(request);
    }
    let shared = |uid: &str| both.index.others(uid, Some("c")).same_failed.map(|same| same.reason);
    assert_eq!(shared("a/2"), Some(Reason::TimedOut));
    assert_eq!(shared("a/late"), None, "it was made later");
}

#[test]
fn a_verdict_that_is_not_the_builds_own_is_nobody_elses() {
    for reason in [Reason::Cancelled, Reason::InputMissing, Reason::BuilderLost, Reason::DependencyFailed] {
        let mut both = Both::default();
        both.running(request("a", "1", "x", &[]));
        both.apply(request("a", "2", "x", &[]));
        both.ask("a/2", NO_LIMIT);
        both.settle("a/1", Some(reason));
        assert_eq!(both.index.others("a/2", Some("c")).same_failed, None, "{reason}");
        assert_eq!(both.ask("a/2", NO_LIMIT), Slot::Granted);
    }
}

#[test]
fn inputs_and_who_makes_them() {
    let mut both = Both::default();
    both.apply(request("a", "app", "app", &["lib", "tool"]));
    both.looks("a/app", &["lib", "tool"]);
    assert_eq!(both.state_of_input("a/app", "lib"), None);
    both.apply(request("b", "lib", "lib", &[]));
    assert_eq!((both.state_of_input("a/app", "lib"), both.news()), (None, vec![]), "another namespace's");
    both.apply(request("a", "lib", "lib", &[]));
    assert_eq!(both.state_of_input("a/app", "lib"), Some(("lib".into(), OtherState::Going)));
    assert_eq!(both.news(), [("a/app".into(), News::Look)]);
    assert!(both.index.is_coming("a/app", &path("lib")) && !both.index.is_coming("a/lib", &path("lib")));

    both.apply(request("a", "tool", "tool", &[]));
    both.news();
    // While others are still to come, what came is known without asking.
    both.settle("a/lib", None);
    assert_eq!(both.news(), [("a/app".into(), News::Arrived(vec![path("lib").into()]))]);
    assert_eq!(both.state_of_input("a/app", "lib"), Some(("lib".into(), OtherState::Succeeded)));
    both.settle("a/tool", Some(Reason::BuildFailed));
    assert_eq!(both.news(), look_up(&["a/app"]));
    let failed = OtherState::Failed { reason: Reason::BuildFailed, message: "it said so".into() };
    assert_eq!(both.state_of_input("a/app", "tool"), Some(("tool".into(), failed)));
    // A second try, by another request, counts more than the failure.
    both.apply(request("a", "again", "tool", &[]));
    assert_eq!(both.state_of_input("a/app", "tool"), Some(("again".into(), OtherState::Going)));
    both.index.gone("a/again");
    both.index.gone("a/tool");
    assert_eq!(both.state_of_input("a/app", "tool"), None);
    // Who has begun is left alone.
    both.news();
    both.ask("a/app", NO_LIMIT);
    both.begin("a/app");
    both.apply(request("a", "third", "tool", &[]));
    assert_eq!(both.news(), []);
}

#[test]
fn a_circle_is_told_to_all_in_it() {
    let mut both = Both::default();
    for (name, input) in [("x", "y"), ("y", "z"), ("z", "x"), ("outside", "x")] {
        both.apply(request("a", name, name, &[input]));
    }
    both.news();
    both.looks("a/outside", &["x"]);
    both.looks("a/x", &["y"]);
    both.looks("a/y", &["z"]);
    assert_eq!(both.news(), []);
    both.looks("a/z", &["x"]);
    let told: Vec<String> = both.news().into_iter().map(|(uid, _)| uid).collect();
    assert_eq!(told, ["a/x", "a/y", "a/z"]);
    let cycle = |both: &Both, uid: &str| both.index.others(uid, Some("c")).cycle;
    assert_eq!(cycle(&both, "a/x"), ["x", "y", "z"]);
    assert_eq!(cycle(&both, "a/z"), ["z", "x", "y"]);
    assert_eq!(cycle(&both, "a/outside"), Vec::<String>::new());
    // The first that says so does not hide it from the others.
    both.settle("a/y", Some(Reason::DependencyCycle));
    assert_eq!(cycle(&both, "a/x"), ["x", "y", "z"]);
    // Somebody has put the path into a cache.
    both.looks("a/x", &[]);
    assert_eq!(cycle(&both, "a/z"), Vec::<String>::new());
}

#[test]
fn what_is_in_a_cache_closes_no_circle() {
    let mut both = Both::default();
    both.apply(request("a", "x", "x", &["y"]));
    both.apply(request("a", "y", "y", &["x"]));
    both.looks("a/x", &["y"]);
    both.looks("a/y", &[]);
    assert_eq!(both.index.others("a/x", Some("c")).cycle, Vec::<String>::new());
    both.apply(request("a", "self", "self", &["self"]));
    both.looks("a/self", &["self"]);
    assert_eq!(both.index.others("a/self", Some("c")).cycle, ["self"]);
}

#[test]
fn fairness_then_priority_then_age_then_name() {
    let mut both = Both::default();
    both.running(request("a", "first", "0", &[]));
    let wait = |both: &mut Both, namespace: &str, name: &str, priority: i32, created: i64| {
        let mut request = request(namespace, name, &format!("{namespace}{name}"), &[]);
        request.spec.priority = Some(priority);
        request.metadata.creation_timestamp = Some(Time(time(created)));
        let uid = request.metadata.uid.clone().unwrap();
        both.apply(request);
        let slot = both.ask(&uid, ONE);
        assert!(matches!(slot, Slot::WaitForConcurrency { .. }), "{slot:?}");
    };
    wait(&mut both, "a", "old", 0, 1);
    wait(&mut both, "a", "urgent", 5, 9);
    wait(&mut both, "b", "young", 0, 8);
    wait(&mut both, "b", "young-too", 0, 8);
    wait(&mut both, "a", "lazy", -1, 0);
    wait(&mut both, "b", "raised", 0, 20);
    let raised = both.server.change("b/raised", |request| request.spec.priority = Some(7));
    both.index.seen(&raised);
    let message = "BuilderClass c has 1 at once (spec.concurrency.total)".to_owned();
    assert_eq!(both.index.slot("a/old", 1), Slot::WaitForConcurrency { message });
    both.news();
    let mut order = vec![];
    let mut running = "a/first".to_owned();
    while order.len() < 6 {
        both.settle(&running, None);
        let news = both.news();
        assert_eq!(news.len(), 1, "{news:?}");
        assert_eq!(news[0].1, News::LookUp, "what caches said is old by now");
        running.clone_from(&news[0].0);
        assert_eq!(both.index.slot(&running, 1), Slot::Granted);
        both.begin(&running);
        order.push(running.clone());
    }
    assert_eq!(order, ["b/raised", "a/urgent", "b/young", "a/old", "b/young-too", "a/lazy"]);

    // The namespace that has fewer running comes first, however old the other's are, and however long ago its turn is.
    let four = Concurrency { total: Some(4), per_namespace: None };
    let mut both = Both::default();
    both.running(request("a", "runs", "0", &[]));
    both.running(request("a", "runs-too", "-1", &[]));
    both.running(request("b", "runs", "0", &[]));
    for name in ["1", "2"] {
        both.apply(request("a", name, name, &[]));
    }
    both.apply(request("b", "1", "1", &[]));
    both.index.limit("c", ONE);
    for uid in ["a/1", "a/2", "b/1"] {
        both.ask(uid, ONE);
    }
    both.index.limit("c", four);
    assert_eq!(both.news(), look_up(&["b/1"]));
}

/// Whatever a tenant sets its own to, and however many it has.
#[test]
fn no_priority_keeps_another_namespace_waiting() {
    let mut both = Both::default();
    both.running(request("a", "first", "0", &[]));
    let mut wait = |namespace: &str, name: &str, priority: i32| {
        let mut request = request(namespace, name, &format!("{namespace}{name}"), &[]);
        request.spec.priority = Some(priority);
        both.apply(request);
        both.ask(&format!("{namespace}/{name}"), ONE);
    };
    for name in ["1", "2", "3", "4"] {
        wait("a", name, 1_000_000);
    }
    wait("b", "1", 0);
    wait("b", "2", -1_000_000);
    both.news();
    let mut order = vec![];
    let mut running = "a/first".to_owned();
    while order.len() < 6 {
        both.settle(&running, None);
        running.clone_from(&both.news()[0].0);
        both.begin(&running);
        order.push(running.clone());
    }
    assert_eq!(order, ["b/1", "a/1", "b/2", "a/2", "a/3", "a/4"]);
}

#[test]
fn a_namespace_has_its_share() {
    let mut both = Both::default();
    let limit = Concurrency { total: Some(3), per_namespace: Some(1) };
    for (namespace, name) in [("a", "1"), ("a", "2"), ("b", "1")] {
        both.apply(request(namespace, name, name, &[]));
    }
    assert_eq!(both.ask("a/1", limit), Slot::Granted);
    let message = "BuilderClass c has 1 at once for namespace a (spec.concurrency.perNamespace)".to_owned();
    assert_eq!(both.ask("a/2", limit), Slot::WaitForConcurrency { message });
    assert_eq!(both.ask("b/1", limit), Slot::Granted);
    both.news();
    both.index.gone("a/1");
    assert_eq!(both.news(), look_up(&["a/2"]));
}

#[test]
fn whoever_is_held_blocks_nobody() {
    type Change = fn(&mut BuildRequest);
    let held: [Change; 3] = [
        |request| request.spec.suspend = Some(true),
        |request| request.spec.cancel = Some(true),
        |request| request.metadata.deletion_timestamp = Some(Time(time(1))),
    ];
    for hold in held {
        let mut both = Both::default();
        for name in ["1", "2"] {
            both.apply(request("a", name, "x", &[]));
        }
        assert_eq!(both.ask("a/1", ONE), Slot::Granted);
        assert!(matches!(both.ask("a/2", ONE), Slot::WaitForSame { .. }));
        let changed = both.server.change("a/1", hold);
        both.index.seen(&changed);
        assert_eq!(both.index.slot("a/1", 1), Slot::Unasked);
        assert_eq!(both.ask("a/1", ONE), Slot::Unasked);
        assert_eq!(both.ask("a/2", ONE), Slot::Granted);
    }
}

#[test]
fn an_old_event_takes_nothing_back() {
    let mut both = Both::default();
    both.apply(request("a", "1", "x", &[]));
    let old = both.server.requests["a/1"].clone();
    assert_eq!(both.ask("a/1", ONE), Slot::Granted);
    both.index.seen(&old);
    assert_eq!(both.index.slot("a/1", 1), Slot::Granted, "before our write");
    both.begin("a/1");
    both.index.seen(&old);
    assert_eq!(both.index.slot("a/1", 1), Slot::Granted, "after it");
    // Neither does what was planned from it.
    both.index.release("a/1");
    assert_eq!(both.index.slot("a/1", 1), Slot::Granted, "its pod runs");
    let ended = both.server.end_attempt("a/1");
    both.index.seen(&ended);
    assert_eq!(both.index.slot("a/1", 1), Slot::Unasked);
    assert_eq!(both.ask("a/1", ONE), Slot::Granted, "the second attempt");
    both.index.seen(&ended);
    assert_eq!(both.index.slot("a/1", 2), Slot::Granted);
    both.settle("a/1", None);
    both.index.seen(&ended);
    both.apply(request("a", "2", "y", &[]));
    assert_eq!(both.ask("a/2", ONE), Slot::Granted, "a settled one came back to life");
}

#[test]
fn a_list_says_what_is_gone_and_what_runs() {
    let mut both = Both::default();
    both.running(request("a", "1", "x", &[]));
    both.running(request("a", "2", "y", &[]));
    both.apply(request("a", "3", "x", &[]));
    both.index = Index::default();
    both.index.begin_list();
    for request in both.server.requests.values() {
        both.index.listed(request);
    }
    both.index.end_list();
    assert_eq!(both.index.slot("a/1", 1), Slot::Granted, "what ran before this process began");
    assert_eq!(both.ask("a/3", NO_LIMIT), Slot::WaitForSame { request: "1".into() });
    both.news();
    both.index.begin_list();
    both.index.listed(&both.server.requests["a/3"].clone());
    both.index.unreadable("a/2");
    both.index.end_list();
    assert_eq!(both.news(), look_up(&["a/3"]));
    assert_eq!(both.index.slot("a/2", 1), Slot::Granted, "it is there, though nobody can read it");
}

#[test]
fn a_status_that_lost_its_verdict_begins_anew() {
    let mut both = Both::default();
    both.running(request("a", "1", "x", &["y"]));
    both.settle("a/1", None);
    let emptied = both.server.change("a/1", |request| request.status = None);
    both.index.seen(&emptied);
    assert_eq!(both.ask("a/1", ONE), Slot::Granted);
    both.apply(request("a", "y", "y", &[]));
    assert_eq!(both.state_of_input("a/1", "y"), Some(("y".into(), OtherState::Going)));
}

/// A request that only names its derivation.
fn named(namespace: &str, name: &str) -> BuildRequest {
    let mut named = request(namespace, name, name, &[]);
    named.spec.derivation = None;
    named.spec.drv_path = Some(format!("/nix/store/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa-{name}.drv"));
    named
}

/// What was read for it.
fn derivation(build: &str, inputs: &[&str]) -> BasicDerivation {
    let spec = request("any", "any", build, inputs).spec;
    let Ok(Target::Derivation(derivation)) = target(&spec, &StoreDir::default()) else {
        panic!("it makes no sense")
    };
    derivation
}

#[test]
fn what_is_only_named_may_make_anything_until_it_was_read() {
    let mut both = Both::default();
    both.apply(request("a", "app", "app", &["lib"]));
    both.looks("a/app", &["lib"]);
    both.apply(named("a", "lib"));
    both.apply(named("b", "tool"));
    let unread = |both: &Both, uid: &str| both.index.others(uid, Some("c")).unread;
    assert_eq!(unread(&both, "a/app").as_deref(), Some("lib"));
    assert_eq!(unread(&both, "a/lib"), None, "itself, and another namespace's");
    assert_eq!(both.state_of_input("a/app", "lib"), None);
    both.index.resolved("a/lib", &derivation("lib", &["base"]));
    assert_eq!(both.news(), [("a/app".into(), News::Look)]);
    assert_eq!(both.state_of_input("a/app", "lib"), Some(("lib".into(), OtherState::Going)));
    assert_eq!(unread(&both, "a/app"), None);
    // It has inputs of its own as well.
    both.looks("a/lib", &["base"]);
    both.apply(request("a", "base", "base", &[]));
    assert_eq!(both.news(), [("a/lib".into(), News::Look)]);
    // Once more changes nothing.
    both.index.resolved("a/lib", &derivation("lib", &["base"]));
    assert_eq!(both.news(), []);
    both.index.gone("a/lib");
    assert_eq!(both.state_of_input("a/app", "lib"), None);
}

#[test]
fn what_may_never_be_read_is_not_waited_for() {
    let mut both = Both::default();
    both.apply(request("a", "app", "app", &["lib"]));
    both.apply(named("a", "lib"));
    let unread = |both: &Both| both.index.others("a/app", Some("c")).unread;
    assert!(unread(&both).is_some());
    // Its file is nowhere, or it has no class.
    let waits = both.server.change("a/lib", |request| {
        let status = request.status.get_or_insert_default();
        let (unknown, why) = (conditions::Status::Unknown, Reason::WaitingForInput);
        conditions::set(&mut status.conditions, conditions::ACCEPTED, unknown, why, "", None, time(200));
    });
    both.index.seen(&waits);
    assert_eq!(unread(&both), None);
    both.apply(named("a", "other"));
    assert_eq!(unread(&both).as_deref(), Some("other"));
    both.settle("a/other", Some(Reason::PathNotProven));
    assert_eq!(unread(&both), None);
}

#[test]
fn a_restart_knows_what_was_read_before() {
    let mut both = Both::default();
    let mut status = BuildRequestStatus::default();
    let outputs = BTreeMap::from([("out".to_owned(), path("lib"))]);
    status.derivation = Some(DerivationStatus { system: "x86_64-linux".into(), outputs });
    let lib = BuildRequest { status: Some(status), ..named("a", "lib") };
    both.apply(lib);
    both.apply(request("a", "app", "app", &["lib"]));
    both.apply(request("a", "same", "lib", &[]));
    assert_eq!(both.state_of_input("a/app", "lib"), Some(("lib".into(), OtherState::Going)));
    assert_eq!(both.index.others("a/app", Some("c")).unread, None);
    // It runs; what it builds is known again when it is read again.
    both.begin("a/lib");
    both.news();
    both.ask("a/same", NO_LIMIT);
    both.index.release("a/same");
    both.index.resolved("a/lib", &derivation("lib", &[]));
    assert_eq!(both.ask("a/same", NO_LIMIT), Slot::WaitForSame { request: "lib".into() });
    both.settle("a/lib", Some(Reason::BuildFailed));
    assert_eq!(both.ask("a/same", ONE), Slot::Granted, "its place is free");
}

#[test]
fn those_in_line_for_the_same_wait_for_one_that_turns_out_to_run() {
    let mut both = Both::default();
    both.apply(named("a", "lib"));
    both.begin("a/lib");
    both.apply(request("a", "same", "lib", &[]));
    assert!(matches!(both.ask("a/same", ONE), Slot::WaitForConcurrency { .. }));
    both.index.resolved("a/lib", &derivation("lib", &[]));
    assert_eq!(both.index.slot("a/same", 1), Slot::WaitForSame { request: "lib".into() });
    both.settle("a/lib", None);
    assert_eq!(both.news(), look_up(&["a/same"]));
    assert_eq!(both.ask("a/same", ONE), Slot::Granted);
}
