//! Threads that share one piece of work. Where a limit on processes leaves none to be had, which a build beside this
//! process can bring about, the caller does all of it.

use std::thread;

/// Has `work` called by up to `most` threads at once, of which the caller's is one, and returns when all calls have. Any of
/// the calls must be able to do everything by itself. A panic in one is passed on.
pub fn in_parallel(most: usize, work: impl Fn() + Sync) {
    thread::scope(|scope| {
        for _ in 1..most {
            if thread::Builder::new().spawn_scoped(scope, &work).is_err() {
                break;
            }
        }
        work();
    });
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::testing::without_threads;

    #[test]
    fn as_many_as_asked_for() {
        for most in [0, 1, 4] {
            // Nobody gets through before all are there.
            let (all, calls) = (Barrier::new(most.max(1)), AtomicUsize::new(0));
            in_parallel(most, || {
                all.wait();
                calls.fetch_add(1, Ordering::SeqCst);
            });
            assert_eq!(calls.into_inner(), most.max(1));
        }
    }

    #[test]
    fn without_threads_the_caller_does_it() {
        without_threads("threads::tests::without_threads_the_caller_does_it", || {
            let calls = AtomicUsize::new(0);
            in_parallel(4, || {
                calls.fetch_add(1, Ordering::SeqCst);
            });
            assert_eq!(calls.into_inner(), 1);
        });
    }
}
