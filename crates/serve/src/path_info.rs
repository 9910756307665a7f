//! The two encodings of what is known about a path: QueryPathInfos' answer and AddToStoreNar's request
//! (Nix: serve-protocol.cc). They differ in order, in how the NAR hash is spelled and in which fields there are.

use std::collections::BTreeSet;
use std::io::{Read, Write};

use drover_nix::signature::Signature;
use drover_nix::{ContentAddress, PathInfo, Sha256, StoreDir, StorePath};

use crate::wire::{self, WireWrite as _};
use crate::{Error, Version};

const ACT: &str = "reading a path info";

/// A path that is being added, with what a store's database keeps beside the [`PathInfo`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReceivedPath {
    pub info: PathInfo,
    /// Seconds since 1970, 0 for "now".
    pub registration_time: u64,
    /// Whether the sender says that it was built there. Nix clients since 2.8 always say no.
    pub ultimate: bool,
}

/// The record behind a path in QueryPathInfos' answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Unkeyed {
    pub deriver: Option<StorePath>,
    pub references: BTreeSet<StorePath>,
    /// 0 from a server that does not know.
    pub nar_size: u64,
    /// None from a server before 2.4, which names neither a content address nor signatures either.
    pub nar_hash: Option<Sha256>,
    pub signatures: Vec<Signature>,
    pub ca: Option<ContentAddress>,
}

impl Unkeyed {
    pub(crate) fn read(input: &mut impl Read, dir: &StoreDir, version: Version) -> Result<Self, Error> {
        let deriver = wire::read_optional_path(input, dir)?;
        let references = wire::read_paths(input, dir)?;
        let _download_size = wire::read_u64(input, ACT)?;
        let nar_size = wire::read_u64(input, ACT)?;
        let mut read =
            Self { deriver, references, nar_size, nar_hash: None, signatures: Vec::new(), ca: None };
        if version >= Version::NAR_HASH {
            read.nar_hash = Some(wire::read_nar_hash(input)?);
            read.ca = read_content_address(input)?;
            read.signatures = read_signatures(input)?;
        }
        Ok(read)
    }

    /// With what the record leaves to be known.
    pub(crate) fn into_info(self, path: StorePath, nar_hash: Sha256, nar_size: u64) -> PathInfo {
        let Self { deriver, references, signatures, ca, .. } = self;
        PathInfo { path, nar_hash, nar_size, references, deriver, signatures, ca }
    }
}

pub(crate) fn write_unkeyed(
    output: &mut impl Write,
    dir: &StoreDir,
    version: Version,
    info: &PathInfo,
) -> Result<(), Error> {
    output.put_optional_path(dir, info.deriver.as_ref())?;
    output.put_paths(dir, &info.references)?;
    output.put_u64(info.nar_size)?; // what a download would cost: the same for want of anything better
    output.put_u64(info.nar_size)?;
    if version >= Version::NAR_HASH {
        output.put_string(info.nar_hash.to_string().as_bytes())?;
        write_content_address(output, info.ca.as_ref())?;
        write_signatures(output, &info.signatures)?;
    }
    Ok(())
}

impl ReceivedPath {
    pub(crate) fn read(input: &mut impl Read, dir: &StoreDir) -> Result<Self, Error> {
        let path = wire::read_path(input, dir)?;
        let deriver = wire::read_optional_path(input, dir)?;
        let nar_hash = wire::read_nar_hash(input)?;
        let references = wire::read_paths(input, dir)?;
        let registration_time = wire::read_u64(input, ACT)?;
        let nar_size = wire::read_u64(input, ACT)?;
        let ultimate = wire::read_bool(input, ACT)?;
        let signatures = read_signatures(input)?;
        let ca = read_content_address(input)?;
        let info = PathInfo { path, nar_hash, nar_size, references, deriver, signatures, ca };
        Ok(Self { info, registration_time, ultimate })
    }

    pub(crate) fn write(&self, output: &mut impl Write, dir: &StoreDir) -> Result<(), Error> {
        let info = &self.info;
        output.put_path(dir, &info.path)?;
        output.put_optional_path(dir, info.deriver.as_ref())?;
        output.put_string(info.nar_hash.to_hex().as_bytes())?; // here, and only here, without `sha256:`
        output.put_paths(dir, &info.references)?;
        output.put_u64(self.registration_time)?;
        output.put_u64(info.nar_size)?;
        output.put_bool(self.ultimate)?;
        write_signatures(output, &info.signatures)?;
        write_content_address(output, info.ca.as_ref())
    }
}

