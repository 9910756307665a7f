//! What this crate's unit tests share.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use drover_nix::{PathInfo, Sha256, StoreDir, StorePath};
use tempfile::TempDir;

use crate::{Access, LocalStore, StoreLayout};

/// A new, empty store. The directory goes with the first value; objects in it do not hinder that, because
/// [`TempStore`] makes them deletable.
pub(crate) fn store() -> (TempStore, LocalStore) {
    let dir = tempfile::tempdir().unwrap();
    // The way to it must not have symlinks, which a temporary directory may.
    let root = dir.path().canonicalize().unwrap();
    let store = LocalStore::open(StoreLayout::in_root(root), Access::ReadWrite).unwrap();
    (TempStore(dir), store)
}

pub(crate) struct TempStore(TempDir);

impl Drop for TempStore {
    fn drop(&mut self) {
        let _ = crate::fs::delete(&self.0.path().join("nix"));
    }
}

/// A path with this name; its hash part follows from the name.
pub(crate) fn store_path(name: &str) -> StorePath {
    StoreDir::default().make_path("test", Sha256::of(name.as_bytes()), name).unwrap()
}

/// The NAR of one file.
pub(crate) fn file_nar(contents: &[u8]) -> Vec<u8> {
    let mut nar = Vec::new();
    let mut writer = drover_nix::nar::Writer::new(&mut nar);
    writer.file_bytes(false, contents).unwrap();
    writer.finish().unwrap();
    nar
}

pub(crate) fn info(name: &str, nar: &[u8], references: &[&StorePath]) -> PathInfo {
    PathInfo {
        path: store_path(name),
        nar_hash: Sha256::of(nar),
        nar_size: nar.len() as u64,
        references: references.iter().map(|path| (*path).clone()).collect::<BTreeSet<_>>(),
        deriver: None,
        signatures: Vec::new(),
        ca: None,
    }
}

/// Adds a file of this name and content.
pub(crate) fn add(store: &LocalStore, name: &str, references: &[&StorePath]) -> StorePath {
    let nar = file_nar(name.as_bytes());
    let info = info(name, &nar, references);
    store.add_nar(&info, false, 0, &mut &nar[..]).unwrap();
    info.path
}

/// Files of all kinds and sizes.
pub(crate) fn sample_tree(root: &Path) {
    std::fs::create_dir_all(root.join("bin")).unwrap();
    std::fs::create_dir(root.join("empty")).unwrap();
    std::fs::write(root.join("bin/run"), "#!/bin/sh\n").unwrap();
    std::fs::set_permissions(root.join("bin/run"), std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::write(root.join("text"), "text").unwrap();
    std::fs::write(root.join("nothing"), "").unwrap();
    let big: Vec<u8> = (0..700_001_u32).map(|i| (i % 251) as u8).collect();
    std::fs::write(root.join("big"), big).unwrap();
    for i in 0..300 {
        std::fs::write(root.join(format!("empty/{i}")), vec![b'x'; i]).unwrap();
    }
    std::os::unix::fs::symlink("bin/run", root.join("link")).unwrap();
    let odd = <std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(b"\xff not UTF-8 \n");
    std::fs::write(root.join(odd), "odd").unwrap();
}

/// What lies in the store's directory.
pub(crate) fn entries(store: &LocalStore) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(&store.layout().real_store_dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != ".links")
        .collect();
    names.sort();
    names
}

/// Runs the rest of the test `name` in a process of its own that can start no thread: their stacks would not fit into
/// its address space.
pub(crate) fn without_threads(name: &str, rest: impl FnOnce()) {
    const MARK: &str = "DROVER_TEST_WITHOUT_THREADS";
    if std::env::var_os(MARK).is_some() {
        assert!(std::thread::Builder::new().spawn(|| ()).is_err(), "this process can start threads");
        return rest();
    }
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact", "--test-threads=1", "--nocapture"])
        .env(MARK, "1")
        .env("RUST_MIN_STACK", (1_u64 << 50).to_string())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
