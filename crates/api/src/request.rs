//! `BuildRequest`: one derivation that someone wants built.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::BuildRequestStatus;
use crate::schema::{self, immutable};

/// What to build, and within which limits. Immutable but for `cancel`, `suspend`, `priority` and the two TTLs.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[kube(
    group = "drover.build",
    version = "v1alpha1",
    kind = "BuildRequest",
    namespaced,
    status = "BuildRequestStatus",
    derive = "PartialEq",
    derive = "Default",
    shortname = "breq",
    category = "nix",
    doc = "One derivation to be built by an ephemeral Nix builder.",
    selectable = ".spec.derivation.system",
    selectable = ".spec.class",
    // The request's own, or what was found at its drvPath: one of `spec` and `status` has it, and no other part.
    printcolumn(name = "System", type_ = "string", json_path = ".*.derivation.system"),
    printcolumn(
        name = "Status",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Succeeded\")].reason",
        description = "Reason of the condition Succeeded"
    ),
    printcolumn(name = "Attempt", type_ = "integer", json_path = ".status.attempt"),
    printcolumn(name = "Duration", type_ = "string", json_path = ".status.duration"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Pod", type_ = "string", json_path = ".status.builder.pod", priority = 1),
    printcolumn(name = "Node", type_ = "string", json_path = ".status.builder.node", priority = 1),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Succeeded\")].message",
        priority = 1
    )
)]
#[x_kube(validation = Rule::new("has(self.derivation) || has(self.drvPath)")
    .message("spec needs a derivation, a drvPath or both"))]
#[x_kube(validation = immutable("derivation"))]
#[x_kube(validation = immutable("drvPath"))]
#[x_kube(validation = immutable("class"))]
#[x_kube(validation = immutable("timeoutSeconds"))]
#[x_kube(validation = immutable("maxSilentSeconds"))]
#[x_kube(validation = immutable("maxLogBytes"))]
#[x_kube(validation = immutable("maxOutputBytes"))]
#[x_kube(validation = immutable("retries"))]
#[x_kube(validation = immutable("resources"))]
#[x_kube(validation = immutable("verify"))]
#[x_kube(validation = Rule::new("!has(oldSelf.cancel) || !oldSelf.cancel || (has(self.cancel) && self.cancel)")
    .message("spec.cancel cannot be taken back: make a new BuildRequest").field_path(".cancel"))]
#[serde(rename_all = "camelCase")]
pub struct BuildRequestSpec {
    /// The derivation, resolved: its inputs are store paths only. May be left out if `drvPath` is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub derivation: Option<DerivationSpec>,

    /// Full store path of the `.drv` file that the derivation comes from. Where the class's caches have it and the `.drv`
    /// files below it, they prove the output paths, and the build's log is kept under its name; where the derivation proves
    /// them alone, `status.drvPath` is the name. Without `derivation` it is read from the caches and resolved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::drv_path")]
    pub drv_path: Option<String>,

    /// Name of the BuilderClass. Default: the class that has `spec.default: true`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), regex(pattern = "^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$"))]
    pub class: Option<String>,

    /// Seconds that the builder may run. Default: the class's pod deadline alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 31_536_000))]
    pub timeout_seconds: Option<u32>,

    /// Seconds that the builder may run without writing to its log. Default: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 31_536_000))]
    pub max_silent_seconds: Option<u32>,

    /// Bytes that the build's log may have. Default: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_099_511_627_776u64))]
    pub max_log_bytes: Option<u64>,

    /// Bytes that the NARs of all outputs may have together. Default: the class's limit, which this cannot raise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_125_899_906_842_624u64))]
    pub max_output_bytes: Option<u64>,

    /// How often to try again. Failures of the machinery and failures of the build have budgets of their own.
    #[serde(default)]
    pub retries: Retries,

    /// Of the requests of one namespace those with a higher number are started first. Default 0. Between namespaces it counts for
    /// nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = -1_000_000, max = 1_000_000))]
    pub priority: Option<i32>,

    /// Resources of the builder's container, within the class's maximum. Default: the class's default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,

    /// Set to true to stop the build. Cannot be taken back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cancel: Option<bool>,

    /// While true, nothing is started. A build that runs already goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suspend: Option<bool>,

    /// Seconds after success until the request is deleted. Default: it is kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 315_360_000))]
    pub ttl_seconds_after_succeeded: Option<u32>,

    /// Seconds after failure until the request is deleted. Default: it is kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 315_360_000))]
    pub ttl_seconds_after_failed: Option<u32>,

    /// Build more than once and compare.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verify: Option<Verify>,
}

