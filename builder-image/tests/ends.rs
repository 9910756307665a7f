//! How builds end: each of Nix's status numbers as it goes over the wire, and what the machine failed a build with told
//! from a builder that failed.

#![allow(clippy::unwrap_used)] // all of it is tests

mod common;
mod machine;

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::time::{Duration, Instant};

use common::{User, out, path_for, set};
use drover_nix::{BasicDerivation, DerivationOutput, OutputName};
use drover_serve::{BuildOptions, BuildResult, BuildStatus, BuildTarget, Cause, Error};
use machine::{Machine, Session};

fn limits() -> BuildOptions {
    BuildOptions::default()
}

/// Numbers that no builder of ours ever answers, and why.
///
/// 1 Substituted: nothing is substituted while building. 7 CachedFailure: no Nix remembers failures any more.
/// 12 NotDeterministic: the protocol cannot ask for a check. 13 ResolvesToAlreadyValid: requests arrive resolved, so that a
/// valid output is 2. 14 NoSubstituters: as 1.
const NEVER: [u64; 5] = [1, 7, 12, 13, 14];

#[test]
fn every_status_as_it_goes_over_the_wire() {
    let mut session = Session::start(&Machine::Plain, User::Current);
    let mut seen: Vec<u64> = NEVER.into();
    let mut expect = |session: &mut Session, drv: &BasicDerivation, options: &BuildOptions, number: u64| {
        let result = session.build(drv, options);
        assert_eq!(session.number(), number, "{result:?}");
        assert_eq!(result.status as u64, number);
        assert_eq!(result.status.is_success(), matches!(number, 0 | 1 | 2 | 13));
        seen.push(number);
        result
    };
    let quick = BuildOptions { timeout_seconds: 1, ..limits() };
    let quiet = BuildOptions { max_silent_seconds: 1, ..limits() };
    let short = BuildOptions { max_log_bytes: 1000, ..limits() };
    let good = session.derivation("touch $out");
    expect(&mut session, &good, &limits(), 0);
    expect(&mut session, &good, &limits(), 2);
    let drv = session.derivation("exit 1");
    expect(&mut session, &drv, &limits(), 3);
    let mut drv = session.derivation("touch $out; : absent");
    drv.builder = "/no/such/builder".into();
    expect(&mut session, &drv, &limits(), 3);
    let mut drv = session.derivation("touch $out; : elsewhere");
    drv.system = "riscv64-linux".into();
    expect(&mut session, &drv, &limits(), 4);
    let drv = session.derivation("true");
    expect(&mut session, &drv, &limits(), 5);
    let drv = session.fixed("echo other > $out");
    expect(&mut session, &drv, &limits(), 5);
    let drv = session.fixed("exit 1");
    expect(&mut session, &drv, &limits(), 6);
    let drv = session.derivation("while :; do echo busy; sleep 0.1; done");
    let result = expect(&mut session, &drv, &quick, 8);
    assert!(result.error_message.contains("timed out after 1 seconds;"), "{}", result.error_message);
    let drv = session.derivation("echo quiet; sleep 1000");
    let result = expect(&mut session, &drv, &quiet, 8);
    let said = "timed out after 1 seconds of silence;\nlast 1 log lines:\n> quiet";
    assert!(result.error_message.ends_with(said), "{}", result.error_message);
    let mut drv = session.derivation("touch $out; : no input");
    drv.input_srcs.insert(path_for("absent", "absent"));
    expect(&mut session, &drv, &limits(), 9);
    let drv = session.derivation("yes");
    expect(&mut session, &drv, &short, 11);

    // Of a request that names one derivation of the store only: others have no dependencies.
    let (number, status) = session.dependency_fails();
    assert_eq!((number, status), (10, BuildStatus::DependencyFailed));
    seen.push(number);

    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen, (0..15).collect::<Vec<u64>>(), "every number is given, or never");
}

