//! Reading a NAR and making sure that it is the right one.

use std::io::{self, ErrorKind, Read};

use drover_nix::hash::Sha256Hasher;
use drover_nix::{HashAlgo, Method, PathInfo, Sha256, nar};

/// A NAR stream that ends well only if hash and size are what `info` says and, where a content address names the
/// SHA-256 of a file, the archive holds that file. Its errors have the kind `InvalidData`; those of the stream
/// underneath keep theirs.
pub struct VerifiedNar<R> {
    inner: R,
    hash: Option<Sha256Hasher>,
    expected: Sha256,
    size: u64,
    left: u64,
    file: Option<FileCheck>,
}

/// For an archive of one plain file: everything before the contents, then the contents' hash.
struct FileCheck {
    header: Vec<u8>,
    seen: u64,
    size: u64,
    hash: Sha256Hasher,
    expected: Vec<u8>,
}

impl<R: Read> VerifiedNar<R> {
    pub fn new(inner: R, info: &PathInfo) -> Self {
        let file = info.ca.as_ref().and_then(|ca| match (ca.method, ca.hash.algo) {
            (Method::Flat | Method::Text, HashAlgo::Sha256) => {
                Some(FileCheck::new(info.nar_size, ca.hash.bytes.clone()))
            }
            _ => None,
        });
        Self {
            inner,
            hash: Some(Sha256Hasher::new()),
            expected: info.nar_hash,
            size: info.nar_size,
            left: info.nar_size,
            file,
        }
    }

    fn check_end(&mut self) -> io::Result<()> {
        // Once: later reads at the end have nothing left to check.
        let Some(hash) = self.hash.take() else { return Ok(()) };
        let actual = hash.finish();
        if actual != self.expected {
            return Err(invalid(format!("its hash is {actual} instead of {}", self.expected)));
        }
        match self.file.take() {
            Some(file) => file.finish(),
            None => Ok(()),
        }
    }
}

impl<R: Read> Read for VerifiedNar<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        if self.left == 0 {
            if self.hash.is_some() && self.inner.read(&mut [0])? != 0 {
                return Err(invalid(format!("it is longer than {} bytes", self.size)));
            }
            self.check_end()?;
            return Ok(0);
        }
        let want = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let count = self.inner.read(&mut buffer[..want])?;
        if count == 0 {
            let got = self.size - self.left;
            return Err(invalid(format!("it ends after {got} bytes instead of {}", self.size)));
        }
        if let Some(hash) = &mut self.hash {
            hash.update(&buffer[..count]);
        }
        if let Some(file) = &mut self.file {
            file.update(&buffer[..count])?;
        }
        self.left -= count as u64;
        // The last bytes are not given away before they are known to be right: a reader that knows the size may well
        // stop here, without asking for the end.
        if self.left == 0 {
            if self.inner.read(&mut [0])? != 0 {
                return Err(invalid(format!("it is longer than {} bytes", self.size)));
            }
            self.check_end()?;
        }
        Ok(count)
    }
}

impl FileCheck {
    fn new(nar_size: u64, expected: Vec<u8>) -> Self {
        // The archive of a file of `n` bytes is 112 bytes and `n`, padded: so its size leaves eight values for `n`.
        // The one that the archive states is checked against that below.
        Self {
            header: Vec::with_capacity(Self::HEADER),
            seen: 0,
            size: nar_size.saturating_sub(112),
            hash: Sha256Hasher::new(),
            expected,
        }
    }

    /// Bytes before a plain file's contents.
    const HEADER: usize = 96;

    fn update(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        if self.header.len() < Self::HEADER {
            let take = bytes.len().min(Self::HEADER - self.header.len());
            self.header.extend_from_slice(&bytes[..take]);
            bytes = &bytes[take..];
            if self.header.len() < Self::HEADER {
                return Ok(());
            }
            self.size = self.stated_size()?;
        }
        let left = self.size - self.seen;
        let take = bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        self.hash.update(&bytes[..take]);
        self.seen += take as u64;
        Ok(())
    }

    fn stated_size(&self) -> io::Result<u64> {
        let plain = || {
            // As the archive of an empty file begins, but for the size.
            let mut writer = nar::Writer::new(Vec::new());
            writer.file_bytes(false, b"").and_then(|()| writer.finish()).map_err(io::Error::other)
        };
        let (kind, size) = self.header.split_at(Self::HEADER - 8);
        let mut stated = [0; 8];
        stated.copy_from_slice(size);
        let stated = u64::from_le_bytes(stated);
        if kind != &plain()?[..Self::HEADER - 8] || stated.next_multiple_of(8) != self.size {
            return Err(invalid("it is not the archive of a plain file, as its content address says".into()));
        }
        Ok(stated)
    }

    fn finish(self) -> io::Result<()> {
        if self.header.len() != Self::HEADER
            || self.seen != self.size
            || self.hash.finish().0[..] != self.expected[..]
        {
            return Err(invalid("the file in it is not the one that its content address names".into()));
        }
        Ok(())
    }
}

fn invalid(why: String) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use drover_nix::ContentAddress;

    use super::*;
    use crate::testing::{info_of, nar_of_file};

    fn read(nar: &[u8], info: &PathInfo) -> Result<Vec<u8>, String> {
        let mut output = Vec::new();
        match VerifiedNar::new(nar, info).read_to_end(&mut output) {
            Ok(_) => Ok(output),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::InvalidData);
                Err(error.to_string())
            }
        }
    }

    #[test]
    fn hash_and_size() {
        let nar = nar_of_file(b"contents");
        let info = info_of("x", &nar);
        assert_eq!(read(&nar, &info).unwrap(), nar);
        assert!(read(&nar[..100], &info).unwrap_err().contains("ends after 100 bytes"));
        assert!(read(&[&nar[..], b"x"].concat(), &info).unwrap_err().contains("longer"));
        let mut wrong = nar;
        wrong[97] ^= 1;
        assert!(read(&wrong, &info).unwrap_err().contains("hash"));
    }

    #[test]
    fn a_reader_that_stops_at_the_size_gets_no_wrong_bytes() {
        let nar = nar_of_file(b"contents");
        let info = info_of("x", &nar);
        let mut wrong = nar.clone();
        wrong[97] ^= 1;
        let mut buffer = vec![0; nar.len()];
        assert!(VerifiedNar::new(&wrong[..], &info).read_exact(&mut buffer).is_err());
        VerifiedNar::new(&nar[..], &info).read_exact(&mut buffer).unwrap();
    }

    #[test]
    fn the_file_that_an_address_names() {
        for contents in [&b""[..], b"1234567", b"12345678", b"123456789"] {
            let nar = nar_of_file(contents);
            let mut info = info_of("x", &nar);
            let ca = |hash: Sha256| Some(ContentAddress { method: Method::Text, hash: hash.into() });
            info.ca = ca(Sha256::of(contents));
            assert_eq!(read(&nar, &info).unwrap(), nar);
            info.ca = ca(Sha256::of(b"other"));
            assert!(read(&nar, &info).unwrap_err().contains("content address"));
        }
        let mut writer = nar::Writer::new(Vec::new());
        writer.file_bytes(true, b"x").unwrap();
        let nar = writer.finish().unwrap();
        let mut info = info_of("x", &nar);
        info.ca = Some(ContentAddress { method: Method::Flat, hash: Sha256::of(b"x").into() });
        assert!(read(&nar, &info).unwrap_err().contains("plain file"));
    }
}
