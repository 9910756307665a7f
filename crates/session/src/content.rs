//! Content addresses from content: what a NAR's bytes say that its path must be (Nix: content-address.cc,
//! references.cc).

use std::io::{self, Read, Write};

use drover_nix::hash::Hasher;
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
            let mut zeroing = Zeroing::new(own, digest);
            io::copy(&mut nar, &mut zeroing)?;
            let (digest, positions) = zeroing.finish()?;
            let mut with_positions = digest.clone();
            for position in positions {
                write!(with_positions, "|{position}")?;
            }
            Ok(vec![with_positions.finish(), digest.finish()])
        }
    }
}

/// Passes bytes on with every occurrence of a hash part replaced by zeros, and notes where they were.
struct Zeroing {
    needle: Vec<u8>,
    output: Hasher,
    /// What was not passed on yet: it may be the beginning of an occurrence.
    held: Vec<u8>,
    passed: u64,
    positions: Vec<u64>,
}

impl Zeroing {
    fn new(own: &StorePath, output: Hasher) -> Self {
        let needle = own.hash_part().as_bytes().to_vec();
        Self { needle, output, held: Vec::new(), passed: 0, positions: Vec::new() }
    }

    fn finish(mut self) -> io::Result<(Hasher, Vec<u64>)> {
        self.output.write_all(&self.held)?;
        Ok((self.output, self.positions))
    }
}

impl Write for Zeroing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.held.extend_from_slice(bytes);
        let len = self.needle.len();
        let mut from = 0;
        while let Some(at) = bstr::ByteSlice::find(&self.held[from..], &self.needle) {
            let at = from + at;
            self.positions.push(self.passed + at as u64);
            self.held[at..at + len].fill(0);
            from = at + len;
        }
        let pass = self.held.len().saturating_sub(len - 1);
        self.output.write_all(&self.held[..pass])?;
        self.held.drain(..pass);
        self.passed += pass as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
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
        // However it is cut into pieces.
        for piece in 1..text.len() {
            let mut zeroing = Zeroing::new(&own, Hasher::new(HashAlgo::Sha256));
            text.as_bytes().chunks(piece).for_each(|piece| zeroing.write_all(piece).unwrap());
            let (digest, positions) = zeroing.finish().unwrap();
            assert_eq!(positions, [2, 34]);
            assert_eq!(digest.finish(), Hash::from(Sha256::of(zeroed.as_bytes())));
        }
    }
}