fn read_content_address(input: &mut impl Read) -> Result<Option<ContentAddress>, Error> {
    const WHAT: &str = "a content address";
    match wire::read_text(input, WHAT)? {
        text if text.is_empty() => Ok(None),
        text => text.parse().map(Some).map_err(Error::nix(WHAT)),
    }
}

fn write_content_address(output: &mut impl Write, ca: Option<&ContentAddress>) -> Result<(), Error> {
    output.put_string(ca.map(ContentAddress::to_string).unwrap_or_default().as_bytes())
}

fn read_signatures(input: &mut impl Read) -> Result<Vec<Signature>, Error> {
    const WHAT: &str = "a signature";
    (0..wire::read_count(input, wire::MAX_SIGNATURES, WHAT)?)
        .map(|_| wire::read_text(input, WHAT)?.parse().map_err(Error::nix(WHAT)))
        .collect()
}

fn write_signatures(output: &mut impl Write, signatures: &[Signature]) -> Result<(), Error> {
    output.put_u64(signatures.len() as u64)?;
    signatures.iter().try_for_each(|signature| output.put_string(signature.to_string().as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::notation::{s, u};

    const A: &str = "/nix/store/i00sflxqsj37lfmf95m8mn0grv615hpj-a";
    const B: &str = "/nix/store/q4mzjdlh5px6977h7v5fdsk1p33yg583-b";

    fn info() -> PathInfo {
        let dir = StoreDir::default();
        let parse = |path: &str| dir.parse(path.as_bytes()).unwrap();
        PathInfo {
            path: parse(A),
            nar_hash: Sha256::of(b"hello\n"),
            nar_size: 34878,
            references: [parse(A), parse(B)].into(),
            deriver: Some(parse(&format!("{B}.drv"))),
            signatures: Vec::new(),
            ca: None,
        }
    }

    #[test]
    fn answers_to_the_byte() {
        let dir = StoreDir::default();
        let hash = "sha256:00xyyr3fi8l6hb839bv3f7yb86yjv7xi1cgh1xnhipym4asvb4aq";
        let since_2_4 =
            [s(&format!("{B}.drv")), u(2), s(A), s(B), u(34878), u(34878), s(hash), s(""), u(0)].concat();
        let mut bytes = Vec::new();
        write_unkeyed(&mut bytes, &dir, Version(0x204), &info()).unwrap();
        assert_eq!(bytes, since_2_4);
        let read = Unkeyed::read(&mut bytes.as_slice(), &dir, Version(0x204)).unwrap();
        assert_eq!(read.nar_hash, Some(info().nar_hash));
        assert_eq!(read.into_info(info().path, info().nar_hash, info().nar_size), info());
        bytes.clear();
        write_unkeyed(&mut bytes, &dir, Version(0x203), &info()).unwrap();
        assert_eq!(bytes, since_2_4[..since_2_4.len() - s(hash).len() - 16]);
        let read = Unkeyed::read(&mut bytes.as_slice(), &dir, Version(0x203)).unwrap();
        assert_eq!((read.nar_hash, read.nar_size), (None, 34878));
    }

    #[test]
    fn additions_to_the_byte() {
        let dir = StoreDir::default();
        let received = ReceivedPath { info: info(), registration_time: 7, ultimate: true };
        let hash = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
        let golden =
            [s(A), s(&format!("{B}.drv")), s(hash), u(2), s(A), s(B), u(7), u(34878), u(1), u(0), s("")]
                .concat();
        let mut bytes = Vec::new();
        received.write(&mut bytes, &dir).unwrap();
        assert_eq!(bytes, golden);
        assert_eq!(ReceivedPath::read(&mut bytes.as_slice(), &dir).unwrap(), received);
    }

    #[test]
    fn any_spelling_of_the_hash() {
        let dir = StoreDir::default();
        let hash = Sha256::of(b"hello\n");
        for text in [hash.to_hex(), hash.to_string(), hash.to_sri(), hash.to_nix32()] {
            let bytes = [s(""), u(0), u(0), u(1), s(&text), s(""), u(0)].concat();
            let read = Unkeyed::read(&mut bytes.as_slice(), &dir, Version(0x204)).unwrap();
            assert_eq!(read.nar_hash, Some(hash));
        }
        let without = [s(""), u(0), u(0), u(1), s(""), s(""), u(0)].concat();
        assert!(Unkeyed::read(&mut without.as_slice(), &dir, Version(0x204)).is_err());
    }
}
