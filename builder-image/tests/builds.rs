//! Whole builds through the protocol: what becomes of outputs, limits and failures.

#![allow(clippy::unwrap_used)] // all of it is tests

mod common;

use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{Builder, User, out, path_for, set};
use drover_nix::{DerivationOutput, Hash, Method, OutputName, Sha256, StoreDir};
use drover_serve::{BuildOptions, BuildStatus, Client};

#[test]
fn an_output_becomes_a_valid_path() {
    for user in [User::Current, User::Ordinary] {
        let mut builder = Builder::start(user);
        let script = "echo building; mkdir -p $out/bin; echo data > $out/file; ln -s $PATH $out/link; \
                      echo '#!/bin/sh' > $out/bin/x; chmod 700 $out/bin/x; touch -d @99 $out/file; echo $out > $out/self";
        let drv = builder.derivation(script);
        let result = builder.build(&drv, &BuildOptions::default());
        assert_eq!((result.status, result.error_message.as_str()), (BuildStatus::Built, ""), "{user:?}");
        assert_eq!(result.built_outputs[&OutputName::out()].path, out(&drv));
        assert!(result.start_time > 0 && result.stop_time >= result.start_time && result.times_built == 1);

        let path = out(&drv);
        let infos = builder.client().query_path_infos(&[path.clone()].into()).unwrap();
        let info = &infos[&path];
        assert_eq!(info.references, [path.clone(), builder.tools.clone()].into());
        let mut nar = Vec::new();
        builder.client().dump_store_path(&path, &mut nar).unwrap();
        assert_eq!((Sha256::of(&nar), nar.len() as u64), (info.nar_hash, info.nar_size));

        let mode = |name: &str| {
            let metadata = std::fs::symlink_metadata(builder.store_file(&path).join(name)).unwrap();
            (metadata.mode() & 0o7777, metadata.mtime())
        };
        assert_eq!(
            [mode(""), mode("bin"), mode("bin/x"), mode("file")],
            [(0o555, 1), (0o555, 1), (0o555, 1), (0o444, 1)]
        );
        assert!(builder.finish().contains("building\n"));
        let left: Vec<_> = std::fs::read_dir(builder.root.path().join("nix/store"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != ".links" && !name.ends_with("-tools") && *name != path.to_string())
            .collect();
        assert_eq!(left, [""; 0], "nothing but the objects is left in the store");
        assert_eq!(std::fs::read_dir(builder.root.path().join("nix/var/nix/builds")).unwrap().count(), 0);
    }
}

#[test]
fn what_is_there_is_not_built_again() {
    let mut builder = Builder::start(User::Current);
    assert_eq!(builder.run("touch $out").status, BuildStatus::Built);
    let again = builder.run("touch $out");
    assert_eq!(again.status, BuildStatus::AlreadyValid);
    assert_eq!(again.built_outputs.len(), 1);
}

#[test]
fn exit_codes_and_signals() {
    let mut builder = Builder::start(User::Current);
    let result = builder.run("for i in $(seq 30); do echo line $i; done; exit 7");
    assert_eq!(result.status, BuildStatus::PermanentFailure);
    assert!(
        result.error_message.contains("failed with exit code 7;\nlast 25 log lines:\n> line 6\n"),
        "{}",
        result.error_message
    );
    assert!(result.error_message.ends_with("> line 30"));
    // Process 1 of a namespace gets no signal that it has no handler for, not even from itself.
    let result = builder.run("exec sh -c 'kill -KILL $$; exit 3'");
    assert!(result.error_message.contains("exit code 3"), "{}", result.error_message);
    let mut drv = builder.derivation("");
    drv.builder = "/no/such/builder".into();
    let result = builder.build(&drv, &BuildOptions::default());
    assert_eq!(result.status, BuildStatus::PermanentFailure);
    assert!(
        result.error_message.contains("cannot execute /no/such/builder: No such file"),
        "{}",
        result.error_message
    );
}

#[test]
fn limits() {
    let mut builder = Builder::start(User::Current);
    let begin = Instant::now();
    let options = BuildOptions { timeout_seconds: 1, ..BuildOptions::default() };
    let result = builder.run_with("while :; do echo x; sleep 0.1; done", &options);
    assert_eq!(result.status, BuildStatus::TimedOut);
    assert!(result.error_message.contains("timed out after 1 seconds;"), "{}", result.error_message);

    let options = BuildOptions { max_silent_seconds: 1, ..BuildOptions::default() };
    let result = builder.run_with("echo loud; sleep 1000 & wait", &options);
    assert_eq!(result.status, BuildStatus::TimedOut);
    assert!(
        result.error_message.contains("timed out after 1 seconds of silence"),
        "{}",
        result.error_message
    );

    let options = BuildOptions { max_log_bytes: 10_000, ..BuildOptions::default() };
    let result = builder.run_with("yes", &options);
    assert_eq!(result.status, BuildStatus::LogLimitExceeded);
    let result = builder.run_with("head -c 9000 /dev/zero | tr '\\0' x; touch $out", &options);
    assert_eq!(result.status, BuildStatus::Built);
    assert!(begin.elapsed() < Duration::from_secs(30), "killed builds take {:?}", begin.elapsed());
}

#[test]
fn outputs_that_are_refused() {
    let mut builder = Builder::start(User::Current);
    for (script, why) in [
        ("true", "failed to produce output path"),
        ("mkfifo $out", "cannot be a store object"),
        ("mkdir $out; mkfifo $out/f", "cannot be a store object"),
        ("touch $out; chmod 666 $out", "suspicious ownership or permission"),
    ] {
        let result = builder.run(script);
        assert_eq!(result.status, BuildStatus::OutputRejected, "{script}: {}", result.error_message);
        assert!(result.error_message.contains(why), "{script}: {}", result.error_message);
    }
    let mut drv = builder.derivation("echo $PATH > $out");
    set(&mut drv, "allowedReferences", "");
    let result = builder.build(&drv, &BuildOptions::default());
    assert_eq!(result.status, BuildStatus::OutputRejected);
    assert!(result.error_message.contains("is not allowed to refer to"), "{}", result.error_message);
    let valid = builder.client().query_valid_paths(&[out(&drv)].into(), false, false).unwrap();
    assert!(valid.is_empty());
}

#[test]
fn requests_that_are_refused() {
    let mut builder = Builder::start(User::Current);
    let mut refused = |why: &str, change: &dyn Fn(&mut drover_nix::BasicDerivation)| {
        let mut drv = builder.derivation("touch $out");
        change(&mut drv);
        let result = builder.build(&drv, &BuildOptions::default());
        assert!(result.error_message.contains(why), "{}", result.error_message);
        result.status
    };
    let rejected = BuildStatus::InputRejected;
    assert_eq!(refused("`riscv64-linux`", &|drv| drv.system = "riscv64-linux".into()), rejected);
    assert_eq!(refused("{moon}", &|drv| set(drv, "requiredSystemFeatures", "moon")), rejected);
    assert_eq!(refused("NUL", &|drv| set(drv, "x", "a\0b")), rejected);
    assert_eq!(
        refused("resolved", &|drv| drv.outputs = [(OutputName::out(), DerivationOutput::Deferred)].into()),
        rejected
    );
    let absent = path_for("absent", "absent");
    let missing = |drv: &mut drover_nix::BasicDerivation| {
        drv.input_srcs.insert(absent.clone());
    };
    assert_eq!(refused(absent.as_str(), &missing), BuildStatus::MiscFailure);
}

#[test]
fn several_outputs() {
    let mut builder = Builder::start(User::Current);
    let mut drv = builder.derivation("echo $dev > $out; mkdir $dev; echo $bin > $dev/x; touch $bin");
    for name in ["dev", "bin"] {
        let path = path_for(name, &format!("test-{name}"));
        set(&mut drv, name, &format!("/nix/store/{path}"));
        drv.outputs.insert(name.parse().unwrap(), DerivationOutput::InputAddressed(path));
    }
    let result = builder.build(&drv, &BuildOptions::default());
    assert_eq!(
        (result.status, result.built_outputs.len()),
        (BuildStatus::Built, 3),
        "{}",
        result.error_message
    );
    let infos = builder.client().query_path_infos(&[out(&drv)].into()).unwrap();
    assert_eq!(infos[&out(&drv)].references, [path_for("dev", "test-dev")].into());

    let mut circle = builder.derivation("echo $dev > $out; echo $out > $dev");
    let path = path_for("circle", "test-dev");
    set(&mut circle, "dev", &format!("/nix/store/{path}"));
    circle.outputs.insert("dev".parse().unwrap(), DerivationOutput::InputAddressed(path));
    let result = builder.build(&circle, &BuildOptions::default());
    assert_eq!(result.status, BuildStatus::OutputRejected, "{}", result.error_message);
}

#[test]
fn fixed_outputs() {
    for user in [User::Current, User::Ordinary] {
        let mut builder = Builder::start(user);
        let hash = || Hash::from(Sha256::of(b"data\n"));
        let drv = builder.fixed("echo data > $out; test $NIX_OUTPUT_CHECKED = 1", Method::Flat, hash());
        let result = builder.build(&drv, &BuildOptions::default());
        assert_eq!(result.status, BuildStatus::Built, "{user:?}: {}", result.error_message);
        let info =
            builder.client().query_path_infos(&[out(&drv)].into()).unwrap().remove(&out(&drv)).unwrap();
        assert_eq!((info.ca.unwrap().method, info.references.len()), (Method::Flat, 0));

        // What is registered is a copy, in a file that nobody has had open who the builder has talked to.
        let drv = builder.fixed("echo copied > $out; stat -c 'made in %i' $out >&2", Method::Flat, {
            Hash::from(Sha256::of(b"copied\n"))
        });
        assert_eq!(builder.build(&drv, &BuildOptions::default()).status, BuildStatus::Built);
        let registered = std::fs::metadata(builder.store_file(&out(&drv))).unwrap();
        let made_in = |log: &str| Some(log.split_once("made in ")?.1.lines().next()?.trim().parse::<u64>());
        let made_in = made_in(&builder.log()).unwrap().unwrap();
        assert_ne!(std::os::unix::fs::MetadataExt::ino(&registered), made_in, "{user:?}");

        let other = || Hash::from(Sha256::of(b"other\n"));
        let drv = builder.fixed("echo data > $out", Method::Flat, other());
        let result = builder.build(&drv, &BuildOptions::default());
        assert_eq!(result.status, BuildStatus::OutputRejected);
        assert!(
            result.error_message.contains(&hash().to_sri())
                && result.error_message.contains(&other().to_sri())
        );

        let drv = builder.fixed("echo other > $out; chmod +x $out", Method::Flat, other());
        let result = builder.build(&drv, &BuildOptions::default());
        assert!(result.error_message.contains("not executable"), "{}", result.error_message);

        // Where there is the network, a failure may pass.
        let drv = builder.fixed("exit 1", Method::Nar, Hash::from(Sha256::of(b"x")));
        assert_eq!(builder.build(&drv, &BuildOptions::default()).status, BuildStatus::TransientFailure);
    }
}

#[test]
fn files_for_the_builder() {
    let mut builder = Builder::start(User::Current);
    let mut drv = builder.derivation(
        "test \"$(cat $textPath)\" = hello; test -z \"${text-}\"; head -1 graph; \
         test $(head -1 graph) = ${PATH%/bin}; touch $out; test -O $textPath",
    );
    set(&mut drv, "text", "hello");
    set(&mut drv, "passAsFile", "text");
    set(&mut drv, "exportReferencesGraph", &format!("graph /nix/store/{}", builder.tools));
    let result = builder.build(&drv, &BuildOptions::default());
    assert_eq!(result.status, BuildStatus::Built, "{}", result.error_message);

    let mut drv = builder.derivation("");
    let json = format!(
        r#"{{"name":"test","words":["a b","c"],"tools":"/nix/store/{}","outputs":["out"],"builder":"/bin/sh"}}"#,
        builder.tools
    );
    drv.env = [("__json".into(), json.into())].into();
    // The shell alone, without the tools, whose PATH is not there: what it can do by itself.
    let script = "while read -r a b c; do case $c in outputs=*) out=${c#*=*=\\'}; out=${out%%\\'*};; esac; done \
                  < $NIX_ATTRS_SH_FILE; read -r line < $NIX_ATTRS_JSON_FILE || :; echo \"$line\" > $out";
    drv.args = vec!["-ec".into(), script.into()];
    let result = builder.build(&drv, &BuildOptions::default());
    assert_eq!(result.status, BuildStatus::Built, "{}\n{}", result.error_message, builder.log());
    let written = std::fs::read_to_string(builder.store_file(&out(&drv))).unwrap();
    let expected = format!(
        r#"{{"builder":"/bin/sh","name":"test","outputs":{{"out":"/nix/store/{}"}},"tools":"/nix/store/{}","words":["a b","c"]}}"#,
        out(&drv),
        builder.tools
    );
    assert_eq!(written.trim_end(), expected);
}

/// Processes whose command line has `marker` in it.
fn processes(marker: &str) -> usize {
    let entries = std::fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let lines = entries.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
    lines.filter(|line| String::from_utf8_lossy(line).contains(marker)).count()
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < deadline, "not within 30 seconds: {what}");
        std::thread::yield_now();
    }
}

