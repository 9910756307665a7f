//! `BuilderClass`: what builders an administrator offers, to whom, and what is believed of what they make.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{PodTemplateSpec, Toleration};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::{CustomResource, KubeSchema, ResourceExt as _};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Resources;

/// What every builder of Drover's offers. Nix asks for the first where output paths are not known before the build
/// (Nix: derivation-options.cc, getRequiredSystemFeatures).
pub const FEATURES_OF_ALL: &[&str] = &["ca-derivations"];

/// A kind of builder. Cluster-scoped: it belongs to whoever runs the cluster.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[kube(
    group = "drover.build",
    version = "v1alpha1",
    kind = "BuilderClass",
    plural = "builderclasses",
    derive = "PartialEq",
    derive = "Default",
    shortname = "bclass",
    category = "nix",
    doc = "A kind of builder that BuildRequests can ask for.",
    printcolumn(name = "Systems", type_ = "string", json_path = ".spec.systems"),
    printcolumn(name = "Default", type_ = "boolean", json_path = ".spec.default"),
    printcolumn(name = "Trust", type_ = "string", json_path = ".spec.trust"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Placement", type_ = "string", json_path = ".spec.placement", priority = 1)
)]
#[x_kube(validation = Rule::new("self.trust != 'Claimed' || has(self.allowedNamespaces)")
    .message("trust: Claimed believes whoever may use the class: name them in spec.allowedNamespaces")
    .field_path(".trust"))]
#[serde(rename_all = "camelCase")]
pub struct BuilderClassSpec {
    /// Systems that its builders build for, such as `x86_64-linux`. `builtin` is always understood.
    #[schemars(length(min = 1, max = 32), inner(length(min = 1, max = 128)))]
    pub systems: Vec<String>,

    /// Whether requests that name no class get this one. Where several classes say so, the oldest is taken.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub default: bool,

    /// What its builders offer of `requiredSystemFeatures`, such as `big-parallel` or `kvm`. `ca-derivations` is always
    /// offered.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(min = 1, max = 128)))]
    pub features: Vec<String>,

    /// What a pod needs in order to offer a feature, by the feature's name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 64))]
    pub feature_scheduling: BTreeMap<String, FeatureScheduling>,

    /// Pod template that is merged over what Drover makes; the container that builds is called `builder`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<PodTemplateSpec>,

    /// Resources of the builder's container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<ClassResources>,

    /// Bytes that the NARs of all outputs of one build may have together, whatever requests say: the operator has them on its disk
    /// on their way to the cache. Default: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_125_899_906_842_624u64))]
    pub max_output_bytes: Option<u64>,

    /// Namespaces whose requests may use this class. Absent: all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed_namespaces: Option<AllowedNamespaces>,

    /// Where the pods live.
    #[serde(default)]
    pub placement: Placement,

    /// Binary caches, in the order in which they are asked. One of them may take the outputs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(validation = Rule::new("self.filter(cache, has(cache.push) && cache.push).size() <= 1")
        .message("at most one cache has push: true"))]
    pub caches: Vec<ClassCache>,

    /// The weakest sandbox that builders may fall back to. There is always one.
    #[serde(default)]
    pub sandbox: SandboxFloor,

    /// What a request must prove before its output paths are believed.
    #[serde(default)]
    pub trust: Trust,

    /// What builds may reach over the network.
    #[serde(default)]
    pub egress: Egress,

    /// Builders that stay up between builds. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warm: Option<Warm>,

    /// How many builders may run at once. Default: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<Concurrency>,
}

/// What a feature asks of the pod.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub struct FeatureScheduling {
    /// Labels that the node must have.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,
    /// Taints that the pod tolerates.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tolerations: Vec<Toleration>,
    /// Added to requests and limits, such as `devices.kubevirt.io/kvm: 1`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub resources: BTreeMap<String, Quantity>,
}

/// What a builder gets, and what a request may ask for.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub struct ClassResources {
    /// Used where a request says nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default: Option<Resources>,
    /// Upper bound of each resource, for requests and limits alike; of CPU, memory and disk it is also the limit of those who
    /// name none. What is absent is not bounded.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub maximum: BTreeMap<String, Quantity>,
}

/// A namespace is allowed if it is named or if the selector matches its labels.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub struct AllowedNamespaces {
    /// Names of namespaces.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1024), inner(length(min = 1, max = 63)))]
    pub names: Vec<String>,
    /// Labels of namespaces.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub selector: Option<LabelSelector>,
}

/// Where builder pods live.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Placement {
    /// In the operator's own builder namespace, which tenants cannot reach into.
    #[default]
    BuilderNamespace,
    /// Next to the request: its quota applies, and its namespace's users can exec into builders.
    RequestNamespace,
}

/// A binary cache.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ClassCache {
    /// `http://`, `https://`, `s3://` or `file://`, with Nix's own parameters behind `?`.
    #[schemars(length(min = 1, max = 2048), regex(pattern = "^(https?|file|s3)://"))]
    pub url: String,
    /// Keys whose signatures are believed: `name:base64`. Empty: what the cache says is believed unsigned.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 512), regex(pattern = "^[^:]+:[0-9a-zA-Z+/]+=*$")))]
    pub public_keys: Vec<String>,
    /// What the cache wants to see, in the operator's namespace; builders never get it. The Secret's entries say what it is:
    /// `username` and `password`, `token` (bearer), `netrc`, or for `s3://` `accessKeyId`, `secretAccessKey` and
    /// `sessionToken`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials_secret_ref: Option<SecretKeyRef>,
    /// Who fetches inputs from here. What builders do not fetch is sent to them by the operator.
    #[serde(default)]
    pub fetched_by: FetchedBy,
    /// Whether outputs are stored here.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub push: bool,
    /// Nix secret key that outputs are signed with, in the operator's namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signing_key_secret_ref: Option<SecretKeyRef>,
}

