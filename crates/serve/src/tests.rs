//! Both halves together, over real pipes, with a store in memory; and the server alone against hand-made bytes.

use std::collections::BTreeSet;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::thread::{self, JoinHandle};

use drover_nix::{DerivationOutput, OutputName, PathInfo, Sha256, StoreDir, StorePath};

use crate::derivation::tests::hello;
use crate::notation::{s, u};
use crate::testing::{MemoryStore, file_nar, info_of};
use crate::{BuildOptions, BuildResult, BuildStatus, BuiltOutput, Client, Error, Version, serve};

const A: &str = "i00sflxqsj37lfmf95m8mn0grv615hpj-a";
const B: &str = "q4mzjdlh5px6977h7v5fdsk1p33yg583-b";
const DRV: &str = "jwmbpldsdgfjhkxk317jn55jilyfl63f-hello.drv";

fn path(base: &str) -> StorePath {
    base.parse().unwrap()
}

fn set(bases: &[&str]) -> BTreeSet<StorePath> {
    bases.iter().map(|base| path(base)).collect()
}

type Server = JoinHandle<(MemoryStore, Result<(), Error>)>;

fn start(mut store: MemoryStore, write: bool) -> (PipeReader, PipeWriter, Server) {
    let (server_input, client_output) = io::pipe().unwrap();
    let (client_input, server_output) = io::pipe().unwrap();
    let server = thread::spawn(move || {
        let result = serve(server_input, server_output, &mut store, &StoreDir::default(), write);
        (store, result)
    });
    (client_input, client_output, server)
}

fn connect(store: MemoryStore, write: bool) -> (Client<PipeReader, PipeWriter>, Server) {
    let (input, output, server) = start(store, write);
    (Client::connect(input, output, StoreDir::default()).unwrap(), server)
}

/// Runs the server over bytes in memory. Its answers without the greeting's.
fn answer(store: &mut MemoryStore, version: u64, request: &[u8]) -> (Vec<u8>, Result<(), Error>) {
    let input = [&u(0x390c_9deb), &u(version), request].concat();
    let mut output = Vec::new();
    let result = serve(input.as_slice(), &mut output, store, &StoreDir::default(), true);
    (output.split_off(16), result)
}

fn p(base: &str) -> Vec<u8> {
    s(&format!("/nix/store/{base}"))
}

fn store_with_a_and_b() -> MemoryStore {
    let mut store = MemoryStore::default();
    store.insert(path(B), &[], file_nar(b"b"));
    store.insert(path(A), &[&path(A), &path(B)], file_nar(b"a"));
    store
}

/// One output, built from nothing.
fn building_store() -> MemoryStore {
    let mut store = store_with_a_and_b();
    store.builder = Some(Box::new(|store, _, derivation, _| {
        let (name, output) = derivation.outputs.iter().next().unwrap();
        let out = output.path(&StoreDir::default(), &derivation.name, name).unwrap().unwrap();
        store.insert(out.clone(), &[], file_nar(b"built"));
        let output = BuiltOutput { path: out, signatures: Vec::new() };
        BuildResult {
            times_built: 1,
            start_time: 10,
            stop_time: 20,
            built_outputs: [(name.clone(), output)].into(),
            ..BuildResult::new(BuildStatus::Built)
        }
    }));
    store
}

#[test]
fn a_whole_session() {
    let (mut client, server) = connect(building_store(), true);
    assert_eq!(client.version(), Version(0x208));
    let missing = "f8g8x4m83da3b2f79iv84q2r3qlc58lr-hello";
    let asked = set(&[A, missing]);
    assert_eq!(client.query_valid_paths(&asked, true, false).unwrap(), set(&[A]));
    let infos = client.query_path_infos(&set(&[A, B, missing])).unwrap();
    assert_eq!(infos.keys().cloned().collect::<BTreeSet<_>>(), set(&[A, B]));
    assert_eq!(infos[&path(A)].references, set(&[A, B]));
    let mut nar = Vec::new();
    assert_eq!(client.dump_store_path(&path(A), &mut nar).unwrap(), nar.len() as u64);
    assert_eq!(nar, file_nar(b"a"));
    assert_eq!(client.query_closure(&set(&[A]), false).unwrap(), set(&[A, B]));

    let source = file_nar(b"source");
    let info = info_of(path("8bazivnbipbyi569623skw5zm91z6kc2-src"), &[&path(B)], &source);
    client.add_to_store_nar(&info, &mut source.as_slice()).unwrap();

    let derivation = hello(DerivationOutput::InputAddressed(path(missing)));
    let options = BuildOptions { timeout_seconds: 5, ..BuildOptions::default() };
    let result = client.build_derivation(&path(DRV), &derivation, &options).unwrap();
    assert_eq!((result.status, result.stop_time), (BuildStatus::Built, 20));
    assert_eq!(result.built_outputs[&OutputName::out()].path, path(missing));
    nar.clear();
    client.dump_store_path(&path(missing), &mut nar).unwrap();
    assert_eq!(nar, file_nar(b"built"));

    drop(client);
    let (store, result) = server.join().unwrap();
    result.unwrap();
    assert_eq!(store.locked, asked);
    assert!(store.paths.contains_key(&info.path));
}

