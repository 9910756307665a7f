//! What others see of a cache while somebody stores in it, at every moment, however the storing ends.

use std::collections::BTreeMap;
use std::sync::Mutex;

use drover_nix::signature::SecretKey;
use drover_nix::{Sha256, StoreDir};

use super::*;
use crate::testing::{info_of, nar_of_file, spool, store_path};

/// Files in memory. Each reading is a moment, each writing two: before it, and after it.
#[derive(Default)]
struct Memory {
    files: Mutex<BTreeMap<String, Vec<u8>>>,
    /// Names of files in the order in which they were written.
    written: Mutex<Vec<String>>,
    moments: Mutex<usize>,
    /// At this moment everything ends.
    crash: Option<usize>,
    /// It was not in order to begin with.
    damaged: bool,
    /// What somebody else does at this moment.
    other: Mutex<Option<(usize, Other)>>,
}

type Other = Box<dyn FnOnce(&Memory) + Send>;

impl Memory {
    fn moment(&self) -> Result<(), Error> {
        let now = {
            let mut moments = self.moments.lock().unwrap();
            *moments += 1;
            *moments
        };
        if !self.damaged {
            self.check();
        }
        let mut other = self.other.lock().unwrap();
        if other.as_ref().is_some_and(|(at, _)| *at == now) {
            let (_, act) = other.take().unwrap();
            drop(other);
            act(self);
            self.check();
        }
        if self.crash.is_some_and(|at| now >= at) {
            return Err(Error::Io { act: "live on".into(), source: io::ErrorKind::Other.into() });
        }
        Ok(())
    }

    /// Every narinfo file leads to a NAR that is what it says, and the paths that it refers to are there.
    fn check(&self) {
        let files = self.files.lock().unwrap();
        for (name, text) in files.iter().filter(|(name, _)| name.ends_with(".narinfo")) {
            assert!(files.contains_key(CACHE_INFO));
            let narinfo = NarInfo::parse(&StoreDir::default(), text).unwrap();
            let file = files.get(&narinfo.url).unwrap_or_else(|| panic!("{name} leads nowhere"));
            let nar = zstd::decode_all(&file[..]).unwrap();
            assert_eq!(narinfo.info.nar_hash, Sha256::of(&nar), "{name}");
            for reference in &narinfo.info.references {
                assert!(files.contains_key(&narinfo_name(reference)), "{name} needs {reference}");
            }
        }
    }

    /// The same files, seen by somebody who lives on.
    fn again(self) -> Self {
        Self { files: self.files, ..Self::default() }
    }
}

impl Files for Memory {
    fn url(&self, name: Option<&str>) -> String {
        format!("memory:{}", name.unwrap_or_default())
    }

    fn open(&self, name: &str) -> Result<Option<Box<dyn Read + Send>>, Error> {
        self.moment()?;
        let file = self.files.lock().unwrap().get(name).cloned();
        Ok(file.map(|file| Box::new(io::Cursor::new(file)) as Box<dyn Read + Send>))
    }

    fn open_url(&self, _url: &str) -> Result<Option<Box<dyn Read + Send>>, Error> {
        unreachable!()
    }

    fn exists(&self, name: &str) -> Result<bool, Error> {
        self.moment()?;
        Ok(self.files.lock().unwrap().contains_key(name))
    }

    fn put(&self, name: &str, _content_type: &str, size: u64, body: &Body<'_>) -> Result<(), Error> {
        self.moment()?;
        let mut bytes = Vec::new();
        body(0).unwrap().read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes.len() as u64, size);
        self.files.lock().unwrap().insert(name.to_owned(), bytes);
        self.written.lock().unwrap().push(name.to_owned());
        self.moment()
    }
}

fn cache(files: Memory) -> BinaryCache<Memory> {
    BinaryCache::new(files, &CacheOptions::default())
}

fn object(name: &str, contents: &str, references: &[&str]) -> (PathInfo, SpooledNar) {
    let nar = nar_of_file(contents.as_bytes());
    let mut info = info_of(name, &nar);
    info.references = references.iter().map(|name| store_path(name)).collect();
    (info, spool(&nar))
}

