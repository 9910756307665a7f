//! The end of a session at every stage of a build: nothing is left of what was not finished, neither processes nor
//! files, and a build that may linger finishes without its client.

use std::io::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use drover_serve::{BuildOptions, BuildStatus};

use super::builds_fixture::{A_SECOND, Drv, Reader, Session, Store, add_tools, eventually, hold};

fn none() -> BuildOptions {
    BuildOptions::default()
}

#[test]
fn an_idle_session_ends_at_once() -> Result<()> {
    let store = Store::new()?;
    for options in [&[][..], &["--linger", "1000"]] {
        Session::start(store.drover(options)?, Reader::Follows)?.end(true)?;
        let drv = Drv::new(&format!("done{}", options.len()), "echo made > $out")?;
        let mut session = Session::start(store.drover(options)?, Reader::Follows)?;
        let result = session.build(&drv, &none())?.join().expect("the client does not panic")?;
        ensure!(result.status == BuildStatus::Built, "{result:?}");
        session.end(true)?;
    }
    store.expect_clean()
}

#[test]
fn who_has_asked_everything_may_close_and_still_read() -> Result<()> {
    /// Questions, answered together at the end: as many as fit a pipe, so that the hang-up is noticed long before.
    const COUNT: usize = 2000;
    let store = Store::new()?;
    let words = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    for options in [&[][..], &["--linger", "1000"]] {
        // All of it has been said, and the other end is closed, before the server starts.
        let (input, mut client) = std::io::pipe()?;
        client.write_all(&words(&[0x390c_9deb, 0x207]))?;
        client.write_all(&words(&[1, 1, 0, 0].repeat(COUNT)))?;
        drop(client);
        let output = store.drover(options)?.stdin(input).output()?;
        ensure!(output.status.success(), "{output:?}");
        let expected = [words(&[0x5452_eecb, 0x207]), words(&[0; COUNT])].concat();
        ensure!(output.stdout == expected, "{options:?}: {} bytes are answered", output.stdout.len());
    }
    store.expect_clean()
}

#[test]
fn the_end_of_input_is_the_end_of_the_build() -> Result<()> {
    let store = Store::new()?;
    // Processes that have left the builder's group and session end as well.
    let script = format!("mkdir $out; echo half > $out/file; {{ {}; }} & {}", hold(), hold());
    let drv = Drv::new("ended", &script)?;
    let mut session = Session::start(store.drover(&[])?, Reader::Follows)?;
    let answer = session.build(&drv, &none())?;
    eventually("both processes run", || drv.processes() >= 2)?;
    session.end(false)?;
    drv.is_gone()?;
    ensure!(answer.join().expect("the client does not panic").is_err());
    store.expect_clean()
}

#[test]
fn a_disconnect_at_any_time_leaves_all_or_nothing() -> Result<()> {
    /// How many builds have to be done before their disconnect to have seen all of one, and the most that are tried.
    const DONE: u32 = 3;
    const MOST: u32 = 500;
    let store = Store::new()?;
    let script = "mkdir $out; i=0; while [ $i != 100 ]; do echo $i $out > $out/$i; i=$((i + 1)); done";
    let (mut done, mut gone, mut point) = (0, 0, 0);
    while done < DONE {
        point += 1;
        ensure!(point < MOST, "{gone} builds were cut, {done} were not");
        let drv = Drv::new(&format!("point{point}"), script)?;
        let mut session = Session::start(store.drover(&[])?, Reader::Follows)?;
        let answer = session.build(&drv, &none())?;
        // Later every time.
        let started = Instant::now();
        while started.elapsed() < Duration::from_millis(3) * point {
            std::thread::yield_now();
        }
        session.input.close();
        let (_, took) = session.wait()?;
        ensure!(took <= A_SECOND, "point {point}: {took:?}");
        drv.is_gone()?;
        let answered = answer.join().expect("the client does not panic").is_ok();
        let valid = store.open()?.is_valid(&drv.out())?;
        ensure!(valid || !answered, "point {point}: an answer and no output");
        *(if valid { &mut done } else { &mut gone }) += 1;
    }
    ensure!(gone > 0, "no build was cut");
    store.expect_clean()
}

