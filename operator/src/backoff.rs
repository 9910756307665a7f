//! How long to wait after a look at a request that failed. Pure; each request by itself.

use std::collections::HashMap;
use std::time::Duration;

/// After the first failure.
pub const FIRST: Duration = Duration::from_millis(200);
/// The longest, however many failures there were.
pub const LONGEST: Duration = Duration::from_secs(300);

/// Failures in a row, by the request's uid. One that succeeds, or is gone, is forgotten.
#[derive(Default, Debug)]
pub struct Backoffs(HashMap<String, u32>);

impl Backoffs {
    /// Another failure: how long to wait, between half and all of what is due. `random` spreads those that failed together.
    pub fn failed(&mut self, uid: &str, random: u64) -> Duration {
        let failures = match self.0.get_mut(uid) {
            Some(failures) => failures,
            None => self.0.entry(uid.to_owned()).or_default(),
        };
        *failures = failures.saturating_add(1);
        let due = FIRST.saturating_mul(2u32.saturating_pow(*failures - 1)).min(LONGEST);
        // At most 300,000 ms.
        let half = u64::try_from(due.as_millis() / 2).unwrap_or(u64::MAX);
        Duration::from_millis(half + random % (half + 1))
    }

    pub fn succeeded(&mut self, uid: &str) {
        self.0.remove(uid);
    }

    /// Forgets all but these.
    pub fn retain(&mut self, mut is_there: impl FnMut(&str) -> bool) {
        self.0.retain(|uid, _| is_there(uid));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_grows_for_each_by_itself_and_starts_anew() {
        let mut backoffs = Backoffs::default();
        assert_eq!(backoffs.failed("a", 100), FIRST);
        assert_eq!(backoffs.failed("a", 200), FIRST * 2);
        assert_eq!(backoffs.failed("b", 0), FIRST / 2);
        backoffs.succeeded("a");
        assert_eq!(backoffs.failed("a", 100), FIRST);
        backoffs.retain(|uid| uid != "b");
        assert_eq!(backoffs.failed("b", 100), FIRST);
        assert_eq!(backoffs.failed("a", 200), FIRST * 2);
    }

    #[test]
    fn it_has_a_limit_and_is_spread() {
        let mut backoffs = Backoffs::default();
        let waits: Vec<_> = (0..10_000u64).map(|random| backoffs.failed("a", random * 7919)).collect();
        assert!(waits.iter().all(|wait| *wait <= LONGEST));
        let late = &waits[100..];
        assert!(late.iter().all(|wait| *wait >= LONGEST / 2));
        let quarter = |wait: &&Duration| **wait < LONGEST * 3 / 4;
        let early = late.iter().filter(quarter).count();
        assert!((late.len() / 3..late.len() * 2 / 3).contains(&early), "{early} of {}", late.len());
    }
}