/// A derivation as `BuildDerivation` carries it (Nix: derivations.hh, BasicDerivation).
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct DerivationSpec {
    /// Name of the derivation, without hash and `.drv`. Store objects are named after it.
    #[schemars(length(min = 1, max = 207), regex(pattern = "^[0-9a-zA-Z+._?=-]+$"))]
    pub name: String,

    /// What the builder runs on, such as `x86_64-linux`, or `builtin`.
    #[schemars(length(min = 1, max = 128), regex(pattern = "^[0-9a-zA-Z_.+-]+$"))]
    pub system: String,

    /// Program to run: a path inside an input, `/bin/sh` of the sandbox, or a `builtin:` name.
    #[schemars(length(min = 1, max = 4096))]
    pub builder: String,

    /// Arguments of the program, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::args")]
    pub args: Vec<String>,

    /// Environment of the program. Values are text; a derivation with other bytes in them has to be given by
    /// `drvPath`. Structured attributes are the entry `__json`, byte for byte.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "schema::env")]
    pub env: BTreeMap<String, String>,

    /// Full store paths that the build may read: sources and the needed outputs of other derivations. What they
    /// refer to comes along by itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::store_paths")]
    pub input_srcs: Vec<String>,

    /// What the build makes, by name. The first that most derivations have is `out`.
    #[schemars(extend("minProperties" = 1, "maxProperties" = schema::MAX_OUTPUTS))]
    #[x_kube(validation = Rule::new(
        "self.all(name, name != 'drv' && name.size() <= 211 && name.matches('^[0-9a-zA-Z+._?=-]+$'))")
        .message("output names have 1 to 211 characters of a-z A-Z 0-9 + - . _ ? = and are not `drv`"))]
    #[x_kube(validation = Rule::new(
        "self.all(name, has(self[name].hashAlgo)) || self.all(name, !has(self[name].hashAlgo))")
        .message("outputs are all of one kind: give hashAlgo for all of them or for none"))]
    #[x_kube(validation = Rule::new(
        "self.all(name, has(self[name].hash) && self[name].hash == 'impure') \
         || self.all(name, !has(self[name].hash) || self[name].hash != 'impure')")
        .message("outputs are all of one kind: all of them are impure or none is"))]
    #[x_kube(validation = Rule::new(
        "self.all(name, !has(self[name].hash) || self[name].hash == 'impure') \
         || (self.size() == 1 && 'out' in self)")
        .message("a fixed-output derivation has one output, and its name is `out`"))]
    pub outputs: BTreeMap<String, OutputSpec>,
}

/// One output. Input-addressed: `path`, or nothing, then Drover computes the path. Fixed: `hashAlgo`, `hash` and
/// `method`. Content-addressed (floating): `hashAlgo` and `method`. Impure: the same, with `hash: impure`. Where the paths
/// of the last two are is known when they are built, and then in `status.outputs`.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[x_kube(validation = Rule::new("!has(self.hash) || has(self.hashAlgo)")
    .message("an output with a hash needs hashAlgo"))]
#[x_kube(validation = Rule::new("!has(self.method) || has(self.hashAlgo)")
    .message("an output with a method needs hashAlgo"))]
#[x_kube(validation = Rule::new("!has(self.path) || has(self.hash) == has(self.hashAlgo)")
    .message("an output with a path and a hashAlgo needs a hash; a content-addressed output has no path yet"))]
#[x_kube(validation = Rule::new("!has(self.path) || !has(self.hash) || self.hash != 'impure'")
    .message("an impure output has no path before it is built"))]
#[x_kube(validation = Rule::new("!has(self.method) || !has(self.hashAlgo) || self.method != 'text' || self.hashAlgo == 'sha256'")
    .message("method text takes hashAlgo sha256"))]
#[x_kube(validation = Rule::new("!has(self.method) || !has(self.hashAlgo) || self.method != 'git' || self.hashAlgo in ['sha1', 'sha256']")
    .message("method git takes hashAlgo sha1 or sha256"))]
#[serde(rename_all = "camelCase")]
pub struct OutputSpec {
    /// Full store path. May be left out where it follows from the other fields.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::store_path")]
    pub path: Option<String>,

    /// Hash algorithm: `md5`, `sha1`, `sha256` or `sha512`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = "^(md5|sha1|sha256|sha512)$"))]
    pub hash_algo: Option<String>,

    /// The hash that a fixed output must have (hexadecimal, nix32, base 64 or `algo-base64`), or `impure`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    pub hash: Option<String>,

    /// What is hashed: `flat` (the bytes of a file), `nar`, `text` or `git`. Default `flat`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = "^(flat|nar|text|git)$"))]
    pub method: Option<String>,
}

/// Budgets for further attempts after the first.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct Retries {
    /// After a lost node, an evicted pod, a broken connection and their like. Default 5.
    #[schemars(range(min = 0, max = 100))]
    pub infrastructure: u32,
    /// After the builder failed. Default 0: a build that failed once is expected to fail again.
    #[schemars(range(min = 0, max = 100))]
    pub build: u32,
}

impl Default for Retries {
    fn default() -> Self {
        Self { infrastructure: 5, build: 0 }
    }
}

/// Resources of a container, as in a pod.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Resources {
    /// What the scheduler sets aside: `cpu`, `memory`, `ephemeral-storage`, extended resources.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub requests: BTreeMap<String, Quantity>,
    /// What the container may use at most.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub limits: BTreeMap<String, Quantity>,
}

/// A check that a build can be repeated.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Verify {
    /// How many builders build it, on different nodes where there are several. Their outputs must be equal.
    #[schemars(range(min = 2, max = 5))]
    pub builders: u32,
}
