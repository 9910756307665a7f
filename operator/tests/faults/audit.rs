//! The invariants of DESIGN.md, read from the double's own history and from nothing that the operator says of itself.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;

use crate::cluster::{ATTEMPT_LABEL, UID_LABEL};
use crate::double::Change;
use crate::double::store::Writer;
use crate::time::Time;

/// A pod may be made so long after its request has gone: what is asked and what is done are two things.
const RACE: SignedDuration = SignedDuration::from_secs(1);
/// What is left of a request that is gone is deleted within this time (S6).
const GONE: SignedDuration = SignedDuration::from_secs(60);

/// All of them; `grace` is what the fault itself costs before anybody can do anything.
pub(crate) fn check(history: &[Change], end: Timestamp, grace: SignedDuration) -> Result<(), String> {
    one_builder_per_attempt(history)?;
    verdicts_stay(history)?;
    pods_belong_to_requests(history)?;
    nothing_is_left(history, end, grace)?;
    budgets_are_kept(history)?;
    events_are_said_once(history)
}

/// Nothing that happens once to a request, or once in an attempt, is said twice: not after a restart either. And of no request
/// is much said.
fn events_are_said_once(history: &[Change]) -> Result<(), String> {
    const MOST: usize = 30;
    let may_repeat = |reason: &str| {
        matches!(reason, "BuilderReady" | "ConnectionLost" | "Suspended") || reason.starts_with("WaitingFor")
    };
    let mut said = BTreeMap::<(String, String, String), usize>::new();
    let mut each = BTreeMap::<String, usize>::new();
    for event in of(history, "events").filter(|change| change.before.is_none()) {
        let Some(event) = &event.after else { continue };
        let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (uid, reason) = (word(&event["regarding"]["uid"]), word(&event["reason"]));
        *said.entry((uid.clone(), reason, word(&event["related"]["name"]))).or_default() += 1;
        *each.entry(uid).or_default() += 1;
    }
    if let Some((what, times)) =
        said.iter().find(|((_, reason, _), times)| **times > 1 && !may_repeat(reason))
    {
        return Err(format!("event {what:?} was said {times} times"));
    }
    match each.iter().find(|(_, count)| **count > MOST) {
        Some((uid, count)) => Err(format!("{count} events about {uid}")),
        None => Ok(()),
    }
}

/// The reasons of the events about a request, in order.
pub(crate) fn events_about(history: &[Change], request: &str) -> Vec<String> {
    let made = of(history, "events").filter(|change| change.before.is_none());
    let about =
        made.filter_map(|change| change.after.as_ref()).filter(|event| event["regarding"]["name"] == request);
    about.map(|event| event["reason"].as_str().unwrap_or_default().to_owned()).collect()
}

fn of<'a>(history: &'a [Change], plural: &'a str) -> impl Iterator<Item = &'a Change> {
    history.iter().filter(move |change| change.key.kind.plural == plural)
}

fn text<'a>(object: &'a Value, label: &str) -> &'a str {
    object["metadata"]["labels"][label].as_str().unwrap_or_default()
}

/// S1: at most one pod at a time for each request and attempt.
fn one_builder_per_attempt(history: &[Change]) -> Result<(), String> {
    let mut alive: BTreeMap<(String, String), usize> = BTreeMap::new();
    for change in of(history, "pods") {
        let attempt = |pod: &Value| (text(pod, UID_LABEL).to_owned(), text(pod, ATTEMPT_LABEL).to_owned());
        match (&change.before, &change.after) {
            (None, Some(pod)) => {
                let count = alive.entry(attempt(pod)).or_default();
                *count += 1;
                if *count > 1 {
                    return Err(format!("S1: {count} pods of one attempt, the last {}", change.key.name));
                }
            }
            (Some(pod), None) => *alive.entry(attempt(pod)).or_default() -= 1,
            _ => {}
        }
    }
    Ok(())
}

/// S2 and S3: outputs are recorded once, and a verdict is the last word.
fn verdicts_stay(history: &[Change]) -> Result<(), String> {
    for change in of(history, "buildrequests") {
        let (Some(before), Some(after)) = (&change.before, &change.after) else { continue };
        let (was, is) = (&before["status"], &after["status"]);
        let outputs = was["outputs"].as_object().is_some_and(|outputs| !outputs.is_empty());
        if outputs && was["outputs"] != is["outputs"] {
            return Err(format!("S2: outputs of {} changed in version {}", change.key.name, change.version));
        }
        // `observedGeneration` moves with a spec that is edited afterwards; nothing else does.
        let without_generation = |status: &Value| {
            let mut status = status.clone();
            if let Some(status) = status.as_object_mut() {
                status.remove("observedGeneration");
                for condition in
                    status.get_mut("conditions").and_then(Value::as_array_mut).into_iter().flatten()
                {
                    condition["observedGeneration"] = Value::Null;
                }
            }
            status
        };
        if verdict(was).is_some() && without_generation(was) != without_generation(is) {
            return Err(format!(
                "S3: the status of {} changed after its verdict, in version {}: {was} {is}",
                change.key.name, change.version
            ));
        }
    }
    Ok(())
}

