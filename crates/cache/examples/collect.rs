//! How fast an output becomes a file for a cache: `cargo run --release -p drover-cache --example collect -- FILE...`.
//!
//! The files, one behind the other and again from the start, stand for an output's archive of 1 GiB: name programs and
//! libraries for what compresses as most outputs do. Each stage is timed alone, then all of them as a session has them.

use std::io::Write as _;
use std::time::{Duration, Instant};

use drover_cache::NarSpool;
use drover_nix::hash::Sha256Hasher;
use drover_nix::references::RefScanner;
use drover_nix::{Sha256, StoreDir, StorePath};

const SIZE: usize = 1 << 30;
/// As they come off a connection.
const PIECE: usize = 64 << 10;
/// Paths that an output may refer to.
const CANDIDATES: u32 = 2000;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut sample = Vec::new();
    for file in std::env::args_os().skip(1) {
        sample.extend(std::fs::read(file)?);
    }
    if sample.is_empty() {
        return Err("name files to make the data of".into());
    }
    let data: Vec<u8> = sample.into_iter().cycle().take(SIZE).collect();
    let candidates: Vec<StorePath> = (0..CANDIDATES)
        .map(|number| StoreDir::default().make_path("test", Sha256::of(&number.to_le_bytes()), "x"))
        .collect::<Result<_, _>>()?;
    let rate = |name: &str, time: Duration| {
        let (seconds, mib) = (time.as_secs_f64(), (SIZE >> 20) as f64);
        println!("{name:<28} {seconds:>6.2} s {:>6.0} MiB/s", mib / seconds);
    };

    let begun = Instant::now();
    let mut hash = Sha256Hasher::new();
    data.chunks(PIECE).for_each(|piece| hash.update(piece));
    hash.finish();
    rate("SHA-256", begun.elapsed());

    let begun = Instant::now();
    let mut scanner = RefScanner::new(candidates.iter().cloned());
    data.chunks(PIECE).for_each(|piece| scanner.feed(piece));
    scanner.found();
    rate("references", begun.elapsed());

    let begun = Instant::now();
    let mut encoder = zstd::stream::write::Encoder::new(std::io::sink(), zstd::DEFAULT_COMPRESSION_LEVEL)?;
    for piece in data.chunks(PIECE) {
        encoder.write_all(piece)?;
    }
    encoder.finish()?;
    rate("zstd on one thread", begun.elapsed());

    for round in 1..=3 {
        let dir = tempfile::tempdir()?;
        let begun = Instant::now();
        let mut spool = NarSpool::new(dir.path(), candidates.iter().cloned())?;
        for piece in data.chunks(PIECE) {
            spool.write_all(piece)?;
        }
        let spooled = spool.finish()?;
        rate(&format!("all, as in a session ({round})"), begun.elapsed());
        println!("{:<28} {:>6.1} % of its size", "", 100.0 * spooled.file_size as f64 / SIZE as f64);
    }
    Ok(())
}
