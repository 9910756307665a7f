//! Spans on their way out: a bounded queue, and one thread that hands them on in batches.
//!
//! Owns what is lost and who hears of it. Whoever brings a span never waits: what there is no room for, and what cannot be
//! delivered, is dropped and counted. How spans are delivered is no matter here.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{io, thread};

use prometheus_client::metrics::counter::Counter;

use super::settings::Sampler;
use super::{Sink, Span};

/// Spans that wait, of all requests; the specification's default. A build has about fifteen.
const MAX_WAITING: usize = 2048;
/// Spans of one request to the collector, as the specification has it.
const MAX_BATCH: usize = 512;

/// Takes batches away. It may block, within a bound of its own.
pub trait Deliver: Send + 'static {
    /// The error is a sentence without secrets.
    fn deliver(&mut self, spans: Vec<Span>) -> Result<(), String>;
}

/// How much waits, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Spans that wait at most.
    pub waiting: usize,
    /// Spans of one batch at most.
    pub batch: usize,
    /// How long a batch that is not full waits for more.
    pub pause: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { waiting: MAX_WAITING, batch: MAX_BATCH, pause: Duration::from_secs(5) }
    }
}

/// A queue with its thread.
pub struct Queue {
    state: Mutex<State>,
    /// Something of the state has changed that somebody waits for.
    changed: Condvar,
    limits: Limits,
    sampler: Sampler,
    dropped: Counter,
}

#[derive(Default)]
struct State {
    spans: VecDeque<Span>,
    is_closing: bool,
    /// Everything was handed on, and the thread is over.
    is_over: bool,
}

impl Queue {
    /// Starts the thread. `dropped` counts.
    pub fn start(
        deliver: impl Deliver,
        sampler: Sampler,
        limits: Limits,
        dropped: Counter,
    ) -> io::Result<Arc<Self>> {
        let (state, changed) = (Mutex::default(), Condvar::new());
        let queue = Arc::new(Self { state, changed, limits, sampler, dropped });
        let own = queue.clone();
        thread::Builder::new().name("spans".into()).spawn(move || own.run(deliver))?;
        Ok(queue)
    }

    /// Takes no more, and waits until what is there was handed on, at most so long. Whether that was enough.
    pub fn close(&self, limit: Duration) -> bool {
        let mut state = self.lock();
        state.is_closing = true;
        self.changed.notify_all();
        let waited = self.changed.wait_timeout_while(state, limit, |state| !state.is_over);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.is_over
    }

    fn run(&self, mut deliver: impl Deliver) {
        let mut outage = Outage::default();
        while let Some(batch) = self.next() {
            let count = batch.len() as u64;
            let result = deliver.deliver(batch);
            if result.is_err() {
                self.dropped.inc_by(count);
            }
            match (outage.note(result.is_ok(), count), result) {
                (Some(Change::Began), Err(why)) => {
                    tracing::warn!(
                        why,
                        "spans do not reach the collector; builds go on, and spans are dropped until it is back"
                    );
                }
                (Some(Change::Ended { lost }), _) => tracing::info!(lost, "spans reach the collector again"),
                _ => {}
            }
        }
        self.lock().is_over = true;
        self.changed.notify_all();
    }

