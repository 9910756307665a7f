//! Content addresses from content: what a NAR's bytes say that its path must be (Nix: content-address.cc,
//! references.cc).

use std::io::{self, Read};

use drover_nix::hash::Hasher;
use drover_nix::hash_modulo::HashModulo;
use drover_nix::nar::{Event, Reader};
use drover_nix::{Hash, HashAlgo, Method, StorePath};

/// Why content has no address of the wanted kind.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("the output must be a regular file that is not executable")]
    NotAFile,
    #[error("hashing by {method} with {algo} is not supported")]
    Unsupported { method: &'static str, algo: HashAlgo },
    #[error("{0}")]
    Nar(#[from] drover_nix::Error),
    #[error("cannot read it back: {0}")]
    Io(#[from] io::Error),
}

/// The hash of a NAR's content. With `own`, occurrences of that path's hash part count as zeros; there are two ways
/// to do that, Nix 2.17 to 2.34's and all others', so the result has up to two hashes.
pub(crate) fn hashes(
    method: Method,
    algo: HashAlgo,
    mut nar: impl Read,
    own: Option<&StorePath>,
) -> Result<Vec<Hash>, Error> {
    let mut digest = Hasher::new(algo);
    match (method, own) {
        (Method::Git, _) => Err(Error::Unsupported { method: method.as_str(), algo }),
        (Method::Flat | Method::Text, _) => {
            let mut reader = Reader::new(nar);
            match reader.next()? {
                Some(Event::File { executable: false, .. }) => {}
                _ => return Err(Error::NotAFile),
            }
            reader.copy_contents(&mut digest)?;
            reader.skip_all()?;
            Ok(vec![digest.finish()])
        }
        (Method::Nar, None) => {
            io::copy(&mut nar, &mut digest)?;
            Ok(vec![digest.finish()])
        }
        (Method::Nar, Some(own)) => {
            let mut hasher = HashModulo::new(own, algo);
            io::copy(&mut nar, &mut hasher)?;
            let hashes = hasher.finish();
            Ok(vec![hashes.with_offsets, hashes.without_offsets])
        }
    }
}

#[cfg(test)]
mod tests {
    use drover_nix::Sha256;
    use drover_serve::testing::file_nar;

    use super::*;

    const OWN: &str = "i00sflxqsj37lfmf95m8mn0grv615hpj";

    #[test]
    fn files_and_archives() {
        let nar = file_nar(b"hello\n");
        let one = |method| hashes(method, HashAlgo::Sha256, nar.as_slice(), None).unwrap().remove(0);
        assert_eq!(one(Method::Flat), Hash::from(Sha256::of(b"hello\n")));
        assert_eq!(one(Method::Text), Hash::from(Sha256::of(b"hello\n")));
        assert_eq!(one(Method::Nar), Hash::from(Sha256::of(&nar)));
        let sha1 = hashes(Method::Flat, HashAlgo::Sha1, nar.as_slice(), None).unwrap().remove(0);
        assert_eq!(sha1.to_hex(), "f572d396fae9206628714fb2ce00f72e94f2258f");
    }

    #[test]
    fn only_plain_files_are_flat() {
        let mut directory = drover_nix::nar::Writer::new(Vec::new());
        directory.directory().unwrap();
        directory.end_directory().unwrap();
        let mut executable = drover_nix::nar::Writer::new(Vec::new());
        executable.file_bytes(true, b"").unwrap();
        for nar in [directory.finish().unwrap(), executable.finish().unwrap()] {
            let result = hashes(Method::Flat, HashAlgo::Sha256, nar.as_slice(), None);
            assert!(matches!(result, Err(Error::NotAFile)));
        }
    }

    #[test]
    fn self_references_count_as_zeros_with_their_positions() {
        let own: StorePath = format!("{OWN}-x").parse().unwrap();
        let text = format!("ab{OWN}{OWN}c{}", &OWN[..31]);
        let zeroed = text.replace(OWN, &"\0".repeat(32));
        let expected =
            [Sha256::of(format!("{zeroed}|2|34").as_bytes()), Sha256::of(zeroed.as_bytes())].map(Hash::from);
        assert_eq!(hashes(Method::Nar, HashAlgo::Sha256, text.as_bytes(), Some(&own)).unwrap(), expected);
    }
}
