//! Requests that lie about lengths, paths, hashes and each other. Each ends the session with one line on standard error,
//! and leaves everything on disk as it was.

use anyhow::{Context as _, Result, ensure};
use drover_nix::derivation::modulo;
use drover_nix::{Derivation, Sha256, StoreDir, StorePath};

use super::arena::Arena;
use super::bytes::*;

/// Runs each session and wants it refused, with the disk as it was before.
fn refused(arena: &Arena, cases: &[(String, Vec<u8>)]) -> Result<()> {
    let before = arena.snapshot()?;
    let valid = arena.store.all_valid_paths()?;
    for (what, input) in cases {
        let outcome = arena.run(input).with_context(|| what.clone())?;
        outcome.expect_refusal().with_context(|| what.clone())?;
        arena.check_unchanged(&before).with_context(|| what.clone())?;
        ensure!(arena.store.all_valid_paths()? == valid, "{what}: the database has changed");
    }
    arena.check_clean()?;
    arena.verify()
}

/// One session that the builder ends with has been served before, so that all lock files and directories are there.
fn used_arena() -> Result<(Arena, StorePath)> {
    let arena = Arena::new()?;
    let there = path("there");
    arena.run(&session(&[Add::new(&there, file_nar(b"there")).bytes()]))?.expect_clean()?;
    Ok((arena, there))
}

fn named<const N: usize>(cases: [(&str, Vec<u8>); N]) -> Vec<(String, Vec<u8>)> {
    cases.map(|(what, request)| (what.to_owned(), session(&[request]))).into()
}

#[test]
fn lengths_and_counts_near_2_to_the_63() -> Result<()> {
    let (arena, there) = used_arena()?;
    let good = Add::new(&path("new"), file_nar(b"x"));
    let build = Build::new("made", "echo > $out").bytes();
    let mut cases = Vec::new();
    for huge in [1 << 63, u64::MAX, u64::MAX - 7, 1 << 40] {
        // A count or a length in every place of every request that has one, with nothing behind it.
        let requests = [
            ("QueryValidPaths' count", [u(1), u(1), u(0), u(huge)].concat()),
            ("QueryValidPaths' path", [u(1), u(1), u(0), u(1), u(huge)].concat()),
            ("QueryPathInfos' count", [u(2), u(huge)].concat()),
            ("DumpStorePath's path", [u(3), u(huge)].concat()),
            ("ImportPaths' magic", [u(4), u(1), u(huge)].concat()),
            (
                "ImportPaths' contents",
                [&u(4)[..], &u(1), &cut(&file_nar(b"x"), "contents"), &u(huge)].concat(),
            ),
            ("ImportPaths' references", {
                let record = [u(1), file_nar(b"x"), u(EXPORT_MAGIC), s(full(&path("new"))), u(huge)];
                [u(4), record.concat()].concat()
            }),
            ("ExportPaths' count", [u(5), u(0), u(huge)].concat()),
            ("BuildPaths' count", [u(6), u(huge)].concat()),
            ("BuildPaths' target", [u(6), u(1), u(huge)].concat()),
            ("QueryClosure's count", [u(7), u(0), u(huge)].concat()),
            ("BuildDerivation's path", [u(8), u(huge)].concat()),
            ("BuildDerivation's outputs", [u(8), s(full(&path("made.drv"))), u(huge)].concat()),
            ("BuildDerivation's system", [cut(&build, "x86_64-linux"), u(huge)].concat()),
            ("BuildDerivation's builder", [cut(&build, "/bin/sh"), u(huge)].concat()),
            ("BuildDerivation's arguments", [behind(&build, "/bin/sh"), u(huge)].concat()),
            ("BuildDerivation's first argument", [behind(&build, "/bin/sh"), u(1), u(huge)].concat()),
            ("BuildDerivation's environment", [behind(&build, "echo > $out"), u(huge)].concat()),
            ("AddToStoreNar's path", [u(9), u(huge)].concat()),
            ("AddToStoreNar's deriver", [u(9), s(full(&path("new"))), u(huge)].concat()),
            ("AddToStoreNar's hash", [u(9), s(full(&path("new"))), s(""), u(huge)].concat()),
            ("AddToStoreNar's references", [behind(&good.bytes(), &good.hash), u(huge)].concat()),
            ("AddToStoreNar's size", Add { nar_size: huge, ..good.clone() }.bytes()),
            ("AddToStoreNar's signatures", {
                let bytes = behind(&good.bytes(), &good.hash);
                [bytes, u(0), u(0), u(120), u(0), u(huge)].concat()
            }),
        ];
        // What is skipped because the path is valid already is no shorter for it.
        let skipped = Add { path: full(&there).into(), nar_size: huge, ..good.clone() };
        let requests = requests.into_iter().chain([("the size of a valid path", skipped.bytes())]);
        cases.extend(requests.map(|(what, request)| (format!("{what} of {huge:#x}"), session(&[request]))));
    }
    refused(&arena, &cases)
}

