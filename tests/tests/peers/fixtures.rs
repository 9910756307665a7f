//! The fixtures are what they say: the right Nix, and a cache that real Nix reads and writes.

use anyhow::Result;
use drover_tests::{HttpCache, Nix, Peer};

const TRIVIAL: &str = r#"derivation { name = "trivial"; system = "x86_64-linux"; builder = "/bin/sh"; args = ["-c" "echo hello > $out"]; }"#;

#[test]
fn each_peer_is_its_version_and_instantiates() -> Result<()> {
    for nix in Nix::ALL {
        let peer = Peer::new(nix)?;
        let said = peer.run("nix-store", &["--version"])?;
        assert!(said.starts_with(&format!("nix-store (Nix) {}.", nix.version())), "{said}");
        let store = tempfile::tempdir()?;
        let store = store.path().to_string_lossy().into_owned();
        let drv = peer.run("nix-instantiate", &["--store", &store, "-E", TRIVIAL])?;
        assert!(drv.trim().ends_with("-trivial.drv"), "{drv}");
    }
    Ok(())
}

#[test]
fn what_a_peer_writes_outside_of_its_directories_is_gone() -> Result<()> {
    let dir = tempfile::tempdir_in(std::env::current_dir()?)?;
    let peer = Peer::new(Nix::V2_34)?.with(dir.path());
    let inside = dir.path().join("kept").to_string_lossy().into_owned();
    peer.run("sh", &["-ec", &format!("echo kept > {inside}; echo gone > /nix/gone; cat /nix/gone")])?;
    assert_eq!(std::fs::read_to_string(&inside)?, "kept\n");
    assert_eq!(peer.run("sh", &["-c", "ls -A /nix; ls -d /.old 2>/dev/null || true"])?, "");
    Ok(())
}

#[test]
fn nix_copies_to_the_http_cache_and_back() -> Result<()> {
    let peer = Peer::new(Nix::V2_34)?;
    let dir = tempfile::tempdir()?;
    let cache = HttpCache::start(dir.path())?;
    let stores = [tempfile::tempdir()?, tempfile::tempdir()?];
    let [from, to] = stores.each_ref().map(|store| store.path().to_string_lossy().into_owned());
    let out = peer.run("nix-build", &["--no-out-link", "--store", &from, "-E", TRIVIAL])?;
    peer.run("nix", &["copy", "--no-check-sigs", "--from", &from, "--to", cache.url(), out.trim()])?;
    let puts: Vec<_> = cache.requests()?.into_iter().filter(|(method, ..)| method == "PUT").collect();
    assert!(
        puts.last().is_some_and(|(_, path, status, _)| path.ends_with(".narinfo") && *status == 201),
        "{puts:?}"
    );
    peer.run("nix", &["copy", "--no-check-sigs", "--from", cache.url(), "--to", &to, out.trim()])?;
    assert_eq!(std::fs::read_to_string(format!("{to}{}", out.trim()))?, "hello\n");
    Ok(())
}
