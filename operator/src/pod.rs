//! The builder pod of one attempt: a pure function of request, class, settings and key.
//!
//! Nothing here talks to anybody. What the class's template says is merged over what Drover says, and what Drover
//! must be able to rely on is then set again: labels, restart policy, no token, the builder's arguments.

mod caches;

use std::collections::{BTreeMap, BTreeSet};

use drover_api::{
    BuildRequest, BuildRequestSpec, BuilderClassSpec, EgressMode, FEATURES_OF_ALL, Placement, Resources,
    SandboxFloor, Trust,
};
use drover_nix::derivation::{modulo, proof};
use drover_nix::{BasicDerivation, StoreDir};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::ResourceExt as _;
use serde_json::{Value, json};

use crate::error::Error;
use crate::quantity::nanos;
use crate::settings::{BUILDER_PORT, Settings};

/// Labels and annotations of builder pods.
pub const UID_LABEL: &str = "drover.build/request-uid";
pub const ATTEMPT_LABEL: &str = "drover.build/attempt";
/// Whether the pod may open connections: `allowed` or `denied`. The chart's NetworkPolicy goes by it.
pub const EGRESS_LABEL: &str = "drover.build/egress";
/// Whether the pod fetches from its class's caches: `allowed` or `denied`. Another of the chart's policies goes by it.
pub const CACHES_LABEL: &str = "drover.build/caches";
/// `namespace/name` of the request, for people and for finding the request of a pod.
pub const REQUEST_ANNOTATION: &str = "drover.build/request";
/// The container that builds.
pub const CONTAINER: &str = "builder";

/// Longest part of a pod's name that the request's name gives. With uid and attempt it stays below the 63 characters
/// that a host name may have.
const NAME_PART: usize = 40;
/// Seconds that copying may take on top of the build's own timeout before the pod's deadline ends it.
const COPY_SECONDS: u32 = 3600;
/// The builder ends its sessions, says so to their clients and goes, which takes it 8 seconds at most.
const GRACE_SECONDS: u32 = 10;
/// How long a pod may be on a node that is lost. Another attempt begins when it is deleted; Kubernetes' own default of five
/// minutes is for pods that somebody would miss (Kubernetes: plugin/pkg/admission/defaulttolerationseconds).
const LOST_NODE_SECONDS: u32 = 30;
/// What a lost node is tainted with, with the effect NoExecute.
const LOST_NODE_TAINTS: [&str; 2] = ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"];
/// 32-bit programs on an x86_64 machine.
const I686: &str = "i686-linux";
/// Kubernetes: well-known labels.
const ARCH_LABEL: &str = "kubernetes.io/arch";
/// A pod without requests is the first to be evicted: what a builder asks for where neither class nor request speaks.
const DEFAULT_REQUESTS: [(&str, &str); 3] =
    [("cpu", "250m"), ("memory", DEFAULT_MEMORY), ("ephemeral-storage", "1Gi")];
pub const DEFAULT_MEMORY: &str = "256Mi";

/// The name follows from request and attempt, so that a creation that is repeated meets the first one.
pub fn name(request_name: &str, uid: &str, attempt: u32) -> String {
    // Names of requests are DNS subdomains: ASCII, and dots are no part of a label.
    let mut short: String = request_name.chars().take(NAME_PART).collect::<String>().replace('.', "-");
    short.truncate(short.trim_end_matches('-').len());
    let uid: String = uid.chars().filter(char::is_ascii_alphanumeric).take(8).collect();
    format!("{short}-{uid}-{attempt}")
}

/// Where the pods of this class and request go.
pub fn namespace<'a>(
    class: &BuilderClassSpec,
    request_namespace: &'a str,
    settings: &'a Settings,
) -> &'a str {
    match class.placement {
        Placement::BuilderNamespace => &settings.builder_namespace,
        Placement::RequestNamespace => request_namespace,
    }
}

/// Everything that decides what the pod looks like.
#[derive(Debug)]
pub struct PodPlan<'a> {
    pub request: &'a BuildRequest,
    pub class: &'a BuilderClassSpec,
    pub class_name: &'a str,
    pub attempt: u32,
    /// What the container may use, where that is another amount than the request or the class says.
    pub memory: Option<&'a Quantity>,
    /// System of the derivation and the features that it requires.
    pub system: &'a str,
    pub features: &'a BTreeSet<String>,
    /// What it builds may fetch: it is a fixed-output or an impure derivation.
    pub fetches: bool,
    /// What it builds, and nothing else.
    pub derivation: &'a BasicDerivation,
    /// Public half of the attempt's client key.
    pub authorized_key: &'a str,
    pub settings: &'a Settings,
}

