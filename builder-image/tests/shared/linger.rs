//! Clients that go while their build runs, and come back for it: nothing is built twice, and nothing of it is lost.

use std::time::{Duration, Instant};

use drover_nix::{BasicDerivation, StorePath};
use drover_serve::{BuildOptions, BuildResult, BuildStatus};
use rustix::process::Signal;

use super::held_unknown;
use crate::common::{add, derivation, tools};
use crate::server::{Server, Session, eventually, held, processes, signal};

const LINGERS: [&str; 2] = ["--linger", "1000"];

/// Has a client ask for the build that `make` makes, and go when it runs.
fn leave(
    server: &Server,
    options: &BuildOptions,
    make: impl FnOnce(&StorePath) -> BasicDerivation,
) -> BasicDerivation {
    let mut session = server.session();
    let drv = make(&add(session.client.as_mut().unwrap(), "tools", tools().path()));
    let answer = session.build(&drv, options);
    session.says("first\n");
    session.kill();
    assert!(answer.join().unwrap().is_none());
    drv
}

/// Has a client ask for it again, with what it sees of the log until the end.
fn come_back(server: &Server, options: &BuildOptions, drv: &BasicDerivation) -> (BuildResult, String) {
    let mut session = server.session();
    let result = session.build(drv, options).join().unwrap().unwrap();
    (result, rest_of_log(session))
}

fn rest_of_log(mut session: Session) -> String {
    assert!(session.ssh.wait().unwrap().success());
    // The reader sees the end of what the client wrote before it ended.
    session.end_of_log()
}

/// How often a build began, by what is in the pod's log.
fn begun(server: &Server) -> usize {
    String::from_utf8_lossy(&server.log.lock().unwrap()).matches("first\n").count()
}

#[test]
fn a_lingering_build_is_found_again_with_its_log() {
    let server = Server::start(&["--linger", "1000"]);
    let mut first = server.session();
    let tools = add(first.client.as_mut().unwrap(), "tools", tools().path());
    let drv = held(&tools, "lingers");
    let none = BuildOptions::default();
    let built = first.build(&drv, &none);
    first.says("first\n");
    first.kill();
    assert!(built.join().unwrap().is_none());
    let mut second = server.session();
    let joined = second.build(&drv, &none);
    second.says("first\n");
    server.let_go();
    assert_eq!(joined.join().unwrap().unwrap().status, BuildStatus::AlreadyValid);
    eventually("the log", || second.log() == "first\nlast\n");
}

#[test]
fn what_ended_while_nobody_was_there_is_still_to_be_had() {
    let server = Server::start(&LINGERS);
    let none = BuildOptions::default();
    for (end, status, message) in [
        ("exit 7", BuildStatus::PermanentFailure, "exit code 7"),
        ("touch $out", BuildStatus::AlreadyValid, ""),
    ] {
        let begun_before = begun(&server);
        let drv = leave(&server, &none, |tools| {
            derivation(
                tools,
                &format!("echo first; while [ ! -e go ]; do sleep 0.05; done; echo last; {end}"),
            )
        });
        server.let_go();
        eventually("the build ends", || processes(&drv) == 0);
        // As often as it is asked for: an answer may be lost like the first.
        for _ in 0..2 {
            let (result, log) = come_back(&server, &none, &drv);
            assert_eq!(result.status, status);
            assert!(result.error_message.contains(message), "{}", result.error_message);
            assert_eq!(log, "first\nlast\n");
        }
        assert_eq!(begun(&server), begun_before + 1, "it is built once");
    }
}

#[test]
fn an_answer_that_was_sent_is_kept_too() {
    let server = Server::start(&LINGERS);
    let none = BuildOptions::default();
    let mut session = server.session();
    let tools = add(session.client.as_mut().unwrap(), "tools", tools().path());
    let drv = derivation(&tools, "echo first; exit 7");
    let (first, _) = (session.build(&drv, &none).join().unwrap().unwrap(), session);
    let (again, log) = come_back(&server, &none, &drv);
    assert_eq!((first.status, again.status), (BuildStatus::PermanentFailure, BuildStatus::PermanentFailure));
    assert_eq!((first.error_message, first.start_time), (again.error_message, again.start_time));
    assert_eq!((log.as_str(), begun(&server)), ("first\n", 1));
}

#[test]
fn nothing_is_kept_without_leave_to_linger() {
    let server = Server::start(&[]);
    let none = BuildOptions::default();
    let mut session = server.session();
    let tools = add(session.client.as_mut().unwrap(), "tools", tools().path());
    let drv = derivation(&tools, "echo first; exit 7");
    session.build(&drv, &none).join().unwrap().unwrap();
    come_back(&server, &none, &drv);
    eventually("it is built again", || begun(&server) == 2);
}

