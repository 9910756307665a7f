//! Drover's client against transcripts of servers of every version.

use std::collections::BTreeSet;
use std::io::{PipeReader, PipeWriter, Read, Write as _, pipe};
use std::thread::{self, JoinHandle};

use anyhow::{Context as _, Result, ensure};
use drover_nix::{BasicDerivation, DerivationOutput, OutputName, PathInfo, Sha256, StoreDir, StorePath};
use drover_serve::{BuildOptions, BuildStatus, BuildTarget, Client, Error};

use super::notation::*;

/// What the client has to send, and what it gets for it.
struct Exchange {
    what: &'static str,
    request: Vec<u8>,
    answer: Vec<u8>,
}

const TIME: u64 = 1_700_000_000;

/// An answer with its gaps filled.
fn filled(parts: Vec<Part>) -> Vec<u8> {
    let fill = |part| match part {
        Part::Bytes(bytes) => bytes,
        Part::Time => u(TIME),
        Part::Failure => u(9),
        Part::Message => s("this is why"),
    };
    parts.into_iter().flat_map(fill).collect()
}

/// A server that knows its part by heart. It ends with an error where the client departs from the text.
fn play(exchanges: Vec<Exchange>) -> Result<(PipeReader, PipeWriter, JoinHandle<Result<()>>)> {
    let (mut input, to_server) = pipe()?;
    let (from_server, mut output) = pipe()?;
    let server = thread::spawn(move || {
        for Exchange { what, request, answer } in exchanges {
            for (index, expected) in request.chunks(8).enumerate() {
                let mut word = [0; 8];
                input.read_exact(&mut word).with_context(|| format!("{what}: word {index} is missing"))?;
                ensure!(word == expected, "{what}: word {index} is {word:02x?}, not {expected:02x?}");
            }
            output.write_all(&answer).with_context(|| format!("{what}: the client is gone"))?;
        }
        let mut rest = Vec::new();
        input.read_to_end(&mut rest)?;
        ensure!(rest.is_empty(), "the client goes on with {rest:02x?}");
        Ok(())
    });
    Ok((from_server, to_server, server))
}

fn path(base: &str) -> Result<StorePath> {
    Ok(base.parse()?)
}

fn paths(bases: &[&str]) -> Result<BTreeSet<StorePath>> {
    bases.iter().map(|base| path(base)).collect()
}

/// The value that stands for the notation's record, as a server of this version can tell it.
fn info(record: &Info<'_>) -> Result<PathInfo> {
    Ok(PathInfo {
        path: path(record.base)?,
        nar_hash: Sha256::of(&nar("hello\n")),
        nar_size: HELLO_SIZE,
        references: paths(record.references)?,
        deriver: record.deriver.map(path).transpose()?,
        signatures: record.signatures.iter().map(|text| Ok(text.parse()?)).collect::<Result<_>>()?,
        ca: Some(record.ca).filter(|ca| !ca.is_empty()).map(str::parse).transpose()?,
    })
}

fn derivation(out: &str, script: &str) -> Result<BasicDerivation> {
    let name = &out[33..];
    let full = format!("/nix/store/{out}");
    let env = [("builder", "/bin/sh"), ("name", name), ("out", &full), ("system", "x86_64-linux")];
    Ok(BasicDerivation {
        name: name.into(),
        outputs: [(OutputName::out(), DerivationOutput::InputAddressed(path(out)?))].into(),
        input_srcs: BTreeSet::new(),
        system: "x86_64-linux".into(),
        builder: "/bin/sh".into(),
        args: vec!["-c".into(), script.into()],
        env: env.into_iter().map(|(key, value)| (key.into(), value.into())).collect(),
    })
}

fn build_options(repeats: u64) -> BuildOptions {
    BuildOptions {
        max_silent_seconds: 50,
        timeout_seconds: 60,
        max_log_bytes: 7 << 20,
        repeats,
        enforce_determinism: repeats != 0,
        keep_failed: true,
    }
}

