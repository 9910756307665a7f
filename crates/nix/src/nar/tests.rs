use std::collections::BTreeMap;
use std::io::{self, Cursor, Read};

use proptest::prelude::*;

use super::*;
use crate::{Error, Sha256};

#[derive(Clone, PartialEq, Eq, Debug)]
enum Node {
    File { executable: bool, contents: Vec<u8> },
    Symlink(Vec<u8>),
    Directory(BTreeMap<Vec<u8>, Self>),
}

fn write(node: &Node) -> Vec<u8> {
    fn put(node: &Node, writer: &mut Writer<Vec<u8>>) {
        match node {
            Node::File { executable, contents } => {
                writer.file(*executable, contents.len() as u64, &contents[..]).unwrap();
            }
            Node::Symlink(target) => writer.symlink(target).unwrap(),
            Node::Directory(entries) => {
                writer.directory().unwrap();
                for (name, node) in entries {
                    writer.entry(name).unwrap();
                    put(node, writer);
                }
                writer.end_directory().unwrap();
            }
        }
    }
    let mut writer = Writer::new(Vec::new());
    put(node, &mut writer);
    let offset = writer.offset();
    let bytes = writer.finish().unwrap();
    assert_eq!(offset, bytes.len() as u64);
    bytes
}

fn read(mut bytes: impl Read) -> Result<(Node, u64), Error> {
    fn get<R: Read>(reader: &mut Reader<R>) -> Result<Node, Error> {
        match reader.next()? {
            Some(Event::File { executable, size }) => {
                let mut contents = Vec::new();
                assert_eq!(reader.copy_contents(&mut contents)?, size);
                Ok(Node::File { executable, contents })
            }
            Some(Event::Symlink(target)) => Ok(Node::Symlink(target.to_vec())),
            Some(Event::Directory) => {
                let mut entries = BTreeMap::new();
                loop {
                    match reader.next()? {
                        Some(Event::Entry(name)) => {
                            let name = name.to_vec();
                            let node = get(reader)?;
                            assert!(entries.insert(name, node).is_none());
                        }
                        Some(Event::EndDirectory) => return Ok(Node::Directory(entries)),
                        other => panic!("{other:?} in a directory"),
                    }
                }
            }
            other => panic!("{other:?} for a node"),
        }
    }
    let mut reader = Reader::new(&mut bytes);
    let node = get(&mut reader)?;
    assert_eq!(reader.next()?, None);
    assert_eq!(reader.next()?, None);
    Ok((node, reader.offset()))
}

