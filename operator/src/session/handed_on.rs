//! What sessions that were stopped have received, for those that come behind them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use drover_session::Kept;

/// How long it is there for the next session, which is started in the same breath: files, which nobody should have to look
/// after.
const FOR: Duration = Duration::from_secs(30);

/// By the request's uid.
#[derive(Default)]
pub(super) struct HandedOn(Mutex<HashMap<String, Left>>);

struct Left {
    attempt: u32,
    pod_uid: String,
    kept: Arc<Kept>,
    since: Instant,
}

impl HandedOn {
    /// What a session of this attempt with this pod has left. A thread of it may still be adding to it.
    pub(super) fn put(&self, uid: &str, attempt: u32, pod_uid: String, kept: Arc<Kept>) {
        let mut left = self.lock();
        left.retain(|_, left| left.since.elapsed() < FOR);
        left.insert(uid.to_owned(), Left { attempt, pod_uid, kept, since: Instant::now() });
    }

    /// For a session of this attempt with this pod: another builder makes outputs of its own.
    pub(super) fn take(&self, uid: &str, attempt: u32, pod_uid: &str) -> Arc<Kept> {
        let left = self.lock().remove(uid);
        let same = |left: &Left| left.attempt == attempt && left.pod_uid == pod_uid;
        left.filter(same).map(|left| left.kept).unwrap_or_default()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Left>> {
        // Each change is one insertion or removal: a panic leaves the map whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn to_the_same_builder_only() {
        let handed_on = HandedOn::default();
        let kept = Arc::new(Kept::default());
        let put = || handed_on.put("uid", 1, "pod".into(), kept.clone());
        put();
        assert!(Arc::ptr_eq(&handed_on.take("uid", 1, "pod"), &kept));
        assert!(!Arc::ptr_eq(&handed_on.take("uid", 1, "pod"), &kept), "once");
        for (uid, attempt, pod) in [("uid", 2, "pod"), ("uid", 1, "other"), ("other", 1, "pod")] {
            put();
            assert!(!Arc::ptr_eq(&handed_on.take(uid, attempt, pod), &kept));
        }
        // What nobody came for goes, with its files.
        let count = Arc::strong_count(&kept);
        handed_on.lock().get_mut("uid").unwrap().since -= FOR;
        handed_on.put("another", 1, "pod".into(), Arc::default());
        assert_eq!(Arc::strong_count(&kept), count - 1);
    }
}