/// S5: a pod is made only for a request that is there, with that uid.
fn pods_belong_to_requests(history: &[Change]) -> Result<(), String> {
    for change in of(history, "pods") {
        let (None, Some(pod)) = (&change.before, &change.after) else { continue };
        let uid = text(pod, UID_LABEL);
        let mut made = false;
        let mut gone = None;
        for request in of(history, "buildrequests").filter(|request| request.version < change.version) {
            let object = request.after.as_ref().or(request.before.as_ref());
            if object.is_some_and(|object| object["metadata"]["uid"] == uid) {
                made = true;
                gone = request.after.is_none().then_some(request.at);
            }
        }
        if !made {
            return Err(format!("S5: pod {} is for a request that never was", change.key.name));
        }
        if let Some(gone) = gone
            && change.at.duration_since(gone) > RACE
        {
            let late = change.at.duration_since(gone).as_secs_f64();
            return Err(format!("S5: pod {} was made {late} s after its request had gone", change.key.name));
        }
    }
    Ok(())
}

/// S6: what was made for a request that is gone is gone as well, and in time.
fn nothing_is_left(history: &[Change], end: Timestamp, grace: SignedDuration) -> Result<(), String> {
    let mut gone = BTreeMap::new();
    for request in of(history, "buildrequests") {
        if let (Some(before), None) = (&request.before, &request.after) {
            gone.insert(before["metadata"]["uid"].as_str().unwrap_or_default().to_owned(), request.at);
        }
    }
    let mut pods: BTreeMap<&str, (&Arc<Value>, Option<Timestamp>)> = BTreeMap::new();
    for change in of(history, "pods") {
        match &change.after {
            None => drop(pods.remove(change.key.name.as_str())),
            Some(pod) => {
                let deleting = !pod["metadata"]["deletionTimestamp"].is_null();
                let entry = pods.entry(&change.key.name).or_insert((pod, None));
                if deleting && entry.1.is_none() {
                    entry.1 = Some(change.at);
                }
            }
        }
        let Some(uid) = change.before.as_ref().or(change.after.as_ref()).map(|pod| text(pod, UID_LABEL))
        else {
            continue;
        };
        if let Some(gone) = gone.get(uid) {
            let late = change.at.duration_since(*gone);
            if late > GONE + grace {
                let late = late.as_secs_f64();
                return Err(format!(
                    "S6: pod {} was still there {late} s after its request",
                    change.key.name
                ));
            }
        }
    }
    match pods.first_key_value() {
        None => Ok(()),
        Some((name, _)) => Err(format!("S6: pod {name} is left at {:.1} s", Time::elapsed(end))),
    }
}

/// S10: attempts are numbered without a gap, and there are no more of them than the budgets allow.
fn budgets_are_kept(history: &[Change]) -> Result<(), String> {
    for change in of(history, "buildrequests") {
        let Some(request) = &change.after else { continue };
        let none = vec![];
        let attempts = request["status"]["attempts"].as_array().unwrap_or(&none);
        let numbers: BTreeSet<u64> =
            attempts.iter().filter_map(|attempt| attempt["number"].as_u64()).collect();
        let expected: BTreeSet<u64> = (1..=attempts.len() as u64).collect();
        let budget = |kind: &str, default| request["spec"]["retries"][kind].as_u64().unwrap_or(default);
        let infrastructure =
            attempts.iter().filter(|attempt| attempt["infrastructure"] == true).count() as u64;
        let build = attempts
            .iter()
            .filter(|attempt| attempt["infrastructure"] != true && !attempt["endTime"].is_null())
            .count() as u64;
        if numbers != expected
            || infrastructure > budget("infrastructure", 5) + 1
            || build > budget("build", 0) + 1
        {
            return Err(format!(
                "S10: attempts of {} in version {}: {attempts:?}",
                change.key.name, change.version
            ));
        }
    }
    Ok(())
}

/// S12: operators write nothing from a version on.
pub(crate) fn silent_since(history: &[Change], version: u64) -> Result<(), String> {
    // What was said last may still be on its way.
    let by_operators = |change: &&Change| {
        change.version > version
            && matches!(change.writer, Writer::Client(_))
            && change.key.kind.plural != "events"
    };
    match history.iter().find(by_operators) {
        None => Ok(()),
        Some(change) => {
            let at = Time::elapsed(change.at);
            let what = format!("{}/{}", change.key.kind.plural, change.key.name);
            Err(format!("S12: {what} was written at {at:.1} s, when all was settled"))
        }
    }
}

/// What became of a request: `Succeeded`'s reason, and the reason of each attempt.
pub(crate) fn end_of(request: Option<&Value>) -> String {
    let Some(request) = request else { return "gone".into() };
    let status = &request["status"];
    let none = vec![];
    let attempts = status["attempts"].as_array().unwrap_or(&none);
    let attempts: Vec<&str> =
        attempts.iter().map(|attempt| attempt["reason"].as_str().unwrap_or("open")).collect();
    let reason = match verdict(status) {
        Some(condition) => condition["reason"].as_str().unwrap_or_default(),
        None => "unsettled",
    };
    format!("{reason}: {}", attempts.join(", "))
}

/// The reason of `Succeeded`, whatever its status.
pub(crate) fn reason_of(request: &Value) -> &str {
    of_summary(request, "reason")
}

/// Its message.
pub(crate) fn message_of(request: &Value) -> &str {
    of_summary(request, "message")
}

fn of_summary<'a>(request: &'a Value, field: &str) -> &'a str {
    let conditions = request["status"]["conditions"].as_array().into_iter().flatten();
    let mut found = conditions.filter(|condition| condition["type"] == "Succeeded");
    found.next().and_then(|condition| condition[field].as_str()).unwrap_or_default()
}

/// The condition with the verdict, if it was spoken.
fn verdict(status: &Value) -> Option<&Value> {
    let conditions = status["conditions"].as_array()?;
    conditions.iter().find(|condition| condition["type"] == "Succeeded" && condition["status"] != "Unknown")
}
