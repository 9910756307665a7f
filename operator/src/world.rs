//! The [`World`]: all that a plan may know about one request, gathered before and not changed while it is made.
//!
//! Plain data, no behaviour beyond questions about itself; nothing here may touch tokio, the clock, the network or the
//! environment. `observe` fills it in, tests write it down.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use drover_api::{BuildRequest, BuilderClassSpec, OutputStatus, Reason, Timings, Transfer};
use drover_nix::StorePath;
use drover_session::Resolved;
use jiff::Timestamp;

use crate::settings::Timeouts;

/// One request and everything around it.
#[derive(Clone, Debug)]
pub struct World {
    pub request: BuildRequest,
    pub class: Class,
    /// What `spec.drvPath` has led to, for a request without a derivation of its own.
    pub resolution: Resolution,
    /// Every pod that carries the request's uid, whatever its state.
    pub pods: Vec<PodView>,
    /// What the class's caches have of outputs and inputs. Asked once for every attempt, and again while it waits.
    pub lookup: Lookup,
    /// What other requests of the namespace mean for this one.
    pub others: Others,
    /// The queue's answer for the attempt that may come next.
    pub slot: Slot,
    /// What the API server said when the open attempt's pod was to be made, if it did not make it.
    pub refusal: Option<PodRefusal>,
    /// Why the open attempt's session could not begin: a Secret that the class names is not there, or not what it should be.
    pub obstacle: Option<String>,
    /// The operator's session for this request, if this process has one.
    pub session: Option<SessionView>,
    /// How long each phase may take.
    pub timeouts: Timeouts,
    /// Read from the API server itself, for this pass: watches may lag.
    pub live: bool,
}

/// The class that the request gets.
#[derive(Clone, PartialEq, Debug)]
pub enum Class {
    /// None has the name, or none is the default.
    Absent,
    /// It chooses namespaces by labels that this operator has no right to read.
    OutOfSight { name: String },
    Found {
        name: String,
        spec: Box<BuilderClassSpec>,
        /// Whether the request's namespace may use it.
        allowed: bool,
    },
}

/// What is known of a derivation that is named by its `.drv` alone.
#[derive(Clone, PartialEq, Debug)]
pub enum Resolution {
    /// Nobody has read it yet, or what was read was lost with the process.
    Unknown,
    /// None of the class's caches has this `.drv`: the one that is named, or a direct input of it.
    Absent {
        path: StorePath,
    },
    /// A cache could not be asked.
    Unreadable {
        why: String,
    },
    /// It cannot be built: a verdict.
    Refused {
        reason: Reason,
        message: String,
    },
    Found(Arc<Resolved>),
}

/// What is known of the outputs before a builder is asked.
#[derive(Clone, PartialEq, Debug)]
pub enum Lookup {
    /// Nobody has looked yet, or the answer was lost with the process.
    Unknown,
    /// Not all of them are in the cache, or the cache could not be asked.
    Missing {
        /// Direct inputs, full paths, that none of the class's caches has. Not those that could not be asked for.
        absent: BTreeSet<String>,
    },
    /// The class's caches cannot be asked as the class says: a Secret that it names is not there, or not what it should be.
    Unusable { why: String },
    /// The request cannot have them: a verdict.
    Refused { reason: Reason, message: String },
    /// All of them.
    Present(BTreeMap<String, OutputStatus>),
}

/// What other requests of the same namespace mean for this one.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Others {
    /// Direct inputs, full paths, that another request has among its outputs.
    pub producers: BTreeMap<String, Other>,
    /// One for the same derivation and class that ended by the build's own failure after this one was made.
    pub same_failed: Option<SameFailed>,
    /// Names of requests, this one first, of which each waits for the next and the last for this one.
    pub cycle: Vec<String>,
    /// A request, not this one, whose derivation is still to be read: it may make anything.
    pub unread: Option<String>,
}

/// Another request, which has an input of this one among its outputs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Other {
    /// Its name.
    pub request: String,
    pub state: OtherState,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum OtherState {
    /// It has not come to its end.
    Going,
    Succeeded,
    Failed {
        reason: Reason,
        message: String,
    },
}

/// A verdict on the same derivation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SameFailed {
    /// Name of the request that it was spoken for.
    pub request: String,
    pub reason: Reason,
    pub message: String,
}

