//! What was read of derivations that requests only name, by request. Lost with the process, and read again.
//!
//! What was found stays: a `.drv` is what its name says. Anything else is worth no more than the look that it was made for. An
//! answer to a question that was forgotten meanwhile is not taken.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::lookups::Ticket;
use crate::world::Resolution;

#[derive(Default)]
pub struct Resolutions(Mutex<Known>);

#[derive(Default)]
struct Known {
    by_uid: HashMap<String, Answer>,
    asked: u64,
}

enum Answer {
    Coming(Ticket),
    There(Resolution),
}

impl Resolutions {
    /// What is known; `Unknown` if nobody has asked.
    pub fn get(&self, uid: &str) -> Resolution {
        match self.lock().by_uid.get(uid) {
            Some(Answer::There(resolution)) => resolution.clone(),
            _ => Resolution::Unknown,
        }
    }

    /// Notes that it is being read; None if it is already.
    pub fn ask(&self, uid: &str) -> Option<Ticket> {
        let mut known = self.lock();
        if matches!(known.by_uid.get(uid), Some(Answer::Coming(_))) {
            return None;
        }
        known.asked += 1;
        let ticket = Ticket(known.asked);
        known.by_uid.insert(uid.to_owned(), Answer::Coming(ticket));
        Some(ticket)
    }

    /// Keeps the answer; false if nobody wants it any more.
    pub fn answer(&self, uid: &str, ticket: Ticket, resolution: Resolution) -> bool {
        let mut known = self.lock();
        let Some(answer) = known.by_uid.get_mut(uid) else { return false };
        let is_wanted = matches!(answer, Answer::Coming(wanted) if *wanted == ticket);
        if is_wanted {
            *answer = Answer::There(resolution);
        }
        is_wanted
    }

    /// The answer was used: unless it is the derivation itself, whoever looks at the request next asks again.
    pub fn expire(&self, uid: &str) {
        let mut known = self.lock();
        if let Some(Answer::There(resolution)) = known.by_uid.get(uid)
            && !matches!(resolution, Resolution::Found(_))
        {
            known.by_uid.remove(uid);
        }
    }

    /// Nobody will ask.
    pub fn forget(&self, uid: &str) {
        self.lock().by_uid.remove(uid);
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        // One insertion or removal at a time: whole after a panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use drover_nix::BasicDerivation;
    use drover_session::Resolved;

    use super::*;

    #[test]
    fn only_what_was_found_lasts() {
        let resolutions = Resolutions::default();
        let ticket = resolutions.ask("a").unwrap();
        assert_eq!(resolutions.ask("a"), None, "asked twice at once");
        let absent = Resolution::Absent { path: "f8g8x4m83da3b2f79iv84q2r3qlc58lr-a.drv".parse().unwrap() };
        assert!(resolutions.answer("a", ticket, absent.clone()));
        assert_eq!(resolutions.get("a"), absent);
        resolutions.expire("a");
        assert_eq!(resolutions.get("a"), Resolution::Unknown);
        let ticket = resolutions.ask("a").unwrap();
        // One that is on its way stays wanted.
        resolutions.expire("a");
        let found = Resolution::Found(Arc::new(Resolved {
            drv_path: "f8g8x4m83da3b2f79iv84q2r3qlc58lr-a.drv".parse().unwrap(),
            derivation: BasicDerivation {
                name: "a".into(),
                outputs: Default::default(),
                input_srcs: Default::default(),
                system: "x86_64-linux".into(),
                builder: "/bin/sh".into(),
                args: vec![],
                env: Default::default(),
            },
        }));
        assert!(resolutions.answer("a", ticket, found.clone()));
        resolutions.expire("a");
        assert_eq!(resolutions.get("a"), found);
        resolutions.forget("a");
        assert!(!resolutions.answer("a", ticket, found), "nobody has asked since");
    }
}
