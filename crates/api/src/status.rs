//! What the operator says about a request. Only the operator writes it.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Most lines of the build's log that a failure keeps.
pub const LOG_TAIL_LINES: usize = 25;

/// Most attempts that a request can have: the first, and both budgets at their largest.
pub const MAX_ATTEMPTS: usize = 201;

/// Where a request stands. `conditions` are for programs; `phase` and `duration` are for people.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[x_kube(validation = Rule::new("!has(oldSelf.outputs) || has(self.outputs)").message("status.outputs never go away"))]
#[x_kube(validation = Rule::new("!has(oldSelf.phase) || !(oldSelf.phase in ['Succeeded', 'Failed']) \
     || (has(self.phase) && self.phase == oldSelf.phase)")
    .message("the end of a request is final: make a new BuildRequest"))]
#[serde(rename_all = "camelCase")]
pub struct BuildRequestStatus {
    /// Accepted, Scheduled, BuilderReady, InputsCopied, Built, OutputsCollected; Succeeded, Ready, Reconciling and
    /// Stalled sum them up. `Succeeded` is Unknown while work goes on and never changes after True or False.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    #[schemars(extend("maxItems" = 32))]
    pub conditions: Vec<Condition>,

    /// `metadata.generation` that this status is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,

    /// For people, and for `kubectl wait --for=jsonpath`. Programs should read the conditions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,

    /// The BuilderClass that was chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class: Option<String>,

    /// Full store path of the `.drv` that the derivation would have; `nix log` finds the log by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drv_path: Option<String>,

    /// What `spec.drvPath` was found to be, of a request that has no `spec.derivation`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub derivation: Option<DerivationStatus>,

    /// Number of the attempt that runs or ran last, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attempt: Option<u32>,

    /// Every attempt, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("maxItems" = MAX_ATTEMPTS))]
    pub attempts: Vec<Attempt>,

    /// When the first attempt began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Time>,

    /// When the request came to its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,

    /// From the first attempt's begin to the end, such as `1m32s`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration: Option<String>,

    /// How long each phase of the last attempt took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timings: Option<Timings>,

    /// What the last attempt moved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transfer: Option<Transfer>,

    /// What was built, by output name. There only after the bytes received were hashed and stored.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[x_kube(validation = Rule::new("self == oldSelf").message("status.outputs never change"))]
    #[schemars(extend("maxProperties" = crate::schema::MAX_OUTPUTS))]
    pub outputs: BTreeMap<String, OutputStatus>,

    /// Who builds, or built.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub builder: Option<BuilderStatus>,

    /// Why it failed. There if and only if Succeeded is False.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<FailureStatus>,
}

/// A derivation that was read from the class's caches, as far as others ask about it.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct DerivationStatus {
    /// What it is built for, such as `x86_64-linux`.
    pub system: String,
    /// Full store paths by output name, of those that are known before the build.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = crate::schema::MAX_OUTPUTS))]
    pub outputs: BTreeMap<String, String>,
}

/// A request's life in four words.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Pending,
    Running,
    Succeeded,
    Failed,
}

/// One try.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub struct Attempt {
    /// From 1.
    pub number: u32,
    /// Name of the builder's pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// Name of the node that the pod ran on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Time>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub end_time: Option<Time>,
    /// How it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What happened, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Whether the machinery failed, not the build.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub infrastructure: bool,
    /// Memory that it had, where that was more than the request or the class gives: an attempt before it ran out of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Quantity>,
    /// How often the connection to its builder broke and was made again.
    #[serde(skip_serializing_if = "is_zero")]
    pub reconnects: u32,
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// Milliseconds that each phase took. A phase that was not reached is absent.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct Timings {
    /// From creation of the request to creation of the pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queued_millis: Option<u64>,
    /// From creation of the pod to the first answer of the builder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod_start_millis: Option<u64>,
    /// Connecting, and the protocol's handshake.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connect_millis: Option<u64>,
    /// Computing the closure, locking it and copying what is missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub copy_in_millis: Option<u64>,
    /// The builder's run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub build_millis: Option<u64>,
    /// Receiving, checking and storing the outputs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub collect_millis: Option<u64>,
}

/// Store paths and bytes that moved.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct Transfer {
    /// Store paths in the closure of the inputs.
    pub paths_total: u64,
    /// Those that the builder had already.
    pub paths_present: u64,
    /// Those that the builder fetched from caches by itself.
    pub paths_fetched: u64,
    /// Bytes of their NARs.
    pub bytes_fetched: u64,
    /// Those that the operator sent to it.
    pub paths_sent: u64,
    /// Bytes of the NARs that were sent.
    pub bytes_sent: u64,
    /// Bytes of the outputs' NARs.
    pub bytes_received: u64,
    /// Bytes that were stored of them in the cache, compressed. What was there already is not stored again.
    pub bytes_stored: u64,
}

/// One output, as it was received.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct OutputStatus {
    /// Full store path.
    pub path: String,
    /// SHA-256 of the NAR: `sha256:` and nix32.
    pub nar_hash: String,
    /// Bytes of the NAR.
    pub nar_size: u64,
    /// Full store paths that the content refers to.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub references: Vec<String>,
    /// How many there are, where they are too many to be listed here. The cache has them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub references_omitted: Option<u64>,
    /// Signatures over path, hash, size and references: `key name:base64`. Some of them, where there are many.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub signatures: Vec<String>,
    /// What the path follows from, if it follows from the content: `fixed:r:sha256:…` and its like.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca: Option<String>,
}

/// The builder of the last attempt.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct BuilderStatus {
    /// Image, with its digest once it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Name of the pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// Namespace of the pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Name of the node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// The sandbox that the builder uses: `nested`, `nested-admin` or `pod`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<String>,
    /// The public key that it identifies itself with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_key: Option<String>,
}

/// A verdict and what led to it.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct FailureStatus {
    /// One of the terminal reasons.
    pub reason: String,
    /// What happened and what to do about it.
    pub message: String,
    /// The last lines of the build's log, at most 25.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub log_tail: Vec<String>,
}

/// As kubectl writes ages: `850ms`, `42s`, `1m32s`, `2h5m`, `3d4h`.
pub fn format_duration(duration: Duration) -> String {
    let pair = |big: u64, big_unit: &str, small: u64, small_unit: &str| match small {
        0 => format!("{big}{big_unit}"),
        _ => format!("{big}{big_unit}{small}{small_unit}"),
    };
    match duration.as_secs() {
        0 => format!("{}ms", duration.as_millis()),
        s @ 1..60 => format!("{s}s"),
        s @ 60..3600 => pair(s / 60, "m", s % 60, "s"),
        s @ 3600..86_400 => pair(s / 3600, "h", s % 3600 / 60, "m"),
        s => pair(s / 86_400, "d", s % 86_400 / 3600, "h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        let text = |ms| format_duration(Duration::from_millis(ms));
        assert_eq!(text(0), "0ms");
        assert_eq!(text(999), "999ms");
        assert_eq!(text(59_999), "59s");
        assert_eq!(text(60_000), "1m");
        assert_eq!(text(92_000), "1m32s");
        assert_eq!(text(7_500_000), "2h5m");
        assert_eq!(text(273_600_000), "3d4h");
    }
}
