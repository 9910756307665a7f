//! What can go wrong in the operator, by the act that failed.
//!
//! A failure of a *build* is no error: it is the outcome of a session (`drover_session::Failure`) and ends in the
//! request's status. These are failures of the operator's own acts; the controller retries them.

use std::path::PathBuf;

use crate::gate::NotLeading;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Opening a cache that a class names.
    #[error("cannot open the cache {url}: {why}")]
    Cache { url: String, why: String },
    /// `drover-operator check`.
    #[error("cannot say that it is well: {why}")]
    Check { why: String },
    /// A request to the API server.
    #[error("cannot {act}: {source}")]
    Kube { act: &'static str, source: Box<kube::Error> },
    /// A request to the API server that took too long. kube retries inside a call; this bounds it.
    #[error("cannot {act}: the API server gave no answer within {seconds} s")]
    KubeTimeout { act: &'static str, seconds: u64 },
    /// Reading or writing a local file.
    #[error("cannot {act} {}: {source}", path.display())]
    File { act: &'static str, path: PathBuf, source: std::io::Error },
    /// A file with classes that says something else.
    #[error("cannot take the classes from {}: {why}", path.display())]
    Classes { path: PathBuf, why: String },
    /// The builder's host key, read from its log.
    #[error("cannot learn the builder's host key: {why}")]
    HostKey { why: String },
    /// The Lease by which this process leads.
    #[error("cannot lead: the lease: {why}")]
    Lease { why: String },
    /// A mistake of the program's, which ended one pass over one request.
    #[error("cannot finish the pass: it panicked: {message}")]
    Panic { message: String },
    /// A Secret that should hold a key.
    #[error("cannot use Secret {name}: {why}")]
    Secret { name: String, why: String },
    /// The seed that client keys are derived from.
    #[error("cannot use the operator's seed: {why}")]
    Seed { why: String },
    /// Reaching or talking to a builder by SSH.
    #[error("cannot {act} over SSH: {source}")]
    Ssh { act: &'static str, source: openssh::Error },
    /// Where spans are to go.
    #[error("cannot export traces: {why}")]
    Tracing { why: String },
    /// What the pod's plan needs and the settings or the class do not give.
    #[error("cannot describe the builder pod: {why}")]
    Pod { why: String },
}

/// Every word that [`Error::category`] says.
pub const CATEGORIES: [&str; 16] = [
    "cache",
    "check",
    "conflict",
    "api",
    "not-leading",
    "api-transport",
    "api-timeout",
    "file",
    "host-key",
    "lease",
    "panic",
    "secret",
    "seed",
    "ssh",
    "tracing",
    "pod",
];

impl Error {
    /// A stable word for metric labels; one of [`CATEGORIES`].
    pub fn category(&self) -> &'static str {
        match self {
            Self::Cache { .. } => "cache",
            Self::Check { .. } => "check",
            Self::Kube { source, .. } => match source.as_ref() {
                kube::Error::Api(status) if status.is_conflict() => "conflict",
                kube::Error::Api(_) => "api",
                kube::Error::Service(error) if error.is::<NotLeading>() => "not-leading",
                _ => "api-transport",
            },
            Self::KubeTimeout { .. } => "api-timeout",
            Self::File { .. } | Self::Classes { .. } => "file",
            Self::HostKey { .. } => "host-key",
            Self::Lease { .. } => "lease",
            Self::Panic { .. } => "panic",
            Self::Secret { .. } => "secret",
            Self::Seed { .. } => "seed",
            Self::Ssh { .. } => "ssh",
            Self::Tracing { .. } => "tracing",
            Self::Pod { .. } => "pod",
        }
    }

    /// For `map_err` at a call to the API server; `act` completes "cannot …".
    pub fn kube(act: &'static str) -> impl FnOnce(kube::Error) -> Self {
        move |source| Self::Kube { act, source: Box::new(source) }
    }

    /// Somebody else wrote the object since it was read: read again and plan again.
    pub fn is_conflict(&self) -> bool {
        matches!(self, Self::Kube { source, .. } if matches!(source.as_ref(), kube::Error::Api(s) if s.is_conflict()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_category_is_in_the_list() {
        let source = include_str!("error.rs");
        let body = source.split_once("fn category").and_then(|(_, rest)| rest.split_once("\n    }\n"));
        let (body, _) = body.expect("the function");
        let words: Vec<&str> = body.split("=> \"").skip(1).filter_map(|arm| arm.split('"').next()).collect();
        assert_eq!(words, CATEGORIES);
    }
}
