//! Drover's own programs, compiled from this checkout: as they are for development, and as images.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow};
use xtask::images::{self, Image};
use xtask::platform::Platform;
use xtask::{checkout, development, run};

/// The path of `drover`, `drover-builder` or `drover-operator`, compiled with the development profile.
pub fn program(name: &str) -> Result<PathBuf> {
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    // Cargo holds no lock while tests run, so asking it is safe; where nothing changed it takes a blink.
    let build = || development::compile().map_err(|error| format!("{error:#}"));
    let dir = BUILT.get_or_init(build).as_ref().map_err(|error| anyhow!("{error}"))?;
    let path = dir.join(name);
    path.is_file().then_some(path).with_context(|| format!("cargo build made no {name} in {}", dir.display()))
}

/// Copies a program that is to be run. Another process copies: a descriptor that this one has open for writing would be in
/// every child that a neighbouring test starts meanwhile, and until they exec the copy would be "busy" to whoever runs it.
pub fn copy_program(from: &Path, to: &Path) -> Result<()> {
    run::run(Command::new("cp").arg(from).arg(to))
}

/// The images of the builder and of the operator, made once for all tests of a program.
pub fn images() -> Result<&'static [Image; 2]> {
    static MADE: OnceLock<Result<[Image; 2], String>> = OnceLock::new();
    let make = || {
        let platforms = [Platform::native().map_err(|error| format!("{error:#}"))?];
        images::make(&checkout().join("target/images"), &platforms).map_err(|error| format!("{error:#}"))
    };
    MADE.get_or_init(make).as_ref().map_err(|error| anyhow!("{error}"))
}
