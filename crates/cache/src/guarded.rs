//! What all users of a cache's handle know of it together: what it had, what it lacked, and where it was wrong.
//!
//! A decorator around any [`Cache`]. Its memory is short and in this process only, and is consulted by [`crate::find`]
//! alone: [`Cache::narinfo`] asks the cache, always. Nix keeps positive answers for thirty days and negative ones for an
//! hour, on disk (narinfo-cache-positive-ttl, narinfo-cache-negative-ttl); a builder that waits for an input that
//! somebody is about to push cannot use an answer that is an hour old, so here "it lacks this" only decides the order in
//! which caches are asked. "It has this" is kept until its NAR turns out to be gone.

use std::collections::HashMap;
use std::io::Read;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use drover_nix::{NarInfo, PathInfo, StorePath};

use crate::{Cache, Error, Recalled, SpooledNar, Stored};

/// How much is remembered, and for how long.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Memory {
    /// That the cache has a path, and what it says of it. What a store path's narinfo file says does not change, but the
    /// cache may drop it.
    pub positive: Duration,
    /// That it lacks one.
    pub negative: Duration,
    /// A path that came wrong is not taken from it.
    pub wrong_path: Duration,
    /// Everything else is asked of other caches first. Doubled for each further path that came wrong meanwhile.
    pub wrong_cache: Duration,
    /// Bytes that narinfo files may take, roughly.
    pub bytes: usize,
}

/// However many paths came wrong.
const LONGEST_ASIDE: Duration = Duration::from_secs(30 * 60);
/// Paths that came wrong and are remembered. Where there are more, the cache is broken as a whole.
const MAX_WRONG: usize = 1000;
/// Bytes of a message that are kept.
const MAX_WHY: usize = 500;

impl Default for Memory {
    fn default() -> Self {
        Self {
            positive: Duration::from_secs(60 * 60),
            negative: Duration::from_secs(60),
            wrong_path: Duration::from_secs(10 * 60),
            wrong_cache: Duration::from_secs(60),
            bytes: 16 << 20,
        }
    }
}

impl Memory {
    /// For a cache with this URL. Asking one that is on this machine costs as little as remembering: only its mistakes
    /// are kept.
    pub fn of(url: &str) -> Self {
        match url.split_once("://") {
            Some(("http" | "https" | "s3", _)) => Self::default(),
            _ => Self { positive: Duration::ZERO, negative: Duration::ZERO, bytes: 0, ..Self::default() },
        }
    }
}

/// What became of questions, for metrics.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Counts {
    /// Answers that memory gave, of either kind.
    pub recalled: u64,
    /// Questions that the cache was asked.
    pub asked: u64,
    /// Paths that came wrong.
    pub wrong: u64,
}

/// A cache with a memory. Shared by whoever should know the same.
pub struct Guarded {
    inner: Arc<dyn Cache>,
    memory: Memory,
    clock: Box<dyn Fn() -> Instant + Send + Sync>,
    answers: Mutex<Answers>,
    wrong: Mutex<Wrong>,
    recalled: AtomicU64,
    asked: AtomicU64,
    found_wrong: AtomicU64,
}

impl Guarded {
    pub fn new(inner: Arc<dyn Cache>, memory: Memory) -> Self {
        Self::with_clock(inner, memory, Instant::now)
    }

    /// With a clock that never goes backwards.
    pub fn with_clock(
        inner: Arc<dyn Cache>,
        memory: Memory,
        clock: impl Fn() -> Instant + Send + Sync + 'static,
    ) -> Self {
        Self {
            inner,
            memory,
            clock: Box::new(clock),
            answers: Mutex::default(),
            wrong: Mutex::default(),
            recalled: AtomicU64::new(0),
            asked: AtomicU64::new(0),
            found_wrong: AtomicU64::new(0),
        }
    }

    pub fn counts(&self) -> Counts {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Counts { recalled: get(&self.recalled), asked: get(&self.asked), wrong: get(&self.found_wrong) }
    }

    /// Fails for a path that came wrong.
    fn check(&self, path: &StorePath) -> Result<(), Error> {
        let now = (self.clock)();
        let mut wrong = self.wrong();
        wrong.expire(now);
        match wrong.paths.get(path) {
            None => Ok(()),
            Some(Mistake { until, why }) => Err(Error::SetAside {
                url: self.inner.url(),
                path: path.clone(),
                why: why.clone(),
                again: until.saturating_duration_since(now),
            }),
        }
    }

