//! What caches have answered, by request: one attempt's answer at a time. Lost with the process, and asked again.
//!
//! An answer that was forgotten while it was on its way is not taken: what made it worthless may have come in between.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::world::Lookup;

#[derive(Default)]
pub struct Lookups(Mutex<Known>);

#[derive(Default)]
struct Known {
    by_uid: HashMap<String, (u32, Answer)>,
    asked: u64,
}

enum Answer {
    Coming(Ticket),
    There(Lookup),
    /// To be asked again, unless what is known to have changed says enough.
    Old(Lookup),
}

/// One question to the caches.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ticket(pub(super) u64);

impl Lookups {
    /// The answer for this attempt; `Unknown` if there is none yet.
    pub fn get(&self, uid: &str, attempt: u32) -> Lookup {
        match self.lock().by_uid.get(uid) {
            Some((of, Answer::There(lookup))) if *of == attempt => lookup.clone(),
            _ => Lookup::Unknown,
        }
    }

    /// Notes that the question is being asked; None if it is already.
    pub fn ask(&self, uid: &str, attempt: u32) -> Option<Ticket> {
        let mut known = self.lock();
        if matches!(known.by_uid.get(uid), Some((of, Answer::Coming(_))) if *of == attempt) {
            return None;
        }
        known.asked += 1;
        let ticket = Ticket(known.asked);
        known.by_uid.insert(uid.to_owned(), (attempt, Answer::Coming(ticket)));
        Some(ticket)
    }

    /// Keeps the answer; false if nobody wants this one any more.
    pub fn answer(&self, uid: &str, ticket: Ticket, lookup: Lookup) -> bool {
        let mut known = self.lock();
        let Some((_, answer)) = known.by_uid.get_mut(uid) else { return false };
        let is_wanted = matches!(answer, Answer::Coming(wanted) if *wanted == ticket);
        if is_wanted {
            *answer = Answer::There(lookup);
        }
        is_wanted
    }

    /// The answer was used: whoever looks at the request next asks again.
    pub fn expire(&self, uid: &str) {
        if let Some((_, answer)) = self.lock().by_uid.get_mut(uid)
            && let Answer::There(lookup) = answer
        {
            *answer = Answer::Old(std::mem::replace(lookup, Lookup::Unknown));
        }
    }

    /// The answer is wrong, or may be.
    pub fn forget(&self, uid: &str) {
        self.lock().by_uid.remove(uid);
    }

    /// These inputs are in the caches now, and nothing else has changed: an answer that says so needs no asking.
    pub fn arrived(&self, uid: &str, paths: &[Arc<str>]) {
        let mut known = self.lock();
        match known.by_uid.get_mut(uid) {
            Some((_, answer @ (Answer::There(_) | Answer::Old(_)))) => {
                let (Answer::There(lookup) | Answer::Old(lookup)) = answer else { return };
                if let Lookup::Missing { absent } = lookup {
                    for path in paths {
                        absent.remove(&**path);
                    }
                }
                *answer = Answer::There(std::mem::replace(lookup, Lookup::Unknown));
            }
            _ => drop(known.by_uid.remove(uid)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        // One insertion or removal at a time: whole after a panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn missing(absent: &[&str]) -> Lookup {
        Lookup::Missing { absent: absent.iter().map(|path| (*path).to_owned()).collect() }
    }

    #[test]
    fn an_answer_is_for_one_attempt() {
        let lookups = Lookups::default();
        let ticket = lookups.ask("a", 1).unwrap();
        assert_eq!(lookups.ask("a", 1), None, "asked twice at once");
        assert_eq!(lookups.get("a", 1), Lookup::Unknown);
        assert!(lookups.answer("a", ticket, missing(&[])));
        assert_eq!(lookups.get("a", 1), missing(&[]));
        assert_eq!(lookups.get("a", 2), Lookup::Unknown);
        assert!(lookups.ask("a", 2).is_some());
    }

    #[test]
    fn what_was_forgotten_on_its_way_is_not_taken() {
        let lookups = Lookups::default();
        let ticket = lookups.ask("a", 1).unwrap();
        lookups.forget("a");
        assert!(!lookups.answer("a", ticket, missing(&["x"])));
        assert_eq!(lookups.get("a", 1), Lookup::Unknown);
        let (old, arrived) = (lookups.ask("a", 1).unwrap(), ["x".into()]);
        lookups.arrived("a", &arrived);
        assert!(!lookups.answer("a", old, missing(&["x"])));
        let new = lookups.ask("a", 1).unwrap();
        assert!(!lookups.answer("a", old, missing(&["x"])), "the new question's answer is another one");
        assert!(lookups.answer("a", new, missing(&["x", "y"])));
        lookups.arrived("a", &arrived);
        assert_eq!(lookups.get("a", 1), missing(&["y"]));
    }

    #[test]
    fn an_old_answer_is_good_for_what_is_known_to_have_changed() {
        let lookups = Lookups::default();
        let ticket = lookups.ask("a", 1).unwrap();
        lookups.answer("a", ticket, missing(&["x", "y"]));
        lookups.expire("a");
        assert_eq!(lookups.get("a", 1), Lookup::Unknown);
        lookups.arrived("a", &["x".into()]);
        assert_eq!(lookups.get("a", 1), missing(&["y"]));
        lookups.expire("a");
        assert!(lookups.ask("a", 1).is_some(), "it is asked again");
    }
}
