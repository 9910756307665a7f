//! Invented logs: a good one in which nothing is found, and for each rule one in which it is broken once.

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::*;

const OPERATOR: &str = "system:serviceaccount:drover:drover";

/// Builds a log, one line after the other; times are seconds since its beginning.
#[derive(Default)]
struct Invented {
    lines: Vec<Value>,
    version: u64,
}

impl Invented {
    /// A request that is built at its first attempt, by an operator that leads.
    fn good() -> Self {
        let mut log = Self::default();
        log.lease(0, "drover-a", 15);
        log.request(1, "one", "team");
        log.status(2, "one", "team", running(1));
        log.pod(3, "one", "team", 1, "p1");
        log.lease(10, "drover-a", 15);
        log.status(12, "one", "team", succeeded("x"));
        log.remove_pod(13, "p1", 10);
        log.remove_pod(14, "p1", 0);
        log
    }

    fn event(
        &mut self,
        at: i64,
        verb: &str,
        object: Value,
        by: &str,
        request: Value,
        response: Value,
    ) -> &mut Value {
        let time = (start() + SignedDuration::from_secs(at)).to_string();
        let mut event = json!({
            "kind": "Event", "stage": "ResponseComplete", "verb": verb, "requestURI": "/",
            "user": {"username": by}, "objectRef": object, "responseStatus": {"code": 200},
            "requestReceivedTimestamp": time, "stageTimestamp": time,
            "requestObject": request, "responseObject": response,
        });
        if by == OPERATOR {
            event["user"]["extra"] = json!({"authentication.kubernetes.io/pod-name": ["drover-a"]});
        }
        self.lines.push(event);
        self.lines.last_mut().unwrap()
    }

    fn object(&mut self, name: &str, namespace: &str, status: Value) -> Value {
        self.version += 1;
        json!({
            "metadata": {
                "uid": format!("uid-{name}"), "name": name, "namespace": namespace,
                "resourceVersion": self.version.to_string(),
            },
            "spec": {"retries": {"infrastructure": 1, "build": 0}},
            "status": status,
        })
    }

    fn request(&mut self, at: i64, name: &str, namespace: &str) {
        let object = self.object(name, namespace, Value::Null);
        self.event(at, "create", requests(name, namespace, ""), "person", Value::Null, object);
    }

    fn status(&mut self, at: i64, name: &str, namespace: &str, status: Value) -> &mut Value {
        let object = self.object(name, namespace, status);
        self.event(at, "patch", requests(name, namespace, "status"), OPERATOR, Value::Null, object)
    }

    fn delete_request(&mut self, at: i64, name: &str, namespace: &str) {
        let answer = json!({"kind": "Status", "details": {"uid": format!("uid-{name}")}});
        self.event(at, "delete", requests(name, namespace, ""), "person", Value::Null, answer);
    }

    fn pod(&mut self, at: i64, request: &str, namespace: &str, attempt: u32, uid: &str) -> &mut Value {
        let object = json!({"metadata": {
            "uid": uid, "name": format!("{request}-{attempt}"), "namespace": "builders",
            "labels": {
                "drover.build/request-uid": format!("uid-{request}"), "drover.build/attempt": attempt.to_string(),
            },
            "annotations": {"drover.build/request": format!("{namespace}/{request}")},
        }});
        self.event(at, "create", pods(), OPERATOR, Value::Null, object)
    }

    fn remove_pod(&mut self, at: i64, uid: &str, grace: i64) {
        let object = json!({"metadata": {"uid": uid, "deletionGracePeriodSeconds": grace}});
        self.event(at, "delete", pods(), "system:node:node-0", Value::Null, object);
    }

    fn lease(&mut self, at: i64, holder: &str, seconds: i64) {
        let object = json!({
            "apiGroup": "coordination.k8s.io", "resource": "leases", "namespace": "drover", "name": "drover",
        });
        let lease =
            json!({"spec": {"holderIdentity": format!("{holder}_1"), "leaseDurationSeconds": seconds}});
        self.event(at, "update", object, OPERATOR, Value::Null, lease);
    }

    /// The reads that a failure takes.
    fn look(&mut self, at: i64, name: &str, namespace: &str) {
        self.event(at, "get", requests(name, namespace, ""), OPERATOR, Value::Null, Value::Null);
        let listed = self.event(at, "list", pods(), OPERATOR, Value::Null, Value::Null);
        listed["requestURI"] =
            format!("/api/v1/pods?labelSelector=drover.build%2Frequest-uid%3Duid-{name}").into();
    }

    fn audit(&self) -> Vec<Violation> {
        let text: String = self.lines.iter().map(|line| format!("{line}\n")).collect();
        let log = Log::parse(&text);
        assert_eq!(log.broken, 0);
        audit(&log.events, &Rules::new("drover", "drover", "builders"))
    }

