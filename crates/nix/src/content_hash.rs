//! What a content address hashes of an object, computed from its NAR (Nix: derivation-builder.cc, file-content-address.cc).

use std::io::{self, Read};

use crate::hash_modulo::{HashModulo, ModuloHashes};
use crate::nar::{Event, Reader};
use crate::{Error, HashAlgo, Method, StorePath, git};

/// The hash of what `nar` holds, with every occurrence of the hash part of `own`, the path that the object has, counted
/// as zeros; but git knows nothing of that. Fails for methods that cannot hash such an object. Reads the whole archive,
/// and checks it but for [`Method::Nar`], where all that counts is the bytes.
pub fn content_hashes(
    method: Method,
    algo: HashAlgo,
    mut nar: impl Read,
    own: &StorePath,
) -> Result<ModuloHashes, Error> {
    let mut hasher = HashModulo::new(own, algo);
    match method {
        Method::Git => return git::object_id(algo, nar).map(ModuloHashes::both),
        Method::Nar => {
            io::copy(&mut nar, &mut hasher).map_err(|source| Error::NarIo { act: "read", source })?;
        }
        Method::Flat | Method::Text => {
            let mut reader = Reader::new(nar);
            match reader.next()? {
                Some(Event::File { executable: false, .. }) => {}
                _ => {
                    return Err(Error::ContentAddress {
                        text: format!("{}{algo}", method.prefix()),
                        why: "only a regular file that is not executable can have it".into(),
                    });
                }
            }
            reader.copy_contents(&mut hasher)?;
            reader.skip_all()?;
        }
    }
    Ok(hasher.finish())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nar::Writer;
    use crate::{Hash, Sha256};

    const OWN: &str = "i00sflxqsj37lfmf95m8mn0grv615hpj";

    fn file(executable: bool, contents: &[u8]) -> Vec<u8> {
        let mut writer = Writer::new(Vec::new());
        writer.file_bytes(executable, contents).unwrap();
        writer.finish().unwrap()
    }

    fn hashes(method: Method, algo: HashAlgo, nar: &[u8]) -> Result<ModuloHashes, Error> {
        content_hashes(method, algo, nar, &format!("{OWN}-x").parse().unwrap())
    }

    #[test]
    fn files_and_archives() {
        let nar = file(false, b"hello\n");
        let one = |method| hashes(method, HashAlgo::Sha256, &nar).unwrap();
        let plain = |bytes: &[u8]| ModuloHashes::both(Hash::from(Sha256::of(bytes)));
        assert_eq!(one(Method::Flat), plain(b"hello\n"));
        assert_eq!(one(Method::Text), plain(b"hello\n"));
        assert_eq!(one(Method::Nar), plain(&nar));
        // git hash-object
        let blob = hashes(Method::Git, HashAlgo::Sha1, &nar).unwrap().with_offsets;
        assert_eq!(blob.to_hex(), "ce013625030ba8dba906f756967f9e9ca394464a");
        let sha1 = hashes(Method::Flat, HashAlgo::Sha1, &nar).unwrap().with_offsets;
        assert_eq!(sha1.to_hex(), "f572d396fae9206628714fb2ce00f72e94f2258f");
    }

    #[test]
    fn only_plain_files_are_flat() {
        let mut directory = Writer::new(Vec::new());
        directory.directory().unwrap();
        directory.end_directory().unwrap();
        for nar in [directory.finish().unwrap(), file(true, b"")] {
            for method in [Method::Flat, Method::Text] {
                let result = hashes(method, HashAlgo::Sha256, &nar);
                assert!(matches!(result, Err(Error::ContentAddress { .. })));
            }
        }
    }

    /// What rl-2.35 of Nix is about: without the offsets, zeros in place of a self-reference give the same hash.
    #[test]
    fn a_zeroed_self_reference_is_told_from_a_real_one() {
        let real = file(false, format!("see {OWN} and {OWN}").as_bytes());
        let forged = file(false, format!("see {OWN} and {}", "\0".repeat(32)).as_bytes());
        let hash = |nar: &[u8]| hashes(Method::Nar, HashAlgo::Sha256, nar).unwrap();
        assert_ne!(hash(&real).with_offsets, hash(&forged).with_offsets);
        assert_eq!(hash(&real).without_offsets, hash(&forged).without_offsets, "Nix 2.17 to 2.34");
    }
}