/// Whether the next attempt may begin, as far as other requests are concerned.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Slot {
    /// Nobody has asked yet, or the answer was lost with the process.
    Unasked,
    Granted,
    /// This request builds the same derivation.
    WaitForSame {
        request: String,
    },
    /// The class's concurrency is used up; the message says by how many.
    WaitForConcurrency {
        message: String,
    },
}

/// The API server made no pod.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PodRefusal {
    pub attempt: u32,
    pub kind: RefusalKind,
    /// The API server's own words.
    pub message: String,
    pub at: Timestamp,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RefusalKind {
    /// A quota, an admission policy, a namespace that is not there: it may come otherwise.
    Quota,
    /// No such pod can be.
    Invalid,
}

/// A builder pod, as far as it matters.
#[derive(Clone, PartialEq, Debug)]
pub struct PodView {
    pub name: String,
    pub namespace: String,
    pub uid: String,
    pub attempt: u32,
    pub created: Timestamp,
    /// It has a deletion timestamp.
    pub deleting: bool,
    pub node: Option<String>,
    /// When the scheduler found that node.
    pub scheduled: Option<Timestamp>,
    /// How long the kubelet lets it run (`activeDeadlineSeconds`).
    pub deadline: Option<Duration>,
    /// What the scheduler says while it finds no node.
    pub unschedulable: Option<String>,
    /// What the kubelet says while a container cannot start: reason and message.
    pub waiting: Option<(String, String)>,
    /// It will not run again: how it ended.
    pub ended: Option<PodEnd>,
    /// The cluster is about to end it, or has: reason and message of its condition `DisruptionTarget`.
    pub disruption: Option<(String, String)>,
    /// Image of the builder's container, with digest once it runs.
    pub image: Option<String>,
}

/// How a pod came to its end without being asked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PodEnd {
    /// The pod's reason (`Evicted`, `DeadlineExceeded`) or its container's (`OOMKilled`, `Error`).
    pub reason: String,
    /// What Kubernetes says about it; nothing that the build could have written.
    pub message: String,
    /// Of the builder's container, if that has ended.
    pub exit_code: Option<i32>,
    /// The last line that the builder's container wrote.
    pub last_line: Option<String>,
    /// Only the container has ended yet, then, by the node's clock; the pod itself may still be told apart by its reason.
    pub only_container_since: Option<Timestamp>,
}

/// What a session has reached. Comparable, so that "later than" can be asked.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Stage {
    Connecting,
    Ready,
    CopyingInputs,
    InputsCopied,
    Building,
    Built,
    Collecting,
}

/// A session with a builder.
#[derive(Clone, PartialEq, Debug)]
pub struct SessionView {
    pub attempt: u32,
    pub pod_uid: String,
    /// When this process began it; of one that had to wait for its turn, when that came.
    pub started: Timestamp,
    /// It has not begun: this process has as many as it may have.
    pub waits: bool,
    pub stage: Stage,
    /// The builder's sandbox, once it has said which.
    pub sandbox: Option<String>,
    /// The builder's public key, `ssh-ed25519 …`, once it is known.
    pub host_key: Option<String>,
    /// Last lines of the build's log so far.
    pub log_tail: Vec<String>,
    /// What it has done before it failed.
    pub counted: Option<(Transfer, Timings)>,
    pub end: Option<SessionEnd>,
    /// When that was.
    pub end_time: Option<Timestamp>,
}

/// How a session ended.
#[derive(Clone, PartialEq, Debug)]
pub enum SessionEnd {
    /// The outputs were received, hashed, checked and stored in the cache.
    Finished { outputs: BTreeMap<String, OutputStatus>, transfer: Transfer, timings: Timings },
    Failed {
        reason: Reason,
        message: String,
        /// The machinery failed, not the build.
        infrastructure: bool,
    },
}

impl World {
    pub fn pod_of(&self, attempt: u32) -> Option<&PodView> {
        self.pods.iter().find(|pod| pod.attempt == attempt)
    }

    pub fn session_of(&self, attempt: u32) -> Option<&SessionView> {
        self.session.as_ref().filter(|session| session.attempt == attempt)
    }
}
