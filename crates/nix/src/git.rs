//! Git's name for a tree of files, from its NAR (Nix: git.cc). Files and symlinks are blobs, directories are trees, and
//! only the owner's right to execute counts among the modes.

use std::io::Read;

use crate::hash::Hasher;
use crate::nar::{Event, Reader};
use crate::{Error, Hash, HashAlgo, Method};

/// Most bytes that the entries of all directories above one point of an archive may take, together with their names.
/// A tree's object begins with its length, so that they have to be kept until the directory ends.
pub const MAX_OPEN_ENTRIES: usize = 64 << 20;

/// Modes as they stand in trees.
mod mode {
    pub(super) const DIRECTORY: &str = "40000";
    pub(super) const EXECUTABLE: &str = "100755";
    pub(super) const REGULAR: &str = "100644";
    pub(super) const SYMLINK: &str = "120000";
}

/// The id of the object that a NAR holds: git's objects are hashed by SHA-1 or SHA-256. Reads not one byte beyond the
/// archive's end.
pub fn object_id(algo: HashAlgo, nar: impl Read) -> Result<Hash, Error> {
    object_id_within(MAX_OPEN_ENTRIES, algo, nar)
}

fn object_id_within(limit: usize, algo: HashAlgo, nar: impl Read) -> Result<Hash, Error> {
    Method::Git.check_algo(algo)?;
    let mut reader = Reader::new(nar);
    let mut open: Vec<Tree> = Vec::new();
    let mut held = 0;
    let mut name = Vec::new();
    loop {
        let (mode, id) = match reader.next()? {
            Some(Event::Entry(entry)) => {
                name = entry.to_vec();
                continue;
            }
            Some(Event::Directory) => {
                open.push(Tree { name: std::mem::take(&mut name), entries: Vec::new() });
                continue;
            }
            Some(Event::EndDirectory) => {
                // Every end has a beginning: the reader sees to that.
                let Some(tree) = open.pop() else { continue };
                held -= tree.entries.iter().map(Entry::size).sum::<usize>();
                name.clone_from(&tree.name);
                (mode::DIRECTORY, tree.id(algo))
            }
            Some(Event::Symlink(target)) => (mode::SYMLINK, object(algo, "blob", target)),
            Some(Event::File { executable, size }) => {
                let mut hasher = Hasher::new(algo);
                hasher.update(format!("blob {size}\0").as_bytes());
                reader.copy_contents(&mut hasher)?;
                (if executable { mode::EXECUTABLE } else { mode::REGULAR }, hasher.finish())
            }
            None => {
                return Err(Error::Nar { offset: reader.offset(), why: "it has no root".into() });
            }
        };
        let Some(tree) = open.last_mut() else {
            reader.skip_all()?;
            return Ok(id);
        };
        let entry = Entry { mode, name: std::mem::take(&mut name), id };
        held += entry.size();
        if held > limit {
            let why = format!("its directories have more than {limit} bytes of entries");
            return Err(Error::Nar { offset: reader.offset(), why });
        }
        tree.entries.push(entry);
    }
}

/// A directory whose entries are still coming.
struct Tree {
    /// Its own, in the directory around it.
    name: Vec<u8>,
    entries: Vec<Entry>,
}

struct Entry {
    mode: &'static str,
    name: Vec<u8>,
    id: Hash,
}

impl Tree {
    fn id(mut self, algo: HashAlgo) -> Hash {
        // By name, those of directories with a slash behind them: another order than that of archives.
        self.entries.sort_by(|a, b| a.key().cmp(b.key()));
        let mut body = Vec::new();
        for Entry { mode, name, id } in &self.entries {
            body.extend_from_slice(mode.as_bytes());
            body.push(b' ');
            body.extend_from_slice(name);
            body.push(0);
            body.extend_from_slice(&id.bytes);
        }
        object(algo, "tree", &body)
    }
}

impl Entry {
    fn key(&self) -> impl Iterator<Item = u8> {
        let slash = (self.mode == mode::DIRECTORY).then_some(b'/');
        self.name.iter().copied().chain(slash)
    }

    fn size(&self) -> usize {
        size_of::<Self>() + self.name.len() + self.id.bytes.len()
    }
}