#[test]
fn a_client_that_goes_away_takes_its_build_with_it() {
    let builder = Builder::start(User::Current);
    let store = builder.root.path().to_str().unwrap().to_owned();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut server = Command::new(common::BUILDER)
        .args(["serve", "--write", "--store", &store])
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let stdout = server.stdout.take().unwrap();
    let mut client = Client::connect(stdout, ours.try_clone().unwrap(), StoreDir::default()).unwrap();
    let marker = format!("sleep 1000{}", std::process::id());
    let drv = builder.derivation(&format!("{marker} & wait"));
    let requester = std::thread::spawn(move || {
        client.build_derivation(&path_for("gone", "test.drv"), &drv, &BuildOptions::default()).is_err()
    });
    eventually("the build runs", || processes(&marker) > 0);
    ours.shutdown(Shutdown::Write).unwrap();
    assert!(!server.wait().unwrap().success());
    assert!(requester.join().unwrap());
    assert_eq!(processes(&marker), 0);
    // Its locks went with it, and so did its directories.
    let store = builder.root.path().join("nix/store");
    let left =
        std::fs::read_dir(store).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert_eq!(left.filter(|name| name.ends_with(".chroot")).count(), 0);
}

#[test]
fn a_builder_that_is_killed_leaves_no_process() {
    let mut builder = Builder::start(User::Current);
    let marker = format!("sleep 2000{}", std::process::id());
    let drv = builder.derivation(&format!("{marker} & wait"));
    let mut client = builder.client.take().unwrap();
    let requester = std::thread::spawn(move || {
        client.build_derivation(&path_for("killed", "test.drv"), &drv, &BuildOptions::default()).is_err()
    });
    eventually("the build runs", || processes(&marker) > 0);
    builder.child.kill().unwrap();
    assert!(requester.join().unwrap());
    eventually("the build is gone", || processes(&marker) == 0);
}