#[test]
fn additions_need_no_answer_in_between() {
    let (mut client, server) = connect(MemoryStore::default(), true);
    let mut infos: Vec<PathInfo> = Vec::new();
    for number in 0..1000u32 {
        // Of very different sizes, each with a reference to the one before.
        let size = if number % 100 == 0 { 1 << 20 } else { number as usize };
        let nar = file_nar(&vec![b'x'; size]);
        let mut hash = [0; 20];
        hash[..4].copy_from_slice(&number.to_le_bytes());
        let path = StorePath::from_parts(hash, "x").unwrap();
        let info = info_of(path, infos.last().map(|last| &last.path).as_slice(), &nar);
        client.send_nar(&info, &mut nar.as_slice()).unwrap();
        infos.push(info);
    }
    let paths: BTreeSet<StorePath> = infos.iter().map(|info| info.path.clone()).collect();
    assert_eq!(client.query_valid_paths(&paths, false, false).unwrap(), paths);
    drop(client);
    server.join().unwrap().1.unwrap();
}

#[test]
fn answers_wait_for_what_they_promise() {
    // A client that sends everything before it reads anything gets no answer that was not settled.
    let nar = file_nar(b"x");
    let request = |base: &str| {
        let hash = Sha256::of(&nar).to_hex();
        let size = nar.len() as u64;
        [u(9), p(base), s(""), s(&hash), u(0), u(0), u(size), u(0), u(0), s(""), nar.clone()].concat()
    };
    let requests = [request(A), request(B), u(1), u(0), u(0), u(2), p(A), p(B)].concat();
    let (bytes, result) = answer(&mut MemoryStore::default(), 0x207, &requests);
    result.unwrap();
    assert_eq!(bytes, [u(1), u(1), u(2), p(A), p(B)].concat());
}

#[test]
fn queries_to_the_byte() {
    let mut store = store_with_a_and_b();
    let (bytes, _) = answer(&mut store, 0x207, &[u(1), u(1), u(0), u(1), p(B)].concat());
    assert_eq!(bytes, [u(1), p(B)].concat());
    assert_eq!(store.locked, set(&[B]));
    let (bytes, _) = answer(&mut store, 0x207, &[u(1), u(1), u(0), u(1), p(DRV)].concat());
    assert_eq!(bytes, u(0));
    let (bytes, _) = answer(&mut store, 0x207, &[u(2), u(1), p(DRV)].concat());
    assert_eq!(bytes, u(0));
    let (bytes, _) = answer(&mut store, 0x207, &[u(2), u(1), p(B)].concat());
    let nar = file_nar(b"b");
    let (size, hash) = (u(nar.len() as u64), s(&Sha256::of(&nar).to_string()));
    assert_eq!(bytes, [p(B), s(""), u(0), size.clone(), size.clone(), hash, s(""), u(0), s("")].concat());
    let (bytes, _) = answer(&mut store, 0x200, &[u(2), u(1), p(B)].concat());
    assert_eq!(bytes, [p(B), s(""), u(0), size.clone(), size, s("")].concat());
    let (bytes, _) = answer(&mut store, 0x207, &[u(3), p(B)].concat());
    assert_eq!(bytes, nar);
}

