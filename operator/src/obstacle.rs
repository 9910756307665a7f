//! Sessions that cannot begin as their class says: why not, kept until one does.
//!
//! Before an attempt the caches are asked, which says the same in good time. Whoever takes over an attempt that is open has asked
//! nobody, and may find that a Secret has gone meanwhile.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The last reason, by the request's uid and attempt. Lost with the process, and met again.
#[derive(Default)]
pub struct Obstacles(Mutex<HashMap<String, (u32, String)>>);

impl Obstacles {
    pub fn get(&self, uid: &str, attempt: u32) -> Option<String> {
        self.lock().get(uid).filter(|(of, _)| *of == attempt).map(|(_, why)| why.clone())
    }

    pub fn set(&self, uid: &str, attempt: u32, why: String) {
        self.lock().insert(uid.to_owned(), (attempt, why));
    }

    pub fn forget(&self, uid: &str) {
        self.lock().remove(uid);
    }

    /// Forgets all requests but these.
    pub fn retain(&self, mut is_there: impl FnMut(&str) -> bool) {
        self.lock().retain(|uid, _| is_there(uid));
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, (u32, String)>> {
        // One insertion or removal at a time: whole after a panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_asks_about_goes() {
        let obstacles = Obstacles::default();
        for uid in ["a", "b"] {
            obstacles.set(uid, 1, "no".into());
        }
        obstacles.retain(|uid| uid == "a");
        assert_eq!((obstacles.get("a", 1).as_deref(), obstacles.get("b", 1)), (Some("no"), None));
        assert_eq!(obstacles.get("a", 2), None, "another attempt has not met it");
        obstacles.forget("a");
        assert_eq!(obstacles.get("a", 1), None);
    }
}
