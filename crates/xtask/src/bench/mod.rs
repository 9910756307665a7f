//! Benchmarks against the programs that people use today, side by side in one run.
//!
//! [`serve`] measures the serve protocol on standard input and output, [`ssh`] through SSH ([`ssh_servers`], over a
//! distance if need be: [`delay`]). What it is made of serves other benchmarks too:
//! the data ([`data`]), a client that favours nobody ([`client`]), the servers and what they use ([`server`]), and what
//! is made of the figures ([`stats`]). Only ratios of one run mean anything: machines and their neighbours differ.

pub mod client;
pub mod data;
pub mod delay;
pub mod serve;
pub mod server;
pub mod ssh;
pub mod ssh_servers;
pub mod stats;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::run;

/// A directory that is gone afterwards, in memory unless another place was named.
pub struct Scratch {
    dir: tempfile::TempDir,
    mounted: bool,
}

impl Scratch {
    /// In `within`, or on a tmpfs of its own, which takes root.
    pub fn new(within: Option<&Path>) -> Result<Self> {
        if let Some(within) = within {
            return Ok(Self { dir: tempfile::tempdir_in(within)?, mounted: false });
        }
        let dir = tempfile::tempdir()?;
        run::run(
            Command::new("mount").args(["-t", "tmpfs", "-o", "mode=0755", "drover-bench"]).arg(dir.path()),
        )
        .context("a tmpfs for the stores takes root; name another place with --dir")?;
        Ok(Self { dir, mounted: true })
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if self.mounted {
            let _ = Command::new("umount").arg("-l").arg(self.dir.path()).status();
        } else {
            let _ = remove(self.dir.path());
        }
    }
}

/// Deletes a tree, store objects included, which their modes protect from others than root.
pub fn remove(dir: &Path) -> Result<()> {
    run::stdout(Command::new("rm").arg("-rf").arg(dir)).map(drop)
}

/// The program `drover-builder` as it is shipped, compiled if need be.
pub fn release_builder() -> Result<PathBuf> {
    run::run(run::cargo().args(["build", "--release", "--quiet", "-p", "drover-builder"]))?;
    let program = crate::checkout().join("target/release/drover-builder");
    if !program.is_file() {
        bail!("cargo made no {}: name the program with --builder", program.display());
    }
    Ok(program)
}
