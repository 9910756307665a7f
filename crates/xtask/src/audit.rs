//! The API server's audit log: who asked for what, and what came of it (Kubernetes: audit.k8s.io/v1, Event).
//!
//! Tests count and compare with it what clients really did, instead of believing what they say. Reads only.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

/// One request that was answered; of a watch, its beginning or its end.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Equal for the stages of one request.
    pub id: String,
    /// `ResponseStarted` (of a watch: it was let in), `ResponseComplete` or `Panic`.
    pub stage: String,
    /// `get`, `list`, `watch`, `create`, `update`, `patch`, `delete`, `deletecollection`.
    pub verb: String,
    pub user: String,
    /// What a client says of itself.
    pub user_agent: String,
    /// Empty for the core group.
    pub group: String,
    /// Plural.
    pub resource: String,
    /// `status`, `log`, `binding`; or empty.
    pub subresource: String,
    /// Empty for what has none, and for requests over all of them.
    pub namespace: String,
    /// Empty where the request names nothing, as in lists; creations have it from the body.
    pub name: String,
    /// The whole path with its query.
    pub uri: String,
    /// HTTP status; 0 if there was none.
    pub code: u16,
    /// Null if the policy keeps none.
    pub body: Value,
    /// RFC 3339 with microseconds: when the request arrived.
    pub received: String,
}

impl Entry {
    pub fn is_write(&self) -> bool {
        !matches!(self.verb.as_str(), "get" | "list" | "watch")
    }

    /// Whether it did what it asked for.
    pub fn is_done(&self) -> bool {
        (200..300).contains(&self.code)
    }

    /// `patch buildrequests/status`, as rules of RBAC say it.
    pub fn act(&self) -> String {
        match self.subresource.as_str() {
            "" => format!("{} {}", self.verb, self.resource),
            subresource => format!("{} {}/{subresource}", self.verb, self.resource),
        }
    }
}

/// The log's entries in its order. A line that is still being written is left out.
pub fn read(log: &Path) -> Result<Vec<Entry>> {
    let text = fs::read(log).with_context(|| format!("could not read {}", log.display()))?;
    parse(&String::from_utf8_lossy(&text))
}

/// Of the text of a log.
pub fn parse(text: &str) -> Result<Vec<Entry>> {
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().filter(|line| !line.is_empty()).map(entry).collect()
}

fn entry(line: &str) -> Result<Entry> {
    let mut event: Value = serde_json::from_str(line)
        .with_context(|| format!("a line of an audit log is no JSON: {line:.200}"))?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let target = &event["objectRef"];
    Ok(Entry {
        id: text(&event["auditID"]),
        stage: text(&event["stage"]),
        verb: text(&event["verb"]),
        user: text(&event["user"]["username"]),
        user_agent: text(&event["userAgent"]),
        group: text(&target["apiGroup"]),
        resource: text(&target["resource"]),
        subresource: text(&target["subresource"]),
        namespace: text(&target["namespace"]),
        name: text(&target["name"]),
        uri: text(&event["requestURI"]),
        code: event["responseStatus"]["code"].as_u64().and_then(|code| code.try_into().ok()).unwrap_or(0),
        received: text(&event["requestReceivedTimestamp"]),
        body: event["requestObject"].take(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_have_what_tests_ask_for() {
        let line = r#"{"auditID":"a","stage":"ResponseComplete","requestURI":"/apis/drover.build/v1alpha1/namespaces/team/buildrequests/x/status?fieldManager=m","verb":"patch","user":{"username":"u"},"userAgent":"d/1","objectRef":{"resource":"buildrequests","namespace":"team","name":"x","apiGroup":"drover.build","apiVersion":"v1alpha1","subresource":"status"},"responseStatus":{"code":200},"requestObject":{"status":{}},"requestReceivedTimestamp":"2026-01-01T00:00:00.000001Z"}"#;
        let entries = parse(&format!("{line}\n{}", &line[..20])).unwrap();
        let [entry] = &entries[..] else { panic!("{entries:?}") };
        assert_eq!(entry.act(), "patch buildrequests/status");
        assert!(entry.is_write() && entry.is_done() && entry.body.is_object());
        assert_eq!((entry.namespace.as_str(), entry.name.as_str(), entry.code), ("team", "x", 200));
        assert!(parse("nonsense\n").is_err());
    }
}
