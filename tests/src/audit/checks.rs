//! One function an invariant; each gives what it found broken.

use std::collections::{BTreeMap, BTreeSet};

use drover_api::{Reason, ReasonKind};
use jiff::{SignedDuration, Timestamp};
use serde_json::Value;

use super::history::{Lease, text};
use super::{Event, GROUP, History, Pod, Request, Rules, StatusWrite, Violation};

pub(super) fn all(events: &[Event], history: &History, rules: &Rules) -> Vec<Violation> {
    let mut found = Vec::new();
    one_pod_an_attempt(history, &mut found);
    pods_for_living_requests(history, rules, &mut found);
    nothing_is_left(events, history, rules, &mut found);
    for (uid, request) in &history.requests {
        let mut report = |invariant, what: String| {
            let about = format!("{}/{} ({uid})", request.namespace, request.name);
            found.push(Violation { invariant, about, what });
        };
        verdicts_stand(request, &mut report);
        outputs_once(request, &mut report);
        no_idle_write(request, &mut report);
        within_budgets(uid, request, history, &mut report);
        the_operator_writes(request, rules, &mut report);
        failures_are_fresh(uid, request, events, rules, &mut report);
    }
    nobody_crosses(events, history, rules, &mut found);
    the_leader_writes(events, &history.leases, rules, &mut found);
    found
}

/// S1: an attempt has one builder. Where an operator died between making a pod and writing that down, and that pod was then
/// lost, the next one makes it again: by the same name, so only once the first is gone, and no session was with that one, since
/// none begins before the status names its pod.
fn one_pod_an_attempt(history: &History, found: &mut Vec<Violation>) {
    let mut attempts: BTreeMap<(&str, &str), Vec<&Pod>> = BTreeMap::new();
    for pod in &history.pods {
        attempts.entry((&pod.request, &pod.attempt)).or_default().push(pod);
    }
    for ((request, attempt), pods) in attempts {
        let mut report =
            |what: String| found.push(Violation { invariant: "S1", about: request.to_owned(), what });
        for pair in pods.windows(2) {
            let [first, second] = pair else { continue };
            if first.gone.is_none_or(|gone| gone > second.created) {
                report(format!("attempt {attempt} had two pods at once: {} and {}", first.uid, second.uid));
            }
            let statuses = history.requests.get(request).map_or(&[][..], |request| &request.statuses);
            let mut while_first = statuses
                .iter()
                .filter(|write| write.received >= first.created && write.received < second.created);
            if while_first.any(|write| names_pod(&write.status, attempt)) {
                let what =
                    format!("attempt {attempt} went on with {} after {} was in use", second.uid, first.uid);
                report(what);
            }
        }
    }
}

/// Whether a status says of an attempt which pod it has.
fn names_pod(status: &Value, attempt: &str) -> bool {
    let attempts = status["attempts"].as_array().into_iter().flatten();
    let number = |known: &Value| known["number"].as_u64().map(|number| number.to_string());
    attempts.into_iter().any(|known| number(known).as_deref() == Some(attempt) && known["pod"].is_string())
}

/// S5: only for a request that exists with that uid; S6: it carries that uid, and S11: its name is the request's.
fn pods_for_living_requests(history: &History, rules: &Rules, found: &mut Vec<Violation>) {
    for pod in &history.pods {
        let mut report =
            |invariant, what: String| found.push(Violation { invariant, about: pod.name.clone(), what });
        if pod.user != rules.operator {
            report("S6", format!("{} made a pod among the builders", pod.user));
        }
        if pod.request.is_empty() || pod.attempt.is_empty() {
            report("S6", "it does not say for which request and attempt it is".into());
            continue;
        }
        let Some(request) = history.requests.get(&pod.request) else {
            report("S5", format!("no request ever had the uid {}", pod.request));
            continue;
        };
        if let Some(deleted) = request.deleted
            && pod.created > after(deleted, rules.race)
        {
            report("S5", format!("made at {}, but its request was deleted at {deleted}", pod.created));
        }
        let name = format!("{}/{}", request.namespace, request.name);
        if !request.name.is_empty() && pod.annotation != name {
            report("S11", format!("it names {}, and its uid is that of {name}", pod.annotation));
        }
    }
}

/// S6: what was made for a request that was deleted is gone in time, as far as the log goes.
fn nothing_is_left(events: &[Event], history: &History, rules: &Rules, found: &mut Vec<Violation>) {
    let Some(end) = events.iter().map(|event| event.done).max() else { return };
    for pod in &history.pods {
        let Some(deleted) = history.requests.get(&pod.request).and_then(|request| request.deleted) else {
            continue;
        };
        let due = after(deleted, rules.gone_within);
        let what = match pod.gone {
            Some(gone) if gone > due => format!("gone at {gone}, its request at {deleted}"),
            None if end > due => format!("still there at {end}, its request was deleted at {deleted}"),
            _ => continue,
        };
        found.push(Violation { invariant: "S6", about: pod.name.clone(), what });
    }
}

