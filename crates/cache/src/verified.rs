use std::io::{self, ErrorKind, Read};

use drover_nix::hash::Sha256Hasher;
use drover_nix::{PathInfo, Sha256};

/// Passes a NAR on and checks at its end that size and hash are what its metadata says. Otherwise the last read fails
/// with `InvalidData`, so that nobody takes the end of a wrong NAR for a good one. At most one byte beyond the
/// announced size is taken from the stream.
pub struct VerifiedNar<R> {
    inner: R,
    hasher: Option<Sha256Hasher>,
    left: u64,
    expected: Sha256,
    what: String,
}

impl<R: Read> VerifiedNar<R> {
    pub fn new(inner: R, info: &PathInfo) -> Self {
        Self {
            inner,
            hasher: Some(Sha256Hasher::new()),
            left: info.nar_size,
            expected: info.nar_hash,
            what: format!("the NAR of {} ({} bytes, {})", info.path, info.nar_size, info.nar_hash),
        }
    }

    fn wrong(&self, why: &str) -> io::Error {
        io::Error::new(ErrorKind::InvalidData, format!("{} {why}", self.what))
    }

    fn check_end(&mut self) -> io::Result<()> {
        let Some(hasher) = self.hasher.take() else {
            return Ok(());
        };
        let mut beyond = [0];
        loop {
            match self.inner.read(&mut beyond) {
                Ok(0) => break,
                Ok(_) => return Err(self.wrong("is longer than announced")),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        match hasher.finish() {
            hash if hash == self.expected => Ok(()),
            hash => Err(self.wrong(&format!("really has the hash {hash}"))),
        }
    }
}

impl<R: Read> Read for VerifiedNar<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        if self.left == 0 {
            return self.check_end().map(|()| 0);
        }
        let want = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let count = self.inner.read(&mut buffer[..want])?;
        if count == 0 {
            return Err(self.wrong(&format!("is {} bytes short", self.left)));
        }
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&buffer[..count]);
        }
        self.left -= count as u64;
        if self.left == 0 {
            // Now, not on the next read: a reader that knows the size does not ask again.
            self.check_end()?;
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8], announced: &[u8]) -> io::Result<Vec<u8>> {
        let info = PathInfo {
            path: "i00sflxqsj37lfmf95m8mn0grv615hpj-a".parse().unwrap(),
            nar_hash: Sha256::of(announced),
            nar_size: announced.len() as u64,
            references: [].into(),
            deriver: None,
            signatures: Vec::new(),
            ca: None,
        };
        let mut out = Vec::new();
        VerifiedNar::new(bytes, &info).read_to_end(&mut out)?;
        Ok(out)
    }

    #[test]
    fn only_what_was_announced() {
        assert_eq!(read(b"good", b"good").unwrap(), b"good");
        for (bytes, why) in [("evil", "really has"), ("goo", "short"), ("goods", "longer"), ("", "short")] {
            let error = read(bytes.as_bytes(), b"good").unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidData);
            assert!(error.to_string().contains(why), "{error}");
        }
    }

    #[test]
    fn a_reader_that_stops_at_the_size_is_told_too() {
        let info_of_good = read(b"good", b"good");
        assert!(info_of_good.is_ok());
        let info = PathInfo {
            path: "i00sflxqsj37lfmf95m8mn0grv615hpj-a".parse().unwrap(),
            nar_hash: Sha256::of(b"good"),
            nar_size: 4,
            references: [].into(),
            deriver: None,
            signatures: Vec::new(),
            ca: None,
        };
        let mut four = [0; 4];
        assert!(VerifiedNar::new(b"evil".as_slice(), &info).read_exact(&mut four).is_err());
    }
}
