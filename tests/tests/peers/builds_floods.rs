//! Logs that nobody reads: the client's reader is stalled with all of the pipe full, for ever (NixOS/nix#16437). Neither
//! builds nor sessions wait for it, and every limit holds.

use std::time::Duration;

use anyhow::{Result, ensure};
use drover_serve::{BuildOptions, BuildResult, BuildStatus};

use super::builds_fixture::{Drv, Reader, Session, Store, add_tools, eventually};

/// A session whose standard error is not read, on a store with tools.
fn stalled(store: &Store, name: &str, script: &str) -> Result<(Session, Drv)> {
    let mut session = Session::start(store.drover(&[])?, Reader::Stalls)?;
    let tools = add_tools(&mut session, &["dd", "yes", "sleep"])?;
    Ok((session, Drv::new(name, script)?.with_tools(&tools)))
}

fn build(session: &mut Session, drv: &Drv, options: &BuildOptions) -> Result<BuildResult> {
    Ok(session.client()?.build_derivation(&drv.path, &drv.drv, options)?)
}

#[test]
fn a_gigabyte_that_nobody_reads() -> Result<()> {
    let store = Store::new()?;
    let script = "dd if=/dev/zero bs=1M count=1024; echo made > $out";
    let (mut session, drv) = stalled(&store, "flood", script)?;
    let result = build(&mut session, &drv, &BuildOptions::default())?;
    ensure!(result.status == BuildStatus::Built, "{result:?}");
    session.end(true)?;
    store.expect_clean()
}

#[test]
fn the_client_goes_in_the_middle_of_a_flood() -> Result<()> {
    let store = Store::new()?;
    let (mut session, drv) = stalled(&store, "cut", "yes")?;
    let answer = session.build(&drv, &BuildOptions::default())?;
    drv.runs()?;
    // The builder is held up: it runs, but has written all that there is room for.
    let written = || -> Option<u64> {
        let text = std::fs::read_to_string(format!("/proc/{}/io", drv_pid(&drv)?)).ok()?;
        text.lines().find_map(|line| line.strip_prefix("wchar: "))?.parse().ok()
    };
    let mut before = None;
    eventually("the builder is held up", || {
        std::thread::sleep(Duration::from_millis(200));
        let now = written();
        now.is_some_and(|bytes| bytes > 1 << 20) && std::mem::replace(&mut before, now) == now
    })?;
    session.end(false)?;
    drv.is_gone()?;
    ensure!(answer.join().expect("the client does not panic").is_err());
    store.expect_clean()
}

/// The process of the builder itself.
fn drv_pid(drv: &Drv) -> Option<u32> {
    let entries = std::fs::read_dir("/proc").ok()?.filter_map(Result::ok);
    entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()).find(|pid| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(&drv.marker)
    })
}

#[test]
fn the_timeout_holds_while_nobody_reads() -> Result<()> {
    let store = Store::new()?;
    let options = BuildOptions { timeout_seconds: 2, ..BuildOptions::default() };
    let (mut session, drv) = stalled(&store, "timeout", "yes")?;
    let result = build(&mut session, &drv, &options)?;
    ensure!(result.status == BuildStatus::TimedOut, "{result:?}");
    // The builder ends in time, whenever the answer comes.
    ensure!(result.stop_time - result.start_time <= 4, "{result:?}");
    session.end(true)?;
    store.expect_clean()
}

#[test]
fn the_limit_on_the_log_holds_while_nobody_reads() -> Result<()> {
    let store = Store::new()?;
    // More than is kept for a reader: what is dropped counts as well.
    let options = BuildOptions { max_log_bytes: 8 << 20, ..BuildOptions::default() };
    let (mut session, drv) = stalled(&store, "limit", "dd if=/dev/zero bs=1M")?;
    let result = build(&mut session, &drv, &options)?;
    ensure!(result.status == BuildStatus::LogLimitExceeded, "{result:?}");
    session.end(true)?;
    store.expect_clean()
}

#[test]
fn the_limit_on_silence_holds_while_nobody_reads() -> Result<()> {
    let store = Store::new()?;
    let options = BuildOptions { max_silent_seconds: 1, ..BuildOptions::default() };
    let script = "dd if=/dev/zero bs=1M count=3; sleep 1000";
    let (mut session, drv) = stalled(&store, "silence", script)?;
    let result = build(&mut session, &drv, &options)?;
    ensure!(result.status == BuildStatus::TimedOut, "{result:?}");
    ensure!(result.error_message.contains("of silence"), "{}", result.error_message);
    session.end(true)?;
    store.expect_clean()
}