#[test]
fn a_build_to_the_byte() {
    let out = "f8g8x4m83da3b2f79iv84q2r3qlc58lr-hello";
    let derivation = [u(1), s("out"), p(out), s(""), s(""), u(0), s("x"), s("/b"), u(0), u(0)].concat();
    let options = |count: usize| vec![0; 8 * count];
    let request = |count| [u(8), p(DRV), derivation.clone(), options(count)].concat();
    let id = format!("sha256:{}!out", "0".repeat(64));
    let json = format!(r#"{{"dependentRealisations":{{}},"id":"{id}","outPath":"{out}","signatures":[]}}"#);
    let common = [u(0), s(""), u(1), u(0), u(10), u(20)].concat();
    for (version, options, answered) in [
        (0x201, 2, [u(0), s("")].concat()),
        (0x205, 5, common.clone()),
        (0x206, 5, [common.clone(), u(1), s(&id), s(&json)].concat()),
        (0x207, 6, [common.clone(), u(1), s(&id), s(&json)].concat()),
        (0x208, 6, [common, u(1), s("out"), p(out), u(0)].concat()),
    ] {
        let (bytes, result) = answer(&mut building_store(), version, &request(options));
        result.unwrap();
        assert_eq!(bytes, answered, "{version:x}");
    }
}

#[test]
fn what_a_wrong_size_does() {
    let nar = file_nar(b"x");
    let request = |hash: &[u8], size: u64| {
        let hash = Sha256::of(hash).to_hex();
        [u(9), p(A), s(""), s(&hash), u(0), u(0), u(size), u(0), u(0), s(""), nar.clone()].concat()
    };
    let size = nar.len() as u64;
    let follow_up = [u(1), u(0), u(0), u(0)].concat();
    for (hash, size) in [(nar.as_slice(), size - 8), (&nar, size + 8), (&nar, 0), (b"other", size)] {
        for valid_already in [false, true] {
            let mut store = if valid_already { store_with_a_and_b() } else { MemoryStore::default() };
            let before = store.paths.clone();
            let stream = [request(hash, size), follow_up.clone(), vec![0; 64]].concat();
            let (bytes, result) = answer(&mut store, 0x207, &stream);
            // A wrong hash of a path that is there already is nobody's business; all else ends the session.
            let tolerated = valid_already && size == nar.len() as u64;
            assert_eq!(bytes.is_empty(), !tolerated, "{size} {valid_already}: {result:?}");
            assert_eq!(store.paths, before);
        }
    }
}

#[test]
fn a_client_counts_what_it_sends() {
    let nar = file_nar(b"x");
    for wrong in [nar.len() as u64 - 8, nar.len() as u64 + 8] {
        let (mut client, server) = connect(MemoryStore::default(), true);
        let info = PathInfo { nar_size: wrong, ..info_of(path(A), &[], &nar) };
        let error = client.add_to_store_nar(&info, &mut nar.as_slice()).unwrap_err();
        assert!(matches!(error, Error::NarSize { .. }), "{error}");
        drop(client);
        let (store, result) = server.join().unwrap();
        assert!(result.is_err() && store.paths.is_empty());
    }
}

#[test]
fn read_only_sessions() {
    let (mut client, server) = connect(store_with_a_and_b(), false);
    assert_eq!(client.query_valid_paths(&set(&[A]), true, true).unwrap(), set(&[A]));
    let nar = file_nar(b"x");
    let error = client.add_to_store_nar(&info_of(path(DRV), &[], &nar), &mut nar.as_slice()).unwrap_err();
    assert!(error.is_disconnect(), "{error}");
    drop(client);
    let (store, result) = server.join().unwrap();
    assert!(matches!(result, Err(Error::NotWritable { command: "AddToStoreNar" })));
    assert_eq!(store.locked, set(&[]));
    assert_eq!(store.calls[0], "query-valid-paths lock=false substitute=false");
}

#[test]
fn export_and_import() {
    let mut source = store_with_a_and_b();
    let (stream, _) = answer(&mut source, 0x207, &[u(5), u(0), u(2), p(A), p(B)].concat());
    let record = |nar: &[u8], trailer: &[u8]| [&u(1), nar, &u(0x4558_494e), trailer].concat();
    let expected = [
        record(&file_nar(b"b"), &[p(B), u(0), s(""), u(0)].concat()),
        record(&file_nar(b"a"), &[p(A), u(2), p(A), p(B), s(""), u(0)].concat()),
        u(0),
    ];
    assert_eq!(stream, expected.concat(), "references come first");
    let mut target = MemoryStore::default();
    let (bytes, result) = answer(&mut target, 0x206, &[u(4), stream].concat());
    result.unwrap();
    assert_eq!(bytes, u(1));
    assert_eq!(target.paths, source.paths);
}

#[test]
fn a_session_cut_off_at_any_byte_changes_nothing_more() {
    let nar = file_nar(b"x");
    let hash = Sha256::of(&nar).to_hex();
    let add = [u(9), p(A), s(""), s(&hash), u(0), u(0), u(nar.len() as u64), u(0), u(0), s(""), nar].concat();
    let query = [u(1), u(1), u(0), u(1), p(A)].concat();
    let export = [u(4), u(0)].concat();
    let whole = [add.clone(), query.clone(), export].concat();
    let ends = [0, add.len(), add.len() + query.len(), whole.len()];
    for len in 0..=whole.len() {
        let mut store = MemoryStore::default();
        let (bytes, result) = answer(&mut store, 0x207, &whole[..len]);
        assert_eq!(result.is_ok(), ends.contains(&len), "{len}: {result:?}");
        assert_eq!(store.paths.contains_key(&path(A)), len >= add.len(), "{len}");
        let answers = ends[1..].iter().filter(|end| len >= **end).count();
        assert_eq!(bytes.len(), [0, 8, 8 + 8 + p(A).len(), 24 + p(A).len()][answers]);
    }
}

#[test]
fn an_answer_cut_off_at_any_byte_is_an_error() {
    let derivation = hello(DerivationOutput::InputAddressed(path("f8g8x4m83da3b2f79iv84q2r3qlc58lr-hello")));
    let run = |answers: &[u8]| -> Result<(), Error> {
        let mut client = Client::connect(answers, io::sink(), StoreDir::default())?;
        client.query_valid_paths(&set(&[A, B]), true, true)?;
        client.query_path_infos(&set(&[A, B]))?;
        client.dump_store_path(&path(A), &mut io::sink())?;
        client.build_derivation(&path(DRV), &derivation, &BuildOptions::default())?;
        Ok(())
    };
    // What a server answers, recorded.
    let (input, output, server) = start(building_store(), true);
    let mut recorder = Recorder { input, bytes: Vec::new() };
    let mut client = Client::connect(&mut recorder, output, StoreDir::default()).unwrap();
    client.query_valid_paths(&set(&[A, B]), true, true).unwrap();
    client.query_path_infos(&set(&[A, B])).unwrap();
    client.dump_store_path(&path(A), &mut io::sink()).unwrap();
    client.build_derivation(&path(DRV), &derivation, &BuildOptions::default()).unwrap();
    drop(client);
    server.join().unwrap().1.unwrap();
    run(&recorder.bytes).unwrap();
    for len in 0..recorder.bytes.len() {
        let error = run(&recorder.bytes[..len]).unwrap_err();
        assert!(matches!(error, Error::Closed { .. }), "{len}: {error}");
    }
}

#[test]
fn answers_that_nobody_asked_for() {
    let greeting = [u(0x5452_eecb), u(0x207)].concat();
    let infos = |answer: &[u8]| {
        let bytes = [greeting.clone(), answer.to_vec()].concat();
        let mut client = Client::connect(bytes.as_slice(), io::sink(), StoreDir::default()).unwrap();
        client.query_path_infos(&set(&[A]))
    };
    let hash = Sha256::of(b"").to_string();
    let item = |base| [p(base), s(""), u(0), u(1), u(1), s(&hash), s(""), u(0)].concat();
    assert!(infos(&[item(A), s("")].concat()).is_ok());
    assert!(matches!(infos(&[item(B), s("")].concat()), Err(Error::Invalid { .. })));
    assert!(matches!(infos(&[item(A), item(A), s("")].concat()), Err(Error::Invalid { .. })));
    let bytes = [greeting.clone(), u(1), p(B)].concat();
    let mut client = Client::connect(bytes.as_slice(), io::sink(), StoreDir::default()).unwrap();
    assert!(matches!(client.query_valid_paths(&set(&[A]), false, false), Err(Error::Invalid { .. })));
}

/// A session with a server that speaks no more than this version.
fn connect_at(mut store: MemoryStore, version: u64) -> (Client<PipeReader, PipeWriter>, Server) {
    let (mut server_input, client_output) = io::pipe().unwrap();
    let (client_input, server_output) = io::pipe().unwrap();
    let server = thread::spawn(move || {
        server_input.read_exact(&mut [0; 16]).unwrap();
        let hello = [u(0x390c_9deb), u(version)].concat();
        let input = hello.as_slice().chain(server_input);
        let result = serve(input, server_output, &mut store, &StoreDir::default(), true);
        (store, result)
    });
    (Client::connect(client_input, client_output, StoreDir::default()).unwrap(), server)
}

#[test]
fn whole_sessions_with_servers_of_every_version() {
    for version in 0x200..=0x208 {
        let (mut client, server) = connect_at(building_store(), version);
        assert_eq!(client.version(), Version(version as u16));
        // What the server does not say of a path, before 2.4, the client finds out.
        let infos = client.query_path_infos(&set(&[A, B])).unwrap();
        assert_eq!(infos[&path(A)], info_of(path(A), &[&path(A), &path(B)], &file_nar(b"a")));
        // What has to travel in an export stream, before 2.5, arrives as well, also in great numbers.
        let mut added: Vec<PathInfo> = Vec::new();
        for number in 0..200u32 {
            let nar = file_nar(&vec![b'x'; number as usize]);
            let mut hash = [3; 20];
            hash[..4].copy_from_slice(&number.to_le_bytes());
            let path = StorePath::from_parts(hash, "x").unwrap();
            let info = info_of(path, added.last().map(|last| &last.path).as_slice(), &nar);
            client.send_nar(&info, &mut nar.as_slice()).unwrap();
            added.push(info);
        }
        let paths: BTreeSet<StorePath> = added.iter().map(|info| info.path.clone()).collect();
        assert_eq!(client.query_valid_paths(&paths, true, true).unwrap(), paths);
        assert_eq!(client.query_closure(&set(&[A]), true).unwrap(), set(&[A, B]));
        let derivation =
            hello(DerivationOutput::InputAddressed(path("f8g8x4m83da3b2f79iv84q2r3qlc58lr-hello")));
        let result = client.build_derivation(&path(DRV), &derivation, &BuildOptions::default());
        match version {
            0x200 => assert!(matches!(result, Err(Error::TooOld { .. }))),
            _ => assert_eq!(result.unwrap().status, BuildStatus::Built),
        }
        let error = client.build_paths(&[], &BuildOptions::default()).unwrap_err();
        assert!(matches!(error, Error::BuildPaths { .. }), "{error}");
        drop(client);
        let (store, result) = server.join().unwrap();
        result.unwrap();
        assert!(added.iter().all(|info| store.paths[&info.path].0 == *info));
    }
}

#[test]
fn exports_can_be_imported_again() {
    let (mut client, server) = connect(store_with_a_and_b(), true);
    let mut nars = Vec::new();
    let infos = client.export_paths(&set(&[A, B]), &mut nars).unwrap();
    assert_eq!(infos.iter().map(|info| info.path.clone()).collect::<Vec<_>>(), [path(B), path(A)]);
    drop(client);
    let source = server.join().unwrap().0;
    let (mut client, server) = connect(MemoryStore::default(), true);
    let (mut b, mut a) = nars.split_at(infos[0].nar_size as usize);
    let items: [(&PathInfo, &mut dyn Read); 2] = [(&infos[0], &mut b), (&infos[1], &mut a)];
    client.import_paths(items).unwrap();
    assert_eq!(client.query_valid_paths(&set(&[A, B]), false, false).unwrap(), set(&[A, B]));
    drop(client);
    assert_eq!(server.join().unwrap().0.paths, source.paths);
}

#[test]
fn exports_that_are_not_what_was_asked_for() {
    let item =
        |base| [&u(1), file_nar(b"x").as_slice(), &u(0x4558_494e), &p(base), &u(0), &s(""), &u(0)].concat();
    let export = |stream: &[&[u8]]| {
        let greeting = [u(0x5452_eecb), u(0x207)].concat();
        let bytes = [greeting.as_slice(), &stream.concat()].concat();
        let mut client = Client::connect(bytes.as_slice(), io::sink(), StoreDir::default()).unwrap();
        client.export_paths(&set(&[A, B]), &mut io::sink())
    };
    let (a, b, stray, end) = (item(A), item(B), item(DRV), u(0));
    assert_eq!(export(&[&a, &b, &end]).unwrap().len(), 2);
    for wrong in [&[&a, &end][..], &[&a, &a, &end], &[&a, &stray, &end], &[&a, &b, &stray, &end], &[&u(2)]] {
        let wrong: Vec<&[u8]> = wrong.iter().map(|part| part.as_slice()).collect();
        assert!(matches!(export(&wrong), Err(Error::Invalid { .. })), "{wrong:?}");
    }
    assert!(matches!(export(&[&a]), Err(Error::Closed { .. })));
}

#[test]
fn unknown_and_malformed_requests_end_the_session() {
    for request in [
        u(0),
        u(10),
        [u(3), s("/etc/passwd")].concat(),
        [u(3), s("")].concat(),
        [u(3), p(DRV)].concat(),
        [u(1), u(0), u(0), u(u64::MAX)].concat(),
        [u(8), p(A)].concat(),
        [u(4), u(2)].concat(),
        [u(7), u(0), u(1), p(DRV)].concat(),
    ] {
        let (bytes, result) = answer(&mut store_with_a_and_b(), 0x207, &request);
        assert!(result.is_err() && bytes.is_empty(), "{request:?}");
    }
}

struct Recorder {
    input: PipeReader,
    bytes: Vec<u8>,
}

impl Read for Recorder {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.input.read(buffer)?;
        self.bytes.write_all(&buffer[..count])?;
        Ok(count)
    }
}