#[test]
fn limits_are_for_everything_together() -> Result<()> {
    let (arena, _) = used_arena()?;
    // Each string is within its own limit. Memory is limited to far less than all of them.
    let names: Vec<String> = (0..100_000).map(|number| format!("o{number}")).collect();
    let target = format!("{}!{}", full(&path("a.drv")), names.join(","));
    let value = vec![b'x'; 8 << 20];
    let build = Build { args: vec![value; 12], ..Build::new("made", "echo > $out") };
    let cases = [
        ("targets to be built", [u(6), u(20), s(&target).repeat(20)].concat()),
        ("a derivation", build.bytes()),
    ];
    refused(&arena, &named(cases))
}

#[test]
fn words_that_mean_nothing() -> Result<()> {
    let (arena, there) = used_arena()?;
    let padded = |padding: u8| {
        let mut bytes = s(full(&there));
        *bytes.last_mut().expect("it is not empty") = padding;
        [u(3), bytes].concat()
    };
    ensure!(s(full(&there)).ends_with(&[0]), "this path has padding");
    let mut cases = named([
        ("command 0", u(0)),
        ("command 10", u(10)),
        ("command 2^64-1", u(u64::MAX)),
        ("padding that is not zero", padded(1)),
        ("an export stream that goes on with 2", [u(4), u(2)].concat()),
        ("an export stream without its magic number", [u(4), u(1), file_nar(b"x"), u(7)].concat()),
        ("options beyond 32 bits", {
            Build { options: [1 << 32, 0, 0, 0, 0, 0], ..Build::new("made", "echo > $out") }.bytes()
        }),
    ]);
    cases.push(("a greeting of another program".into(), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()));
    cases.push(("another major version".into(), [u(MAGIC), u(0x307)].concat()));
    refused(&arena, &cases)
}

/// What is no path of this store, by the rules of Nix's path.cc and store-dir-config.cc.
fn bad_paths() -> Vec<(&'static str, Vec<u8>)> {
    let hash = "i00sflxqsj37lfmf95m8mn0grv615hpj";
    let of = |base: String| format!("/nix/store/{base}").into_bytes();
    vec![
        ("empty", Vec::new()),
        ("outside the store", b"/etc/passwd".to_vec()),
        ("the store itself", b"/nix/store".to_vec()),
        ("the store with a slash", b"/nix/store/".to_vec()),
        ("not absolute", format!("{hash}-a").into()),
        ("..", of(format!("../store/{hash}-a"))),
        ("the parent of an object", of(format!("{hash}-a/.."))),
        ("a trailing slash", of(format!("{hash}-a/"))),
        ("a file in an object", of(format!("{hash}-a/b"))),
        ("another prefix", format!("/nix/storex/{hash}-a").into()),
        ("two slashes", format!("/nix/store//{hash}-a").into()),
        ("no name", of(format!("{hash}-"))),
        ("no dash", of(hash.to_owned())),
        ("another separator", of(format!("{hash}Xname"))),
        ("a NUL as the separator", of(format!("{hash}\0name"))),
        ("a slash as the separator", of(format!("{hash}/name"))),
        ("a NUL in the name", of(format!("{hash}-na\0me"))),
        ("a NUL at the end", of(format!("{hash}-name\0"))),
        ("a newline", of(format!("{hash}-na\nme"))),
        ("a space", of(format!("{hash}-na me"))),
        ("an escape", of(format!("{hash}-\x1b[31mred"))),
        ("not UTF-8", [&of(format!("{hash}-"))[..], b"\xff\xfe"].concat()),
        ("the name .", of(format!("{hash}-."))),
        ("the name ..", of(format!("{hash}-.."))),
        ("a name of 212", of(format!("{hash}-{}", "a".repeat(212)))),
        ("a hash part with e", of(format!("{}-a", hash.replace('i', "e")))),
        ("a hash part in capitals", of(format!("{}-a", hash.to_uppercase()))),
        ("a hash part of 31", of(format!("{}-a", &hash[1..]))),
        ("4096 bytes", of("a".repeat(4085))),
        ("one byte more than any path", of("a".repeat(4086))),
    ]
}

