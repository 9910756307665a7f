//! The Kubernetes API group `drover.build/v1alpha1`: what users write, what the operator answers, and the rules.
//!
//! This crate owns the two resource types ([`BuildRequest`], [`BuilderClass`]), the words that their status uses
//! ([`Reason`], [`conditions`]) and the way between a request and Nix's own types ([`convert`]). It is pure: it may
//! not talk to an API server, read a clock, or know an async runtime. Whoever sets a condition brings the time.
//!
//! Everything that an API server can check alone is in the schema, so that a mistake is answered when it is made and
//! the answer names the field. The rest is checked again by [`convert`], because a schema can be replaced.

// `KubeSchema` repeats each struct inside a function, where its `pub` reaches nobody.
#![allow(unreachable_pub)]
// Several `printcolumn(type_ = "string")` in one `kube` attribute are several columns, not one thing said twice.
#![allow(clippy::duplicated_attributes)]

mod class;
pub mod conditions;
pub mod convert;
mod crd;
mod reasons;
mod request;
mod schema;
mod status;

pub use class::{
    AllowedNamespaces, BuilderClass, BuilderClassSpec, ClassCache, ClassResources, Concurrency, Egress,
    EgressMode, FEATURES_OF_ALL, FeatureScheduling, FetchedBy, Placement, SandboxFloor, SecretKeyRef, Trust,
    Warm, default_class,
};
pub use convert::{FieldError, Target};
pub use crd::crds;
pub use reasons::{Budget, Kind as ReasonKind, Reason, markdown_table as reasons_markdown};
pub use request::{BuildRequest, BuildRequestSpec, DerivationSpec, OutputSpec, Resources, Retries, Verify};
pub use schema::MAX_OUTPUTS;
pub use status::{
    Attempt, BuildRequestStatus, BuilderStatus, DerivationStatus, FailureStatus, LOG_TAIL_LINES,
    MAX_ATTEMPTS, OutputStatus, Phase, Timings, Transfer, format_duration,
};

/// The API group.
pub const GROUP: &str = "drover.build";
/// The version that is served and stored.
pub const VERSION: &str = "v1alpha1";
/// `apiVersion` of both kinds.
pub const API_VERSION: &str = "drover.build/v1alpha1";
