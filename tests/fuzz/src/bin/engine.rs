//! libFuzzer around one target, named by the variable DROVER_FUZZ_TARGET; without it, a list of the targets. Started by
//! `cargo xtask fuzz`.
#![no_main]

use std::path::Path;
use std::sync::OnceLock;

use drover_fuzz::{Counting, TARGETS, Target};

#[global_allocator]
static MEMORY: Counting = Counting;

static TARGET: OnceLock<&'static Target> = OnceLock::new();

fn target() -> &'static Target {
    TARGET.get_or_init(|| {
        let name = std::env::var("DROVER_FUZZ_TARGET").unwrap_or_default();
        Target::find(&name).unwrap_or_else(|| panic!("DROVER_FUZZ_TARGET={name:?} names no target"))
    })
}

/// Writes the seeds into the directory DROVER_FUZZ_SEEDS, before libFuzzer reads it.
fn prepare() {
    if std::env::var_os("DROVER_FUZZ_TARGET").is_none() {
        TARGETS.iter().for_each(|target| println!("{}", target.name));
        std::process::exit(0);
    }
    let Some(dir) = std::env::var_os("DROVER_FUZZ_SEEDS") else { return };
    let recordings = std::env::var_os("DROVER_FUZZ_RECORDINGS");
    let seeds = target().all_seeds(recordings.as_deref().map(Path::new));
    for (number, seed) in seeds.unwrap_or_else(|error| panic!("no seeds: {error}")).iter().enumerate() {
        let file = Path::new(&dir).join(format!("seed-{number:03}"));
        std::fs::write(&file, seed).unwrap_or_else(|error| panic!("cannot write {file:?}: {error}"));
    }
}

libfuzzer_sys::fuzz_target!(init: prepare(), |data: &[u8]| target().run(data));
