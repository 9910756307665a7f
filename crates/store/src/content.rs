//! Whether a content address leads to the path and is the content's (Nix: local-store.cc, content-address.cc).

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::path::Path;

use drover_nix::hash_modulo::{HashModulo, ModuloHashes};
use drover_nix::{ContentAddress, Hash, Method, PathInfo, StoreDir, StorePath, git};

use crate::{Error, fs};

/// The path must follow from the content address and the references.
pub(crate) fn check_address(dir: &StoreDir, info: &PathInfo) -> Result<(), Error> {
    let Some(ca) = &info.ca else { return Ok(()) };
    let others: BTreeSet<StorePath> = info.other_references().cloned().collect();
    let computed = ca
        .store_path(dir, info.path.name(), &others, info.references.contains(&info.path))
        .map_err(|error| fail(info, ca, error.to_string()))?;
    if computed == info.path {
        Ok(())
    } else {
        Err(fail(info, ca, format!("with its references it leads to {computed}")))
    }
}

/// The object at `real`, whose archive was found to have the hash `info.nar_hash`, must have the content address.
/// Occurrences of its own hash part count as zeros, whether they are registered as references or were discarded.
pub(crate) fn check_content(info: &PathInfo, real: &Path) -> Result<(), Error> {
    let Some(ca) = &info.ca else { return Ok(()) };
    let plain = Hash::from(info.nar_hash);
    if ca.method == Method::Nar && ca.hash == plain && !info.references.contains(&info.path) {
        return Ok(());
    }
    let mut hasher = HashModulo::new(&info.path, ca.hash.algo);
    let actual = match ca.method {
        Method::Nar => {
            fs::dump(real, &mut hasher)?;
            hasher.finish()
        }
        Method::Flat | Method::Text => {
            let meta = std::fs::symlink_metadata(real).map_err(Error::io("examine", real))?;
            if !meta.is_file() {
                return Err(fail(info, ca, "only a regular file can have it".into()));
            }
            File::open(real)
                .and_then(|mut file| io::copy(&mut file, &mut hasher))
                .map_err(Error::io("read", real))?;
            hasher.finish()
        }
        Method::Git => {
            let id = fs::with_nar(real, |nar| git::object_id(ca.hash.algo, nar))?;
            ModuloHashes::both(id.map_err(|error| fail(info, ca, error.to_string()))?)
        }
    };
    if actual.contains(&ca.hash) {
        return Ok(());
    }
    Err(fail(info, ca, format!("its content has the hash {}", actual.with_offsets)))
}

fn fail(info: &PathInfo, ca: &ContentAddress, why: String) -> Error {
    Error::ContentAddress { path: info.path.clone(), ca: ca.to_string(), why }
}

#[cfg(test)]
mod tests {
    use drover_nix::hash::Hasher;
    use drover_nix::store_path::HASH_PART_LEN;
    use drover_nix::{HashAlgo, Sha256};

    use super::*;
    use crate::testing::{file_nar, info, store, store_path};

    /// An object with this content under the path that its address gives.
    fn addressed(name: &str, content: &[u8], method: Method, algo: HashAlgo) -> (PathInfo, Vec<u8>) {
        let nar = file_nar(content);
        let mut digest = Hasher::new(algo);
        match method {
            Method::Nar => digest.update(&nar),
            Method::Git => digest.update(&[format!("blob {}\0", content.len()).as_bytes(), content].concat()),
            Method::Flat | Method::Text => digest.update(content),
        }
        let ca = ContentAddress { method, hash: digest.finish() };
        let mut info = info(name, &nar, &[]);
        info.path = ca.store_path(&StoreDir::default(), name, &BTreeSet::new(), false).unwrap();
        info.ca = Some(ca);
        (info, nar)
    }

    #[test]
    fn every_method_is_verified() {
        for (method, algo) in [
            (Method::Nar, HashAlgo::Sha256),
            (Method::Nar, HashAlgo::Sha512),
            (Method::Flat, HashAlgo::Sha256),
            (Method::Flat, HashAlgo::Sha1),
            (Method::Text, HashAlgo::Sha256),
            (Method::Git, HashAlgo::Sha1),
            (Method::Git, HashAlgo::Sha256),
        ] {
            let (_dir, store) = store();
            let (info, nar) = addressed("good", b"content", method, algo);
            store.add_nar(&info, false, 0, &mut &nar[..]).unwrap();
            assert_eq!(store.path_info(&info.path).unwrap().unwrap().ca, info.ca);
            // Right hash and size of an archive, under an address that another content has.
            let (mut forged, _) = addressed("bad", b"content", method, algo);
            let nar = file_nar(b"forgery");
            (forged.nar_hash, forged.nar_size) = (Sha256::of(&nar), nar.len() as u64);
            let error = store.add_nar(&forged, false, 0, &mut &nar[..]).unwrap_err();
            assert!(matches!(error, Error::ContentAddress { .. }), "{error}");
            assert!(!store.real_path(&forged.path).exists());
        }
    }

    #[test]
    fn references_to_itself_are_blanked_out() {
        let path = store_path("self");
        let (_dir, store) = store();
        let content =
            [b"x".repeat(40_000), path.hash_part().into(), b"-".to_vec(), path.hash_part().into()].concat();
        let real = store.real_path(&path);
        std::fs::write(&real, &content).unwrap();
        let nar = file_nar(&content);
        let start = nar.windows(HASH_PART_LEN).position(|w| w == path.hash_part().as_bytes()).unwrap();
        let mut blank = nar;
        blank[start..start + 32].fill(0);
        blank[start + 33..start + 65].fill(0);
        let offsets = format!("|{start}|{}", start + 33);
        let expected = (Sha256::of(&[&blank[..], offsets.as_bytes()].concat()), Sha256::of(&blank));
        let mut hasher = HashModulo::new(&path, HashAlgo::Sha256);
        fs::dump(&real, &mut hasher).unwrap();
        let hashes = hasher.finish();
        assert_eq!((hashes.with_offsets, hashes.without_offsets), (expected.0.into(), expected.1.into()));
    }

    #[test]
    fn either_hash_of_references_to_itself_is_accepted_and_no_other() {
        let temporary = store_path("self");
        let content = |path: &StorePath| format!("x{}", path.hash_part()).into_bytes();
        let mut hasher = HashModulo::new(&temporary, HashAlgo::Sha256);
        io::Write::write_all(&mut hasher, &file_nar(&content(&temporary))).unwrap();
        let hashes = hasher.finish();
        for (hash, good) in [
            (hashes.with_offsets, true),
            (hashes.without_offsets, true),
            (Hash::from(Sha256::of(b"no such content")), false),
        ] {
            // With the reference registered, and without it as where it was discarded.
            for registered in [true, false] {
                let (_dir, store) = store();
                let ca = ContentAddress { method: Method::Nar, hash: hash.clone() };
                let path = ca.store_path(&StoreDir::default(), "self", &[].into(), registered).unwrap();
                let nar = file_nar(&content(&path));
                let own: &[&StorePath] = if registered { &[&path] } else { &[] };
                let info = PathInfo { path: path.clone(), ca: Some(ca), ..info("self", &nar, own) };
                let added = store.add_nar(&info, false, 0, &mut &nar[..]);
                assert_eq!(added.is_ok(), good, "{added:?}");
            }
        }
    }
}
