//! The static programs that the images hold, compiled so that the checkout's path leaves no trace in them.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::run;

pub(super) const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The packages whose programs are made, and the programs.
pub(super) const NAMES: [&str; 2] = ["drover-builder", "drover-operator"];

/// Compiles `drover-builder` and `drover-operator` and returns the directory that holds them.
///
/// The target directory is their own: other flags than those of development would make cargo compile everything twice.
pub(super) fn compile() -> Result<PathBuf> {
    let checkout = crate::checkout();
    let target_dir = checkout.join("target/static");
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home =
        home.or_else(|| std::env::home_dir().map(|home| home.join(".cargo"))).context("no home directory")?;
    let prefixes = [(target_dir.as_path(), "/target"), (&checkout, "/drover"), (&home, "/cargo")];

    let mut rustflags = vec!["-C".to_owned(), "target-feature=+crt-static".to_owned()];
    rustflags.extend(prefixes.map(|(from, to)| format!("--remap-path-prefix={}={to}", from.display())));
    let cflags = prefixes.map(|(from, to)| format!("-ffile-prefix-map={}={to}", from.display())).join(" ");

    let mut cargo = run::cargo();
    cargo.args(["build", "--release", "--target", TARGET, "--target-dir"]).arg(&target_dir);
    cargo.args(NAMES.iter().flat_map(|name| ["-p", name]));
    // Separated by 0x1f: a path may hold a space. It goes before RUSTFLAGS, whatever that says.
    cargo.env("CARGO_ENCODED_RUSTFLAGS", rustflags.join("\x1f")).env_remove("RUSTFLAGS");
    cargo.env(format!("CFLAGS_{}", TARGET.replace('-', "_")), cflags);
    run::run(&mut cargo)?;
    let programs = target_dir.join(TARGET).join("release");
    for name in NAMES {
        check_static(&programs.join(name))?;
    }
    Ok(programs)
}

/// A program that asks for a loader would not start in an image that has none.
fn check_static(program: &Path) -> Result<()> {
    let bytes = std::fs::read(program).with_context(|| format!("could not read {}", program.display()))?;
    if has_interpreter(&bytes) {
        anyhow::bail!("{} is not static", program.display());
    }
    Ok(())
}

/// Whether an ELF file has a PT_INTERP program header (System V ABI, chapter 5).
fn has_interpreter(elf: &[u8]) -> bool {
    let read = |at: usize, size: usize| {
        elf.get(at..at + size)
            .map(|bytes| bytes.iter().rev().fold(0usize, |value, byte| value << 8 | usize::from(*byte)))
    };
    // e_phoff, e_phentsize and e_phnum of a 64-bit file.
    let (Some(table), Some(size), Some(count)) = (read(32, 8), read(54, 2), read(56, 2)) else {
        return false;
    };
    (0..count).any(|index| read(table + index * size, 4) == Some(3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_program_asks_for_a_loader() {
        let program = std::env::current_exe().unwrap();
        assert!(check_static(&program).is_err());
        assert!(!has_interpreter(b"\x7fELF"));
    }
}
