//! Archives that would do harm if they were unpacked. Nothing is written outside the store, whatever they say.

use anyhow::{Context as _, Result, ensure};

use super::arena::Arena;
use super::bytes::*;

fn archive(node: Vec<u8>) -> Vec<u8> {
    [s("nix-archive-1"), node].concat()
}

/// So many directories in each other, open, and then a file. Complete only if `close`.
fn nested(depth: usize, close: bool) -> Vec<u8> {
    let open = [s("("), s("type"), s("directory"), s("entry"), s("("), s("name"), s("d"), s("node")].concat();
    let end = [s(")"), s(")")].concat();
    let mut bytes = [s("nix-archive-1"), open.repeat(depth), file(b"deep")].concat();
    if close {
        bytes.extend(end.repeat(depth));
    }
    bytes
}

/// An entry of a directory whose name is as long as is claimed, not as it is.
fn claims(token: &str, length: u64) -> Vec<u8> {
    let before = [s("("), s("type")].concat();
    let node = match token {
        "magic" => return u(length),
        "parenthesis" => u(length),
        "type" => [before, u(length)].concat(),
        "target" => [before, s("symlink"), s("target"), u(length)].concat(),
        "contents" => [before, s("regular"), s("contents"), u(length)].concat(),
        _ => [before, s("directory"), s("entry"), s("("), s("name"), u(length)].concat(),
    };
    archive(node)
}

fn hostile(canary: &str) -> Vec<(String, Vec<u8>)> {
    let victim = format!("{canary}/victim");
    let inside = directory(&[(b"file", file(b"written outside"))]);
    let named = |name: &[u8]| archive(directory(&[(name, file(b"x"))]));
    let mut cases = vec![
        (
            "a symlink, then a directory of its name",
            archive(directory(&[(b"x", symlink(canary)), (b"x", inside.clone())])),
        ),
        (
            "a symlink, then a file of its name",
            archive(directory(&[(b"x", symlink(&victim)), (b"x", file(b"bad"))])),
        ),
        (
            "a directory, then a symlink of its name",
            archive(directory(&[(b"x", inside), (b"x", symlink(canary))])),
        ),
        ("two files of one name", archive(directory(&[(b"x", file(b"1")), (b"x", file(b"2"))]))),
        ("names out of order", archive(directory(&[(b"b", file(b"1")), (b"a", file(b"2"))]))),
        ("names in another order than bytes'", archive(directory(&[(b"a", file(b"1")), (b"B", file(b"2"))]))),
        ("the name .", named(b".")),
        ("the name ..", named(b"..")),
        ("the name /", named(b"/")),
        ("an absolute name", named(victim.as_bytes())),
        ("a name that climbs", named(b"../../../../canary/victim")),
        ("an empty name", named(b"")),
        ("a name of 256 bytes", named(&[b'a'; 256])),
        ("a name with a NUL", named(b"a\0b")),
        ("an empty target", archive(symlink(""))),
        ("a target with a NUL", archive(symlink("a\0b"))),
        ("a target of 4096 bytes", archive(symlink([b'a'; 4096]))),
        ("nesting of 65", nested(64, true)),
        ("nesting of 100,000", nested(100_000, true)),
        ("nesting of 100,000 that never ends", nested(100_000, false)),
        ("another magic", [s("nix-archive-2"), file(b"x")].concat()),
        ("an unknown type", archive([s("("), s("type"), s("device"), s(")")].concat())),
        (
            "a type twice",
            archive([s("("), s("type"), s("regular"), s("type"), s("symlink"), s(")")].concat()),
        ),
        ("no contents", archive([s("("), s("type"), s("regular"), s(")")].concat())),
        ("`executable` behind the contents", {
            let file =
                [s("("), s("type"), s("regular"), s("contents"), s("x"), s("executable"), s(""), s(")")];
            archive(file.concat())
        }),
        ("an `executable` that says something", {
            let file =
                [s("("), s("type"), s("regular"), s("executable"), s("yes"), s("contents"), s("x"), s(")")];
            archive(file.concat())
        }),
        ("padding that is not zero", {
            let mut bytes = archive(file(b"x"));
            let at = bytes.len() - 16 - 1;
            bytes[at] = 1;
            bytes
        }),
        ("an entry without a node", {
            let entry =
                [s("("), s("type"), s("directory"), s("entry"), s("("), s("name"), s("x"), s(")"), s(")")];
            archive(entry.concat())
        }),
    ];
    let tokens = ["magic", "parenthesis", "type", "target", "contents", "name"];
    let lengths = [1 << 40, 1 << 63, u64::MAX, u64::MAX - 7];
    cases.extend(tokens.into_iter().flat_map(|token| lengths.map(|length| (token, claims(token, length)))));
    cases.into_iter().map(|(what, nar)| (what.to_owned(), nar)).collect()
}

#[test]
fn archives_that_reach_out_of_the_store() -> Result<()> {
    let arena = Arena::new()?;
    let canary = arena.canary();
    let canary = canary.to_str().context("temporary directories are UTF-8")?;
    arena.run(&session(&[Add::new(&path("there"), file_nar(b"there")).bytes()]))?.expect_clean()?;
    let before = arena.snapshot()?;
    let new = path("new");
    for (what, nar) in hostile(canary) {
        // Complete, with the right hash and size; and with a size that lets more follow.
        let whole = Add::new(&new, nar.clone());
        let open = Add { nar_size: 1 << 40, ..whole.clone() };
        // For a path that is valid: nobody unpacks it, so that it may pass, as with Nix.
        let skipped = Add { path: full(&path("there")).into(), ..whole.clone() };
        let imported = [u(4), export_stream(&[(&new, nar, vec![])])].concat();
        let requests = [
            ("added", whole.bytes()),
            ("open", open.bytes()),
            ("skipped", skipped.bytes()),
            ("imported", imported),
        ];
        for (how, request) in requests {
            let outcome = arena.run(&session(&[request])).with_context(|| format!("{what}, {how}"))?;
            if how != "skipped" || !outcome.status.success() {
                outcome.expect_refusal().with_context(|| format!("{what}, {how}"))?;
            }
            arena.check_unchanged(&before).with_context(|| format!("{what}, {how}"))?;
        }
    }
    ensure!(arena.check_clean()?.len() == 1);
    arena.verify()
}

#[test]
fn the_largest_that_is_allowed() -> Result<()> {
    let arena = Arena::new()?;
    let cases = [
        ("depth", nested(63, true)),
        ("name", archive(directory(&[(&[b'a'; 255], file(b"x"))]))),
        ("target", archive(symlink([b'a'; 4095]))),
        ("bytes", archive(directory(&[(b"\x01\xff", file(b"x")), (b"\xff", symlink("/no/where"))]))),
        ("sparse", archive(file(&vec![0; 3 << 20]))),
    ];
    for (what, nar) in &cases {
        let request = Add::new(&path(what), nar.clone()).bytes();
        let outcome = arena.run(&session(&[request, [u(3), s(full(&path(what)))].concat()]))?;
        outcome.expect_clean().with_context(|| what.to_string())?;
        ensure!(outcome.stdout[24..] == nar[..], "{what}: what comes out is not what went in");
    }
    ensure!(arena.check_clean()?.len() == cases.len());
    arena.verify()
}
