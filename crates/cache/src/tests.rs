//! Caches in directories, local stores and what is common to all.

use std::collections::BTreeSet;
use std::io::Read as _;

use drover_nix::derivation::{aterm, modulo};
use drover_nix::{BasicDerivation, ContentAddress, Derivation, DerivationOutput, Method, OutputName, Sha256};
use drover_store::{Access, LocalStore, StoreLayout};

use super::*;
use crate::testing::{info_of, nar_of_file, spool, store_path};

fn file_cache(dir: &std::path::Path) -> Arc<dyn Cache> {
    open(&format!("file://{}", dir.display()), &CacheOptions::default()).unwrap()
}

fn put(cache: &dyn Cache, name: &str, contents: &[u8], references: &[&str]) -> StorePath {
    let nar = nar_of_file(contents);
    let mut info = info_of(name, &nar);
    info.references = references.iter().map(|name| store_path(name)).collect();
    assert_eq!(cache.put(&info, &spool(&nar)).unwrap(), Stored::New);
    info.path
}

fn get(cache: &dyn Cache, path: &StorePath) -> Vec<u8> {
    let narinfo = cache.narinfo(path).unwrap().unwrap();
    let mut bytes = Vec::new();
    VerifiedNar::new(cache.nar(&narinfo).unwrap(), &narinfo.info).read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_cache_in_a_directory() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("new/cache");
    let cache = file_cache(&root);
    assert_eq!(cache.narinfo(&store_path("x")).unwrap(), None);
    let path = put(&*cache, "x", b"hello", &[]);
    assert_eq!(get(&*cache, &path), nar_of_file(b"hello"));
    assert_eq!(std::fs::read(root.join("nix-cache-info")).unwrap(), b"StoreDir: /nix/store\n");
    let drv = store_path("x.drv");
    cache.put_log(&drv, &mut &b"text"[..]).unwrap();
    assert_eq!(std::fs::read(root.join("log").join(drv.as_str())).unwrap(), b"text");
    // Nothing half written stays behind, and everybody may read.
    for file in walk(&root) {
        let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&file).unwrap());
        assert_eq!(mode & 0o777, 0o644, "{}", file.display());
        assert!(!file.file_name().unwrap().to_str().unwrap().starts_with('.'), "{}", file.display());
    }
    let other = CacheOptions { dir: StoreDir::new("/other/store").unwrap(), ..CacheOptions::default() };
    let error = open(&cache.url(), &other).unwrap().narinfo(&path).unwrap_err();
    assert_eq!(error.category(), "store-dir");
}

fn walk(dir: &std::path::Path) -> Vec<PathBuf> {
    std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] })
        .collect()
}

#[test]
fn a_local_store() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().canonicalize().unwrap();
    let store = LocalStore::open(StoreLayout::in_root(&root), Access::ReadWrite).unwrap();
    let contents = vec![7; 300_000];
    let nar = nar_of_file(&contents);
    let info = info_of("x", &nar);
    store.add_nar(&info, false, 0, &mut &nar[..]).unwrap();
    for url in [root.display().to_string(), format!("local?root={}", root.display())] {
        let cache =
            open(&url, &CacheOptions { require_signatures: true, ..CacheOptions::default() }).unwrap();
        assert!(get(&*cache, &info.path) == nar);
        assert_eq!(cache.narinfo(&store_path("absent")).unwrap(), None);
        assert_eq!(cache.put(&info, &spool(&nar)).unwrap_err().category(), "read-only");
        // A reader that leaves early.
        let mut stream = cache.nar(&cache.narinfo(&info.path).unwrap().unwrap()).unwrap();
        stream.read_exact(&mut [0; 10]).unwrap();
    }
    let cache = open(&root.display().to_string(), &CacheOptions::default()).unwrap();
    let mut narinfo = cache.narinfo(&info.path).unwrap().unwrap();
    narinfo.info.path = store_path("absent");
    let mut bytes = Vec::new();
    assert!(cache.nar(&narinfo).unwrap().read_to_end(&mut bytes).is_err(), "no archive, and no error");
    drop(store);
    drover_store::fs::delete(&root.join("nix")).unwrap();
}

#[test]
fn urls_that_are_no_caches() {
    let dir = tempfile::tempdir().unwrap();
    put(&*file_cache(dir.path()), "x", b"", &[]);
    for (url, says) in [
        ("gs://bucket", "gs is not supported"),
        ("file://relative", "absolute"),
        ("file:///x?colour=blue", "colour"),
        ("nonsense", "local"),
        (&dir.path().display().to_string(), "did you mean file://"),
    ] {
        let Err(error) = open(url, &CacheOptions::default()) else { panic!("{url} was opened") };
        assert!(error.to_string().contains(says), "{error}");
    }
}

#[test]
fn closures_over_two_caches() {
    let (left, right) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let caches = [file_cache(left.path()), file_cache(right.path())];
    put(&*caches[0], "top", b"1", &["top", "mid", "gone"]);
    put(&*caches[1], "mid", b"2", &["leaf"]);
    put(&*caches[0], "leaf", b"3", &[]);
    put(&*caches[1], "leaf", b"3", &[]);
    put(&*caches[1], "aside", b"4", &[]);
    let found = closure(&caches, [store_path("top")]).unwrap();
    let places: BTreeSet<_> = found.found.iter().map(|(path, (cache, _))| (path.name(), *cache)).collect();
    assert_eq!(places, [("leaf", 0), ("mid", 1), ("top", 0)].into());
    assert_eq!(found.missing, [store_path("gone")].into());
    // A broken narinfo file is not the same as none.
    let name = format!("{}.narinfo", store_path("mid").hash_part());
    std::fs::write(right.path().join(name), "x").unwrap();
    assert_eq!(closure(&caches, [store_path("top")]).err().unwrap().category(), "format");
}

#[test]
fn derivations_are_proven_by_their_names() {
    let store_dir = StoreDir::default();
    let dir = tempfile::tempdir().unwrap();
    let cache = file_cache(dir.path());
    let hash = Sha256::of(b"x").into();
    let fixed = DerivationOutput::CaFixed(ContentAddress { method: Method::Flat, hash });
    let drv = Derivation {
        basic: BasicDerivation {
            name: "d".into(),
            outputs: [(OutputName::out(), fixed)].into(),
            input_srcs: [store_path("src")].into(),
            system: "x86_64-linux".into(),
            builder: "/bin/sh".into(),
            args: Vec::new(),
            env: [("PATH".into(), "".into())].into(),
        },
        input_drvs: std::collections::BTreeMap::new(),
    };
    let path = modulo::drv_path(&store_dir, &drv).unwrap();
    let text = aterm::print(&store_dir, &drv).unwrap();
    let store = |path: &StorePath, text: &[u8]| {
        let nar = nar_of_file(text);
        let info = PathInfo { path: path.clone(), ..info_of("any", &nar) };
        cache.put(&info, &spool(&nar)).unwrap();
    };
    store(&path, &text);
    assert_eq!(read_drv(&*cache, &store_dir, &path).unwrap().unwrap(), drv);
    assert!(read_drv(&*cache, &store_dir, &store_path("absent.drv")).unwrap().is_none());
    assert_eq!(read_file(&*cache, &path, 10).unwrap_err().category(), "content");
    let forged = store_path("d.drv");
    store(&forged, &text);
    let error = read_drv(&*cache, &store_dir, &forged).unwrap_err();
    assert!(error.to_string().contains("not the derivation"), "{error}");
}