#[test]
fn paths_that_are_none() -> Result<()> {
    let (arena, there) = used_arena()?;
    let good = Add::new(&path("new"), file_nar(b"x"));
    let mut cases = Vec::new();
    for (what, bad) in bad_paths() {
        let optional_is_fine = bad.is_empty();
        let text = [&bad[..], b"!out"].concat();
        let in_list = |bad: &[u8]| l(&[full(&there).as_bytes(), bad]);
        let mut add = |place: &str, request: Vec<u8>| {
            cases.push((format!("{what} in {place}"), session(&[request])));
        };
        add("QueryValidPaths", [u(1), u(1), u(0), in_list(&bad)].concat());
        add("QueryPathInfos", [u(2), in_list(&bad)].concat());
        add("DumpStorePath", [u(3), s(&bad)].concat());
        add("ExportPaths", [u(5), u(0), in_list(&bad)].concat());
        add("BuildPaths", [u(6), in_list(&text), u(0).repeat(6)].concat());
        add("QueryClosure", [u(7), u(0), in_list(&bad)].concat());
        add("BuildDerivation", Build { drv: bad.clone(), ..Build::new("made", "") }.bytes());
        let inputs = vec![full(&there).into(), bad.clone()];
        add("a derivation's inputs", Build { inputs, ..Build::new("made", "") }.bytes());
        if !optional_is_fine {
            let outputs = vec![["out".into(), bad.clone(), "".into(), "".into()]];
            add("a derivation's outputs", Build { outputs, ..Build::new("made", "") }.bytes());
            add("AddToStoreNar's deriver", Add { deriver: bad.clone(), ..good.clone() }.bytes());
        }
        add("AddToStoreNar", Add { path: bad.clone(), ..good.clone() }.bytes());
        let references = vec![full(&there).into(), bad.clone()];
        add("AddToStoreNar's references", Add { references, ..good.clone() }.bytes());
        let record = [u(4), u(1), file_nar(b"x"), u(EXPORT_MAGIC), s(&bad), u(0), s(""), u(0), u(0)];
        add("ImportPaths", record.concat());
    }
    refused(&arena, &cases)
}

