use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

use super::*;

/// A member, as hostile as may be: names go into the header byte for byte.
fn member(kind: EntryType, name: &str, target: &str, mode: u32, contents: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
    header.as_mut_bytes()[157..157 + target.len()].copy_from_slice(target.as_bytes());
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(contents.len() as u64);
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend(contents);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn file(name: &str, contents: &str) -> Vec<u8> {
    member(EntryType::Regular, name, "", 0o644, contents.as_bytes())
}

fn directory(name: &str) -> Vec<u8> {
    member(EntryType::Directory, name, "", 0o755, b"")
}

fn link(kind: EntryType, name: &str, target: &str) -> Vec<u8> {
    member(kind, name, target, 0o777, b"")
}

/// A directory to unpack to, beside which there is one to keep out of.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        fs::create_dir(place.0.path().join("to")).unwrap();
        fs::create_dir(place.0.path().join("outside")).unwrap();
        fs::write(place.0.path().join("outside/secret"), "secret").unwrap();
        place
    }

    fn unpack(&self, members: &[Vec<u8>]) -> Result<()> {
        unpack([members.concat(), vec![0; 1024]].concat().as_slice(), &self.0.path().join("to"))
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.0.path().join("to").join(name))
            .unwrap_or_else(|error| error.kind().to_string())
    }

    fn metadata(&self, name: &str) -> fs::Metadata {
        fs::symlink_metadata(self.0.path().join("to").join(name)).unwrap()
    }

    /// An archive that is refused, and that has changed nothing outside.
    fn refuses(members: &[Vec<u8>], why: &str) {
        let place = Self::new();
        let error = format!("{:#}", place.unpack(members).unwrap_err());
        assert!(error.contains(why), "{error}");
        place.outside_is_as_it_was();
    }

    fn outside_is_as_it_was(&self) {
        let outside = self.0.path().join("outside");
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
        assert_eq!(fs::read_to_string(outside.join("secret")).unwrap(), "secret");
        assert_eq!(fs::symlink_metadata(outside.join("secret")).unwrap().nlink(), 1);
        assert_eq!(fs::read_dir(self.0.path()).unwrap().count(), 2);
    }
}

#[test]
fn what_archives_hold() {
    let place = Place::new();
    let long = format!("top/{}/{}", "d".repeat(120), "f".repeat(120));
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(4);
    header.set_mode(0o600);
    builder.append_data(&mut header, &long, &b"long"[..]).unwrap();
    let long_member = builder.into_inner().unwrap();
    place
        .unpack(&[
            member(EntryType::XGlobalHeader, "pax_global_header", "", 0, b"15 comment=abc\n"),
            directory("./"),
            directory("top/"),
            member(EntryType::Regular, "top/run", "", 0o4755, b"#!"),
            file("top/deep/er/file", "text"),
            link(EntryType::Symlink, "top/link", "../../outside/secret"),
            link(EntryType::Link, "top/hard", "top/deep/er/file"),
            link(EntryType::Link, "top/hardlink-to-link", "top/link"),
            file("top/run", "second"),
            member(EntryType::Regular, "top/old/", "", 0, b""),
            long_member[..long_member.len() - 1024].to_vec(),
        ])
        .unwrap();
    assert_eq!((place.read("top/deep/er/file"), place.read("top/hard")), ("text".into(), "text".into()));
    assert_eq!((place.read("top/run"), place.read(&long)), ("second".into(), "long".into()));
    assert_eq!(place.metadata("top/hard").nlink(), 2);
    assert!(place.metadata("top/link").is_symlink() && place.metadata("top/hardlink-to-link").is_symlink());
    assert!(place.metadata("top/old").is_dir());
    place.outside_is_as_it_was();
}

#[test]
fn modes() {
    let place = Place::new();
    let run = member(EntryType::Regular, "run", "", 0o6711, b"");
    place.unpack(&[run, file("plain", ""), member(EntryType::Directory, "d", "", 0o2000, b"")]).unwrap();
    let mode = |name: &str| place.metadata(name).permissions().mode() & 0o7700;
    assert_eq!([mode("run"), mode("plain"), mode("d")], [0o700, 0o600, 0o700]);
}

#[test]
fn absolute_names_are_relative() {
    let place = Place::new();
    let outside = place.0.path().join("outside/new");
    let name = outside.to_str().unwrap();
    place.unpack(&[file(name, "x"), link(EntryType::Link, "hard", name)]).unwrap();
    assert_eq!((place.read(&name[1..]), place.read("hard")), ("x".into(), "x".into()));
    place.outside_is_as_it_was();
}

#[test]
fn names_that_lead_out() {
    for name in ["../outside/secret", "a/../../outside/secret", "..", "a/.."] {
        Place::refuses(&[file(name, "x")], "'..'");
        Place::refuses(&[directory(name)], "'..'");
        Place::refuses(&[link(EntryType::Link, "hard", name)], "'..'");
    }
    Place::refuses(&[file("/", "x")], "no name");
}

#[test]
fn ways_through_symlinks() {
    for target in ["../outside", "/", "."] {
        let planted = link(EntryType::Symlink, "a", target);
        Place::refuses(&[planted.clone(), file("a/new", "x")], "is a symlink or a file");
        Place::refuses(&[planted.clone(), file("a/secret", "x")], "is a symlink or a file");
        Place::refuses(&[planted.clone(), directory("a/b/c")], "is a symlink or a file");
        Place::refuses(&[planted, link(EntryType::Link, "hard", "a/secret")], "is a symlink or a file");
    }
    Place::refuses(&[file("a", ""), file("a/b", "")], "is a symlink or a file");
}

#[test]
fn members_replace_symlinks_and_do_not_follow_them() {
    let place = Place::new();
    let planted = link(EntryType::Symlink, "a", "../outside/secret");
    place.unpack(&[planted, file("a", "mine")]).unwrap();
    assert_eq!(place.read("a"), "mine");
    place.outside_is_as_it_was();
    // A hard link is to the symlink, and replacing it leaves what that leads to.
    let planted = link(EntryType::Symlink, "b", "../outside/secret");
    place.unpack(&[planted, link(EntryType::Link, "c", "b"), file("c", "mine")]).unwrap();
    place.outside_is_as_it_was();
}

#[test]
fn a_directory_that_was_left_is_looked_at_again() {
    // The directory of the member before is open still, and its name leads elsewhere by now.
    let members = [directory("a"), link(EntryType::Symlink, "a", "../outside"), file("a/new", "x")];
    Place::refuses(&members, "is a symlink or a file");
}

#[test]
fn what_no_store_object_can_be() {
    for kind in [EntryType::Char, EntryType::Block, EntryType::Fifo] {
        Place::refuses(&[link(kind, "device", "")], "device or a pipe");
    }
}

#[test]
fn damage() {
    let whole = [file("a", &"x".repeat(2000)), vec![0; 1024]].concat();
    let place = Place::new();
    let to = place.0.path().join("to");
    assert!(unpack(&whole[..1500], &to).is_err());
    assert!(unpack(&b"no archive at all".repeat(100)[..], &to).is_err());
    let mut changed = whole;
    changed[0] = b'b';
    assert!(unpack(changed.as_slice(), &to).is_err());
    let mut huge = tar::Header::new_gnu();
    huge.set_path("x").unwrap();
    huge.set_size(u64::MAX >> 1);
    huge.set_cksum();
    assert!(unpack(&huge.as_bytes()[..], &to).is_err());
    place.outside_is_as_it_was();
}