impl PodPlan<'_> {
    pub fn build(&self) -> Result<Pod, Error> {
        let mut pod = self.base();
        if let Some(template) = &self.class.template {
            let template = serde_json::to_value(template).map_err(|error| Error::Pod {
                why: format!("the class's template cannot be written as JSON: {error}"),
            })?;
            merge(&mut pod, template, "");
        }
        self.insist(&mut pod, self.trust()?);
        serde_json::from_value(pod).map_err(|error| Error::Pod {
            why: format!("merging template of class {} gives no pod: {error}", self.class_name),
        })
    }

    fn base(&self) -> Value {
        let settings = self.settings;
        let mut spec = json!({
            "hostUsers": false,
            "enableServiceLinks": false,
            "terminationGracePeriodSeconds": GRACE_SECONDS,
            "activeDeadlineSeconds": match self.request.spec.timeout_seconds {
                Some(timeout) => timeout.saturating_add(COPY_SECONDS),
                None => settings.pod_deadline_seconds,
            },
            "nodeSelector": self.node_selector(),
            "tolerations": self.scheduling().flat_map(|s| s.tolerations.iter()).collect::<Vec<_>>(),
            "containers": [{
                "name": CONTAINER,
                "image": settings.builder_image,
                "imagePullPolicy": settings.builder_pull_policy,
                // A builder that refuses to run says why in its log's last line, which so becomes part of the pod's end.
                "terminationMessagePolicy": "FallbackToLogsOnError",
                "ports": [{"name": "ssh", "containerPort": BUILDER_PORT, "protocol": "TCP"}],
                "securityContext": self.security_context(),
                "resources": self.resources(),
                "volumeMounts": [{"name": "nix", "mountPath": "/nix"}, {"name": "tmp", "mountPath": "/tmp"}],
            }],
            "volumes": [{"name": "nix", "emptyDir": {}}, {"name": "tmp", "emptyDir": {}}],
        });
        if !settings.builder_pull_secrets.is_empty() {
            let secrets: Vec<Value> =
                settings.builder_pull_secrets.iter().map(|name| json!({"name": name})).collect();
            spec["imagePullSecrets"] = secrets.into();
        }
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "labels": {
                    "app.kubernetes.io/name": "drover-builder",
                    "app.kubernetes.io/managed-by": "drover-operator",
                },
                // Both autoscalers would otherwise move a pod that cannot be moved.
                "annotations": {
                    "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
                    "karpenter.sh/do-not-disrupt": "true",
                },
            },
            "spec": spec,
        })
    }

    /// With a user namespace of its own and /proc unmasked, the builder nests Nix's whole sandbox. Seccomp stays unset,
    /// since RuntimeDefault refuses namespaces to whoever lacks SYS_ADMIN.
    fn security_context(&self) -> Value {
        let mut context = json!({"allowPrivilegeEscalation": false, "procMount": "Unmasked"});
        if self.class.sandbox == SandboxFloor::NestedAdmin {
            // Over the pod's own user namespace, and nothing outside it. Pod Security `baseline` does not admit it.
            context["capabilities"] = json!({"add": ["SYS_ADMIN"]});
        }
        context
    }

    /// What a template may not change.
    fn insist(&self, pod: &mut Value, trust: Vec<String>) {
        let request = self.request;
        let uid = request.uid().unwrap_or_default();
        let request_namespace = request.namespace().unwrap_or_default();
        let metadata = &mut pod["metadata"];
        metadata["name"] = name(&request.name_any(), &uid, self.attempt).into();
        metadata["namespace"] = namespace(self.class, &request_namespace, self.settings).into();
        metadata["labels"][UID_LABEL] = uid.as_str().into();
        metadata["labels"][ATTEMPT_LABEL] = self.attempt.to_string().into();
        metadata["labels"][EGRESS_LABEL] = if self.may_connect() { "allowed" } else { "denied" }.into();
        let caches = self.cache_options();
        metadata["labels"][CACHES_LABEL] = if caches.is_empty() { "denied" } else { "allowed" }.into();
        metadata["annotations"][REQUEST_ANNOTATION] =
            format!("{request_namespace}/{}", request.name_any()).into();
        if self.class.placement == Placement::RequestNamespace {
            metadata["ownerReferences"] = json!([{
                "apiVersion": drover_api::API_VERSION,
                "kind": "BuildRequest",
                "name": request.name_any(),
                "uid": uid,
                "controller": true,
                "blockOwnerDeletion": false,
            }]);
        }
        let spec = &mut pod["spec"];
        if let Some(arch) = self.arch() {
            spec["nodeSelector"][ARCH_LABEL] = arch.into();
        }
        spec["restartPolicy"] = "Never".into();
        spec["automountServiceAccountToken"] = false.into();
        if spec["tolerations"].is_null() {
            spec["tolerations"] = json!([]);
        }
        if let Some(tolerations) = spec["tolerations"].as_array_mut() {
            for key in LOST_NODE_TAINTS {
                // The shortest of several would count, whatever the class says.
                if !tolerations.iter().any(|toleration| tolerates(toleration, key)) {
                    tolerations.push(json!({
                        "key": key,
                        "operator": "Exists",
                        "effect": "NoExecute",
                        "tolerationSeconds": LOST_NODE_SECONDS,
                    }));
                }
            }
        }
        let containers = spec["containers"].as_array_mut().into_iter().flatten();
        for container in containers.filter(|container| container["name"] == CONTAINER) {
            container["args"] = json!([
                "listen",
                "--listen",
                format!("0.0.0.0:{BUILDER_PORT}"),
                "--authorized-key",
                self.authorized_key,
                "--store",
                "local",
                "--system-features",
                self.offered(),
                // The builder takes the strongest that works, and does not start below this one.
                "--sandbox",
                self.class.sandbox.rung(),
                // An operator that was away finds the build again, or how it ended.
                "--linger",
                self.settings.timeouts.linger.as_secs().to_string(),
            ]);
            if let Some(args) = container["args"].as_array_mut() {
                args.extend(trust.iter().map(|word| word.as_str().into()));
            }
            if let Some(memory) = self.memory {
                let resources = &mut container["resources"];
                let of = if resources["limits"]["memory"].is_null() { "requests" } else { "limits" };
                resources[of]["memory"] = memory.0.as_str().into();
            }
            // The builder keeps to it even where no network plugin enforces policies.
            if let (EgressMode::None, Some(args)) = (self.class.egress.mode, container["args"].as_array_mut())
            {
                args.extend(["--network".into(), "none".into()]);
            }
            if let Some(args) = container["args"].as_array_mut() {
                args.extend(caches.iter().map(|option| option.as_str().into()));
            }
            // The nodes for these have another system of their own; the processor runs both.
            if let (I686, Some(args)) = (self.system, container["args"].as_array_mut()) {
                args.extend(["--extra-platforms".into(), I686.into()]);
            }
        }
    }

    /// What the builder looks at again before it builds: that it is this derivation, and that its paths are proven. What
    /// it cannot prove from the derivation alone the session proves before it sends it.
    fn trust(&self) -> Result<Vec<String>, Error> {
        let dir = StoreDir::default();
        let own = modulo::basic_drv_path(&dir, self.derivation)
            .map_err(|error| Error::Pod { why: format!("the derivation has no name of its own: {error}") })?;
        let own = dir.full(&own);
        let verified = self.class.trust == Trust::Verified;
        let word = if verified { "verified" } else { "claimed" };
        let mut words = vec!["--trust", word, "--only-derivation", &own];
        if verified && proof::prove_alone(&dir, self.derivation).is_err() {
            words.extend(["--proven-derivation", &own]);
        }
        Ok(words.into_iter().map(str::to_owned).collect())
    }

    fn may_connect(&self) -> bool {
        match self.class.egress.mode {
            EgressMode::None => false,
            EgressMode::FixedOutput => self.fetches,
            EgressMode::All => true,
        }
    }

    /// What the builder is told of the class's caches. Where a build may have no network but the pod's, the pod has none
    /// for its caches either, unless that build may fetch.
    fn cache_options(&self) -> Vec<String> {
        let alone = self.class.sandbox != SandboxFloor::Pod;
        match self.class.egress.mode {
            EgressMode::None => Vec::new(),
            _ if alone || self.may_connect() => caches::options(&self.class.caches),
            _ => Vec::new(),
        }
    }

    /// What the class offers, for the builder to offer no less and no more.
    fn offered(&self) -> String {
        let features = self.class.features.iter().map(String::as_str);
        let all: BTreeSet<&str> = features.chain(FEATURES_OF_ALL.iter().copied()).collect();
        all.into_iter().collect::<Vec<_>>().join(",")
    }

    fn scheduling(&self) -> impl Iterator<Item = &drover_api::FeatureScheduling> {
        self.features.iter().filter_map(|feature| self.class.feature_scheduling.get(feature))
    }

    fn node_selector(&self) -> BTreeMap<String, String> {
        self.scheduling()
            .flat_map(|s| s.node_selector.iter().map(|(key, value)| (key.clone(), value.clone())))
            .collect()
    }

    /// What Kubernetes calls the processors that run this system. A level of x86-64 is no architecture of a node: a builder
    /// whose processor has it not says so.
    fn arch(&self) -> Option<&'static str> {
        match self.system {
            "x86_64-linux" | I686 => Some("amd64"),
            level if level.starts_with("x86_64-v") && level.ends_with("-linux") => Some("amd64"),
            "aarch64-linux" => Some("arm64"),
            "riscv64-linux" => Some("riscv64"),
            "powerpc64le-linux" => Some("ppc64le"),
            _ => None,
        }
    }

    fn resources(&self) -> Resources {
        let mut resources = resources(&self.request.spec, self.class);
        for extra in self.scheduling().flat_map(|s| &s.resources) {
            resources.requests.insert(extra.0.clone(), extra.1.clone());
            resources.limits.insert(extra.0.clone(), extra.1.clone());
        }
        resources
    }
}

