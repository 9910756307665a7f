//! A mistake of the program's over one request costs one pass, and not the operator.

mod invented;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use drover_operator::clock::Clock;
use drover_operator::controller;
use drover_operator::metrics::Metrics;
use invented::Server;
use jiff::Timestamp;

#[tokio::test]
async fn a_pass_that_panics_is_counted_and_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server { requests: 2, cache: dir.path().to_owned(), seen: Arc::default() };
    let (metrics, broken) = (Arc::new(Metrics::new()), Arc::new(AtomicBool::new(true)));
    let is_broken = broken.clone();
    let clock = Clock::new(move || {
        assert!(!is_broken.load(Ordering::Relaxed), "the clock is broken, as the test wants it");
        Timestamp::now()
    });
    let operator =
        tokio::spawn(controller::run(server.parts(clock, metrics.clone()), std::future::pending()));
    let panics = || metrics.failures("panic");
    let limit = Duration::from_secs(60);
    let again = async {
        while panics() < 3 {
            assert!(!operator.is_finished(), "a pass took the operator with it");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(limit, again).await.expect("both are tried, and tried again");
    // Mended: the one whose turn it is not yet says so.
    broken.store(false, Ordering::Relaxed);
    let seen = async {
        while server.waiting() == 0 {
            assert!(!operator.is_finished());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(limit, seen).await.expect("they are looked at as if nothing had been");
    operator.abort();
}