#[test]
fn the_rest_of_a_nar_from_any_offset() {
    let nar = file_nar(&[7; 1000]);
    let size = nar.len() as u64;
    let mut store = MemoryStore::default();
    store.insert(path(A), &[], nar.clone());
    let request = |base: &str, offset: u64| [u(0x4452_4f56), p(base), u(offset)].concat();
    for offset in 0..=size {
        let (said, result) = answer(&mut store, 0x207, &request(A, offset));
        result.unwrap();
        assert!(said == nar[usize::try_from(offset).unwrap()..], "{offset}");
    }
    // Nobody is left waiting for what does not come.
    assert!(answer(&mut store, 0x207, &request(A, size + 1)).1.is_err());
    assert!(answer(&mut store, 0x207, &request(B, 0)).1.is_err());

    let (mut client, server) = connect(store, false);
    let mut rest = Vec::new();
    client.dump_store_path_from(&path(A), 500, size, &mut rest).unwrap();
    assert!(rest == nar[500..]);
    // The session goes on behind it.
    assert_eq!(client.query_valid_paths(&set(&[A, B]), false, false).unwrap(), set(&[A]));
    drop(client);
    server.join().unwrap().1.unwrap();
}

#[test]
fn frames_of_a_nar_from_any_offset() {
    let nar = file_nar(&[7; 1000]);
    let size = nar.len() as u64;
    let store = || {
        let mut store = MemoryStore::default();
        store.insert(path(A), &[], nar.clone());
        store.framer = Some(Box::new(|rest| rest.chunks(300).map(<[u8]>::to_vec).collect()));
        store
    };
    let (mut client, server) = connect(store(), false);
    assert!(client.knows_frames().unwrap());
    for offset in [0, 1, 300, size - 1, size] {
        let mut frames = client.dump_store_path_frames(&path(A), offset).unwrap();
        let (mut frame, mut all) = (Vec::new(), Vec::new());
        while frames.next(&mut frame).unwrap() {
            assert!(!frame.is_empty() && frame.len() <= 300);
            all.extend_from_slice(&frame);
        }
        assert!(all == nar[usize::try_from(offset).unwrap()..], "{offset}");
    }
    // The session goes on behind it.
    assert_eq!(client.query_valid_paths(&set(&[A, B]), false, false).unwrap(), set(&[A]));
    drop(client);
    server.join().unwrap().1.unwrap();

    // Nobody is left waiting for what does not come.
    let request = |base: &str, offset: u64| [u(0x4452_4f57), p(base), u(offset)].concat();
    assert!(answer(&mut store(), 0x207, &request(A, size + 1)).1.is_err());
    assert!(answer(&mut store(), 0x207, &request(B, 0)).1.is_err());
}

#[test]
fn a_server_without_frames_is_asked_in_words_that_it_knows() {
    let mut store = MemoryStore::default();
    store.insert(path(A), &[], file_nar(b"x"));
    let (mut client, server) = connect(store, true);
    assert!(!client.knows_frames().unwrap());
    assert_eq!(client.query_valid_paths(&set(&[A, B]), true, true).unwrap(), set(&[A]));
    drop(client);
    let (store, result) = server.join().unwrap();
    result.unwrap();
    // No store hears of the path that stands for the question.
    assert_eq!(store.locked, set(&[A, B]));
}
