//! A server that lies: the client half believes nothing that it can check, and allocates nothing on a claim.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use drover_nix::{PathInfo, Sha256, StoreDir, StorePath};
use drover_serve::{BuildOptions, BuildTarget, Client, Error};

use super::bytes::*;

type Connection<'a> = Client<&'a [u8], std::io::Sink>;

/// What a client makes of this answer, from a server of protocol 2.7.
fn ask<T>(answer: &[u8], ask: impl FnOnce(&mut Connection<'_>) -> Result<T, Error>) -> Result<T, Error> {
    ask_at(0x207, answer, ask)
}

fn ask_at<T>(
    version: u64,
    answer: &[u8],
    ask: impl FnOnce(&mut Connection<'_>) -> Result<T, Error>,
) -> Result<T, Error> {
    let stream = [u(0x5452_eecb), u(version), answer.to_vec()].concat();
    let mut client = Client::connect(stream.as_slice(), std::io::sink(), StoreDir::default())?;
    ask(&mut client)
}

fn set(paths: &[&StorePath]) -> BTreeSet<StorePath> {
    paths.iter().copied().cloned().collect()
}

#[track_caller]
fn refused<T: std::fmt::Debug>(what: &str, result: Result<T, Error>) {
    match result {
        Ok(value) => panic!("{what} is believed: {value:?}"),
        Err(error) => {
            // Not a connection that broke: the server is to blame, and is said to be.
            assert!(!error.is_disconnect() && error.category() != "backend", "{what}: {error}");
            assert!(!error.to_string().contains('\n'), "{what}: {error}");
        }
    }
}

#[test]
fn greetings() {
    let connect = |bytes: &[u8]| Client::connect(bytes, std::io::sink(), StoreDir::default()).map(drop);
    refused("a login shell", connect(b"Last login: Mon Nov 23 from 10.0.0.1\n"));
    refused("the client's own magic", connect(&hello()));
    refused("another major version", connect(&[u(0x5452_eecb), u(0x307)].concat()));
    refused("a version of 64 bits", connect(&[u(0x5452_eecb), u(u64::MAX)].concat()));
}

#[test]
fn sets_of_paths() {
    let (a, b) = (path("a"), path("b"));
    for huge in [1 << 32, (1 << 63) - 1, 1 << 63, u64::MAX] {
        refused("a count", ask(&u(huge), |c| c.query_valid_paths(&set(&[&a]), true, true)));
        refused("a length", ask(&[u(1), u(huge)].concat(), |c| c.query_valid_paths(&set(&[&a]), true, true)));
        refused("a closure's count", ask(&u(huge), |c| c.query_closure(&set(&[&a]), false)));
    }
    let stray = [l(&[full(&a), full(&b)])].concat();
    refused("a path that nobody asked for", ask(&stray, |c| c.query_valid_paths(&set(&[&a]), true, true)));
    let outside = l(&["/etc/passwd"]);
    refused("a path outside the store", ask(&outside, |c| c.query_closure(&set(&[&a]), false)));
}

#[test]
fn path_infos() {
    let (a, b) = (path("a"), path("b"));
    let hash = s(Sha256::of(b"").to_string());
    let record = [s(""), u(0), u(120), u(120), hash.clone(), s(""), u(0)].concat();
    let ask_for_a = |answer: &[u8]| ask(answer, |c| c.query_path_infos(&set(&[&a])));
    assert!(ask_for_a(&[s(full(&a)), record.clone(), s("")].concat()).is_ok());
    refused("another path", ask_for_a(&[s(full(&b)), record.clone(), s("")].concat()));
    let twice = [s(full(&a)), record.clone(), s(full(&a)), record, s("")].concat();
    refused("a path twice", ask_for_a(&twice));
    for huge in [1 << 32, 1 << 63, u64::MAX] {
        let name = s(full(&a));
        let to_signatures = [s(""), u(0), u(120), u(120), hash.clone(), s("")].concat();
        refused("a path's length", ask_for_a(&u(huge)));
        refused("a deriver's length", ask_for_a(&[name.clone(), u(huge)].concat()));
        refused("references", ask_for_a(&[name.clone(), s(""), u(huge)].concat()));
        refused("signatures", ask_for_a(&[name, to_signatures, u(huge)].concat()));
    }
    for (what, hash) in [("no hash", ""), ("a short hash", "sha256:00"), ("words", "trust me")] {
        let answer = [s(full(&a)), s(""), u(0), u(120), u(120), s(hash), s(""), u(0), s("")].concat();
        refused(what, ask_for_a(&answer));
    }
    let bad_ca = [s(full(&a)), s(""), u(0), u(1), u(1), hash, s("fixed:x"), u(0), s("")].concat();
    refused("a content address that is none", ask_for_a(&bad_ca));
}

#[test]
fn archives() {
    let a = path("a");
    let dump = |answer: &[u8]| ask(answer, |c| c.dump_store_path(&a, &mut std::io::sink()));
    assert!(dump(&file_nar(b"x")).is_ok());
    refused("no archive", dump(&[b'x'; 200]));
    let twice = directory(&[(b"x", symlink("/etc")), (b"x", file(b"bad"))]);
    refused("a name twice", dump(&[s("nix-archive-1"), twice].concat()));
    let level =
        [s("("), s("type"), s("directory"), s("entry"), s("("), s("name"), s("d"), s("node")].concat();
    refused("endless nesting", dump(&[s("nix-archive-1"), level.repeat(100_000)].concat()));
    refused("a huge token", dump(&[s("nix-archive-1"), u(1 << 40), vec![0; 4096]].concat()));
}

#[test]
fn export_streams() {
    let (a, b) = (path("a"), path("b"));
    let export = |answer: &[u8]| ask(answer, |c| c.export_paths(&set(&[&a]), &mut std::io::sink()));
    let record =
        |path: &StorePath| [u(1), file_nar(b"x"), u(EXPORT_MAGIC), s(full(path)), u(0), s(""), u(0)].concat();
    assert!(export(&[record(&a), u(0)].concat()).is_ok());
    refused("a path that nobody asked for", export(&[record(&b), u(0)].concat()));
    refused("a path twice", export(&[record(&a), record(&a), u(0)].concat()));
    refused("nothing", export(&u(0)));
    refused("neither an archive nor the end", export(&u(2)));
    refused("no magic number", export(&[u(1), file_nar(b"x"), u(7), record(&a)].concat()));
    for huge in [1 << 40, 1 << 63, u64::MAX] {
        let before = [u(1), file_nar(b"x"), u(EXPORT_MAGIC), s(full(&a))].concat();
        refused("references", export(&[before, u(huge)].concat()));
    }
}

#[test]
fn archives_of_another_size_than_was_said() {
    // Before protocol 2.4 a server says how long a path's archive is, and the client has to ask for it to know its hash.
    let (a, nar) = (path("a"), file_nar(b"contents"));
    let infos = |size: usize| {
        let info = [s(full(&a)), s(""), u(0), u(0), u(size as u64), s("")].concat();
        ask_at(0x203, &[info, nar.clone()].concat(), |c| c.query_path_infos(&set(&[&a])))
    };
    assert!(infos(nar.len()).is_ok());
    refused("a longer archive", infos(nar.len() - 8));
    refused("a shorter archive", infos(nar.len() + 8));
}

#[test]
fn added_paths() {
    let nar = file_nar(b"contents");
    let info = PathInfo {
        path: path("a"),
        nar_hash: Sha256::of(&nar),
        nar_size: nar.len() as u64,
        references: BTreeSet::new(),
        deriver: None,
        signatures: Vec::new(),
        ca: None,
    };
    for word in [0, 2, u64::MAX] {
        refused("not 1", ask(&u(word), |c| c.add_to_store_nar(&info, &mut nar.as_slice())));
    }
}

#[test]
fn build_results() -> Result<()> {
    let drv = drover_nix::BasicDerivation {
        name: "made".into(),
        outputs: [("out".parse()?, drover_nix::DerivationOutput::InputAddressed(path("made")))].into(),
        input_srcs: BTreeSet::new(),
        system: "x86_64-linux".into(),
        builder: "/bin/sh".into(),
        args: Vec::new(),
        env: [].into(),
    };
    let drv_path = path("made.drv");
    let build = |version: u64, answer: &[u8]| {
        ask_at(version, answer, |c| c.build_derivation(&drv_path, &drv, &BuildOptions::default()))
    };
    let head = [u(0), s(""), u(1), u(0), u(1), u(2)].concat();
    ensure!(build(0x207, &[head.clone(), u(0)].concat()).is_ok());
    for status in [15, 255, 256, 1 << 32, u64::MAX] {
        refused("a status that there is not", build(0x207, &[u(status), head[8..].to_vec(), u(0)].concat()));
    }
    for huge in [1 << 32, 1 << 63, u64::MAX] {
        refused("a message's length", build(0x207, &[u(3), u(huge)].concat()));
        refused("a count of outputs", build(0x207, &[head.clone(), u(huge)].concat()));
        refused("a count of outputs", build(0x208, &[head.clone(), u(huge)].concat()));
        refused("a realisation's length", build(0x207, &[head.clone(), u(1), u(huge)].concat()));
    }
    let id = format!("sha256:{}!out", "0".repeat(64));
    let json = |text: &str| build(0x207, &[head.clone(), u(1), s(&id), s(text)].concat());
    let base = path("made");
    ensure!(json(&format!(r#"{{"id":"{id}","outPath":"{base}"}}"#)).is_ok());
    refused("a full path", json(&format!(r#"{{"id":"{id}","outPath":"/nix/store/{base}"}}"#)));
    refused("a path that climbs", json(&format!(r#"{{"id":"{id}","outPath":"../../{base}"}}"#)));
    refused("nested JSON", json(&"[".repeat(100_000)));
    refused("no JSON", json("{"));
    let output = [s("out"), s(full(&base)), u(0)].concat();
    let twice = [head.clone(), u(2), output.clone(), output].concat();
    refused("an output twice", build(0x208, &twice));
    let climbing = [head, u(1), s("../out"), s(full(&base)), u(0)].concat();
    refused("an output's name with a slash", build(0x208, &climbing));
    let target = [BuildTarget { path: base, outputs: None }];
    for status in [1, 2, 13, 15, 100, 101, u64::MAX] {
        let result =
            ask(&[u(status), s("no")].concat(), |c| c.build_paths(&target, &BuildOptions::default()));
        ensure!(matches!(result, Err(Error::BuildPaths { .. })), "{status} is taken for success: {result:?}");
    }
    let endless = [u(9), u(1 << 40)].concat();
    refused("a message's length", ask(&endless, |c| c.build_paths(&target, &BuildOptions::default())));
    Ok(())
}