/// Who fetches inputs from a cache. Builders can where that is `http://` or `https://` and wants no credentials, and where
/// they may open connections: not under `egress.mode: None`, and under `sandbox: Pod`, where builds share the builder's
/// network, only those that may fetch themselves.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FetchedBy {
    /// Builders, where they can and the URL's host is neither a private address nor a name within the cluster: such are out
    /// of their reach as a rule.
    #[default]
    Auto,
    /// Builders, where they can. Their network has to let them: `builder.networkPolicy.caches` of the chart.
    Builders,
    /// The operator.
    Operator,
}

/// A Secret in the operator's namespace.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct SecretKeyRef {
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// Which of the Secret's entries. Default: `key` for signing keys.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub key: Option<String>,
}

/// The rungs of the sandbox ladder, from the strongest. Builders use the strongest that works and report which.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SandboxFloor {
    /// Nix's full sandbox in nested namespaces; the pod passes Pod Security `baseline`.
    #[default]
    Nested,
    /// The same with SYS_ADMIN of the pod's own user namespace, for nodes whose pods have a seccomp profile in any case.
    /// Pod Security `baseline` does not admit it: the builders' namespace has to.
    NestedAdmin,
    /// The pod is the sandbox, and serves one build only.
    Pod,
}

impl SandboxFloor {
    /// The rung's name, as builders take it and report it.
    pub fn rung(self) -> &'static str {
        match self {
            Self::Nested => "nested",
            Self::NestedAdmin => "nested-admin",
            Self::Pod => "pod",
        }
    }
}

/// What is believed of a request.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Trust {
    /// No output path that is not proven: not by the derivation or its `.drv` closure, nor by the content. Content that
    /// refers to itself proves its path as Nix 2.35 hashes it, not as Nix 2.17 to 2.34 did.
    #[default]
    Verified,
    /// Every output path that is claimed: for namespaces that may write any path of the cache. Of content-addressed
    /// outputs both ways of hashing are taken.
    Claimed,
}

/// Network access of builds. Every build's sandbox has its own network; only fixed-output builds can use the pod's.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct Egress {
    /// Whose pods may open connections.
    pub mode: EgressMode,
}

/// Whose pods may open connections.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EgressMode {
    /// Nobody's.
    None,
    /// Those of fixed-output derivations.
    #[default]
    FixedOutput,
    /// All.
    All,
}

/// Pods that wait for work.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct Warm {
    /// Pods that are kept ready. Default 0.
    #[schemars(range(min = 0, max = 1000))]
    pub min: u32,
    /// Seconds that a builder waits for its next build. Default 0: it goes with its build.
    #[schemars(range(min = 0, max = 86_400))]
    pub idle_seconds: u32,
    /// Builds after which a builder goes. Default 0: no limit.
    #[schemars(range(min = 0, max = 100_000))]
    pub max_builds: u32,
}

/// Limits on builders that run at once.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct Concurrency {
    /// Of this class.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000))]
    pub total: Option<u32>,
    /// Of this class, for one namespace.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000))]
    pub per_namespace: Option<u32>,
}

/// The class for requests that name none: of those that call themselves the default, the oldest, then the first by
/// name.
pub fn default_class<'a>(classes: impl IntoIterator<Item = &'a BuilderClass>) -> Option<&'a BuilderClass> {
    classes
        .into_iter()
        .filter(|class| class.spec.default)
        .min_by_key(|class| (class.creation_timestamp().map(|time| time.0), class.name_any()))
}

impl BuilderClassSpec {
    /// Whether its builders can build for `system`.
    pub fn has_system(&self, system: &str) -> bool {
        system == "builtin" || self.systems.iter().any(|ours| ours == system)
    }

    /// Whether its builders offer what `requiredSystemFeatures` names.
    pub fn has_feature(&self, feature: &str) -> bool {
        FEATURES_OF_ALL.contains(&feature) || self.features.iter().any(|ours| ours == feature)
    }

    /// The cache that takes the outputs.
    pub fn push_cache(&self) -> Option<&ClassCache> {
        self.caches.iter().find(|cache| cache.push)
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    use super::*;

    #[test]
    fn the_oldest_default_wins() {
        let class = |name: &str, default, second: i64| {
            let mut class = BuilderClass::new(name, BuilderClassSpec { default, ..Default::default() });
            class.metadata.creation_timestamp =
                Some(Time(k8s_openapi::jiff::Timestamp::from_second(second).unwrap()));
            class
        };
        let classes = [class("a", false, 1), class("z", true, 2), class("b", true, 3), class("y", true, 2)];
        assert_eq!(default_class(&classes).unwrap().name_any(), "y");
        assert!(default_class(&classes[..1]).is_none());
    }

    #[test]
    fn features_are_named_but_for_those_of_all() {
        let spec = BuilderClassSpec { features: vec!["kvm".into()], ..Default::default() };
        assert!(spec.has_feature("kvm") && spec.has_feature("ca-derivations"));
        assert!(!spec.has_feature("big-parallel"));
    }

    #[test]
    fn builtin_needs_no_system() {
        let spec = BuilderClassSpec { systems: vec!["x86_64-linux".into()], ..Default::default() };
        assert!(spec.has_system("builtin") && spec.has_system("x86_64-linux"));
        assert!(!spec.has_system("aarch64-linux"));
    }
}