/// S3: a verdict is the last word; nothing of the status changes after it but the generation that it is said of.
fn verdicts_stand(request: &Request, report: &mut impl FnMut(&'static str, String)) {
    let Some(spoken) = request.statuses.iter().position(|write| verdict(&write.status).is_some()) else {
        return;
    };
    let first = &request.statuses[spoken];
    for later in &request.statuses[spoken + 1..] {
        if without_generation(&later.status) != without_generation(&first.status) {
            let was = verdict(&first.status);
            let is = verdict(&later.status);
            report(
                "S3",
                format!("{was:?} at {}, and another status at {}: {is:?}", first.received, later.received),
            );
        }
    }
}

/// S2: outputs come once, with the verdict, and stay as they are.
fn outputs_once(request: &Request, report: &mut impl FnMut(&'static str, String)) {
    let mut recorded: Option<&Value> = None;
    for write in &request.statuses {
        let outputs = &write.status["outputs"];
        let some = outputs.as_object().is_some_and(|outputs| !outputs.is_empty());
        let succeeded = verdict(&write.status).is_some_and(|(status, _)| status == "True");
        if some != succeeded {
            report("S2", format!("at {}: outputs {some}, succeeded {succeeded}", write.received));
        }
        match recorded {
            Some(before) if before != outputs => {
                report("S2", format!("other outputs at {} than before", write.received));
            }
            _ if some => recorded = Some(outputs),
            _ => {}
        }
    }
}

/// S12: every write of a status changes it.
fn no_idle_write(request: &Request, report: &mut impl FnMut(&'static str, String)) {
    for pair in request.statuses.windows(2) {
        let [before, after] = pair else { continue };
        if before.version == after.version || before.status == after.status {
            report("S12", format!("the write at {} changed nothing", after.received));
        }
    }
}

/// S10: attempts are numbered without gaps, what ended stays ended, neither budget is exceeded, and no failure of the
/// machinery is counted as the build's. Pods are counted by themselves.
fn within_budgets(
    uid: &str,
    request: &Request,
    history: &History,
    report: &mut impl FnMut(&'static str, String),
) {
    let retries = |kind: &str, default: u64| {
        let number = request.spec["retries"][kind].as_u64().unwrap_or(default);
        usize::try_from(number).unwrap_or(usize::MAX)
    };
    let (infrastructure, build) = (retries("infrastructure", 5), retries("build", 0));
    let pods = history.pods.iter().filter(|pod| pod.request == uid).count();
    if pods > infrastructure + build + 1 {
        report("S10", format!("{pods} pods, and retries of {infrastructure} and {build}"));
    }
    let mut ended: Vec<Value> = Vec::new();
    for write in &request.statuses {
        let attempts = write.status["attempts"].as_array().cloned().unwrap_or_default();
        for (index, attempt) in attempts.iter().enumerate() {
            if attempt["number"].as_u64() != Some(index as u64 + 1) {
                report(
                    "S10",
                    format!("at {}: attempt {} is number {}", write.received, index + 1, attempt["number"]),
                );
            }
            let reason = attempt["reason"].as_str().and_then(Reason::parse);
            let machinery = attempt["infrastructure"] == true;
            if reason.is_some_and(|reason| reason.is_terminal() && reason.is_infrastructure() != machinery) {
                report(
                    "S10",
                    format!(
                        "attempt {} ended with {} and infrastructure {machinery}",
                        index + 1,
                        attempt["reason"]
                    ),
                );
            }
        }
        if attempts.len() < ended.len() || attempts[..ended.len()] != ended[..] {
            report("S10", format!("at {}: an attempt that had ended is another now", write.received));
        }
        ended = attempts.into_iter().take_while(|attempt| attempt["endTime"].is_string()).collect();
    }
    let failed = |machinery: bool| {
        let of_kind = ended.iter().filter(|attempt| (attempt["infrastructure"] == true) == machinery);
        of_kind
            .filter(|attempt| attempt["reason"].as_str().and_then(Reason::parse).is_some_and(is_failure))
            .count()
    };
    for (what, count, most) in
        [("infrastructure", failed(true), infrastructure + 1), ("build", failed(false), build + 1)]
    {
        if count > most {
            report("S10", format!("{count} failures of {what}, of which {most} end it"));
        }
    }
}

/// Only the operator writes statuses.
fn the_operator_writes(request: &Request, rules: &Rules, report: &mut impl FnMut(&'static str, String)) {
    for write in request.statuses.iter().filter(|write| write.user != rules.operator) {
        report("S11", format!("{} wrote the status at {}", write.user, write.received));
    }
}

/// S9: a failure that follows from what became of an attempt is written only after a look at the API server itself.
fn failures_are_fresh(
    uid: &str,
    request: &Request,
    events: &[Event],
    rules: &Rules,
    report: &mut impl FnMut(&'static str, String),
) {
    // To cancel takes no look at anything but the request.
    let failed = |write: &&StatusWrite| {
        verdict(&write.status).is_some_and(|(status, reason)| status == "False" && reason != "Cancelled")
    };
    let Some(write) = request.statuses.iter().find(failed) else { return };
    let since = after(write.received, -rules.fresh);
    let recent = |event: &&Event| {
        event.user == rules.operator && event.done >= since && event.done <= after(write.received, rules.skew)
    };
    let pods = |event: &Event| event.verb == "list" && event.is("", "pods") && event.uri.contains(uid);
    let itself = |event: &Event| {
        event.verb == "get"
            && event.is(GROUP, "buildrequests")
            && event.namespace == request.namespace
            && event.name == request.name
    };
    let seen = |what: &dyn Fn(&Event) -> bool| events.iter().filter(recent).any(what);
    if !seen(&pods) || !seen(&itself) {
        report(
            "S9",
            format!("a failure was written at {} without a fresh look at request and pods", write.received),
        );
    }
}

/// S11: builders have no rights, and no request hears of another namespace's.
fn nobody_crosses(events: &[Event], history: &History, rules: &Rules, found: &mut Vec<Violation>) {
    let builders = format!("system:serviceaccount:{}:", rules.builders);
    let by_builders = events.iter().filter(|event| event.user.starts_with(&builders));
    for user in by_builders.map(|event| &event.user).collect::<BTreeSet<_>>() {
        let what = "a builder spoke to the API server".to_owned();
        found.push(Violation { invariant: "S11", about: user.clone(), what });
    }
    let mut names: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for request in history.requests.values().filter(|request| !request.name.is_empty()) {
        names.entry(&request.namespace).or_default().insert(&request.name);
    }
    for (uid, request) in &history.requests {
        let own = names.get(request.namespace.as_str());
        let others = names.iter().filter(|(namespace, _)| **namespace != request.namespace);
        let others: Vec<&str> = others
            .flat_map(|(_, names)| names.iter().copied())
            .filter(|name| own.is_none_or(|own| !own.contains(name)))
            .collect();
        let said: BTreeSet<String> =
            request.statuses.iter().flat_map(|write| messages(&write.status)).collect();
        for message in said {
            let words: BTreeSet<&str> =
                message.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-' || c == '.')).collect();
            for name in others.iter().filter(|name| words.contains(**name)) {
                found.push(Violation {
                    invariant: "S11",
                    about: format!("{}/{} ({uid})", request.namespace, request.name),
                    what: format!("its status names {name} of another namespace: {message:?}"),
                });
            }
        }
    }
}

/// An operator writes only while its lease is valid. Without any lease there is nothing to check.
fn the_leader_writes(events: &[Event], leases: &[Lease], rules: &Rules, found: &mut Vec<Violation>) {
    if leases.is_empty() {
        return;
    }
    let writes = events.iter().filter(|event| {
        event.user == rules.operator
            && event.writes()
            && event.succeeded()
            && !event.is("coordination.k8s.io", "leases")
    });
    for event in writes {
        let Some(pod) = &event.pod else { continue };
        // The lease as it was then; the skew is the time that the write itself took to arrive.
        let sent = after(event.received, -rules.skew);
        let held = leases.iter().enumerate().any(|(index, lease)| {
            let valid_until = after(lease.received, SignedDuration::from_secs(lease.seconds));
            let taken = leases[index + 1..].iter().find(|later| later.holder != lease.holder);
            let until = taken.map_or(valid_until, |later| valid_until.min(later.received));
            lease.holder.starts_with(pod.as_str()) && lease.received <= event.received && sent <= until
        });
        if !held {
            let about = format!("{} {} {}/{}", event.verb, event.resource, event.namespace, event.name);
            let what = format!("{pod} wrote at {} without holding the lease", event.received);
            found.push(Violation { invariant: "Lease", about, what });
        }
    }
}

/// The time to live may be changed after the end: then the same is said of the newest spec.
fn without_generation(status: &Value) -> Value {
    let mut status = status.clone();
    let conditions =
        status["conditions"].as_array_mut().into_iter().flatten().filter_map(Value::as_object_mut);
    conditions.for_each(|condition| drop(condition.remove("observedGeneration")));
    status.as_object_mut().map(|status| status.remove("observedGeneration"));
    status
}

/// Status and reason of the condition Succeeded, once that is not Unknown.
fn verdict(status: &Value) -> Option<(String, String)> {
    let conditions = status["conditions"].as_array()?;
    let succeeded = conditions.iter().find(|condition| condition["type"] == "Succeeded")?;
    let known = matches!(succeeded["status"].as_str(), Some("True" | "False"));
    known.then(|| (text(&succeeded["status"]), text(&succeeded["reason"])))
}

fn is_failure(reason: Reason) -> bool {
    matches!(reason.kind(), ReasonKind::Failure | ReasonKind::Infrastructure) && reason != Reason::Cancelled
}

/// Every message in a status.
fn messages(status: &Value) -> Vec<String> {
    let lists = [&status["conditions"], &status["attempts"]];
    let listed = lists.into_iter().filter_map(Value::as_array).flatten().map(|one| &one["message"]);
    listed.chain([&status["failure"]["message"]]).filter_map(Value::as_str).map(str::to_owned).collect()
}

fn after(time: Timestamp, duration: SignedDuration) -> Timestamp {
    // A year beyond what a log can have is as good as the end of time.
    time.saturating_add(duration).unwrap_or(Timestamp::MAX)
}