fn session(version: Version) -> Result<()> {
    let common = version.min(OURS);
    let hello = nar("hello\n");
    let source = source();
    let user = Info {
        base: USER,
        references: &[SOURCE, USER],
        nar_size: HELLO_SIZE,
        nar_hash: HELLO_NIX32,
        ..Info::default()
    };
    let known = Info { nar_hash: HELLO_NIX32, ..source.clone() };
    let mut script = Vec::new();
    let mut say = |what, request, answer| script.push(Exchange { what, request, answer });
    say("greeting", client_hello(OURS), server_hello(version));
    say("query", query_valid_paths(true, true, &[SOURCE, USER]), u(0));
    let addition = match version {
        0x205.. => source.addition(&hello),
        _ => [u(4), source.record(&hello, false), u(0)].concat(),
    };
    say("add", addition, u(1));
    say("import", [u(4), user.record(&hello, false), u(0)].concat(), u(1));
    let infos = [known.item(common), user.item(common), s("")].concat();
    say("infos", query_path_infos(&[SOURCE, MISSING, USER]), infos);
    if version < 0x204 {
        say("what the source's hash is", dump_store_path(SOURCE), hello.clone());
        say("what the user's hash is", dump_store_path(USER), hello.clone());
    }
    say("dump", dump_store_path(USER), hello.clone());
    let export = [source.record(&hello, false), user.record(&hello, true), u(0)].concat();
    say("export", [u(5), u(0), set(&[SOURCE, USER])].concat(), export);
    say("closure", query_closure(true, &[USER]), set(&[SOURCE, USER]));
    say("build paths", build_paths(common, &[&format!("{KEPT_DRV}!out"), SOURCE]), u(0));
    // What Nix's server makes of its exit code, and a number that some clients take for a success.
    for number in [100, 1] {
        say("build paths in vain", build_paths(common, &[KEPT_DRV]), [u(number), s("no")].concat());
    }
    if version >= 0x201 {
        let built = filled(build_result(common, 0, &[SENT_OUT]));
        say("build", build_derivation(common, SENT_DRV, SENT_OUT, "echo sent > $out", 0), built);
        let failed = filled(build_result(common, 3, &[]));
        say("build in vain", build_derivation(common, FAILS_DRV, FAILS_OUT, "exit 3", 1), failed);
    }
    say("at the end", query_valid_paths(false, false, &[]), u(0));
    let (input, output, server) = play(script)?;

    let result = (|| -> Result<()> {
        let mut client = Client::connect(input, output, StoreDir::default())?;
        ensure!(u64::from(client.version().0) == common);
        ensure!(client.query_valid_paths(&paths(&[SOURCE, USER])?, true, true)?.is_empty());
        let (source, user) = (info(&source)?, info(&user)?);
        client.add_to_store_nar(&source, &mut hello.as_slice())?;
        client.import_paths([(&user, &mut hello.as_slice() as &mut dyn Read)])?;

        let infos = client.query_path_infos(&paths(&[SOURCE, MISSING, USER])?)?;
        // Before 2.4 there is no way to say these.
        let told = match common {
            0x204.. => source.clone(),
            _ => PathInfo { ca: None, signatures: Vec::new(), ..source.clone() },
        };
        ensure!(infos.values().eq([&told, &user]), "{infos:?}");
        let mut received = Vec::new();
        ensure!(client.dump_store_path(&path(USER)?, &mut received)? == HELLO_SIZE && received == hello);
        received.clear();
        let exported = client.export_paths(&paths(&[SOURCE, USER])?, &mut received)?;
        let told = PathInfo { ca: None, signatures: Vec::new(), ..source.clone() };
        ensure!(exported == [told, user] && received == hello.repeat(2), "{exported:?}");
        let closure = client.query_closure(&paths(&[USER])?, true)?;
        ensure!(closure == paths(&[SOURCE, USER])?);

        let all = BuildTarget { path: path(KEPT_DRV)?, outputs: None };
        let one = BuildTarget { outputs: Some([OutputName::out()].into()), ..all.clone() };
        let there = BuildTarget { path: path(SOURCE)?, outputs: None };
        client.build_paths(&[one, there], &build_options(0))?;
        for expected in [BuildStatus::PermanentFailure, BuildStatus::MiscFailure] {
            match client.build_paths(std::slice::from_ref(&all), &build_options(0)) {
                Err(Error::BuildPaths { status, message }) => ensure!(status == expected && message == "no"),
                other => anyhow::bail!("{other:?}"),
            }
        }

        let sent = derivation(SENT_OUT, "echo sent > $out")?;
        let result = client.build_derivation(&path(SENT_DRV)?, &sent, &build_options(0));
        if version < 0x201 {
            ensure!(matches!(result, Err(Error::TooOld { .. })), "{result:?}");
        } else {
            let result = result?;
            ensure!(result.status == BuildStatus::Built && result.error_message.is_empty(), "{result:?}");
            let times = if common >= 0x203 { (1, TIME, TIME) } else { (0, 0, 0) };
            ensure!((result.times_built, result.start_time, result.stop_time) == times, "{result:?}");
            let listed: Vec<_> = result.built_outputs.values().map(|built| built.path.clone()).collect();
            let expected = if common >= 0x206 { vec![path(SENT_OUT)?] } else { Vec::new() };
            ensure!(listed == expected, "{listed:?}");
            let fails = derivation(FAILS_OUT, "exit 3")?;
            let result = client.build_derivation(&path(FAILS_DRV)?, &fails, &build_options(1))?;
            ensure!(result.status == BuildStatus::PermanentFailure, "{result:?}");
            ensure!(result.error_message == "this is why" && result.built_outputs.is_empty(), "{result:?}");
        }
        ensure!(client.query_valid_paths(&BTreeSet::new(), false, false)?.is_empty());
        Ok(())
    })();
    // The server knows more exactly where they part.
    server.join().expect("the server does not panic")?;
    result
}

#[test]
fn our_client_to_the_byte_with_servers_of_every_version() -> Result<()> {
    for version in VERSIONS {
        session(version).with_context(|| format!("version {version:x}"))?;
    }
    Ok(())
}

#[test]
fn our_client_tells_other_programs_from_servers() -> Result<()> {
    for answer in [server_hello(0x101), server_hello(0x300), b"Welcome to this machine!".to_vec()] {
        let said = Client::connect(answer.as_slice(), std::io::sink(), StoreDir::default()).map(drop);
        ensure!(matches!(said, Err(Error::Magic { .. } | Error::UnsupportedVersion { .. })), "{said:?}");
    }
    Ok(())
}
