//! `cargo xtask bench ssh` with very little data, so that it still works on the day when somebody wants figures.

use std::time::Duration;

use anyhow::{Result, ensure};
use drover_tests::program;
use xtask::bench::data::Sizes;
use xtask::bench::ssh::{Options, measure};

#[test]
fn the_benchmark_of_the_ssh_servers_measures_both() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let options = Options {
        rounds: 1,
        dir: Some(dir.path().to_owned()),
        sizes: Sizes { large: (2, 64 << 10), ..Sizes::default() },
        builder: program("drover-builder")?,
        round_trip: Duration::from_millis(4),
    };
    let measured = measure(&options)?;
    ensure!(measured.len() == 9, "{measured:?}");
    for one in &measured {
        let seconds = [&one.row.theirs.seconds.0, &one.row.ours.seconds.0];
        ensure!(
            seconds.iter().all(|series| !series.is_empty() && series.iter().all(|value| *value > 0.0)),
            "{one:?}"
        );
    }
    // A greeting takes several round trips, whoever the server is.
    let far = measured.iter().find(|one| one.row.name == "first byte, far");
    ensure!(far.is_some_and(|one| one.row.ours.seconds.median() > 0.012), "{far:?}");
    Ok(())
}
