//! Sessions of one listening program that ask for the same build: one builds, all see its log and get its end; and clients
//! that go and come back ([`linger`]). Spoken to by OpenSSH's client; without it these tests fail:
//! `apt-get install openssh-client`.

#![allow(clippy::unwrap_used)] // all of it is tests

#[path = "../common/mod.rs"]
mod common;
mod linger;
mod server;

use common::{add, derivation, set, tools};
use drover_nix::{BasicDerivation, DerivationOutput, HashAlgo, Method, OutputName, Sha256, StorePath};
use drover_serve::{BuildOptions, BuildStatus};
use server::{Server, eventually, held, processes};

#[test]
fn two_sessions_share_a_build_and_its_log() {
    let server = Server::start(&[]);
    let (mut first, mut second) = (server.session(), server.session());
    let tools = add(first.client.as_mut().unwrap(), "tools", tools().path());
    let drv = held(&tools, "shared");
    let none = BuildOptions::default();
    let built = first.build(&drv, &none);
    first.says("first\n");
    let joined = second.build(&drv, &none);
    // From the beginning, which was before it came.
    second.says("another session builds");
    second.says("first\n");
    // The shell is two for a moment, whenever it starts a program.
    eventually("one build", || processes(&drv) == 1);
    server.let_go();
    let (built, joined) = (built.join().unwrap().unwrap(), joined.join().unwrap().unwrap());
    assert_eq!((built.status, joined.status), (BuildStatus::Built, BuildStatus::AlreadyValid));
    assert_eq!(built.built_outputs, joined.built_outputs);
    assert_eq!((joined.times_built, joined.start_time, joined.stop_time), (0, 0, 0));
    first.says("last\n");
    second.says("last\n");
    // The pod's log has it once.
    let log = String::from_utf8_lossy(&server.log.lock().unwrap()).into_owned();
    assert_eq!(log.matches("last\n").count(), 1, "{log}");
}

#[test]
fn a_failure_is_shared_too_and_other_limits_are_not() {
    let server = Server::start(&[]);
    let (mut first, mut second, mut third) = (server.session(), server.session(), server.session());
    let tools = add(first.client.as_mut().unwrap(), "tools", tools().path());
    let drv = derivation(&tools, "echo first; while [ ! -e go ]; do sleep 0.05; done; exit 7");
    let none = BuildOptions::default();
    let limited = BuildOptions { timeout_seconds: 1, ..BuildOptions::default() };
    let built = first.build(&drv, &none);
    first.says("first\n");
    let joined = second.build(&drv, &none);
    second.says("first\n");
    let apart = third.build(&drv, &limited);
    third.says("waiting for another build");
    server.let_go();
    for answer in [built, joined] {
        let result = answer.join().unwrap().unwrap();
        assert_eq!(result.status, BuildStatus::PermanentFailure);
        assert!(result.error_message.contains("exit code 7"), "{}", result.error_message);
    }
    // It builds for itself, with its own limit.
    assert_eq!(apart.join().unwrap().unwrap().status, BuildStatus::TimedOut);
}

#[test]
fn a_build_goes_on_for_who_joined_it() {
    let server = Server::start(&[]);
    let (mut first, mut second) = (server.session(), server.session());
    let tools = add(first.client.as_mut().unwrap(), "tools", tools().path());
    let drv = held(&tools, "joined");
    let none = BuildOptions::default();
    let built = first.build(&drv, &none);
    first.says("first\n");
    let joined = second.build(&drv, &none);
    second.says("first\n");
    first.kill();
    assert!(built.join().unwrap().is_none());
    // The shell is two for a moment, whenever it starts a program.
    eventually("one build", || processes(&drv) == 1);
    server.let_go();
    assert_eq!(joined.join().unwrap().unwrap().status, BuildStatus::AlreadyValid);
    second.says("last\n");
    // And it ends when the last one leaves.
    let drv = held(&tools, "left");
    let (mut first, mut second) = (server.session(), server.session());
    let built = first.build(&drv, &none);
    first.says("first\n");
    let joined = second.build(&drv, &none);
    second.says("first\n");
    first.kill();
    second.kill();
    assert!(built.join().unwrap().is_none() && joined.join().unwrap().is_none());
    eventually("the build ends", || processes(&drv) == 0);
}

/// As [`held`], with an output whose path follows from its content: another one with each build.
fn held_unknown(tools: &StorePath, name: &str, output: DerivationOutput) -> BasicDerivation {
    let mut drv = held(tools, name);
    let script = drv.args[1].to_string();
    drv.args[1] = script.replace("touch $out", "cat /proc/sys/kernel/random/uuid > $out").into();
    drv.outputs = [(OutputName::out(), output)].into();
    let placeholder = Sha256::of(b"nix-output:out").to_nix32();
    set(&mut drv, "out", &format!("/{placeholder}"));
    drv
}

#[test]
fn what_is_not_known_before_is_shared_by_its_derivation() {
    let server = Server::start(&["--linger", "1000"]);
    let (mut first, mut second) = (server.session(), server.session());
    let tools = add(first.client.as_mut().unwrap(), "tools", tools().path());
    let floating = DerivationOutput::CaFloating { method: Method::Nar, algo: HashAlgo::Sha256 };
    let drv = held_unknown(&tools, "floating", floating);
    let none = BuildOptions::default();
    let built = first.build(&drv, &none);
    first.says("first\n");
    let joined = second.build(&drv, &none);
    second.says("another session builds");
    first.kill();
    assert!(built.join().unwrap().is_none());
    server.let_go();
    let joined = joined.join().unwrap().unwrap();
    assert_eq!(joined.status, BuildStatus::AlreadyValid);
    // Remembered when nobody of those is there any more.
    let again = server.session().build(&drv, &none).join().unwrap().unwrap();
    assert_eq!(again.status, BuildStatus::AlreadyValid);
    assert!(again.built_outputs.len() == 1 && again.built_outputs == joined.built_outputs);
}

#[test]
fn what_is_impure_is_shared_with_nobody() {
    let server = Server::start(&[]);
    let (mut first, mut second) = (server.session(), server.session());
    let tools = add(first.client.as_mut().unwrap(), "tools", tools().path());
    let impure = DerivationOutput::Impure { method: Method::Nar, algo: HashAlgo::Sha256 };
    let drv = held_unknown(&tools, "impure", impure);
    let none = BuildOptions::default();
    let one = first.build(&drv, &none);
    first.says("first\n");
    let other = second.build(&drv, &none);
    second.says("waiting for another build");
    server.let_go();
    let one = one.join().unwrap().unwrap();
    second.says("first\n");
    server.let_go();
    let other = other.join().unwrap().unwrap();
    assert_eq!((one.status, other.status), (BuildStatus::Built, BuildStatus::Built));
    assert_ne!(one.built_outputs, other.built_outputs);
}
