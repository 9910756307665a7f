//! What the operator is told at start and needs everywhere. Plain data; `main` fills it from flags.

use std::time::Duration;

use crate::scope::Scope;

/// Identity of the operator towards the API server: field manager and User-Agent.
pub const FIELD_MANAGER: &str = "drover-operator";
/// Field manager of status, which is another writer than that of objects.
pub const STATUS_MANAGER: &str = "drover-operator-status";
/// Port that builders listen on.
pub const BUILDER_PORT: u16 = 2222;

/// Exit codes of builders that will not run on such a pod, however often they are started: options that they do not know,
/// and a machine that allows no sandbox of the kind that is asked for. The last line of the log says which.
pub const BUILDER_REFUSES: [i32; 2] = [2, 78];

/// Exit code of builders that were told to end (SIGTERM), and did: by an eviction, a deletion, a shutdown of the node. None
/// ends so by itself; why it was to end, the pod says.
pub const BUILDER_TOLD_TO_END: i32 = 143;

/// How long each phase of a request may take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timeouts {
    /// A pod that has found no node by then finds none.
    pub scheduling: Duration,
    /// From a pod that has a node to a builder that answers; pulling the image is in it.
    pub start: Duration,
    /// Copying during which nothing moves for so long is given up.
    pub stall: Duration,
    /// How long, from a request's creation, an input is waited for that no cache has and no request builds.
    pub input_grace: Duration,
    /// How long a build goes on whose operator is away.
    pub linger: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            scheduling: Duration::from_secs(86_400),
            start: Duration::from_secs(600),
            stall: Duration::from_secs(300),
            input_grace: Duration::from_secs(60),
            linger: Duration::from_secs(3600),
        }
    }
}

#[derive(Clone, Debug)]
pub struct Settings {
    /// Namespace of the operator: its seed and the Secrets that classes name are here.
    pub namespace: String,
    /// Namespace of the builders, for classes whose placement is `BuilderNamespace`.
    pub builder_namespace: String,
    /// Image of the builder.
    pub builder_image: String,
    /// `Always`, `IfNotPresent` or `Never`.
    pub builder_pull_policy: String,
    /// Names of Secrets with which the kubelet pulls that image, in the builder's namespace.
    pub builder_pull_secrets: Vec<String>,
    /// Sessions that run at the same time; further ones wait.
    pub max_sessions: u16,
    /// Seconds that a pod may live if the request has no timeout and the class no deadline.
    pub pod_deadline_seconds: u32,
    /// Directory for spooled archives, logs and connections; short, since sockets lie below it.
    pub work_dir: std::path::PathBuf,
    /// Requests that are looked at at the same time.
    pub concurrency: u16,
    pub timeouts: Timeouts,
    pub scope: Scope,
}