/// Strings laid out as an archive has them.
fn strings(strings: &[&str]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for string in strings {
        bytes.extend_from_slice(&(string.len() as u64).to_le_bytes());
        bytes.extend_from_slice(string.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    bytes
}

fn why(bytes: &[u8]) -> String {
    let error = Reader::new(bytes).skip_all().unwrap_err();
    assert!(matches!(error, Error::Nar { .. }), "{error}");
    error.to_string()
}

const HELLO: [&str; 8] = ["nix-archive-1", "(", "type", "regular", "contents", "hello\n", ")", ""];

#[test]
fn known_archive() {
    let node = Node::File { executable: false, contents: b"hello\n".to_vec() };
    let bytes = write(&node);
    assert_eq!(bytes, strings(&HELLO[..7]));
    assert_eq!(bytes.len(), 120);
    let hash = "1c37d01af40be2e80691de3cc3df44377a699afbb17c68f080964b2fd071fc13";
    assert_eq!(Sha256::of(&bytes).to_hex(), hash);
    assert_eq!(read(&bytes[..]).unwrap(), (node, 120));
}

#[test]
fn every_kind_of_node() {
    let archive = strings(&[
        "nix-archive-1",
        "(",
        "type",
        "directory",
        "entry",
        "(",
        "name",
        "bin",
        "node",
        "(",
        "type",
        "directory",
        "entry",
        "(",
        "name",
        "sh",
        "node",
        "(",
        "type",
        "regular",
        "executable",
        "",
        "contents",
        "12345678",
        ")",
        ")",
        ")",
        ")",
        "entry",
        "(",
        "name",
        "empty",
        "node",
        "(",
        "type",
        "directory",
        ")",
        ")",
        "entry",
        "(",
        "name",
        "link",
        "node",
        "(",
        "type",
        "symlink",
        "target",
        "bin/sh",
        ")",
        ")",
        ")",
    ]);
    let sh = Node::File { executable: true, contents: b"12345678".to_vec() };
    let bin = Node::Directory([(b"sh".to_vec(), sh)].into());
    let node = Node::Directory(
        [
            (b"bin".to_vec(), bin),
            (b"empty".to_vec(), Node::Directory(BTreeMap::new())),
            (b"link".to_vec(), Node::Symlink(b"bin/sh".to_vec())),
        ]
        .into(),
    );
    assert_eq!(write(&node), archive);
    assert_eq!(read(&archive[..]).unwrap(), (node, archive.len() as u64));
}

#[test]
fn reads_nothing_beyond_the_end() {
    for node in [
        Node::File { executable: true, contents: b"x".to_vec() },
        Node::Symlink(b"t".to_vec()),
        Node::Directory([(b"a".to_vec(), Node::Directory(BTreeMap::new()))].into()),
    ] {
        let mut bytes = write(&node);
        let len = bytes.len() as u64;
        bytes.extend_from_slice(b"next request");
        let mut cursor = Cursor::new(&bytes);
        assert_eq!(Reader::new(&mut cursor).skip_all().unwrap(), len);
        assert_eq!(cursor.position(), len);
    }
}

#[test]
fn contents_that_nobody_read_are_skipped_and_their_padding_checked() {
    let mut bytes = strings(&HELLO[..7]);
    let mut reader = Reader::new(&bytes[..]);
    assert_eq!(reader.next().unwrap(), Some(Event::File { executable: false, size: 6 }));
    assert_eq!(reader.read_contents(&mut [0; 2]).unwrap(), 2);
    assert_eq!(reader.next().unwrap(), None);
    bytes[103] = 1; // the last of two zeros behind `hello\n`
    assert!(why(&bytes).contains("padding"));
}

fn nested(depth: usize) -> Vec<u8> {
    let mut bytes = strings(&["nix-archive-1"]);
    for _ in 1..depth {
        bytes.extend(strings(&["(", "type", "directory", "entry", "(", "name", "d", "node"]));
    }
    bytes.extend(strings(&["(", "type", "symlink", "target", "t", ")"]));
    for _ in 1..depth {
        bytes.extend(strings(&[")", ")"]));
    }
    bytes
}

#[test]
fn depth_is_bounded() {
    assert!(read(&nested(MAX_DEPTH)[..]).is_ok());
    for depth in [MAX_DEPTH + 1, 100_000] {
        let bytes = nested(depth);
        // On a stack that no recursion of that depth would fit in.
        let thread = std::thread::Builder::new().stack_size(128 << 10);
        assert!(thread.spawn(move || why(&bytes)).unwrap().join().unwrap().contains("nested"));
    }
    let mut writer = Writer::new(io::sink());
    for _ in 0..MAX_DEPTH {
        writer.directory().unwrap();
        writer.entry(b"d").unwrap();
    }
    assert!(writer.symlink(b"t").is_err());
}

#[test]
fn claims_of_length_are_not_believed() {
    let huge = (1u64 << 40).to_le_bytes();
    // In place of every length in turn.
    for archive in [
        strings(&HELLO[..7]),
        strings(&["nix-archive-1", "(", "type", "symlink", "target", "t", ")"]),
        nested(2),
    ] {
        let mut at = 0;
        while at < archive.len() {
            let mut bytes = archive.clone();
            let len = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
            bytes[at..at + 8].copy_from_slice(&huge);
            let mut reader = Reader::new(&bytes[..]);
            assert!(reader.skip_all().is_err());
            assert!(reader.held() <= CHUNK + MAX_TARGET_LEN, "{}", reader.held());
            at += 8 + len.next_multiple_of(8) as usize;
        }
    }
    // A file may be large: its contents are not kept, so the stream's end is what stops it.
    let mut bytes = strings(&HELLO[..5]);
    bytes.extend_from_slice(&u64::MAX.to_le_bytes());
    bytes.extend_from_slice(&[7; 100]);
    assert!(matches!(Reader::new(&bytes[..]).skip_all(), Err(Error::NarIo { act: "read", .. })));
}

#[test]
fn what_is_not_canonical_is_refused() {
    let link = |target: &str| strings(&["nix-archive-1", "(", "type", "symlink", "target", target, ")"]);
    let long = "x".repeat(MAX_TARGET_LEN);
    assert!(read(&link(&long)[..]).is_ok());
    for bad in ["", "a\0b", &format!("{long}x")] {
        assert!(why(&link(bad)).contains("target"));
    }
    let directory = |names: &[&str]| {
        let mut bytes = strings(&["nix-archive-1", "(", "type", "directory"]);
        for name in names {
            bytes.extend(strings(&["entry", "(", "name", name, "node"]));
            bytes.extend(strings(&["(", "type", "symlink", "target", "/etc", ")", ")"]));
        }
        bytes.extend(strings(&[")"]));
        bytes
    };
    let long = "x".repeat(MAX_NAME_LEN);
    assert!(read(&directory(&["", "\u{1}", "a", &long][1..])[..]).is_ok());
    for bad in ["", ".", "..", "a/b", "/", "a\0", &format!("{long}x")] {
        assert!(why(&directory(&[bad])).contains("name"), "{bad:?}");
    }
    for bad in [["a", "a"], ["b", "a"], ["aa", "a"], ["a", "A"]] {
        assert!(why(&directory(&bad)).contains("predecessor"), "{bad:?}");
    }
    for bad in [
        &["nix-archive-2", "(", "type", "regular", "contents", "abc", ")"][..],
        &["nix-archive-1", "(", "type", "regulas", "contents", "abc", ")"],
        &["nix-archive-1", "(", "type", "directorz", "contents", "abc", ")"],
        &["nix-archive-1", "(", "type", "regular", "contents", "abc", "executable", "", ")"],
        &["nix-archive-1", "(", "type", "regular", "executable", "x", "contents", "abc", ")"],
        &[
            "nix-archive-1",
            "(",
            "type",
            "regular",
            "executable",
            "",
            "executable",
            "",
            "contents",
            "abc",
            ")",
        ],
        &["nix-archive-1", "(", "type", "regular", "type", "regular", "contents", "abc", ")"],
        &["nix-archive-1", "(", "type", "directory", "entri", "abc", ")", ")", ")"],
        &["nix-archive-1", "(", "contents", "abc", "type", "regular", ")"],
        &["nix-archive-1", "(", "type", "regular", ")", "", "", "", "", "", ""],
    ] {
        why(&strings(bad));
    }
}

#[test]
fn every_truncation_fails_and_then_stays_failed() {
    let bytes = nested(3);
    for len in 0..bytes.len() {
        let mut reader = Reader::new(&bytes[..len]);
        assert!(matches!(reader.skip_all(), Err(Error::NarIo { act: "read", .. })), "{len}");
        assert!(reader.next().is_err());
        assert!(copy(&bytes[..len], io::sink()).is_err());
    }
}

#[test]
fn the_writer_keeps_its_callers_honest() {
    let writer = || Writer::new(Vec::new());
    assert!(writer().entry(b"a").is_err());
    assert!(writer().end_directory().is_err());
    assert!(writer().finish().is_err());
    assert!(writer().symlink(b"").is_err());
    assert!(writer().file(false, 3, &b"12"[..]).is_err());
    assert!(writer().file(false, 1, &b"12"[..]).is_err());
    assert!(writer().file(false, 0, &b"1"[..]).is_err());
    let mut twice = writer();
    twice.symlink(b"a").unwrap();
    assert!(twice.symlink(b"a").is_err());
    let mut open = writer();
    open.directory().unwrap();
    assert!(open.directory().is_err());
    let mut unsorted = writer();
    unsorted.directory().unwrap();
    unsorted.entry(b"b").unwrap();
    assert!(unsorted.end_directory().is_err());
}

#[test]
fn the_side_that_failed_is_named() {
    struct Full;
    impl io::Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::Error::other("no space"))
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let node = Node::File { executable: false, contents: vec![1; 3 * CHUNK] };
    let error = copy(&write(&node)[..], Full).unwrap_err();
    assert!(error.to_string().contains("no space") && error.category() == "nar-io", "{error}");
    assert!(matches!(error, Error::NarIo { act: "write", .. }));
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        prop::collection::vec(prop_oneof![1u8..b'/', b'0'..=255], 1..20),
        prop::collection::vec(b'a'..b'd', 1..3)
    ]
    .prop_filter("reserved", |name| name != b"." && name != b"..")
}

