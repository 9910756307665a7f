//! Several sessions that want the same output of one store: it is built once, and everybody gets it.

use std::time::Instant;

use anyhow::{Result, ensure};
use drover_nix::OutputName;
use drover_serve::{BuildOptions, BuildResult, BuildStatus};

use super::builds_fixture::{A_SECOND, Answer, Drv, Reader, Session, Store, hold};

fn answer(answer: Answer) -> Result<BuildResult> {
    Ok(answer.join().expect("the client does not panic")?)
}

/// The second of two sessions has to find what the first one built.
fn expect_already_valid(result: &BuildResult, drv: &Drv) -> Result<()> {
    ensure!(result.status == BuildStatus::AlreadyValid, "{result:?}");
    let output = result.built_outputs.get(&OutputName::out());
    // Real Nix lists the outputs of this derivation, of which it never saw the .drv file, in some versions only.
    ensure!(output.is_none_or(|output| output.path == drv.out()), "{result:?}");
    Ok(())
}

#[test]
fn two_processes_build_once() -> Result<()> {
    let store = Store::new()?;
    let drv = Drv::new("twice", &format!("{}; echo once; echo made > $out", hold()))?;
    let mut first = Session::start(store.drover(&[])?, Reader::Follows)?;
    let mut second = Session::start(store.drover(&[])?, Reader::Follows)?;
    let built = first.build(&drv, &BuildOptions::default())?;
    drv.runs()?;
    let waiting = second.build(&drv, &BuildOptions::default())?;
    second.says("waiting for another build")?;
    ensure!(drv.processes() == 1);
    store.let_go()?;
    let (built, waited) = (answer(built)?, answer(waiting)?);
    ensure!(built.status == BuildStatus::Built && built.times_built == 1, "{built:?}");
    expect_already_valid(&waited, &drv)?;
    ensure!(waited.built_outputs == built.built_outputs && waited.built_outputs.len() == 1);
    ensure!((waited.times_built, waited.start_time, waited.stop_time) == (0, 0, 0), "{waited:?}");
    let logs = first.end(true)? + &second.end(true)?;
    ensure!(logs.matches("once").count() == 1, "{logs}");
    store.expect_clean()
}

#[test]
fn who_waits_builds_when_the_first_one_fails() -> Result<()> {
    let store = Store::new()?;
    let drv = Drv::new("fails", &format!("{}; exit 1", hold()))?;
    let mut first = Session::start(store.drover(&[])?, Reader::Follows)?;
    let mut second = Session::start(store.drover(&[])?, Reader::Follows)?;
    let built = first.build(&drv, &BuildOptions::default())?;
    drv.runs()?;
    let waiting = second.build(&drv, &BuildOptions::default())?;
    second.says("waiting for another build")?;
    // The end of the first one's client is the end of its build, and the second one's turn.
    first.end(false)?;
    ensure!(built.join().expect("the client does not panic").is_err());
    second.says("holding")?;
    store.let_go()?;
    ensure!(answer(waiting)?.status == BuildStatus::PermanentFailure);
    second.end(true)?;
    store.expect_clean()
}

#[test]
fn who_waits_for_another_process_goes_with_its_client() -> Result<()> {
    let store = Store::new()?;
    let drv = Drv::new("impatient", &format!("{}; echo made > $out", hold()))?;
    let mut first = Session::start(store.drover(&[])?, Reader::Follows)?;
    // Even one that may linger: it has nothing to lose yet.
    let mut second = Session::start(store.drover(&["--linger", "1000"])?, Reader::Follows)?;
    let built = first.build(&drv, &BuildOptions::default())?;
    drv.runs()?;
    let waiting = second.build(&drv, &BuildOptions::default())?;
    second.says("waiting for another build")?;
    second.end(false)?;
    ensure!(waiting.join().expect("the client does not panic").is_err());
    ensure!(drv.processes() == 1, "the first one's build is not the second one's business");
    store.let_go()?;
    ensure!(answer(built)?.status == BuildStatus::Built);
    first.end(true)?;
    store.expect_clean()
}

#[test]
fn real_nix_waits_for_ours() -> Result<()> {
    let store = Store::new()?;
    let drv = Drv::new("ours", &format!("{}; echo made > $out", hold()))?;
    let mut ours = Session::start(store.drover(&[])?, Reader::Follows)?;
    let built = ours.build(&drv, &BuildOptions::default())?;
    drv.runs()?;
    let mut theirs = Session::start(nix(&store)?, Reader::Follows)?;
    let waiting = theirs.build(&drv, &BuildOptions::default())?;
    // Nix says nothing of it: that it has the derivation's temporary roots means that it is on its way to the lock.
    super::builds_fixture::eventually("Nix wants the output", || {
        let roots = std::fs::read_dir(store.path("nix/var/nix/temproots")).into_iter().flatten();
        let texts = roots.filter_map(|entry| std::fs::read_to_string(entry.ok()?.path()).ok());
        texts.filter(|text| text.contains(drv.out().as_str())).count() == 2
    })?;
    store.let_go()?;
    ensure!(answer(built)?.status == BuildStatus::Built);
    expect_already_valid(&answer(waiting)?, &drv)?;
    ensure!(!theirs.log().contains("holding"), "it was built twice");
    ours.end(true)?;
    drop(theirs.client.take());
    theirs.input.close();
    ensure!(theirs.wait()?.0.success());
    store.expect_clean()
}

#[test]
fn ours_waits_for_real_nix() -> Result<()> {
    let store = Store::new()?;
    let drv = Drv::new("theirs", &format!("{}; echo made > $out", hold()))?;
    let mut theirs = Session::start(nix(&store)?, Reader::Follows)?;
    let built = theirs.build(&drv, &BuildOptions::default())?;
    drv.runs()?;
    let mut ours = Session::start(store.drover(&[])?, Reader::Follows)?;
    let waiting = ours.build(&drv, &BuildOptions::default())?;
    ours.says("waiting for another build")?;
    store.let_go()?;
    let built = answer(built)?;
    let begin = Instant::now();
    let waited = answer(waiting)?;
    ensure!(
        begin.elapsed() <= A_SECOND,
        "a lock that is free is noticed at once, not by asking now and then"
    );
    ensure!(built.status == BuildStatus::Built, "{built:?}");
    expect_already_valid(&waited, &drv)?;
    ensure!(waited.built_outputs.len() == 1);
    drop(theirs.client.take());
    theirs.input.close();
    ensure!(theirs.wait()?.0.success());
    ours.end(true)?;
    store.expect_clean()
}

/// A real `nix-store --serve --write` on the store, which asks for locks every second.
fn nix(store: &Store) -> Result<std::process::Command> {
    let mut command = store.nix()?.command("nix-store")?;
    command.args(["--serve", "--write", "--option", "build-poll-interval", "1"]);
    Ok(command)
}