#[test]
fn too_little_memory_is_told_from_a_builder_that_failed() {
    const HOG: &str = "dd if=/dev/zero of=/dev/null bs=512M count=1";
    for user in [User::Current, User::Ordinary] {
        let mut session = Session::start(&Machine::Memory { bytes: 96 << 20 }, user);
        let mut ends = |script: &str| {
            let result = session.run(script);
            (result.status, Cause::of(&result), result.error_message)
        };
        // Nothing was killed yet.
        let (status, cause, message) = ends("exit 137");
        assert_eq!((status, cause), (BuildStatus::PermanentFailure, None), "{user:?}: {message}");
        for script in [
            // The builder itself, a process of it that it notices, one that it makes little of, one in the background.
            format!("exec {HOG}"),
            format!("echo hungry; {HOG}"),
            format!("{HOG} || exit 3"),
            format!("{HOG} & wait $!; exit 4"),
        ] {
            let (status, cause, message) = ends(&script);
            let expected = (BuildStatus::PermanentFailure, Some(Cause::OutOfMemory));
            assert_eq!((status, cause), expected, "{user:?}: {script}: {message}");
            assert!(message.contains("for want of memory"), "{message}");
        }
        // Who makes do with less has succeeded, and who fails later has failed.
        let (status, _, message) = ends(&format!("{HOG} || touch $out"));
        assert_eq!(status, BuildStatus::Built, "{user:?}: {message}");
        let (status, cause, message) = ends("echo out of memory: builder; exit 1");
        assert_eq!((status, cause), (BuildStatus::PermanentFailure, None), "{user:?}: {message}");
        // What has the network has Nix's other number.
        let drv = session.fixed(HOG);
        let result = session.build(&drv, &limits());
        assert_eq!(result.status, BuildStatus::TransientFailure, "{}", result.error_message);
        assert_eq!(Cause::of(&result), Some(Cause::OutOfMemory), "{}", result.error_message);
    }
}

#[test]
fn a_full_disk_is_told_from_a_builder_that_failed() {
    let full = |result: &BuildResult, what: &str| {
        let expected = (BuildStatus::TransientFailure, Some(Cause::DiskFull));
        assert_eq!((result.status, Cause::of(result)), expected, "{what}: {}", result.error_message);
    };
    for user in [User::Current, User::Ordinary] {
        let mut session = Session::start(&Machine::Disk { store: "size=64m", builds: None }, user);
        full(&session.run("dd if=/dev/zero of=$out bs=1M"), "an output");
        full(&session.run("dd if=/dev/zero of=waste bs=1M || exit 5"), "the build directory");
        full(&session.run("dd if=/dev/zero of=/tmp/waste bs=1M"), "the temporary directory");
        // The builder does its part; there is no room for the copy that a fixed output is.
        let drv = session.fixed("dd if=/dev/zero of=$out bs=1M count=40");
        full(&session.build(&drv, &limits()), "our own copy");
        // Whatever depends on it.
        let waste = session.add_derivation("waste", "dd if=/dev/zero of=$out bs=1M", None);
        let path = session.add_derivation("depending", "touch $out", Some(&waste));
        match session.client().build_paths(&[BuildTarget { path, outputs: None }], &limits()) {
            Err(Error::BuildPaths { message, .. }) => {
                assert!(message.starts_with("disk full: cannot build "), "{message}");
            }
            other => panic!("{other:?}"),
        }
        // All of that is gone again.
        let failed = session.run("echo disk full: I say; exit 1");
        assert_eq!((failed.status, Cause::of(&failed)), (BuildStatus::PermanentFailure, None), "{failed:?}");
        let good = session.run("dd if=/dev/zero of=$out bs=1M count=20");
        assert_eq!(good.status, BuildStatus::Built, "{good:?}");

        // Builds have a disk of their own, and only that is full.
        let mut session =
            Session::start(&Machine::Disk { store: "size=64m", builds: Some("size=12m") }, user);
        full(&session.run("dd if=/dev/zero of=waste bs=1M"), "the builds' disk");
        let good = session.run("dd if=/dev/zero of=$out bs=1M count=20");
        assert_eq!(good.status, BuildStatus::Built, "{good:?}");

        // Room, but no inodes.
        let mut session =
            Session::start(&Machine::Disk { store: "size=64m,nr_inodes=900", builds: None }, user);
        let many = "i=0; while : > $i; do i=$((i + 1)); done; exit 1";
        full(&session.run(many), "inodes");
        let good = session.run("touch $out");
        assert_eq!(good.status, BuildStatus::Built, "{good:?}");
    }
}

#[test]
fn a_builder_that_something_else_kills() {
    for user in [User::Current, User::Ordinary] {
        let mut session = Session::start(&Machine::Plain, user);
        // With the number of a failed build, as in Nix, and a word that says more.
        let drv = session.derivation("echo alive; sleep 1000 & wait");
        let result = session.build_while(&drv, |session| {
            let builder = session.builder_of(&drv);
            rustix::process::kill_process(builder, rustix::process::Signal::TERM).unwrap();
            // Process 1 of a namespace has no use for that one.
            rustix::process::kill_process(builder, rustix::process::Signal::KILL).unwrap();
        });
        assert_eq!(result.status, BuildStatus::PermanentFailure, "{user:?}: {result:?}");
        assert_eq!(Cause::of(&result), Some(Cause::Killed), "{user:?}: {}", result.error_message);
        assert!(result.error_message.contains("failed due to signal 9 (Killed)"), "{}", result.error_message);

        // A process of the build, and not the builder: that is for the builder to judge.
        let drv = session.derivation("sleep 1001 || exit 7");
        let result = session.build_while(&drv, |session| {
            let child = session.process_of("sleep 1001");
            rustix::process::kill_process(child, rustix::process::Signal::KILL).unwrap();
        });
        assert_eq!((result.status, Cause::of(&result)), (BuildStatus::PermanentFailure, None), "{result:?}");
        assert!(result.error_message.contains("exit code 7"), "{}", result.error_message);

        // What watches over all builds.
        let drv = session.derivation("echo alive; sleep 1002 & wait");
        let result = session.build_while(&drv, |session| {
            session.builder_of(&drv);
            let helper = session.helper();
            rustix::process::kill_process(helper, rustix::process::Signal::KILL).unwrap();
        });
        assert_eq!(result.status, BuildStatus::MiscFailure, "{user:?}: {result:?}");
        assert_eq!(Cause::of(&result), Some(Cause::Killed), "{user:?}: {}", result.error_message);
        // There is another one when it is needed.
        assert_eq!(session.run("touch $out").status, BuildStatus::Built);
    }
}