#[test]
fn a_log_that_nobody_reads_does_not_hold_up_the_end() {
    let builder = Builder::start(User::Current);
    let store = builder.root.path().to_str().unwrap().to_owned();
    let mut server = Command::new(common::BUILDER)
        .args(["serve", "--write", "--store", &store])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (stdout, stdin) = (server.stdout.take().unwrap(), server.stdin.take().unwrap());
    let mut client = Client::connect(stdout, stdin, StoreDir::default()).unwrap();
    let drv = builder.derivation("head -c 3000000 /dev/zero | tr '\\0' x; touch $out");
    let result =
        client.build_derivation(&path_for("flood", "test.drv"), &drv, &BuildOptions::default()).unwrap();
    assert_eq!(result.status, BuildStatus::Built, "{}", result.error_message);
    drop(client);
    // Still nobody reads.
    assert!(server.wait().unwrap().success());
}

#[test]
fn what_failed_is_kept_if_asked_for() {
    let mut builder = Builder::start(User::Current);
    let builds = builder.root.path().join("nix/var/nix/builds");
    let keep = BuildOptions { keep_failed: true, ..BuildOptions::default() };
    assert_eq!(builder.run_with("touch $out", &keep).status, BuildStatus::Built);
    assert_eq!(builder.run("touch evidence; exit 1").status, BuildStatus::PermanentFailure);
    assert_eq!(std::fs::read_dir(&builds).unwrap().count(), 0, "neither succeeded nor asked for");
    assert_eq!(builder.run_with("touch evidence; exit 2", &keep).status, BuildStatus::PermanentFailure);
    let kept = std::fs::read_dir(&builds).unwrap().next().unwrap().unwrap().path().join("build");
    assert!(kept.join("evidence").exists());
    let log = builder.finish();
    assert!(log.contains(&format!("keeping build directory {}", kept.display())), "{log}");
}

#[test]
fn more_rounds_are_one() {
    let mut builder = Builder::start(User::Current);
    // As Hydra asks for with derivations that are said to be deterministic, and Nix ends the session for.
    let options = BuildOptions { repeats: 1, enforce_determinism: true, ..BuildOptions::default() };
    let result = builder.run_with("echo round; touch $out", &options);
    assert_eq!((result.status, result.times_built), (BuildStatus::Built, 1));
    assert_eq!(builder.finish().matches("round").count(), 1);
}