fn object(algo: HashAlgo, kind: &str, body: &[u8]) -> Hash {
    let mut hasher = Hasher::new(algo);
    hasher.update(format!("{kind} {}\0", body.len()).as_bytes());
    hasher.update(body);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nar::Writer;

    /// Its order as an archive (`a`, `a-`, `a.txt`) is not that of a tree (`a-`, `a.txt`, `a/`).
    fn tree() -> Vec<u8> {
        let mut nar = Writer::new(Vec::new());
        let file = |nar: &mut Writer<Vec<u8>>, name: &str, executable, contents: &[u8]| {
            nar.entry(name.as_bytes()).unwrap();
            nar.file_bytes(executable, contents).unwrap();
        };
        let directory = |nar: &mut Writer<Vec<u8>>, name: &str| {
            nar.entry(name.as_bytes()).unwrap();
            nar.directory().unwrap();
        };
        nar.directory().unwrap();
        directory(&mut nar, "a");
        file(&mut nar, "file", false, b"hello\n");
        nar.end_directory().unwrap();
        file(&mut nar, "a-", false, b"y\n");
        file(&mut nar, "a.txt", false, b"x\n");
        directory(&mut nar, "b.d");
        file(&mut nar, "z", false, b"z\n");
        nar.end_directory().unwrap();
        directory(&mut nar, "empty");
        nar.end_directory().unwrap();
        nar.entry(b"link").unwrap();
        nar.symlink(b"a/file").unwrap();
        file(&mut nar, "run", true, b"#!/bin/sh\n");
        file(&mut nar, "void", false, b"");
        nar.end_directory().unwrap();
        nar.finish().unwrap()
    }

    /// Computed by `git mktree` of git 2.39, in repositories of either object format.
    #[test]
    fn trees_have_gits_names() {
        for (algo, id) in [
            (HashAlgo::Sha1, "56a231d24d57b900e1a87571e1fe2311afb80108"),
            (HashAlgo::Sha256, "e2b1d7f5243f6a838c43dc758b202a4b0615e9ee473e9f14c9f0094945b6ad68"),
        ] {
            let nar = tree();
            let mut stream = &[&nar[..], b"rest"].concat()[..];
            assert_eq!(object_id(algo, &mut stream).unwrap().to_hex(), id);
            assert_eq!(stream, b"rest", "not one byte beyond the end");
        }
    }

    /// By `git hash-object`.
    #[test]
    fn single_files_are_blobs_whatever_their_mode() {
        let id = |make: &dyn Fn(&mut Writer<Vec<u8>>)| {
            let mut nar = Writer::new(Vec::new());
            make(&mut nar);
            object_id(HashAlgo::Sha1, nar.finish().unwrap().as_slice()).unwrap().to_hex()
        };
        let run = "1a2485251c33a70432394c93fb89330ef214bfc9";
        for executable in [false, true] {
            assert_eq!(id(&|nar| nar.file_bytes(executable, b"#!/bin/sh\n").unwrap()), run);
        }
        assert_eq!(id(&|nar| nar.symlink(b"a/file").unwrap()), "bfd40f938065c2deddb49b44704d0df20b88eda8");
    }

    #[test]
    fn directories_that_are_done_take_no_room() {
        let entry = size_of::<Entry>() + 1 + HashAlgo::Sha1.size();
        let tree = |deep: bool, entries: u8| {
            let mut nar = Writer::new(Vec::new());
            nar.directory().unwrap();
            for name in 0..entries {
                nar.entry(&[b'a' + name]).unwrap();
                if deep {
                    nar.directory().unwrap();
                    nar.entry(b"x").unwrap();
                }
                nar.file_bytes(false, b"").unwrap();
                if deep {
                    nar.end_directory().unwrap();
                }
            }
            nar.end_directory().unwrap();
            object_id_within(5 * entry, HashAlgo::Sha1, nar.finish().unwrap().as_slice())
        };
        assert!(tree(false, 5).is_ok() && tree(true, 5).is_ok());
        assert!(tree(false, 6).is_err());
    }

    #[test]
    fn what_git_cannot_name() {
        for algo in [HashAlgo::Md5, HashAlgo::Sha512] {
            assert!(matches!(object_id(algo, tree().as_slice()), Err(Error::ContentAddress { .. })));
        }
        let nar = tree();
        assert!(object_id(HashAlgo::Sha1, &nar[..nar.len() - 1]).is_err());
        assert!(object_id(HashAlgo::Sha1, &b""[..]).is_err());
    }
}