    /// Something was found, and all of it is of this invariant.
    #[track_caller]
    fn breaks(&self, invariant: &str) {
        let found = self.audit();
        assert!(!found.is_empty(), "{invariant} is broken and was not found");
        for violation in &found {
            assert_eq!(violation.invariant, invariant, "{violation}");
        }
    }
}

fn start() -> Timestamp {
    Timestamp::from_second(1_800_000_000).unwrap()
}

fn requests(name: &str, namespace: &str, sub: &str) -> Value {
    let mut object = json!({
        "apiGroup": GROUP, "resource": "buildrequests", "namespace": namespace, "name": name,
    });
    if !sub.is_empty() {
        object["subresource"] = sub.into();
    }
    object
}

fn pods() -> Value {
    json!({"resource": "pods", "namespace": "builders", "name": "p"})
}

fn condition(status: &str, reason: &str, message: &str) -> Value {
    json!([{"type": "Succeeded", "status": status, "reason": reason, "message": message}])
}

fn running(attempt: u32) -> Value {
    let mut attempts: Vec<Value> = (1..attempt).map(|number| lost(number, "Evicted", true)).collect();
    attempts.push(json!({"number": attempt}));
    json!({"conditions": condition("Unknown", "Building", ""), "attempts": attempts})
}

fn succeeded(path: &str) -> Value {
    json!({
        "conditions": condition("True", "Built", ""),
        "attempts": [{"number": 1, "endTime": "then", "reason": "Built"}],
        "outputs": {"out": {"path": path}},
    })
}

fn lost(number: u32, reason: &str, infrastructure: bool) -> Value {
    json!({"number": number, "endTime": "then", "reason": reason, "infrastructure": infrastructure})
}

fn failed(reason: &str, attempts: &[Value]) -> Value {
    json!({"conditions": condition("False", reason, ""), "attempts": attempts})
}

#[test]
fn in_a_good_log_nothing_is_found() {
    let mut log = Invented::good();
    assert_eq!(log.audit(), []);
    log.request(15, "two", "team");
    log.status(16, "two", "team", running(1));
    log.pod(17, "two", "team", 1, "p2");
    log.status(18, "two", "team", running(2));
    log.pod(19, "two", "team", 2, "p3");
    log.look(20, "two", "team");
    log.status(
        21,
        "two",
        "team",
        failed("BuildFailed", &[lost(1, "Evicted", true), lost(2, "BuildFailed", false)]),
    );
    log.delete_request(22, "two", "team");
    for (at, pod) in [(23, "p2"), (70, "p3")] {
        log.remove_pod(at, pod, 0);
    }
    log.remove_pod(200, "unknown", 0);
    assert_eq!(log.audit(), []);
}

#[test]
fn what_is_no_event_is_counted_and_no_more() {
    let good = Invented::good().lines;
    let half = &good[1].to_string()[..100];
    let text = format!("{}\n{half}{}\n", good[0], good[2]);
    let log = Log::parse(&text);
    assert_eq!((log.events.len(), log.broken), (2, 1));
}

#[test]
fn s1_a_second_pod_for_an_attempt() {
    let mut log = Invented::good();
    log.pod(8, "one", "team", 1, "p1-again");
    log.breaks("S1");

    // Lost before anyone wrote down that it was there: no builder of the attempt's yet.
    let unknown = || {
        let mut log = Invented::good();
        log.lines.truncate(4);
        log.remove_pod(5, "p1", 0);
        log
    };
    let named = || json!({"attempts": [{"number": 1, "pod": "one-1"}]});
    let mut log = unknown();
    log.pod(7, "one", "team", 1, "p1-again");
    log.status(8, "one", "team", named());
    assert_eq!(log.audit(), []);

    let mut log = unknown();
    log.status(6, "one", "team", named());
    log.pod(7, "one", "team", 1, "p1-again");
    log.breaks("S1");
}

#[test]
fn s2_outputs_that_change_or_come_without_success() {
    let mut log = Invented::good();
    let mut early = running(1);
    early["outputs"] = succeeded("x")["outputs"].clone();
    log.lines.truncate(4);
    log.status(6, "one", "team", early);
    log.breaks("S2");

    let mut log = Invented::good();
    let mut none = succeeded("x");
    none["outputs"] = json!({});
    log.lines.truncate(4);
    log.status(6, "one", "team", none);
    log.breaks("S2");
}

#[test]
fn s3_a_status_that_changes_after_the_verdict() {
    let mut log = Invented::good();
    let mut again = succeeded("x");
    again["duration"] = "1s".into();
    log.status(14, "one", "team", again);
    log.breaks("S3");
}

#[test]
fn s5_a_pod_for_a_request_that_is_gone_or_never_was() {
    let mut log = Invented::good();
    log.delete_request(4, "one", "team");
    log.pod(10, "one", "team", 2, "p2");
    log.remove_pod(11, "p2", 0);
    log.breaks("S5");

    let mut log = Invented::good();
    log.pod(4, "never", "team", 1, "p2");
    log.breaks("S5");
}

