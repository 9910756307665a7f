//! The real `drover-builder serve --write` against transcripts of every version.

use std::io::{Read, Write as _};
use std::process::{Child, Command, Stdio};
use std::thread;

use anyhow::{Context as _, Result, ensure};
use drover_tests::{Nix, Peer, program};

use super::notation::*;

/// A request, and what has to come back before anything else does.
struct Step {
    what: &'static str,
    request: Vec<u8>,
    answer: Vec<Part>,
}

fn step(what: &'static str, request: Vec<u8>, answer: Vec<u8>) -> Step {
    Step { what, request, answer: vec![Part::Bytes(answer)] }
}

/// All nine commands, as a client of this version has them.
fn session(version: Version) -> Vec<Step> {
    let common = version.min(OURS);
    let hello = nar("hello\n");
    let source = source();
    let user = Info { base: USER, references: &[SOURCE, USER], nar_size: HELLO_SIZE, ..Info::default() };
    let drv = Info { base: KEPT_DRV, nar_size: 408, nar_hash: KEPT_NAR_HASH, ..Info::default() };
    let add = |info: &Info<'_>, nar: &[u8]| match version {
        0x205.. => info.addition(nar),
        _ => [u(4), info.record(nar, false), u(0)].concat(),
    };
    let mut known = Info { nar_hash: HELLO_NIX32, ..source.clone() };
    if version < 0x205 {
        // It came in an export stream, which has no room for more.
        known = Info { ca: "", signatures: &[], ..known };
    }
    let known_user = Info { nar_hash: HELLO_NIX32, ..user.clone() };
    let infos = [known.item(common), known_user.item(common), s("")].concat();
    let export = [source.record(&hello, false), user.record(&hello, false), u(0)].concat();
    let failure = vec![Part::Failure, Part::Message];
    let mut steps = vec![
        step("greeting", client_hello(version), server_hello(common)),
        step("nothing is valid", query_valid_paths(true, true, &[SOURCE, USER]), u(0)),
        step("add", add(&source, &hello), u(1)),
        step("add again", add(&Info { nar_hash: HELLO_SRI, ..source.clone() }, &hello), u(1)),
        step("import", [u(4), user.record(&hello, true), source.record(&hello, false), u(0)].concat(), u(1)),
        step("import nothing", [u(4), u(0)].concat(), u(1)),
        step(
            "some are valid",
            query_valid_paths(false, false, &[SOURCE, MISSING, USER]),
            set(&[SOURCE, USER]),
        ),
        step("infos", query_path_infos(&[SOURCE, MISSING, USER]), infos),
        step("no infos", query_path_infos(&[MISSING]), s("")),
        step("dump", dump_store_path(USER), hello.clone()),
        step("export", [u(5), u(0), set(&[SOURCE, USER])].concat(), export),
        step("closure", query_closure(false, &[USER]), set(&[SOURCE, USER])),
        step("add a derivation", add(&drv, &nar(KEPT_TEXT)), u(1)),
        step("build its output", build_paths(common, &[&format!("{KEPT_DRV}!out")]), u(0)),
        step("build all outputs, and what is there", build_paths(common, &[KEPT_DRV, SOURCE]), u(0)),
        Step { what: "build what nobody has", request: build_paths(common, &[MISSING]), answer: failure },
        step("closure with outputs", query_closure(true, &[KEPT_DRV]), set(&[KEPT_OUT, KEPT_DRV])),
    ];
    if version >= 0x201 {
        let mut build = |what, drv, out, script, repeats, status, outputs: &[&str]| {
            let request = build_derivation(common, drv, out, script, repeats);
            steps.push(Step { what, request, answer: build_result(common, status, outputs) });
        };
        build("build", SENT_DRV, SENT_OUT, "echo sent > $out", 1, 0, &[SENT_OUT]);
        build("build again", SENT_DRV, SENT_OUT, "echo sent > $out", 0, 2, &[SENT_OUT]);
        build("build in vain", FAILS_DRV, FAILS_OUT, "exit 3", 0, 3, &[]);
        let ask = query_valid_paths(true, false, &[FAILS_OUT, SENT_OUT]);
        steps.push(step("what was built", ask, set(&[SENT_OUT])));
    }
    steps
}