/// Outputs of one build, references first.
fn outputs() -> [(PathInfo, SpooledNar); 3] {
    [
        object("lib", "1", &["lib"]),
        // The same bytes at two paths: one NAR for both.
        object("copy", "1", &["lib"]),
        object("out", "2", &["lib", "copy", "out"]),
    ]
}

fn put_all(cache: &BinaryCache<Memory>) -> Result<Vec<Stored>, Error> {
    outputs().iter().map(|(info, nar)| cache.put(info, nar)).collect()
}

#[test]
fn a_crash_at_any_moment_leaves_nothing_that_leads_nowhere() {
    for crash in 1.. {
        let broken = cache(Memory { crash: Some(crash), ..Memory::default() });
        let ended = put_all(&broken);
        broken.files.check();
        let done = ended.is_ok();
        let before = broken.files.written.lock().unwrap().clone();
        let again = cache(broken.files.again());
        put_all(&again).unwrap();
        // What was complete is not written again.
        let mut written = [before, again.files.written.lock().unwrap().clone()].concat();
        written.sort();
        let files: Vec<String> = again.files.files.lock().unwrap().keys().cloned().collect();
        assert_eq!(written, files, "crash at {crash}");
        assert_eq!(files.len(), 6, "{files:?}");
        if done {
            // That was after the end. At least: two moments for each of six files.
            assert!(crash > 12, "{crash}");
            return;
        }
    }
}

#[test]
fn two_that_store_the_same_path_at_once() {
    let mut stays = Vec::new();
    for at in 1.. {
        let other: Other = Box::new(|files: &Memory| {
            // The other one has handles of its own, on the same files.
            let theirs =
                Memory { files: Mutex::new(files.files.lock().unwrap().clone()), ..Memory::default() };
            let theirs = cache(theirs);
            let (info, nar) = object("x", "another", &["x"]);
            theirs.put(&info, &nar).unwrap();
            *files.files.lock().unwrap() = theirs.files.files.into_inner().unwrap();
        });
        let ours = cache(Memory { other: Mutex::new(Some((at, other))), ..Memory::default() });
        let (info, nar) = object("x", "one", &["x"]);
        let stored = ours.put(&info, &nar).unwrap();
        if ours.files.other.lock().unwrap().is_some() {
            break;
        }
        ours.files.check();
        let there = ours.parsed(&info.path).unwrap().unwrap().info.nar_hash;
        match stored {
            // What is there is what whoever stored it was told.
            Stored::Already(said) => assert_eq!(said.info.nar_hash, there),
            Stored::New => {}
        }
        stays.push(there == info.nar_hash);
    }
    // The other one came first as long as it was there before the last look, and last in the end.
    let ours = stays.iter().position(|ours| *ours).unwrap();
    assert!(ours >= stays.len() - 2, "{stays:?}");
}

#[test]
fn a_nar_that_is_gone_comes_back() {
    let key = SecretKey::from_seed("k", &[7; 32]).unwrap();
    let sign = |info: &mut PathInfo| {
        info.signatures = vec![key.sign(info.fingerprint(&StoreDir::default()).as_bytes())];
    };
    for same in [true, false] {
        let files = cache(Memory { damaged: true, ..Memory::default() });
        let (mut info, nar) = object("x", "one", &[]);
        sign(&mut info);
        files.put(&info, &nar).unwrap();
        let url = files.parsed(&info.path).unwrap().unwrap().url;
        files.files.files.lock().unwrap().remove(&url);
        let (info, nar) = object("x", if same { "one" } else { "another" }, &[]);
        assert_eq!(files.put(&info, &nar).unwrap(), Stored::New);
        files.files.check();
        let there = files.parsed(&info.path).unwrap().unwrap().info;
        assert_eq!(there.nar_hash, info.nar_hash);
        // Signatures are over content: those of other content would be wrong.
        assert_eq!(there.signatures.len(), usize::from(same));
    }
}
