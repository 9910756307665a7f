//! Pods that the API server would not make: what it said, kept until it makes one.
//!
//! That is no error of the operator's. A quota is the everyday case: the request waits, and says so.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;

use crate::world::{PodRefusal, RefusalKind};

/// The last refusal, by the request's uid. Lost with the process, and said again.
#[derive(Default)]
pub struct Refusals(Mutex<HashMap<String, PodRefusal>>);

impl Refusals {
    pub fn get(&self, uid: &str, attempt: u32) -> Option<PodRefusal> {
        self.lock().get(uid).filter(|refusal| refusal.attempt == attempt).cloned()
    }

    pub fn set(&self, uid: &str, refusal: PodRefusal) {
        self.lock().insert(uid.to_owned(), refusal);
    }

    pub fn forget(&self, uid: &str) {
        self.lock().remove(uid);
    }

    /// Forgets all requests but these.
    pub fn retain(&self, mut is_there: impl FnMut(&str) -> bool) {
        self.lock().retain(|uid, _| is_there(uid));
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, PodRefusal>> {
        // One insertion or removal at a time: whole after a panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What an answer to the creation of a pod says about the pod; None if it says nothing about it.
pub fn refusal(error: &kube::Error, attempt: u32, at: Timestamp) -> Option<PodRefusal> {
    let kube::Error::Api(status) = error else { return None };
    let kind = match status.code {
        // Quotas (Kubernetes: plugin/pkg/admission/resourcequota), limit ranges, Pod Security, a namespace that ends.
        403 => RefusalKind::Quota,
        // Nothing else of a new pod's address can be missing but its namespace.
        404 => RefusalKind::Quota,
        // A policy's webhook that does not answer (Kubernetes: apiserver/pkg/admission/plugin/webhook/generic).
        500 if status.message.contains("failed calling webhook \"") => RefusalKind::Quota,
        // Policies choose their own code: a webhook's is 400 if it gives none (Kubernetes:
        // apiserver/pkg/admission/plugin/webhook/errors), a ValidatingAdmissionPolicy's 422.
        400 | 422 if is_policy(&status.message) => RefusalKind::Quota,
        400 | 422 => RefusalKind::Invalid,
        _ => return None,
    };
    Some(PodRefusal { attempt, kind, message: status.message.clone(), at })
}

/// Whether somebody's rule speaks, which its owner may change, and not the schema of pods.
fn is_policy(message: &str) -> bool {
    (message.contains("admission webhook \"") || message.contains("ValidatingAdmissionPolicy '"))
        && message.contains("denied")
}

#[cfg(test)]
mod tests {
    use kube::core::Status;

    use super::*;

    #[test]
    fn what_nobody_asks_about_goes() {
        let refusals = Refusals::default();
        let refusal = PodRefusal {
            attempt: 1,
            kind: RefusalKind::Quota,
            message: "no".into(),
            at: Timestamp::UNIX_EPOCH,
        };
        for uid in ["a", "b"] {
            refusals.set(uid, refusal.clone());
        }
        refusals.retain(|uid| uid == "a");
        assert_eq!((refusals.get("a", 1), refusals.get("b", 1)), (Some(refusal), None));
    }

    #[test]
    fn what_can_change_is_waited_for() {
        let kind = |code: u16, message: &str| {
            let status = Status::failure(message, "Reason").with_code(code);
            refusal(&kube::Error::Api(Box::new(status)), 1, Timestamp::UNIX_EPOCH).map(|refusal| refusal.kind)
        };
        let (quota, invalid) = (Some(RefusalKind::Quota), Some(RefusalKind::Invalid));
        assert_eq!(kind(403, "pods \"x\" is forbidden: exceeded quota: none"), quota);
        assert_eq!(kind(422, "Pod \"x\" is invalid: spec.containers[0].image: Required value"), invalid);
        assert_eq!(kind(400, "Pod in version \"v1\" cannot be handled as a Pod"), invalid);
        assert_eq!(kind(400, "admission webhook \"a.b\" denied the request: no"), quota);
        assert_eq!(
            kind(
                422,
                "pods \"x\" is forbidden: ValidatingAdmissionPolicy 'a' with binding 'b' denied request: no"
            ),
            quota
        );
        assert_eq!(kind(404, "namespaces \"drover-builders\" not found"), quota);
        assert_eq!(kind(500, "Internal error occurred: failed calling webhook \"a.b\": no route"), quota);
        for code in [401, 409, 429, 500, 503] {
            assert_eq!(kind(code, "no"), None, "{code}");
        }
    }
}
