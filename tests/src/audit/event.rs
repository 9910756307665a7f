//! One event of an API server's audit log (Kubernetes: staging/src/k8s.io/apiserver/pkg/apis/audit/v1/types.go).

use anyhow::{Context, Result};
use jiff::Timestamp;
use serde_json::Value;

/// How every event begins, whoever wrote what before it.
const START: &str = r#"{"kind":"Event""#;

/// A request to the API server that was answered. Bodies are null where the policy does not ask for them.
#[derive(Clone, Debug)]
pub struct Event {
    /// When the API server had it, and when it had answered.
    pub received: Timestamp,
    pub done: Timestamp,
    pub user: String,
    /// Of the pod whose token the user showed, if it was one.
    pub pod: Option<String>,
    pub verb: String,
    pub uri: String,
    pub group: String,
    /// With the subresource: `pods/status`.
    pub resource: String,
    pub namespace: String,
    pub name: String,
    pub code: u16,
    pub request: Value,
    pub response: Value,
}

/// A log, and how many of its lines are no events: an API server that is killed may leave half a line.
#[derive(Debug, Default)]
pub struct Log {
    pub events: Vec<Event>,
    pub broken: usize,
}

impl Log {
    pub fn parse(text: &str) -> Self {
        let mut log = Self::default();
        for line in text.lines() {
            let parsed = Event::parse(line).or_else(|error| {
                log.broken += 1;
                // The next API server goes on behind the half line.
                let at = line.rfind(START).filter(|at| *at > 0).ok_or(error)?;
                Event::parse(&line[at..])
            });
            log.events.extend(parsed.ok().flatten());
        }
        log
    }
}

impl Event {
    /// None for a stage other than the answer's.
    fn parse(line: &str) -> Result<Option<Self>> {
        let mut event: Value = serde_json::from_str(line).context("a line of JSON")?;
        if event["stage"] != "ResponseComplete" {
            return Ok(None);
        }
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let time = |field: &str| -> Result<Timestamp> {
            event[field].as_str().context("a time")?.parse().context("a time")
        };
        let (received, done) = (time("requestReceivedTimestamp")?, time("stageTimestamp")?);
        let about = &event["objectRef"];
        let resource = match about["subresource"].as_str() {
            Some(sub) => format!("{}/{sub}", text(&about["resource"])),
            None => text(&about["resource"]),
        };
        let pods = &event["user"]["extra"]["authentication.kubernetes.io/pod-name"];
        Ok(Some(Self {
            received,
            done,
            user: text(&event["user"]["username"]),
            pod: pods[0].as_str().map(str::to_owned),
            verb: text(&event["verb"]),
            uri: text(&event["requestURI"]),
            group: text(&about["apiGroup"]),
            resource,
            namespace: text(&about["namespace"]),
            name: text(&about["name"]),
            code: event["responseStatus"]["code"].as_u64().and_then(|code| code.try_into().ok()).unwrap_or(0),
            request: event["requestObject"].take(),
            response: event["responseObject"].take(),
        }))
    }

    pub fn succeeded(&self) -> bool {
        (200..300).contains(&self.code)
    }

    pub fn writes(&self) -> bool {
        !matches!(self.verb.as_str(), "get" | "list" | "watch")
    }

    /// Whether it concerns this resource of this group.
    pub fn is(&self, group: &str, resource: &str) -> bool {
        self.group == group && self.resource == resource
    }
}