#[test]
fn a_builder_that_crashes_is_the_builds_own_doing() {
    let mut session = Session::start(&Machine::Plain, User::Current);
    for (code, said) in [
        (&[0x0f, 0x0b][..], "failed due to signal 4 (Illegal instruction)"),
        // Writes to address 0.
        (&[0x89, 0x04, 0x25, 0, 0, 0, 0], "failed due to signal 11 (Segmentation fault)"),
    ] {
        let program = session.add_program(code);
        let mut drv = session.derivation("");
        drv.builder = format!("/nix/store/{program}").into();
        drv.input_srcs.insert(program);
        let result = session.build(&drv, &limits());
        assert_eq!((result.status, Cause::of(&result)), (BuildStatus::PermanentFailure, None), "{result:?}");
        assert!(result.error_message.contains(said), "{}", result.error_message);
    }
}

#[test]
fn limits_hold_for_builders_that_do_not_want_to_end() {
    let mut session = Session::start(&Machine::Plain, User::Current);
    let begin = Instant::now();
    let one = BuildOptions { timeout_seconds: 1, ..limits() };
    let deaf = "trap '' HUP INT QUIT TERM PIPE ALRM; ";
    for script in [
        "while :; do sleep 1; done",
        "while :; do echo x; done",
        // In a session of its own, with a terminal of nobody's; the builder waits for it.
        "setsid sh -c \"trap '' HUP INT TERM; sleep 1000\" & wait",
    ] {
        let result = session.run_with(&format!("{deaf}{script}"), &one);
        assert_eq!(result.status, BuildStatus::TimedOut, "{script}: {result:?}");
        assert!(result.error_message.contains("timed out after 1 seconds"), "{}", result.error_message);
    }
    // Output of any process counts, and none of its silence does while there is some.
    let quiet = BuildOptions { max_silent_seconds: 4, ..limits() };
    let result =
        session.run_with("(for i in 1 2 3 4 5 6; do sleep 1; echo $i; done) & wait; touch $out", &quiet);
    assert_eq!(result.status, BuildStatus::Built, "{result:?}");
    // Both at once: what comes first.
    let both = BuildOptions { timeout_seconds: 1000, max_silent_seconds: 1, ..limits() };
    let result = session.run_with("sleep 1000", &both);
    assert!(result.error_message.contains("of silence"), "{}", result.error_message);
    assert!(begin.elapsed() < Duration::from_secs(60), "{:?}", begin.elapsed());
}

#[test]
fn the_end_of_output_is_the_end_of_a_build() {
    let mut session = Session::start(&Machine::Plain, User::Current);
    let begin = Instant::now();
    // It closed its output and lives: killed at once, and no outside killer is suspected.
    let result = session.run("echo last words; exec > /dev/null 2>&1; sleep 1000; touch $out");
    assert_eq!((result.status, Cause::of(&result)), (BuildStatus::PermanentFailure, None), "{result:?}");
    assert!(result.error_message.contains("failed due to signal 9 (Killed)"), "{}", result.error_message);
    assert!(result.error_message.contains("closed its output"), "{}", result.error_message);
    assert!(result.error_message.ends_with("> last words"), "{}", result.error_message);
    assert!(begin.elapsed() < Duration::from_secs(60), "{:?}", begin.elapsed());
    // Processes that it leaves behind end with it, so that nothing is written after the end; what was, is all there.
    let flood = "touch $out; (sleep 1000; echo late) & i=0; while [ $i != 5000 ]; do echo line $i; i=$((i + 1)); done";
    let result = session.run(flood);
    assert_eq!(result.status, BuildStatus::Built, "{result:?}");
    let log = session.finish();
    assert!(log.contains("line 4999\n") && !log.contains("late"), "{}", log.len());
}

