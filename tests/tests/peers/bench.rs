//! The benchmark against real Nix runs: every case, with little data. What it says of speed is not looked at.

use anyhow::{Result, ensure};
use drover_tests::program;
use xtask::bench::data::Sizes;
use xtask::bench::serve::{CASES, Options, measure};

#[test]
fn every_case_of_the_serve_benchmark_measures_both_sides() -> Result<()> {
    let sizes =
        Sizes { large: (2, 3 << 20), files: 300, paths: 50, queried: 200, builds: 4, memory: 5 << 20 };
    let builder = program("drover-builder")?;
    let report =
        measure(&Options { rounds: 1, only: Vec::new(), dir: None, sizes, builder: builder.clone() })?;
    for case in CASES.into_iter().filter(|case| *case != "memory") {
        let rows: Vec<_> = report.rows.iter().filter(|row| row.name.starts_with(case)).collect();
        ensure!(!rows.is_empty(), "no row for {case}");
        for row in rows {
            let (least, _) = row.ours.seconds.range();
            ensure!(row.ours.seconds.0.len() == 1 && least > 0.0 && row.ratio() > 0.0, "{row:?}");
            ensure!(row.ours.peak > 0 && row.theirs.peak > 0, "{row:?}");
        }
    }
    // Far more than so little data needs, far less than an archive in memory would.
    ensure!(report.memory.is_some_and(|peak| peak > 1 << 20 && peak < 64 << 20), "{:?}", report.memory);
    // A misspelt case measures nothing and says so.
    let misspelt =
        Options { rounds: 1, only: vec!["lrage".into()], dir: None, sizes: Sizes::default(), builder };
    ensure!(measure(&misspelt).is_err());
    Ok(())
}