/// What a builder gets by itself: the request's, or the class's, or a little. Requests are never absent, and neither is a limit
/// where the class has a maximum: whoever names none would have no bound at all.
pub fn resources(request: &BuildRequestSpec, class: &BuilderClassSpec) -> Resources {
    let of_class = class.resources.as_ref();
    let default = of_class.and_then(|resources| resources.default.clone());
    let mut resources = request.resources.clone().or(default).unwrap_or_default();
    for (name, amount) in DEFAULT_REQUESTS {
        // A limit alone is a request, too: Kubernetes copies it.
        if resources.limits.contains_key(name) {
            continue;
        }
        let amount = Quantity(amount.into());
        let most = of_class.and_then(|resources| resources.maximum.get(name));
        if most.is_none_or(|most| nanos(&amount) <= nanos(most)) {
            resources.requests.entry(name.into()).or_insert(amount);
        }
        if let Some(most) = most {
            resources.limits.insert(name.into(), most.clone());
        }
    }
    resources
}

/// Merges `over` into `under`: objects by key; lists of things that have names by name; other lists and values are
/// replaced. Nulls, which unset fields of a template become, say nothing.
fn merge(under: &mut Value, over: Value, key: &str) {
    match (under, over) {
        (_, Value::Null) => {}
        (Value::Object(under), Value::Object(over)) => {
            for (key, value) in over {
                match under.get_mut(&key) {
                    Some(below) => merge(below, value, &key),
                    None if value.is_null() => {}
                    None => {
                        under.insert(key, value);
                    }
                }
            }
        }
        (Value::Array(under), Value::Array(over)) if merge_key(key).is_some() => {
            let id = merge_key(key).unwrap_or_default();
            for value in over {
                match under.iter_mut().find(|below| below[id] == value[id]) {
                    Some(below) => merge(below, value, ""),
                    None => under.push(value),
                }
            }
        }
        (Value::Array(under), Value::Array(over)) if key == "tolerations" => under.extend(over),
        (under, over) => *under = over,
    }
}

/// Whether a toleration is for this taint, which has no value, with the effect NoExecute (Kubernetes: api/core/v1
/// toleration.go, ToleratesTaint).
fn tolerates(toleration: &Value, taint: &str) -> bool {
    let of = |field: &str| toleration[field].as_str().unwrap_or_default();
    let (key, exists) = (of("key"), of("operator") == "Exists");
    ["", "NoExecute"].contains(&of("effect"))
        && (key == taint || key.is_empty())
        && (exists || (key == taint && of("value").is_empty()))
}

/// By which field the entries of a list are told apart (Kubernetes: patchMergeKey of the pod's fields).
fn merge_key(list: &str) -> Option<&'static str> {
    match list {
        "containers" | "initContainers" | "volumes" | "env" | "imagePullSecrets" => Some("name"),
        "volumeMounts" => Some("mountPath"),
        "ports" => Some("containerPort"),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