#[test]
fn a_disconnect_while_outputs_are_hashed() -> Result<()> {
    let store = Store::new()?;
    let mut session = Session::start(store.drover(&[])?, Reader::Follows)?;
    let tools = add_tools(&mut session, &["dd"])?;
    let drv = Drv::new("large", "dd if=/dev/zero of=$out bs=1M count=1024 2>&1; echo written")?;
    let drv = drv.with_tools(&tools);
    let answer = session.build(&drv, &none())?;
    session.says("written")?;
    eventually("the builder is done", || drv.processes() == 0)?;
    // A gigabyte is not hashed yet.
    session.end(false)?;
    ensure!(answer.join().expect("the client does not panic").is_err());
    ensure!(!store.open()?.is_valid(&drv.out())?);
    store.expect_clean()
}

#[test]
fn a_disconnect_while_outputs_are_registered() -> Result<()> {
    let store = Store::new()?;
    let drv = Drv::new("registered", "echo made > $out; echo written")?;
    let mut session = Session::start(store.drover(&[])?, Reader::Follows)?;
    // Whoever writes to the database holds up all others: here, until the client is gone.
    let mut database = rusqlite::Connection::open(store.path("nix/var/nix/db/db.sqlite"))?;
    let writing = database.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
    let answer = session.build(&drv, &none())?;
    eventually("the output is in place", || {
        drv.processes() == 0 && store.path("nix/store").join(drv.out().as_str()).exists()
    })?;
    session.input.close();
    writing.rollback()?;
    let (status, took) = session.wait()?;
    ensure!(!status.success() && took <= A_SECOND, "{status}, {took:?}: {}", session.log());
    ensure!(answer.join().expect("the client does not panic").is_err());
    // Too late to stop: it is valid, and nothing is left beside it.
    ensure!(store.open()?.is_valid(&drv.out())?);
    store.expect_clean()
}

#[test]
fn a_build_may_linger_for_whoever_comes_next() -> Result<()> {
    let store = Store::new()?;
    let drv = Drv::new("lingers", &format!("{}; echo once; echo made > $out", hold()))?;
    let mut first = Session::start(store.drover(&["--linger", "1000"])?, Reader::Follows)?;
    let answer = first.build(&drv, &none())?;
    drv.runs()?;
    first.input.close();
    // The client is let go, or an SSH connection would stay for as long as the build.
    ensure!(answer.join().expect("the client does not panic").is_err());
    ensure!(first.is_running()? && drv.processes() == 1);
    let mut second = Session::start(store.drover(&[])?, Reader::Follows)?;
    let waiting = second.build(&drv, &none())?;
    second.says("waiting for another build")?;
    store.let_go()?;
    let result = waiting.join().expect("the client does not panic")?;
    ensure!(result.status == BuildStatus::AlreadyValid && result.built_outputs.len() == 1, "{result:?}");
    let (status, took) = first.wait()?;
    ensure!(!status.success() && took <= A_SECOND, "nobody got its answer: {status}, {took:?}");
    ensure!(!second.end(true)?.contains("once"), "it was built twice");
    store.expect_clean()
}

#[test]
fn a_build_lingers_no_longer_than_it_may() -> Result<()> {
    let store = Store::new()?;
    let drv = Drv::new("expires", &format!("{}; echo made > $out", hold()))?;
    let mut session = Session::start(store.drover(&["--linger", "2"])?, Reader::Follows)?;
    let answer = session.build(&drv, &none())?;
    drv.runs()?;
    let begin = Instant::now();
    session.input.close();
    let (status, _) = session.wait()?;
    let took = begin.elapsed();
    ensure!(!status.success(), "{status}");
    ensure!(took >= Duration::from_secs(2) && took <= Duration::from_secs(2) + A_SECOND, "{took:?}");
    ensure!(answer.join().expect("the client does not panic").is_err());
    drv.is_gone()?;
    store.expect_clean()
}

#[test]
fn a_killed_server_leaves_no_process_and_nothing_that_stops_the_next() -> Result<()> {
    let store = Store::new()?;
    let drv = Drv::new("killed", &format!("{}; echo made > $out", hold()))?;
    let mut session = Session::start(store.drover(&[])?, Reader::Follows)?;
    let answer = session.build(&drv, &none())?;
    drv.runs()?;
    drop(session);
    ensure!(answer.join().expect("the client does not panic").is_err());
    eventually("the build is gone", || drv.processes() == 0)?;
    let mut next = Session::start(store.drover(&[])?, Reader::Follows)?;
    let answer = next.build(&drv, &none())?;
    next.says("holding")?;
    store.let_go()?;
    let result = answer.join().expect("the client does not panic")?;
    ensure!(result.status == BuildStatus::Built, "{result:?}");
    next.end(true)?;
    let store = store.open()?;
    store.path_info(&drv.out())?.context("it was built")?;
    Ok(())
}
