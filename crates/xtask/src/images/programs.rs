//! The static programs that the images hold, compiled so that the checkout's path leaves no trace in them; on another
//! platform's account by a cross compiler.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::parts::host;
use crate::platform::Platform;
use crate::run;

/// The packages whose programs are made, and the programs.
pub(super) const NAMES: [&str; 2] = ["drover-builder", "drover-operator"];

/// What they can do that cargo does not build unasked.
pub(super) const FEATURES: &str = "drover-operator/otel";

/// Compiles `drover-builder` and `drover-operator` and returns the directory that holds them.
///
/// The target directory is their own: other flags than those of development would make cargo compile everything twice.
pub(super) fn compile(platform: Platform) -> Result<PathBuf> {
    let compiler = compiler(platform)?;
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
    let target = platform.target();
    cargo.args(["build", "--release", "--target", target, "--target-dir"]).arg(&target_dir);
    cargo.args(NAMES.iter().flat_map(|name| ["-p", name])).args(["--features", FEATURES]);
    // Separated by 0x1f: a path may hold a space. It goes before RUSTFLAGS, whatever that says.
    cargo.env("CARGO_ENCODED_RUSTFLAGS", rustflags.join("\x1f")).env_remove("RUSTFLAGS");
    let word = target.replace('-', "_");
    cargo.env(format!("CFLAGS_{word}"), cflags);
    if platform != Platform::native()? {
        cargo.env(format!("CARGO_TARGET_{}_LINKER", word.to_uppercase()), compiler);
    }
    run::run(&mut cargo)?;
    let programs = target_dir.join(target).join("release");
    for name in NAMES {
        check(&programs.join(name), platform)?;
    }
    Ok(programs)
}

/// The C compiler for a platform, installed where it is missing, with Rust's own library for it.
pub(super) fn compiler(platform: Platform) -> Result<String> {
    let native = Platform::native()?;
    let (compiler, packages) = platform.compiler(native);
    if platform == native {
        return Ok(compiler);
    }
    let static_libc = Path::new("/usr").join(platform.triplet()).join("lib/libc.a");
    if host::find(&compiler).is_none() || !static_libc.is_file() {
        let packages: Vec<_> = packages.iter().map(String::as_str).collect();
        host::install(&packages).with_context(|| {
            format!("programs for {platform} take these packages: {}", packages.join(" "))
        })?;
    }
    let mut rustc = std::process::Command::new("rustc");
    let library = run::stdout(rustc.args(["--print", "target-libdir", "--target", platform.target()]))?;
    if !Path::new(library.trim()).is_dir() {
        run::run(std::process::Command::new("rustup").args(["target", "add", platform.target()]))
            .with_context(|| {
                format!("programs for {platform} take Rust's library for {}", platform.target())
            })?;
    }
    Ok(compiler)
}

/// A program that asks for a loader would not start in an image that has none; nor would another machine's.
fn check(program: &Path, platform: Platform) -> Result<()> {
    let bytes = std::fs::read(program).with_context(|| format!("could not read {}", program.display()))?;
    ensure!(!has_interpreter(&bytes), "{} is not static", program.display());
    let machine = field(&bytes, 18, 2);
    ensure!(machine == Some(platform.machine().into()), "{} is not for {platform}", program.display());
    Ok(())
}

/// Whether an ELF file has a PT_INTERP program header (System V ABI, chapter 5).
fn has_interpreter(elf: &[u8]) -> bool {
    // e_phoff, e_phentsize and e_phnum of a 64-bit file.
    let (Some(table), Some(size), Some(count)) = (field(elf, 32, 8), field(elf, 54, 2), field(elf, 56, 2))
    else {
        return false;
    };
    (0..count).any(|index| field(elf, table + index * size, 4) == Some(3))
}

/// A little-endian number.
fn field(elf: &[u8], at: usize, size: usize) -> Option<usize> {
    let bytes = elf.get(at..at + size)?;
    Some(bytes.iter().rev().fold(0usize, |value, byte| value << 8 | usize::from(*byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_program_asks_for_a_loader() {
        let program = std::env::current_exe().unwrap();
        let error = check(&program, Platform::native().unwrap()).unwrap_err().to_string();
        assert!(error.ends_with(" is not static"), "{error}");
        assert!(!has_interpreter(b"\x7fELF"));
    }

    #[test]
    fn a_program_of_another_machine_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("program");
        let mut elf = vec![0; 64];
        elf[18] = 183;
        std::fs::write(&program, elf).unwrap();
        check(&program, Platform::Arm64).unwrap();
        let error = check(&program, Platform::Amd64).unwrap_err().to_string();
        assert!(error.ends_with(" is not for linux/amd64"), "{error}");
    }
}