#[test]
fn additions_that_are_not_what_they_say() -> Result<()> {
    let (arena, there) = used_arena()?;
    let new = path("new");
    let good = Add::new(&new, file_nar(b"contents"));
    let size = good.nar_size;
    let hash = Sha256::of(&good.nar);
    let addressed = StoreDir::default().make_path("source", hash, "addressed")?;
    let ca = format!("fixed:r:{hash}").into_bytes();
    let proven = Add { ca: ca.clone(), path: full(&addressed).into(), ..good.clone() };
    let absent = full(&path("absent")).into_bytes();
    let flat = format!("fixed:{}", Sha256::of(b"contents"));
    let flat_path = full(&path("flat"));
    let drv = full(&path("a.drv")).into_bytes();
    let text_drv = |text: &[u8]| Add { path: drv.clone(), ..Add::new(&new, file_nar(text)) }.bytes();
    let longer = [&good.nar[..], &[0; 8]].concat();
    let cases = named([
        ("no bytes", Add { nar_size: 0, ..good.clone() }.bytes()),
        ("a size that is 8 too small", Add { nar_size: size - 8, ..good.clone() }.bytes()),
        ("a size that is 1 too small", Add { nar_size: size - 1, ..good.clone() }.bytes()),
        ("a size that is 8 too large", Add { nar_size: size + 8, ..good.clone() }.bytes()),
        ("a size that is too large, with bytes", {
            Add { nar_size: size + 8, nar: longer.clone(), ..good.clone() }.bytes()
        }),
        ("a tail that the hash covers", {
            Add { nar_size: size + 8, hash: Sha256::of(&longer).to_hex().into(), nar: longer, ..good.clone() }
                .bytes()
        }),
        ("a wrong size of a path that is valid", {
            Add { path: full(&there).into(), nar_size: size + 8, ..good.clone() }.bytes()
        }),
        ("a wrong hash", Add { hash: Sha256::of(b"").to_hex().into(), ..good.clone() }.bytes()),
        (
            "a hash of another kind",
            Add { hash: "md5:5d41402abc4b2a76b9719d911017c592".into(), ..good.clone() }.bytes(),
        ),
        ("no hash", Add { hash: Vec::new(), ..good.clone() }.bytes()),
        ("a content address that leads elsewhere", Add { ca, ..good.clone() }.bytes()),
        ("a content address and a reference that it does not have", {
            Add { references: vec![full(&there).into()], ..proven.clone() }.bytes()
        }),
        ("a content address of other contents", {
            let other = file_nar(b"else");
            let nar_hash = Sha256::of(&other).to_hex().into();
            Add { nar_size: other.len() as u64, hash: nar_hash, nar: other, ..proven }.bytes()
        }),
        ("a flat content address of a directory", {
            let nar = [s("nix-archive-1"), directory(&[])].concat();
            let inner =
                Sha256::of(format!("fixed:out:sha256:{}:", Sha256::of(b"contents").to_hex()).as_bytes());
            let path = StoreDir::default().make_path("output:out", inner, "flat")?;
            Add { ca: flat.clone().into(), ..Add::new(&path, nar) }.bytes()
        }),
        ("a flat content address with a reference", {
            let references = vec![full(&there).into()];
            Add { path: flat_path.into(), ca: flat.into(), references, ..good.clone() }.bytes()
        }),
        ("a text content address that refers to itself", {
            let ca = format!("text:{}", Sha256::of(b"contents")).into();
            Add { ca, references: vec![full(&new).into()], ..good.clone() }.bytes()
        }),
        ("a content address that is none", Add { ca: "fixed:x:sha256:0".into(), ..good.clone() }.bytes()),
        ("a reference to what is not there", Add { references: vec![absent], ..good.clone() }.bytes()),
        ("a signature that is none", Add { signatures: vec!["unsigned".into()], ..good }.bytes()),
        ("a .drv that is none", text_drv(b"hello")),
        ("a .drv that ends early", text_drv(b"Derive([(\"out\",\"/nix")),
        ("a .drv of a directory", {
            Add { path: drv.clone(), ..Add::new(&new, [s("nix-archive-1"), directory(&[])].concat()) }.bytes()
        }),
        ("a .drv whose output is another's", wrong_outputs()?),
    ]);
    refused(&arena, &cases)
}

#[test]
fn additions_in_flight_that_spoil_each_other() -> Result<()> {
    let (arena, there) = used_arena()?;
    let [a, b, c] = ["a", "b", "c"].map(path);
    let add = |path: &StorePath, references: &[&StorePath]| {
        let references = references.iter().map(|path| full(path).into()).collect();
        Add { references, ..Add::new(path, file_nar(path.as_str().as_bytes())) }
    };
    let bad = Add { hash: Sha256::of(b"").to_hex().into(), ..add(&b, &[]) };
    let cut = Add { nar: add(&b, &[]).nar[..40].to_vec(), ..add(&b, &[]) };
    let again = Add::new(&a, file_nar(b"other contents of a"));
    // What is sent without waiting, what of it is added, and how many additions are answered: all before what is wrong,
    // and nothing behind it.
    let cases: [(&str, Vec<Add>, Vec<&StorePath>, usize); 8] = [
        ("a wrong hash in the middle", vec![add(&a, &[]), bad.clone(), add(&c, &[])], vec![&a], 1),
        ("a wrong hash at the end", vec![add(&a, &[]), add(&c, &[&a]), bad.clone()], vec![&a, &c], 2),
        ("a reference to the wrong one", vec![bad, add(&c, &[&b])], vec![], 0),
        ("a reference to a later one", vec![add(&a, &[&b]), add(&b, &[])], vec![], 0),
        ("a circle", vec![add(&a, &[&b]), add(&b, &[&a])], vec![], 0),
        ("one that breaks off", vec![add(&a, &[&there]), cut], vec![&a], 1),
        (
            "a reference that is missing",
            vec![add(&a, &[]), add(&b, &[&path("absent")]), add(&c, &[])],
            vec![&a],
            1,
        ),
        // Skipped because it is there, whatever it says; and then something wrong.
        ("a path again", vec![add(&a, &[]), again, add(&b, &[&b, &c])], vec![&a], 2),
    ];
    for (what, adds, added, answered) in cases {
        let requests: Vec<Vec<u8>> = adds.iter().map(Add::bytes).collect();
        let outcome = arena.run(&session(&requests))?;
        outcome.expect_refusal().with_context(|| what.to_owned())?;
        let answers = outcome.stdout.get(16..).unwrap_or_default();
        ensure!(answers == u(1).repeat(answered), "{what}: answered with {answers:?}");
        let mut expected: std::collections::BTreeSet<StorePath> = added.iter().copied().cloned().collect();
        expected.insert(there.clone());
        let valid = arena.check_clean().with_context(|| what.to_owned())?;
        ensure!(valid == expected, "{what}: valid are {valid:?}");
        for path in added.iter().rev() {
            let object = std::fs::read(arena.objects().join(path.as_str()))?;
            ensure!(object == path.as_str().as_bytes(), "{what}: {path} has other contents");
        }
        arena.verify().with_context(|| what.to_owned())?;
        added.iter().rev().try_for_each(|path| arena.store.delete_path(path).map(drop))?;
    }
    Ok(())
}

