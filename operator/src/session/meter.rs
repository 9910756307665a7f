//! How much a session moves, in whatever direction, and the watch over it: copying during which nothing moves is given
//! up. While the build runs nothing need move; its limits are the builder's to keep.

use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use drover_cache::{Cache, Error, Recalled, SpooledNar, Stored};
use drover_nix::{NarInfo, PathInfo, StorePath};
use tokio::time::Instant;

/// Bytes that have to move in each period for a session to be alive. A peer that sends a byte now and then keeps a
/// connection up, and nobody ever gets anywhere.
pub const FLOOR: u64 = 1024;
/// How often in a period the watch looks.
const LOOKS: u32 = 20;
/// Between two looks, at most and at least.
const LONGEST_LOOK: Duration = Duration::from_secs(5);
const SHORTEST_LOOK: Duration = Duration::from_millis(5);

/// Clones are one.
#[derive(Clone, Debug, Default)]
pub struct Meter(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    moved: AtomicU64,
    rests: AtomicBool,
    /// Milliseconds for which nothing need move beyond what is always allowed.
    patience: AtomicU64,
    /// What is being stored: how much of it was read so far.
    uploads: Mutex<Vec<Arc<AtomicU64>>>,
}

impl Meter {
    pub fn add(&self, bytes: u64) {
        self.0.moved.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Whether nothing is expected to move.
    pub fn rest(&self, rests: bool) {
        self.0.rests.store(rests, Ordering::Relaxed);
    }

    /// Nothing need move for so long, beyond the period; zero again when what was waited for has come.
    pub fn wait(&self, patience: Duration) {
        let millis = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
        self.0.patience.store(millis, Ordering::Relaxed);
        // What was waited for counts as movement: the period begins anew.
        self.add(FLOOR);
    }

    fn patience(&self) -> Duration {
        Duration::from_millis(self.0.patience.load(Ordering::Relaxed))
    }

    /// Bytes so far.
    pub fn total(&self) -> u64 {
        let uploads = self.uploads();
        let under_way: u64 = uploads.iter().map(|read| read.load(Ordering::Relaxed)).sum();
        self.0.moved.load(Ordering::Relaxed) + under_way
    }

    /// Returns once nothing worth the name has moved for a whole `period`.
    pub async fn stalled(&self, period: Duration) {
        let mut watch = Watch { since: Instant::now(), total: self.total() };
        let pause = (period / LOOKS).clamp(SHORTEST_LOOK, LONGEST_LOOK);
        let rests = || self.0.rests.load(Ordering::Relaxed);
        while !watch.is_over(Instant::now(), rests(), self.total(), period.saturating_add(self.patience())) {
            tokio::time::sleep(pause).await;
        }
    }

    /// The cache, with what is read from it and stored in it counted.
    pub fn watch(&self, cache: Arc<dyn Cache>) -> Arc<dyn Cache> {
        Arc::new(Watched { cache, meter: self.clone() })
    }

    fn uploads(&self) -> MutexGuard<'_, Vec<Arc<AtomicU64>>> {
        // Each change is one insertion or removal: a panic leaves it whole.
        self.0.uploads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Since when too little has moved.
struct Watch {
    since: Instant,
    total: u64,
}

impl Watch {
    fn is_over(&mut self, now: Instant, rests: bool, total: u64, period: Duration) -> bool {
        if rests || total - self.total >= FLOOR {
            *self = Self { since: now, total };
        }
        now.duration_since(self.since) >= period
    }
}

/// A cache whose traffic counts.
struct Watched {
    cache: Arc<dyn Cache>,
    meter: Meter,
}

impl Cache for Watched {
    fn url(&self) -> String {
        self.cache.url()
    }

    fn narinfo(&self, path: &StorePath) -> Result<Option<NarInfo>, Error> {
        let found = self.cache.narinfo(path);
        // An answer is progress, though most say no and are short.
        self.meter.add(FLOOR);
        found
    }

    fn recall(&self, path: &StorePath) -> Recalled {
        self.cache.recall(path)
    }

    fn set_aside(&self, path: &StorePath, why: &str) {
        self.cache.set_aside(path, why);
    }

    fn nar(&self, narinfo: &NarInfo) -> Result<Box<dyn Read + Send>, Error> {
        let reader = self.cache.nar(narinfo)?;
        Ok(Box::new(Counted { reader, meter: self.meter.clone() }))
    }

    fn put(&self, info: &PathInfo, nar: &SpooledNar) -> Result<Stored, Error> {
        let read = nar.bytes_read();
        self.meter.uploads().push(Arc::clone(&read));
        let stored = self.cache.put(info, nar);
        let mut uploads = self.meter.uploads();
        uploads.retain(|upload| !Arc::ptr_eq(upload, &read));
        self.meter.add(read.load(Ordering::Relaxed));
        stored
    }

    fn put_log(&self, drv: &StorePath, log: &mut dyn Read) -> Result<(), Error> {
        self.cache.put_log(drv, &mut Counted { reader: log, meter: self.meter.clone() })
    }

    fn log(&self, drv: &StorePath) -> Result<Option<Box<dyn Read + Send>>, Error> {
        self.cache.log(drv)
    }
}

struct Counted<R> {
    reader: R,
    meter: Meter,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.reader.read(buffer)?;
        self.meter.add(count as u64);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PERIOD: Duration = Duration::from_secs(300);

    /// Sees what moves in each minute. After how many minutes it is over, None if never.
    fn over(moved: impl IntoIterator<Item = (u64, bool)>) -> Option<usize> {
        let begun = Instant::now();
        let mut watch = Watch { since: begun, total: 0 };
        let mut total = 0;
        moved.into_iter().zip(1..).position(|((bytes, rests), minute)| {
            total += bytes;
            watch.is_over(begun + minute * Duration::from_secs(60), rests, total, PERIOD)
        })
    }

    #[test]
    fn silence_is_over_after_a_period() {
        assert_eq!(over([(0, false); 20]), Some(4));
        assert_eq!(over([(FLOOR, false); 20]), None);
        assert_eq!(over([(0, true); 20]), None, "a build may be silent");
        // The period begins with the copying, not with the build.
        assert_eq!(over([[(0, true); 10], [(0, false); 10]].concat()), Some(14));
    }

    #[test]
    fn a_trickle_is_silence() {
        assert_eq!(over([(1, false); 20]), Some(4));
        // What comes to enough within the period is alive, however unevenly.
        let slow = FLOOR.div_ceil(4);
        assert_eq!(over([(slow, false); 40]), None);
        assert_eq!(over([(FLOOR - 1, false), (0, false), (0, false), (0, false), (0, false)]), Some(4));
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_looked_at_in_time() {
        let meter = Meter::default();
        let begun = Instant::now();
        meter.stalled(PERIOD).await;
        assert!(begun.elapsed() >= PERIOD && begun.elapsed() < PERIOD + 2 * LONGEST_LOOK);
        let never = meter.clone();
        let moves = async {
            loop {
                tokio::time::sleep(PERIOD / 2).await;
                meter.add(FLOOR);
            }
        };
        tokio::select! {
            () = never.stalled(PERIOD) => panic!("something moves"),
            () = moves => {}
            () = tokio::time::sleep(20 * PERIOD) => {}
        }
    }

    #[tokio::test(start_paused = true)]
    async fn silence_that_was_announced_is_no_stall() {
        let meter = Meter::default();
        let begun = Instant::now();
        meter.wait(3 * PERIOD);
        meter.stalled(PERIOD).await;
        assert!(begun.elapsed() >= 4 * PERIOD && begun.elapsed() < 4 * PERIOD + 2 * LONGEST_LOOK);
        let begun = Instant::now();
        meter.wait(3 * PERIOD);
        meter.wait(Duration::ZERO);
        meter.stalled(PERIOD).await;
        assert!(begun.elapsed() < PERIOD + 2 * LONGEST_LOOK);
    }
}