#[test]
fn s6_a_pod_that_outlives_its_request() {
    // Asked to go in time, and not gone.
    let mut log = Invented::good();
    log.lines.pop();
    log.delete_request(20, "one", "team");
    log.remove_pod(79, "other", 0);
    assert_eq!(log.audit(), []);
    log.remove_pod(81, "other", 0);
    log.breaks("S6");
    log.remove_pod(82, "p1", 0);
    log.breaks("S6");

    let mut log = Invented::good();
    log.pod(4, "one", "team", 2, "p2")["responseObject"]["metadata"]["labels"] = json!({});
    log.breaks("S6");

    let mut log = Invented::good();
    log.pod(4, "one", "team", 2, "p2")["user"] = json!({"username": "person"});
    log.breaks("S6");
}

#[test]
fn s8_a_secret_in_a_line() {
    let secrets = ["hunter2".to_owned(), String::new()];
    assert_eq!(leaks("one\ntwo hunter2\nthree", &secrets), [2]);
    assert!(leaks("one\ntwo", &secrets).is_empty());
}

#[test]
fn s9_a_failure_without_a_look() {
    let end = |look: Option<i64>| {
        let mut log = Invented::good();
        log.lines.truncate(5);
        if let Some(at) = look {
            log.look(at, "one", "team");
        }
        log.status(24, "one", "team", failed("BuildFailed", &[lost(1, "BuildFailed", false)]));
        log
    };
    assert_eq!(end(Some(23)).audit(), []);
    end(None).breaks("S9");
    let mut stale = end(Some(23));
    stale.lease(40, "drover-a", 60);
    stale.request(41, "two", "team");
    stale.look(42, "one", "team");
    stale.status(80, "two", "team", failed("BuildFailed", &[lost(1, "BuildFailed", false)]));
    stale.breaks("S9");
}

#[test]
fn s10_more_attempts_than_there_may_be() {
    let end = |attempts: &[Value], reason: &str| {
        let mut log = Invented::good();
        log.lines.truncate(5);
        log.look(11, "one", "team");
        log.status(12, "one", "team", failed(reason, attempts));
        log
    };
    let evicted = |number| lost(number, "Evicted", true);
    assert_eq!(end(&[evicted(1), evicted(2)], "Evicted").audit(), []);
    end(&[evicted(1), evicted(2), evicted(3)], "Evicted").breaks("S10");
    let build = |number| lost(number, "BuildFailed", false);
    end(&[build(1), build(2)], "BuildFailed").breaks("S10");
    end(&[evicted(2)], "Evicted").breaks("S10");
    end(&[lost(1, "Evicted", false)], "Evicted").breaks("S10");

    let mut log = Invented::good();
    for number in 2..=3 {
        log.pod(5, "one", "team", number, &format!("more-{number}"));
    }
    log.breaks("S10");

    let mut log = Invented::good();
    log.lines.truncate(5);
    log.status(5, "one", "team", running(2));
    log.status(6, "one", "team", json!({"attempts": [lost(1, "DiskFull", true), {"number": 2}]}));
    log.breaks("S10");
}

#[test]
fn s11_what_crosses_namespaces() {
    let mut log = Invented::good();
    log.pod(4, "one", "other-team", 2, "p2");
    log.breaks("S11");

    let mut log = Invented::good();
    log.request(15, "secret-project", "other-team");
    log.request(16, "two", "team");
    log.status(
        17,
        "two",
        "team",
        json!({"conditions": condition("Unknown", "WaitingForInput", "request secret-project builds it")}),
    );
    log.breaks("S11");

    let mut log = Invented::good();
    log.event(5, "get", pods(), "system:serviceaccount:builders:default", Value::Null, Value::Null);
    log.breaks("S11");

    let mut log = Invented::good();
    log.request(15, "two", "team");
    log.status(16, "two", "team", running(1))["user"] = json!({"username": "person"});
    log.breaks("S11");
}

#[test]
fn s12_a_write_that_changes_nothing() {
    let mut log = Invented::good();
    log.status(14, "one", "team", succeeded("x"));
    log.breaks("S12");

    let mut log = Invented::good();
    log.lines.truncate(5);
    log.status(5, "one", "team", running(1));
    log.breaks("S12");
}

#[test]
fn a_write_without_the_lease() {
    // Run out.
    let mut log = Invented::good();
    log.request(28, "two", "team");
    log.status(28, "two", "team", running(1));
    log.breaks("Lease");

    // Taken by another.
    let mut log = Invented::good();
    log.lease(15, "drover-b", 15);
    log.request(18, "two", "team");
    log.status(19, "two", "team", running(1));
    log.breaks("Lease");

    let mut log = Invented::good();
    log.lines.retain(|line| line["objectRef"]["resource"] != "leases");
    assert_eq!(log.audit(), [], "there is no election");
}
