//! Records sessions of real Nix clients with the builder into a directory: what `cargo xtask fuzz` starts from.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use drover_tests::record;

fn main() -> Result<()> {
    let into = PathBuf::from(std::env::args_os().nth(1).context("usage: record DIRECTORY")?);
    // A client sees `/tmp` and little else.
    let dir = tempfile::tempdir()?;
    for (number, recording) in record::record(dir.path())?.iter().enumerate() {
        let name = format!("{}-{}-{number}", recording.nix.version(), recording.name);
        for (from, extension) in [(&recording.requests, "requests"), (&recording.answers, "answers")] {
            std::fs::copy(from, into.join(format!("{name}.{extension}")))?;
        }
    }
    Ok(())
}