/// A proper `.drv` file under its own name, but for the output that it claims.
fn wrong_outputs() -> Result<Vec<u8>> {
    let dir = StoreDir::default();
    let out = path("glibc");
    let basic = drover_nix::BasicDerivation {
        name: "liar".into(),
        outputs: [("out".parse()?, drover_nix::DerivationOutput::InputAddressed(out.clone()))].into(),
        input_srcs: [].into(),
        system: "x86_64-linux".into(),
        builder: "/bin/sh".into(),
        args: Vec::new(),
        env: [("out".into(), full(&out).into())].into(),
    };
    let drv = Derivation { basic, input_drvs: [].into() };
    let text = drover_nix::derivation::aterm::print(&dir, &drv)?;
    Ok(Add::new(&modulo::drv_path(&dir, &drv)?, file_nar(&text)).bytes())
}

#[test]
fn derivations_that_are_none() -> Result<()> {
    let (arena, _) = used_arena()?;
    let good = || Build::new("made", "echo > $out");
    let out = |name: &[u8], path: &str, algo: &str, hash: &str| {
        [name.to_vec(), path.into(), algo.into(), hash.into()]
    };
    let a = full(&path("made"));
    let cases = named([
        ("no .drv", Build { drv: full(&path("made")).into(), ..good() }.bytes()),
        ("two outputs of one name", {
            Build { outputs: vec![out(b"out", &a, "", ""), out(b"out", &a, "", "")], ..good() }.bytes()
        }),
        (
            "an output's name with a slash",
            Build { outputs: vec![out(b"../x", &a, "", "")], ..good() }.bytes(),
        ),
        ("an output's name with a NUL", Build { outputs: vec![out(b"o\0t", &a, "", "")], ..good() }.bytes()),
        ("an empty output's name", Build { outputs: vec![out(b"", &a, "", "")], ..good() }.bytes()),
        ("an unknown algorithm", Build { outputs: vec![out(b"out", &a, "r:sha3", "00")], ..good() }.bytes()),
        ("a hash without an algorithm", Build { outputs: vec![out(b"out", &a, "", "00")], ..good() }.bytes()),
        ("a short hash", Build { outputs: vec![out(b"out", &a, "sha256", "00")], ..good() }.bytes()),
    ]);
    refused(&arena, &cases)
}