#[test]
fn what_is_kept_of_a_failed_build_is_nobody_elses() {
    for user in [User::Current, User::Ordinary] {
        let mut session = Session::start(&Machine::Plain, user);
        let keep = BuildOptions { keep_failed: true, ..limits() };
        let script = "mkdir -m 777 open; echo evidence > open/file; chmod 666 open/file; mkdir -m 000 closed; \
                      ln -s /etc/passwd link; echo half > $out; exit 1";
        let drv = session.derivation(script);
        let result = session.build(&drv, &keep);
        assert_eq!(result.status, BuildStatus::PermanentFailure);
        // Also where it did its part and the output is refused.
        let refused = session.run_with("touch second", &keep);
        assert_eq!(refused.status, BuildStatus::OutputRejected);
        let owner = std::fs::metadata(session.root().join("nix/store")).unwrap().uid();
        let log = session.finish();
        let kept: Vec<_> = log.lines().filter_map(|l| l.split_once("keeping build directory ")).collect();
        assert_eq!(kept.len(), 2, "{user:?}: {log}");
        let dir = std::path::PathBuf::from(kept[0].1);
        for (name, mode) in [
            ("..", 0o755),
            (".", 0o755),
            ("open", 0o755),
            ("open/file", 0o644),
            ("closed", 0o700),
            ("../tmp", 0o755),
        ] {
            let metadata = std::fs::symlink_metadata(dir.join(name)).unwrap();
            assert_eq!(
                (metadata.uid(), metadata.permissions().mode() & 0o7777),
                (owner, mode),
                "{user:?} {name}"
            );
        }
        assert_eq!(std::fs::symlink_metadata(dir.join("link")).unwrap().uid(), owner);
        assert_eq!(std::fs::read_to_string(dir.join("open/file")).unwrap(), "evidence\n");
        assert!(std::path::Path::new(kept[1].1).join("second").exists());
        // Nix moves outputs of failed builds into the store, without making them valid. Here nothing is left there.
        assert!(!session.root().join("nix/store").join(out(&drv).as_str()).exists());
    }
}

#[test]
fn nothing_is_kept_of_a_built_in_builder() {
    let mut session = Session::start(&Machine::Plain, User::Current);
    let mut drv = session.fixed("");
    drv.builder = "builtin:fetchurl".into();
    drv.system = "builtin".into();
    set(&mut drv, "url", "file:///no/such/file");
    // What it would have to say about is gone with it, and may have been a password.
    let keep = BuildOptions { keep_failed: true, ..limits() };
    let result = session.build(&drv, &keep);
    assert!(!result.status.is_success(), "{result:?}");
    let failed = session.run_with("exit 1", &keep);
    assert_eq!(failed.status, BuildStatus::PermanentFailure);
    assert_eq!(session.finish().matches("keeping build directory").count(), 1, "of the other one only");
    let kept = std::fs::read_dir(session.root().join("nix/var/nix/builds")).unwrap().count();
    assert_eq!(kept, 1);
}

/// Deferred outputs and structured lies are for other tests; this one shows that a request is answered and not fatal.
#[test]
fn a_session_goes_on_after_every_failure() {
    let mut session = Session::start(&Machine::Plain, User::Current);
    let mut drv = session.derivation("touch $out");
    drv.outputs = [(OutputName::out(), DerivationOutput::Deferred)].into();
    assert_eq!(session.build(&drv, &limits()).status, BuildStatus::InputRejected);
    let mut drv = session.derivation("touch $out; : twice");
    set(&mut drv, "allowedReferences", "no-such-output");
    assert_eq!(session.build(&drv, &limits()).status, BuildStatus::OutputRejected);
    assert_eq!(session.run("touch $out; : after that").status, BuildStatus::Built);
}

impl Session {
    /// Has a `.drv` built whose input's builder fails. The number that BuildPaths answers, and what it means.
    fn dependency_fails(&mut self) -> (u64, BuildStatus) {
        let failing = self.add_derivation("failing", "exit 1", None);
        let depending = self.add_derivation("depending", "touch $out", Some(&failing));
        let target = BuildTarget { path: depending, outputs: None };
        match self.client().build_paths(&[target], &limits()) {
            Err(Error::BuildPaths { status, .. }) => (self.number(), status),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_machine_that_starts_no_thread_gets_an_error_and_no_crash() {
    let root = tempfile::TempDir::new().unwrap();
    let output = std::process::Command::new(common::BUILDER)
        .args(["--serve", "--write", "--store", root.path().to_str().unwrap()])
        // Stacks that do not fit into its address space: as if a build had taken all processes that there may be.
        .env("RUST_MIN_STACK", (1_u64 << 50).to_string())
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("cannot start a thread"), "{said}");
}
