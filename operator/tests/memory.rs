//! What 10,000 live requests take of the operator's memory. A process of its own, since all of it is measured; the API server
//! is invented, and keeps next to nothing itself.

#![allow(clippy::unwrap_used)] // all of it is tests

mod invented;

use std::sync::Arc;
use std::time::{Duration, Instant};

use drover_operator::clock::Clock;
use drover_operator::controller;
use invented::Server;

const REQUESTS: usize = 10_000;
/// The design's number.
const LIMIT_MIB: u64 = 150;
/// For two busy processors, and code that is not optimised.
const PATIENCE: Duration = Duration::from_secs(120);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_live_requests_fit() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server { requests: REQUESTS, cache: dir.path().to_owned(), seen: Arc::default() };
    let before = resident_mib();
    let parts = server.parts(Clock::system(), Arc::default());
    let begun = Instant::now();
    let operator = tokio::spawn(controller::run(parts, std::future::pending()));
    // Each of them was looked at, its outputs and inputs were looked for, and it says what it waits for.
    while server.waiting() < REQUESTS - 1 {
        assert!(begun.elapsed() < PATIENCE, "{} of {REQUESTS} were looked at", server.waiting());
        assert!(!operator.is_finished(), "the operator has ended");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let (rate, now) = (REQUESTS as f64 / begun.elapsed().as_secs_f64(), resident_mib());
    println!(
        "{REQUESTS} live requests: {now} MiB resident, of which {before} before; {rate:.0} looked at a second"
    );
    assert!(now <= LIMIT_MIB, "{now} MiB");
    operator.abort();
}

/// What the kernel says that this process holds now.
fn resident_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
}