#[test]
fn limits_count_while_nobody_is_there() {
    let server = Server::start(&LINGERS);
    let of = |timeout_seconds, max_silent_seconds| BuildOptions {
        timeout_seconds,
        max_silent_seconds,
        ..BuildOptions::default()
    };
    for (options, message) in [(of(2, 0), "timed out after 2 seconds"), (of(0, 2), "silence")] {
        let drv = leave(&server, &options, |tools| held(tools, message));
        eventually("the build ends", || processes(&drv) == 0);
        let (result, log) = come_back(&server, &options, &drv);
        assert_eq!(result.status, BuildStatus::TimedOut);
        assert!(result.error_message.contains(message), "{}", result.error_message);
        assert_eq!(log, "first\n");
    }
    assert_eq!(begun(&server), 2);
}

#[test]
fn a_long_log_is_seen_whole_by_who_comes_back() {
    let server = Server::start(&LINGERS);
    let none = BuildOptions::default();
    // More than is kept in memory, half of it while nobody is there.
    let print = "while [ $i -lt $end ]; do echo line $i; i=$((i + 1)); done";
    let drv = leave(&server, &none, |tools| {
        derivation(
            tools,
            &format!(
                "i=0; end=30000; {print}; echo first; while [ ! -e go ]; do sleep 0.05; done; end=60000; {print}; \
                 touch $out"
            ),
        )
    });
    server.let_go();
    let (result, log) = come_back(&server, &none, &drv);
    assert_eq!(result.status, BuildStatus::AlreadyValid);
    let lines = |from: usize, to: usize| (from..to).map(|i| format!("line {i}\n")).collect::<String>();
    assert!(log == format!("{}first\n{}", lines(0, 30_000), lines(30_000, 60_000)), "{} bytes", log.len());
}

#[test]
fn a_client_that_neither_goes_nor_answers_is_in_nobodys_way() {
    let server = Server::start(&LINGERS);
    let none = BuildOptions::default();
    let mut stopped = server.session();
    let tools = add(stopped.client.as_mut().unwrap(), "tools", tools().path());
    let drv = held(&tools, "stopped");
    let _never = stopped.build(&drv, &none);
    stopped.says("first\n");
    // As when its machine is cut off: no end of anything arrives.
    signal(&stopped.ssh, Signal::STOP);
    let mut second = server.session();
    let answer = second.build(&drv, &none);
    second.says("first\n");
    server.let_go();
    assert_eq!(answer.join().unwrap().unwrap().status, BuildStatus::AlreadyValid);
    second.says("last\n");
    assert_eq!(begun(&server), 1);
}

#[test]
fn an_impure_build_is_found_by_one_who_comes_back() {
    use drover_nix::{DerivationOutput, HashAlgo, Method};
    let server = Server::start(&LINGERS);
    let none = BuildOptions::default();
    let impure = DerivationOutput::Impure { method: Method::Nar, algo: HashAlgo::Sha256 };
    let drv = leave(&server, &none, |tools| held_unknown(tools, "left", impure));
    let mut second = server.session();
    let answer = second.build(&drv, &none);
    second.says("first\n");
    server.let_go();
    let found = answer.join().unwrap().unwrap();
    assert_eq!((found.status, begun(&server)), (BuildStatus::AlreadyValid, 1));
    // Whoever asks now wants another one.
    let mut third = server.session();
    let answer = third.build(&drv, &none);
    third.says("first\n");
    server.let_go();
    let other = answer.join().unwrap().unwrap();
    assert_eq!((other.status, begun(&server)), (BuildStatus::Built, 2));
    assert_ne!(found.built_outputs, other.built_outputs);
}

#[test]
fn told_to_end_it_says_so_to_its_clients() {
    let mut server = Server::start(&LINGERS);
    let (mut idle, mut building) = (server.session(), server.session());
    let tools = add(building.client.as_mut().unwrap(), "tools", tools().path());
    let drv = held(&tools, "told");
    let answer = building.build(&drv, &BuildOptions::default());
    building.says("first\n");
    signal(&server.child, Signal::TERM);
    assert_eq!(server.child.wait().unwrap().code(), Some(143));
    assert!(answer.join().unwrap().is_none(), "that is no result of the build");
    for session in [&mut idle, &mut building] {
        session.ssh.wait().unwrap();
        let log = session.end_of_log();
        assert!(
            log.contains("drover-builder: killed from outside: the builder was told to end\n"),
            "{log:?}"
        );
    }
}

#[test]
fn nothing_lingers_in_a_program_that_ends() {
    let mut server = Server::start(&["--linger", "1000"]);
    let mut session = server.session();
    let tools = add(session.client.as_mut().unwrap(), "tools", tools().path());
    let drv = held(&tools, "stopped");
    let _answer = session.build(&drv, &BuildOptions::default());
    session.says("first\n");
    let begin = Instant::now();
    signal(&server.child, Signal::TERM);
    assert_eq!(server.child.wait().unwrap().code(), Some(143));
    assert!(begin.elapsed() < Duration::from_secs(8), "it took {:?}", begin.elapsed());
    assert_eq!(processes(&drv), 0);
}