fn node() -> impl Strategy<Value = Node> {
    let leaf = prop_oneof![
        (any::<bool>(), prop::collection::vec(any::<u8>(), 0..40))
            .prop_map(|(executable, contents)| Node::File { executable, contents }),
        (any::<bool>(), CHUNK / 2 - 9..3 * CHUNK)
            .prop_map(|(executable, len)| Node::File { executable, contents: vec![len as u8; len] }),
        prop::collection::vec(1u8..=255, 1..40).prop_map(Node::Symlink),
    ];
    leaf.prop_recursive(5, 24, 6, |node| {
        prop::collection::btree_map(name(), node, 0..6).prop_map(Node::Directory)
    })
}

/// Gives bytes in pieces, as a socket does.
struct Dribble<'a>(&'a [u8], usize);

impl Read for Dribble<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.1.min(buffer.len());
        self.0.read(&mut buffer[..count])
    }
}

proptest! {
    #[test]
    fn round_trip(node in node(), piece in 1usize..100_000) {
        let bytes = write(&node);
        prop_assert_eq!(bytes.len() % 8, 0);
        let (again, size) = read(Dribble(&bytes, piece)).unwrap();
        prop_assert_eq!(&again, &node);
        prop_assert_eq!(size, bytes.len() as u64);
        let mut copied = Vec::new();
        prop_assert_eq!(copy(Dribble(&bytes, piece), &mut copied).unwrap(), size);
        prop_assert!(copied == bytes);
    }

    /// Whatever is accepted is what the writer would have written.
    #[test]
    fn accepted_means_canonical(
        node in node(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut bytes = write(&node);
        for (index, value) in changes {
            let at = index.index(bytes.len().min(2000));
            bytes[at] = value;
        }
        if let Ok((node, size)) = read(&bytes[..]) {
            prop_assert!(write(&node) == bytes[..size as usize]);
        }
    }
}