    fn answers(&self) -> MutexGuard<'_, Answers> {
        // Whole after a panic: each change is one insertion or removal.
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wrong(&self) -> MutexGuard<'_, Wrong> {
        self.wrong.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Cache for Guarded {
    fn url(&self) -> String {
        self.inner.url()
    }

    fn narinfo(&self, path: &StorePath) -> Result<Option<NarInfo>, Error> {
        self.check(path)?;
        self.asked.fetch_add(1, Ordering::Relaxed);
        // From before the question: the answer is no younger than that.
        let now = (self.clock)();
        let answer = self.inner.narinfo(path);
        match &answer {
            Ok(answer) => {
                let kept = if answer.is_some() { self.memory.positive } else { self.memory.negative };
                let until = now + kept;
                self.answers().insert(path, Answer { until, said: answer.clone() }, self.memory.bytes);
            }
            Err(_) => self.answers().remove(path),
        }
        answer
    }

    fn recall(&self, path: &StorePath) -> Recalled {
        let now = (self.clock)();
        let aside = {
            let mut wrong = self.wrong();
            wrong.expire(now);
            // Asked last, it says why it is not to be had from here.
            wrong.paths.contains_key(path) || wrong.until.is_some_and(|until| now < until)
        };
        if aside {
            return Recalled::AskedLast;
        }
        let Some(said) = self.answers().get(path, now, self.memory.bytes) else { return Recalled::Nothing };
        self.recalled.fetch_add(1, Ordering::Relaxed);
        match said {
            Some(narinfo) => Recalled::Has(Box::new(narinfo)),
            None => Recalled::Lacked,
        }
    }

    fn nar(&self, narinfo: &NarInfo) -> Result<Box<dyn Read + Send>, Error> {
        self.check(&narinfo.info.path)?;
        let nar = self.inner.nar(narinfo);
        if nar.is_err() {
            // It may have been dropped, or be another one now: to be asked again.
            self.answers().remove(&narinfo.info.path);
        }
        nar
    }

    fn set_aside(&self, path: &StorePath, why: &str) {
        let now = (self.clock)();
        self.found_wrong.fetch_add(1, Ordering::Relaxed);
        self.answers().remove(path);
        let why = why.chars().take(MAX_WHY).collect();
        self.wrong().add(path, why, now, &self.memory);
    }

    fn put(&self, info: &PathInfo, nar: &SpooledNar) -> Result<Stored, Error> {
        let stored = self.inner.put(info, nar);
        // It has it now, or something that is not known.
        self.answers().remove(&info.path);
        stored
    }

    fn put_log(&self, drv: &StorePath, log: &mut dyn Read) -> Result<(), Error> {
        self.inner.put_log(drv, log)
    }

    fn log(&self, drv: &StorePath) -> Result<Option<Box<dyn Read + Send>>, Error> {
        self.inner.log(drv)
    }
}

struct Answer {
    until: Instant,
    said: Option<NarInfo>,
}

impl Answer {
    /// Bytes in memory, roughly: each string has some overhead.
    fn weight(&self) -> usize {
        const STRING: usize = 96;
        let Some(NarInfo { info, url, .. }) = &self.said else { return 2 * STRING };
        let lists = info.references.len() + 2 * info.signatures.len();
        8 * STRING + url.len() + lists * STRING
    }
}

/// Two generations: what is not asked for while one fills up is gone after the next one.
#[derive(Default)]
struct Answers {
    young: HashMap<StorePath, Answer>,
    weight: usize,
    old: HashMap<StorePath, Answer>,
}

impl Answers {
    fn insert(&mut self, path: &StorePath, answer: Answer, limit: usize) {
        self.remove(path);
        let weight = answer.weight();
        if weight > limit / 2 {
            return;
        }
        if self.weight + weight > limit / 2 {
            self.old = std::mem::take(&mut self.young);
            self.weight = 0;
        }
        self.weight += weight;
        self.young.insert(path.clone(), answer);
    }

    fn get(&mut self, path: &StorePath, now: Instant, limit: usize) -> Option<Option<NarInfo>> {
        if let Some(answer) = self.old.remove(path) {
            self.insert(path, answer, limit);
        }
        let answer = self.young.get(path)?;
        if answer.until <= now {
            self.remove(path);
            return None;
        }
        Some(answer.said.clone())
    }

    fn remove(&mut self, path: &StorePath) {
        if let Some(answer) = self.young.remove(path) {
            self.weight -= answer.weight();
        }
        self.old.remove(path);
    }
}

#[derive(Default)]
struct Wrong {
    paths: HashMap<StorePath, Mistake>,
    /// Of the cache as a whole.
    until: Option<Instant>,
}

struct Mistake {
    until: Instant,
    why: String,
}

impl Wrong {
    fn expire(&mut self, now: Instant) {
        self.paths.retain(|_, mistake| now < mistake.until);
    }

    fn add(&mut self, path: &StorePath, why: String, now: Instant, memory: &Memory) {
        self.expire(now);
        if self.paths.len() < MAX_WRONG || self.paths.contains_key(path) {
            self.paths.insert(path.clone(), Mistake { until: now + memory.wrong_path, why });
        }
        let doubled = 1u32 << (self.paths.len() - 1).min(16);
        let until = now + memory.wrong_cache.saturating_mul(doubled).min(LONGEST_ASIDE);
        self.until = self.until.max(Some(until));
    }
}

#[cfg(test)]
mod tests;