/// Reads what an answer has to be, and says where it is not.
fn expect(input: &mut impl Read, answer: &[Part]) -> Result<()> {
    let mut word = || -> Result<u64> {
        let mut word = [0; 8];
        input.read_exact(&mut word).context("it ends too early")?;
        Ok(u64::from_le_bytes(word))
    };
    for part in answer {
        match part {
            Part::Bytes(bytes) => {
                for (index, expected) in bytes.chunks(8).enumerate() {
                    let got = word()?.to_le_bytes();
                    ensure!(got == expected, "word {index} of {bytes:02x?} is {got:02x?}");
                }
            }
            Part::Time => ensure!(word()? > 1_500_000_000, "no time"),
            Part::Failure => {
                let status = word()?;
                ensure!((3..=14).contains(&status) && status != 13, "status {status}");
            }
            Part::Message => {
                let len = word()?;
                ensure!((1..10_000).contains(&len), "a message of {len} bytes");
                let bytes = (0..len.div_ceil(8)).map(|_| word()).collect::<Result<Vec<_>>>()?;
                let bytes: Vec<u8> = bytes.into_iter().flat_map(u64::to_le_bytes).collect();
                let (text, padding) = bytes.split_at(len as usize);
                ensure!(str::from_utf8(text).is_ok() && padding.iter().all(|byte| *byte == 0));
            }
        }
    }
    Ok(())
}

fn start(root: &std::path::Path, arguments: &[&str]) -> Result<Child> {
    let mut builder = Command::new(program("drover-builder")?);
    builder.args(arguments).arg("--store").arg(root).args(["--sandbox-shell", "/bin/busybox"]);
    builder.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    builder.spawn().context("cannot start drover-builder")
}

fn replay(version: Version, steps: &[Step], at_once: bool) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let spelling: &[&str] = if at_once { &["--serve", "--write"] } else { &["serve", "--write"] };
    let mut child = start(dir.path(), spelling)?;
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let (mut stdin, mut stdout) = (stdin.context("no stdin")?, stdout.context("no stdout")?);
    let mut stderr = child.stderr.take().context("no stderr")?;
    let log = thread::spawn(move || {
        let mut log = String::new();
        stderr.read_to_string(&mut log).map(|_| log)
    });
    let result = (|| -> Result<()> {
        if at_once {
            let all: Vec<u8> = steps.iter().flat_map(|step| step.request.clone()).collect();
            // Open until the last answer is there: a client that hangs up has its build cancelled.
            let sender = thread::spawn(move || stdin.write_all(&all).map(|()| stdin));
            for step in steps {
                expect(&mut stdout, &step.answer).context(step.what)?;
            }
            drop(sender.join().expect("sending does not panic")?);
        } else {
            for step in steps {
                stdin.write_all(&step.request)?;
                expect(&mut stdout, &step.answer).context(step.what)?;
            }
            drop(stdin);
        }
        let mut rest = Vec::new();
        stdout.read_to_end(&mut rest)?;
        ensure!(rest.is_empty(), "it goes on with {rest:02x?}");
        Ok(())
    })();
    let _ = result.is_err().then(|| child.kill());
    let status = child.wait()?;
    let log = log.join().expect("reading does not panic")?;
    result.with_context(|| format!("version {version:x}, at once: {at_once}; {log}"))?;
    ensure!(status.success(), "version {version:x}: {status}: {log}");
    let root = dir.path().to_str().context("temporary directories are UTF-8")?;
    Peer::new(Nix::V2_34)?.run("nix-store", &["--store", root, "--verify", "--check-contents"])?;
    drover_store::fs::delete(&dir.path().join("nix"))?;
    Ok(())
}

#[test]
fn every_version_to_the_byte() -> Result<()> {
    for version in VERSIONS {
        replay(version, &session(version), false)?;
    }
    Ok(())
}

#[test]
fn clients_that_do_not_wait_for_answers() -> Result<()> {
    for version in [0x200, 0x204, 0x206, 0x207, 0x208] {
        replay(version, &session(version), true)?;
    }
    Ok(())
}

#[test]
fn other_majors_and_other_commands_end_the_session() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let greeting = client_hello(0x207);
    let say = |bytes: &[u8]| -> Result<(Option<i32>, Vec<u8>, String)> {
        let mut child = start(dir.path(), &["serve", "--write"])?;
        let mut stdin = child.stdin.take().context("no stdin")?;
        stdin.write_all(bytes)?;
        drop(stdin);
        let output = child.wait_with_output()?;
        Ok((output.status.code(), output.stdout, String::from_utf8(output.stderr)?))
    };
    for (what, bytes, answer) in [
        ("protocol 1", client_hello(0x101), vec![]),
        ("protocol 3", client_hello(0x300), vec![]),
        ("a browser", b"GET / HTTP/1.1\r\n\r\n".to_vec(), vec![]),
        ("half a greeting", greeting[..12].to_vec(), vec![]),
        ("command 0", [&greeting[..], &u(0)].concat(), server_hello(0x207)),
        ("command 10", [&greeting[..], &u(10)].concat(), server_hello(0x207)),
    ] {
        let (code, said, log) = say(&bytes)?;
        ensure!(code.is_some_and(|code| code != 0) && said == answer, "{what}: {code:?} {said:02x?}");
        ensure!(log.lines().count() == 1 && log.starts_with("drover-builder: "), "{what}: {log}");
    }
    // A greeting and nothing else is a session like any other: `nix store info` holds no other.
    ensure!(say(&greeting)? == (Some(0), server_hello(0x207), String::new()));
    Ok(())
}
