//! What `tests/derivations/sqlite` compiles, and with what: a compiler and a C library out of Debian's packages, and
//! SQLite's amalgamation out of the crate that ships it. Only copies files; knows nothing of Nix.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use xtask::{checkout, parts, run};

/// Three directories named `tcc`, `libc` and `sqlite`: the arguments of the expression.
pub fn inputs() -> Result<PathBuf> {
    let debian = parts::rootfs::tcc()?;
    let amalgamation = amalgamation()?;
    // A part of its own: the copy is what the store paths are computed from, so it has to be the same each time.
    let recipe = format!("2\n{}\n{}", debian.display(), amalgamation.display());
    parts::ensure("sqlite-inputs", &recipe, |dir| {
        let script = r#"
set -eu
debian=$1 amalgamation=$2 out=$3
lib=$debian/usr/lib/x86_64-linux-gnu
mkdir -p "$out/tcc/bin" "$out/tcc/lib" "$out/libc/lib" "$out/sqlite"
cp "$debian/usr/bin/tcc" "$out/tcc/bin/"
cp -rL "$lib/tcc" "$out/tcc/lib/tcc"
cp -rL "$debian/usr/include" "$out/libc/include"
cp -rL "$out/libc/include/x86_64-linux-gnu/." "$out/libc/include/"
for file in libc.so.6 libm.so.6 libmvec.so.1 libdl.so.2 libpthread.so.0 ld-linux-x86-64.so.2 crt1.o crti.o crtn.o; do
    cp -L "$lib/$file" "$out/libc/lib/"
done
ln -s libc.so.6 "$out/libc/lib/libc.so"
ln -s libm.so.6 "$out/libc/lib/libm.so"
cp "$amalgamation/sqlite3.c" "$amalgamation/sqlite3.h" "$out/sqlite/"
chmod -R u+w "$out"
"#;
        let mut copy = Command::new("sh");
        copy.args(["-c", script, "sqlite-inputs"]).args([&debian, &amalgamation, dir]);
        run::stdout(&mut copy).map(drop)
    })
}

/// Where cargo keeps the sources of `libsqlite3-sys`.
fn amalgamation() -> Result<PathBuf> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["metadata", "--format-version=1", "--locked"]).current_dir(checkout());
    let metadata: serde_json::Value = serde_json::from_str(&run::stdout(&mut cargo)?)?;
    let manifest = metadata["packages"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|package| package["name"] == "libsqlite3-sys")
        .and_then(|package| package["manifest_path"].as_str())
        .context("the workspace does not depend on libsqlite3-sys any more: the test wants its SQLite")?;
    let dir = Path::new(manifest).with_file_name("sqlite3");
    fs::metadata(dir.join("sqlite3.c")).with_context(|| format!("no amalgamation in {}", dir.display()))?;
    Ok(dir)
}
