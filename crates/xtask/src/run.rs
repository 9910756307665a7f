//! Running programs: what was run, how it ended and what it said, in one error.
//!
//! Owns no state. Everything that this crate starts goes through here or through a handle that ends it on drop.

use std::ffi::OsStr;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Lines of standard error that an error message repeats.
const STDERR_LINES: usize = 40;

/// Runs `command` with its output shown as it comes; an exit code other than 0 is an error.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("could not start {}", describe(command)))?;
    if !status.success() {
        bail!("{} ended with {status}", describe(command));
    }
    Ok(())
}

/// Runs `command` and returns what it wrote, whatever its exit code.
pub fn output(command: &mut Command) -> Result<Output> {
    command.stdin(Stdio::null()).output().with_context(|| format!("could not start {}", describe(command)))
}

/// Runs `command` and returns its standard output; an exit code other than 0 is an error that ends with its standard error.
pub fn stdout(command: &mut Command) -> Result<String> {
    let out = output(command)?;
    if !out.status.success() {
        bail!("{} ended with {}:\n{}", describe(command), out.status, tail(&out.stderr));
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// Runs `command` with `input` on its standard input and returns its standard output.
pub fn filter(command: &mut Command, input: &[u8]) -> Result<String> {
    use std::io::Write;
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("could not start {}", describe(command)))?;
    let mut stdin = child.stdin.take().context("the child has no standard input")?;
    // A thread writes while this one reads: neither side can fill a pipe and wait for the other.
    let out = std::thread::scope(|scope| {
        let writer = scope.spawn(move || stdin.write_all(input));
        let out = child.wait_with_output();
        // A program that ends without reading everything says why by its exit code, not by EPIPE here.
        drop(writer.join());
        out
    })?;
    if !out.status.success() {
        bail!("{} ended with {}:\n{}", describe(command), out.status, tail(&out.stderr));
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// The cargo that started this program, in the checkout, as a person would run it there.
pub fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(crate::checkout());
    // What cargo told this program about its own package would make build scripts believe that something changed.
    for (name, _) in std::env::vars_os() {
        let told = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_", "CARGO_PRIMARY_"];
        if told.iter().any(|prefix| name.as_encoded_bytes().starts_with(prefix.as_bytes())) {
            cargo.env_remove(name);
        }
    }
    // What it starts can be found again when its time is over.
    cargo.env(crate::limit::MARK, crate::limit::mark());
    cargo
}

/// Calls `ready` until it says yes; the error after `limit` says what was awaited.
pub fn wait_for(what: &str, limit: Duration, mut ready: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !ready()? {
        if start.elapsed() > limit {
            bail!("waited {} s for {what}", limit.as_secs());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// The command line, as a person would type it.
pub fn describe(command: &Command) -> String {
    let quote = |s: &OsStr| {
        let s = s.to_string_lossy();
        let long = s.len() > 200 || s.contains('\n');
        if long { "'…'".to_owned() } else { s.into_owned() }
    };
    std::iter::once(command.get_program()).chain(command.get_args()).map(quote).collect::<Vec<_>>().join(" ")
}

fn tail(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(STDERR_LINES)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_the_command_and_repeats_what_it_said() {
        let error = stdout(Command::new("sh").args(["-c", "echo no such thing >&2; exit 3"]))
            .unwrap_err()
            .to_string();
        assert!(error.starts_with("sh -c"), "{error}");
        assert!(error.contains("exit status: 3") && error.ends_with("no such thing"), "{error}");
    }

    #[test]
    fn a_filter_may_be_larger_than_a_pipe() {
        let input = vec![b'x'; 1 << 20];
        assert_eq!(filter(&mut Command::new("cat"), &input).unwrap().len(), input.len());
    }

    #[test]
    fn waiting_ends_with_what_was_awaited() {
        let error = wait_for("Godot", Duration::ZERO, || Ok(false)).unwrap_err();
        assert_eq!(error.to_string(), "waited 0 s for Godot");
    }
}