    /// Waits for a batch that is full or has waited long enough. None: there will be no more.
    fn next(&self) -> Option<Vec<Span>> {
        let has_none = |state: &mut State| state.spans.is_empty() && !state.is_closing;
        let state = self.changed.wait_while(self.lock(), has_none).unwrap_or_else(PoisonError::into_inner);
        let is_short = |state: &mut State| state.spans.len() < self.limits.batch && !state.is_closing;
        let waited = self.changed.wait_timeout_while(state, self.limits.pause, is_short);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let count = state.spans.len().min(self.limits.batch);
        let batch: Vec<Span> = state.spans.drain(..count).collect();
        (!batch.is_empty()).then_some(batch)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is one of a queue or a flag: whole after a panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sink for Queue {
    fn take(&self, span: Span) {
        if !self.sampler.keeps(&span) {
            return;
        }
        let mut state = self.lock();
        if state.is_closing || state.spans.len() >= self.limits.waiting {
            drop(state);
            self.dropped.inc();
            return;
        }
        state.spans.push_back(span);
        if state.spans.len() == 1 || state.spans.len() >= self.limits.batch {
            self.changed.notify_all();
        }
    }
}

/// Whether deliveries fail: of many that do in a row, one is worth a line.
#[derive(Default)]
struct Outage {
    lost: u64,
}

#[derive(PartialEq, Debug)]
enum Change {
    Began,
    Ended { lost: u64 },
}

impl Outage {
    /// A batch of so many has been delivered, or not.
    fn note(&mut self, is_delivered: bool, count: u64) -> Option<Change> {
        let before = self.lost;
        if is_delivered {
            self.lost = 0;
            return (before > 0).then_some(Change::Ended { lost: before });
        }
        self.lost += count;
        (before == 0).then_some(Change::Began)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use drover_api::BuildRequest;
    use jiff::Timestamp;

    use super::*;
    use crate::trace::{Context, Tracer};

    const LONG: Duration = Duration::from_secs(60);
    const ALL: Sampler = Sampler { follows_parent: true, ratio: 1.0 };

    /// Says how many it got, and then waits to hear what becomes of them.
    struct Slow {
        got: Sender<usize>,
        verdicts: Receiver<Result<(), String>>,
    }

    impl Deliver for Slow {
        fn deliver(&mut self, spans: Vec<Span>) -> Result<(), String> {
            self.got.send(spans.len()).unwrap();
            // Nobody there to say it: well delivered.
            self.verdicts.recv().unwrap_or(Ok(()))
        }
    }

    struct Rig {
        queue: Arc<Queue>,
        tracer: Tracer,
        got: Receiver<usize>,
        verdicts: Sender<Result<(), String>>,
        dropped: Counter,
    }

    fn rig(limits: Limits, sampler: Sampler) -> Rig {
        let ((got_by, got), (verdicts, heard)) = (channel(), channel());
        let dropped = Counter::default();
        let slow = Slow { got: got_by, verdicts: heard };
        let queue = Queue::start(slow, sampler, limits, dropped.clone()).unwrap();
        Rig { tracer: Tracer::new(queue.clone()), queue, got, verdicts, dropped }
    }

    fn say(tracer: &Tracer, count: usize) {
        let context = Context::of(&BuildRequest::new("a", Default::default()));
        let now = Timestamp::UNIX_EPOCH;
        for _ in 0..count {
            tracer.say(|| vec![context.root(now, now)]);
        }
    }

    #[test]
    fn what_waits_is_handed_on_in_batches_and_at_the_end() {
        // Only a full batch, or the end, makes it go: the pause is longer than the test.
        let rig = rig(Limits { waiting: 100, batch: 3, pause: LONG }, ALL);
        say(&rig.tracer, 3);
        assert_eq!(rig.got.recv_timeout(LONG), Ok(3));
        say(&rig.tracer, 5);
        drop(rig.verdicts);
        assert!(rig.queue.close(LONG));
        assert_eq!(rig.got.try_iter().collect::<Vec<_>>(), [3, 2]);
        assert_eq!(rig.dropped.get(), 0);
        // Behind the end there is nothing.
        say(&rig.tracer, 1);
        assert_eq!(rig.dropped.get(), 1);
    }

    #[test]
    fn a_batch_that_is_not_full_goes_after_a_while() {
        let rig = rig(Limits { waiting: 100, batch: 50, pause: Duration::from_millis(1) }, ALL);
        say(&rig.tracer, 1);
        assert_eq!(rig.got.recv_timeout(LONG), Ok(1));
    }

    /// The collector answers nothing. Whoever builds does not wait for it, and the end has a bound.
    #[test]
    fn nobody_waits_for_a_collector() {
        let rig = rig(Limits { waiting: 4, batch: 2, pause: LONG }, ALL);
        say(&rig.tracer, 2);
        assert_eq!(rig.got.recv_timeout(LONG), Ok(2));
        say(&rig.tracer, 10);
        assert_eq!(rig.dropped.get(), 6);
        assert!(!rig.queue.close(Duration::from_millis(1)));
        // And it goes on once it is back.
        drop(rig.verdicts);
        assert!(rig.queue.close(LONG));
        assert_eq!(rig.got.try_iter().collect::<Vec<_>>(), [2, 2]);
    }

    #[test]
    fn what_cannot_be_delivered_is_counted() {
        let rig = rig(Limits { waiting: 100, batch: 2, pause: LONG }, ALL);
        for verdict in [Err("no route".to_owned()), Err("no route".to_owned()), Ok(())] {
            rig.verdicts.send(verdict).unwrap();
        }
        say(&rig.tracer, 6);
        assert!(rig.queue.close(LONG));
        assert_eq!(rig.dropped.get(), 4);
        let mut outage = Outage::default();
        let heard = [true, false, false, true, true, false].map(|is_delivered| outage.note(is_delivered, 2));
        let (began, ended) = (Some(Change::Began), Some(Change::Ended { lost: 4 }));
        assert_eq!(heard, [None, began, None, ended, None, Some(Change::Began)]);
    }

    #[test]
    fn what_is_not_kept_is_no_loss() {
        let rig = rig(Limits::default(), Sampler { follows_parent: true, ratio: 0.0 });
        drop(rig.verdicts);
        say(&rig.tracer, 3);
        assert!(rig.queue.close(LONG));
        assert_eq!((rig.got.try_iter().count(), rig.dropped.get()), (0, 0));
    }
}