#[test]
fn strings_for_the_system_with_nul_or_no_utf_8() -> Result<()> {
    let (arena, _) = used_arena()?;
    let good = |name: &str| Build::new(name, "printf '%s' \"$odd\" > $out");
    let with = |key: &[u8], value: &[u8]| {
        let mut build = good("made");
        build.env.push([key.to_vec(), value.to_vec()]);
        build
    };
    // Once, so that all directories are there that builds need.
    build_well(&arena, &good("plain"))?;
    let before = arena.snapshot()?;
    // Not the protocol's business, so an answer: each is a derivation that cannot be built, and the session goes on.
    let mut refused = vec![with(b"odd", b"a\0b"), with(b"o\0d", b"x")];
    refused.extend([b"a\0b".to_vec()].map(|arg| Build { args: vec!["-c".into(), arg], ..good("made") }));
    refused.push(Build { builder: b"/bin/s\0h".to_vec(), ..good("made") });
    refused.push(Build { builder: Vec::new(), ..good("made") });
    refused.push(Build { system: b"x86_64-linux\0".to_vec(), ..good("made") });
    for build in refused {
        let what = readable(&build);
        let mut builder = arena.start()?;
        builder.send(&session(&[build.bytes()]))?;
        builder.receive(16)?;
        let (status, message) = builder.receive_build_result().with_context(|| what.clone())?;
        ensure!([3, 4, 5, 9].contains(&status) && !message.is_empty(), "{what}: {status} {message}");
        // The session goes on.
        let outcome = builder.finish(&[u(1), u(0), u(0), u(0)].concat())?;
        ensure!(outcome.status.success() && outcome.stdout == u(0), "{what}: {outcome:?}");
        arena.check_unchanged(&before).with_context(|| what.clone())?;
    }
    // Bytes that are no text are bytes.
    let mut build = good("bytes");
    build.env.push([b"odd".to_vec(), b"\xff\xfe\x80".to_vec()]);
    build.args.push(b"\xc3(".to_vec());
    build_well(&arena, &build)?;
    ensure!(std::fs::read(arena.objects().join(path("bytes").as_str()))? == b"\xff\xfe\x80");
    // So are names that no shell would give a variable; Nix builds with them as well.
    for (name, key) in [("equals", b"o=d".as_slice()), ("nameless", b"")] {
        let mut build = good(name);
        build.env.push([key.to_vec(), b"x".to_vec()]);
        build_well(&arena, &build)?;
    }
    arena.check_clean()?;
    arena.verify()
}

#[test]
fn a_path_that_was_just_deleted() -> Result<()> {
    let (arena, there) = used_arena()?;
    let mut builder = arena.start()?;
    builder.send(&session(&[[u(2), l(&[full(&there)])].concat()]))?;
    builder.receive(16)?;
    // It is valid: the answer begins with it.
    ensure!(builder.receive(72)?.starts_with(&s(full(&there))[..]));
    arena.store.delete_path(&there)?;
    let outcome = builder.finish(&[u(3), s(full(&there))].concat())?;
    outcome.expect_refusal()?;
    ensure!(!outcome.stdout.windows(13).any(|bytes| bytes == b"nix-archive-1"), "a part of an archive");
    // Valid, but without its files: the same.
    arena.add(&there, &file_nar(b"there"), &[])?;
    drover_store::fs::delete(&arena.objects().join(there.as_str()))?;
    let outcome = arena.run(&session(&[[u(3), s(full(&there))].concat()]))?;
    outcome.expect_refusal()?;
    ensure!(outcome.stdout.len() == 16, "a part of an archive");
    arena.store.delete_path(&there)?;
    arena.check_clean()?;
    arena.verify()
}

fn build_well(arena: &Arena, build: &Build) -> Result<()> {
    let mut builder = arena.start()?;
    builder.send(&session(&[build.bytes()]))?;
    builder.receive(16)?;
    let result = builder.receive_build_result()?;
    ensure!(result.0 == 0, "{result:?}");
    ensure!(builder.finish(&[])?.status.success());
    Ok(())
}

/// The parts of a derivation that a case is about, readable.
fn readable(build: &Build) -> String {
    let text = |bytes: &Vec<u8>| bytes.escape_ascii().to_string();
    let env: Vec<String> = build.env.iter().flatten().map(text).collect();
    let args: Vec<String> = build.args.iter().map(text).collect();
    format!("{} {args:?} {env:?} on {}", text(&build.builder), text(&build.system))
}

/// Bytes up to the last string that is this text.
fn cut(bytes: &[u8], text: impl AsRef<[u8]>) -> Vec<u8> {
    let end = find(bytes, text.as_ref());
    bytes[..end].to_vec()
}

/// Bytes up to and with the last string that is this text.
fn behind(bytes: &[u8], text: impl AsRef<[u8]>) -> Vec<u8> {
    let text = text.as_ref();
    bytes[..find(bytes, text) + s(text).len()].to_vec()
}

fn find(bytes: &[u8], text: &[u8]) -> usize {
    let string = s(text);
    bytes.windows(string.len()).rposition(|window| window == string).expect("the text is there")
}
