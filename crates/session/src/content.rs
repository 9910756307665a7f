//! Content addresses from content: what a NAR's bytes say that its path must be (Nix: content-address.cc,
//! references.cc).

use std::io::{self, Read};

use drover_nix::content_hash::content_hashes;
use drover_nix::hash_modulo::ModuloHashes;
use drover_nix::{HashAlgo, Method, StorePath};

/// Why content has no address of the wanted kind.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{0}")]
    Content(drover_nix::Error),
    #[error("cannot read it back: {0}")]
    Io(io::Error),
}

/// The hash of a NAR's content. Occurrences of the hash part of `own`, its path, count as zeros, in either of Nix's two
/// ways.
pub(crate) fn hashes(
    method: Method,
    algo: HashAlgo,
    nar: impl Read,
    own: &StorePath,
) -> Result<ModuloHashes, Error> {
    content_hashes(method, algo, nar, own).map_err(|error| match error {
        drover_nix::Error::NarIo { source, .. } => Error::Io(source),
        other => Error::Content(other),
    })
}

#[cfg(test)]
mod tests {
    use drover_nix::{Hash, Sha256};
    use drover_serve::testing::file_nar;

    use super::*;

    const OWN: &str = "i00sflxqsj37lfmf95m8mn0grv615hpj";

    fn of(method: Method, algo: HashAlgo, nar: &[u8]) -> Result<ModuloHashes, Error> {
        hashes(method, algo, nar, &format!("{OWN}-x").parse().unwrap())
    }

    #[test]
    fn every_method_has_one_hash_where_there_is_no_reference_to_itself() {
        let nar = file_nar(b"hello\n");
        let one = |method| of(method, HashAlgo::Sha256, &nar).unwrap();
        assert_eq!(one(Method::Flat), ModuloHashes::both(Hash::from(Sha256::of(b"hello\n"))));
        assert_eq!(one(Method::Text), ModuloHashes::both(Hash::from(Sha256::of(b"hello\n"))));
        assert_eq!(one(Method::Nar), ModuloHashes::both(Hash::from(Sha256::of(&nar))));
        assert_eq!(one(Method::Git), ModuloHashes::both(Hash::from(Sha256::of(b"blob 6\0hello\n"))));
        assert!(matches!(of(Method::Git, HashAlgo::Md5, &nar), Err(Error::Content(_))));
    }

    #[test]
    fn self_references_count_as_zeros_with_their_positions() {
        let text = format!("ab{OWN}{OWN}c{}", &OWN[..31]);
        let zeroed = text.replace(OWN, &"\0".repeat(32));
        let expected = ModuloHashes {
            with_offsets: Sha256::of(format!("{zeroed}|2|34").as_bytes()).into(),
            without_offsets: Sha256::of(zeroed.as_bytes()).into(),
        };
        assert_eq!(of(Method::Nar, HashAlgo::Sha256, text.as_bytes()).unwrap(), expected);
    }
}
