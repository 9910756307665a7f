//! The workspace's programs as they are for development.
//!
//! All packages are asked for at once, with what only tests and examples need: dependencies then have the same features for
//! tests, programs and examples, and are compiled once. For one package alone they would have fewer, and be compiled anew.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::run;

/// Compiles every program and example, and returns the directory of the programs; examples are in `examples` below it.
pub fn compile() -> Result<PathBuf> {
    run::run(run::cargo().args(["build", "--quiet", "--workspace", "--bins", "--examples"]))?;
    let this = std::env::current_exe()?;
    // A test is target/debug/deps/TEST-HASH, any other program target/debug/PROGRAM.
    let dir = this.parent().context("a program lies in a directory")?;
    Ok(if dir.ends_with("deps") { dir.parent().unwrap_or(dir) } else { dir }.to_owned())
}
