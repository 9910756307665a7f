//! Refusals, as API servers word them (Kubernetes: apimachinery/pkg/api/errors).

use serde_json::{Value, json};

use super::store::Key;

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Failure {
    pub(crate) code: u16,
    pub(crate) reason: &'static str,
    pub(crate) message: String,
}

impl Failure {
    fn new(code: u16, reason: &'static str, message: String) -> Self {
        Self { code, reason, message }
    }

    pub(crate) fn not_found(key: &Key) -> Self {
        Self::new(404, "NotFound", format!("{} {:?} not found", key.resource(), key.name))
    }

    pub(crate) fn already_exists(key: &Key) -> Self {
        Self::new(409, "AlreadyExists", format!("{} {:?} already exists", key.resource(), key.name))
    }

    pub(crate) fn conflict(key: &Key, why: &str) -> Self {
        let message = format!("Operation cannot be fulfilled on {} {:?}: {why}", key.resource(), key.name);
        Self::new(409, "Conflict", message)
    }

    /// The version in a write is not the newest.
    pub(crate) fn outdated(key: &Key) -> Self {
        let why =
            "the object has been modified; please apply your changes to the latest version and try again";
        Self::conflict(key, why)
    }

    /// The real one has no reason for it either.
    pub(crate) fn version_in_creation() -> Self {
        Self::new(500, "", "resourceVersion should not be set on objects to be created".into())
    }

    /// An apply patch without a manager.
    pub(crate) fn no_manager() -> Self {
        Self::new(
            422,
            "Invalid",
            "PatchOptions.meta.k8s.io \"\" is invalid: fieldManager: Required value".into(),
        )
    }

    pub(crate) fn bad_request(why: &str) -> Self {
        Self::new(400, "BadRequest", why.to_owned())
    }

    pub(crate) fn quota(key: &Key, why: &str) -> Self {
        Self::new(403, "Forbidden", format!("{} {:?} is forbidden: {why}", key.resource(), key.name))
    }

    /// The history does not reach back so far.
    pub(crate) fn expired(version: u64, oldest: u64) -> Self {
        Self::new(410, "Expired", format!("too old resource version: {version} ({oldest})"))
    }

    pub(crate) fn internal() -> Self {
        Self::new(500, "InternalError", "Internal error occurred: etcdserver: leader changed".into())
    }

    /// A webhook that may not be passed over does not answer (Kubernetes: apiserver/pkg/admission/plugin/webhook/errors).
    pub(crate) fn webhook(name: &str) -> Self {
        let message = format!("Internal error occurred: failed calling webhook {name:?}: connection refused");
        Self::new(500, "InternalError", message)
    }

    pub(crate) fn too_many_requests() -> Self {
        Self::new(429, "TooManyRequests", "too many requests, please try again later".into())
    }

    /// The double's own: it knows no such thing.
    pub(crate) fn not_modelled(what: &str) -> Self {
        Self::new(501, "NotImplemented", format!("the double does not model {what}"))
    }

    pub(crate) fn status(&self) -> Value {
        json!({
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code,
        })
    }
}
