//! Whether a cache's word about a path is believed (Nix: path-info.cc, checkSignatures and isContentAddressed).

use drover_nix::{HashAlgo, Method, PathInfo, StoreDir};

use crate::CacheOptions;

/// Says why the word is not believed.
pub(crate) fn check(options: &CacheOptions, info: &PathInfo) -> Result<(), String> {
    let wanted = options.require_signatures || !options.public_keys.is_empty();
    if !wanted || is_self_proving(&options.dir, info) {
        return Ok(());
    }
    let fingerprint = info.fingerprint(&options.dir);
    let signed = info
        .signatures
        .iter()
        .any(|signature| options.public_keys.iter().any(|key| key.verify(fingerprint.as_bytes(), signature)));
    if signed {
        return Ok(());
    }
    let known = |name: &str| options.public_keys.iter().any(|key| key.name == name);
    if let Some(signature) = info.signatures.iter().find(|signature| known(&signature.key_name)) {
        return Err(format!(
            "its signature by {} does not fit: hash, size or references are not what was signed, or another key of \
             that name signed it",
            signature.key_name
        ));
    }
    let names = |names: Vec<&str>| if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    Err(format!(
        "no trusted key signed it (its signatures: {}; trusted keys: {}){}; give the cache's public key, or allow it \
         without signatures",
        names(info.signatures.iter().map(|signature| signature.key_name.as_str()).collect()),
        names(options.public_keys.iter().map(|key| key.name.as_str()).collect()),
        if info.ca.is_some() { ", and its content address does not prove it" } else { "" },
    ))
}

/// Whether path, references and content address belong together, and [`crate::VerifiedNar`] can show that the content
/// is the address's: then it does not matter who says so. Not claimed for addresses by weak hashes, and for NARs that
/// refer to themselves, whose hash has to be computed in another way.
pub fn is_self_proving(dir: &StoreDir, info: &PathInfo) -> bool {
    let Some(ca) = &info.ca else { return false };
    let others = info.other_references().cloned().collect();
    let refers_to_itself = info.references.contains(&info.path);
    let path_fits = || {
        ca.store_path(dir, info.path.name(), &others, refers_to_itself).is_ok_and(|path| path == info.path)
    };
    match (ca.method, ca.hash.algo) {
        (Method::Nar, HashAlgo::Sha256) => {
            !refers_to_itself && ca.hash.bytes == info.nar_hash.0 && path_fits()
        }
        (Method::Flat | Method::Text, HashAlgo::Sha256) => path_fits(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use drover_nix::signature::SecretKey;
    use drover_nix::{ContentAddress, Sha256};

    use super::*;
    use crate::testing::{info_of, nar_of_file};

    #[test]
    fn signatures() {
        let mut info = info_of("x", &nar_of_file(b"x"));
        let key = SecretKey::from_seed("good-1", &[1; 32]).unwrap();
        let other = SecretKey::from_seed("other-1", &[2; 32]).unwrap();
        let mut options = CacheOptions { public_keys: vec![key.public()], ..CacheOptions::default() };
        assert!(check(&options, &info).unwrap_err().contains("good-1"));
        let fingerprint = info.fingerprint(&options.dir);
        info.signatures.push(other.sign(fingerprint.as_bytes()));
        assert!(check(&options, &info).unwrap_err().contains("other-1"));
        info.signatures.push(key.sign(fingerprint.as_bytes()));
        check(&options, &info).unwrap();
        // The signature is over all of it.
        let path = info.path.clone();
        info.references.insert(path);
        assert!(check(&options, &info).is_err());
        info.references.clear();
        check(&options, &info).unwrap();
        info.nar_size += 1;
        let error = check(&options, &info).unwrap_err();
        assert!(error.contains("good-1 does not fit"), "{error}");
        // Two keys of one name, as where a cache had to change its key and kept the name: either will do.
        let namesake = SecretKey::from_seed("good-1", &[3; 32]).unwrap();
        info.signatures = vec![namesake.sign(info.fingerprint(&options.dir).as_bytes())];
        assert!(check(&options, &info).unwrap_err().contains("another key of that name"));
        for keys in [[key.public(), namesake.public()], [namesake.public(), key.public()]] {
            let both = CacheOptions { public_keys: keys.into(), ..options.clone() };
            check(&both, &info).unwrap();
        }
        // Good bytes under the name of a key that nobody trusts.
        info.signatures[0].key_name = "other-1".into();
        assert!(check(&options, &info).unwrap_err().contains("no trusted key"));
        options.public_keys.clear();
        check(&options, &info).unwrap();
        options.require_signatures = true;
        assert!(check(&options, &info).is_err());
    }

    #[test]
    fn content_addresses() {
        let options = CacheOptions { require_signatures: true, ..CacheOptions::default() };
        let nar = nar_of_file(b"hello");
        let with = |method, hash: Sha256| {
            let ca = ContentAddress { method, hash: hash.into() };
            let mut info = info_of("x", &nar);
            info.path = ca.store_path(&options.dir, "x", &info.references, false).unwrap();
            info.ca = Some(ca);
            info
        };
        for (method, hash) in [
            (Method::Nar, Sha256::of(&nar)),
            (Method::Flat, Sha256::of(b"hello")),
            (Method::Text, Sha256::of(b"hello")),
        ] {
            let mut info = with(method, hash);
            check(&options, &info).unwrap();
            info.path = info_of("x", &nar).path;
            assert!(check(&options, &info).is_err(), "an address that belongs to another path");
        }
        assert!(check(&options, &with(Method::Nar, Sha256::of(b"another"))).is_err());
    }
}
