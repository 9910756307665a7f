//! The greeting: magic numbers and versions (Nix: serve-protocol-connection.cc).
//!
//! Peers disagree about which version is in force: since Nix 2.23 the lower of the two, before it what the other side
//! said. Every client sends its 16 bytes before it reads, so the server reads them first and answers with the lower
//! version; then every rule gives the same result.

use std::io::{Read, Write};

use crate::wire::{self, WireWrite as _};
use crate::{Error, LATEST, Version};

const CLIENT_MAGIC: u64 = 0x390c_9deb;
const SERVER_MAGIC: u64 = 0x5452_eecb;
const ACT: &str = "reading the greeting";

/// The client's first 16 bytes, to be sent in one write.
pub(crate) fn client_hello() -> [u8; 16] {
    let mut hello = [0; 16];
    hello[..8].copy_from_slice(&CLIENT_MAGIC.to_le_bytes());
    hello[8..].copy_from_slice(&u64::from(LATEST.0).to_le_bytes());
    hello
}

/// What the client makes of the server's greeting: the version in force.
pub(crate) fn read_server_hello(input: &mut impl Read) -> Result<Version, Error> {
    read_magic(input, SERVER_MAGIC)?;
    read_version(input)
}

/// The server's side, both ways. Writes nothing before the client's greeting is there in full; does not flush.
pub(crate) fn answer(input: &mut impl Read, output: &mut impl Write) -> Result<Version, Error> {
    read_magic(input, CLIENT_MAGIC)?;
    let version = read_version(input)?;
    output.put_u64(SERVER_MAGIC)?;
    output.put_u64(u64::from(version.0))?;
    Ok(version)
}

fn read_magic(input: &mut impl Read, expected: u64) -> Result<(), Error> {
    match wire::read_u64(input, ACT)? {
        magic if magic == expected => Ok(()),
        other => Err(Error::Magic { got: other.to_le_bytes() }),
    }
}

/// The lower of what the peer says and [`LATEST`].
fn read_version(input: &mut impl Read) -> Result<Version, Error> {
    let word = wire::read_u64(input, ACT)?;
    match u16::try_from(word).map(Version) {
        Ok(version) if version.major() == LATEST.major() => Ok(version.min(LATEST)),
        _ => Err(Error::UnsupportedVersion { word }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(magic: u64, version: u64) -> Vec<u8> {
        [magic.to_le_bytes(), version.to_le_bytes()].concat()
    }

    #[test]
    fn the_server_answers_with_the_lower_version() {
        for (said, agreed) in
            [(0x200, 0x200), (0x204, 0x204), (0x206, 0x206), (0x207, 0x207), (0x208, 0x208), (0x2ff, 0x208)]
        {
            let mut output = Vec::new();
            let version = answer(&mut hello(CLIENT_MAGIC, said).as_slice(), &mut output).unwrap();
            assert_eq!(version, Version(agreed));
            assert_eq!(output, hello(SERVER_MAGIC, u64::from(agreed)));
        }
        // A 2.5 server's greeting, to the byte.
        let mut output = Vec::new();
        answer(&mut hello(CLIENT_MAGIC, 0x205).as_slice(), &mut output).unwrap();
        assert_eq!(output, b"\xcb\xee\x52\x54\0\0\0\0\x05\x02\0\0\0\0\0\0");
    }

    #[test]
    fn nothing_is_written_before_the_client_has_spoken() {
        let whole = hello(CLIENT_MAGIC, 0x207);
        for len in 0..whole.len() {
            let mut output = Vec::new();
            assert!(matches!(answer(&mut &whole[..len], &mut output), Err(Error::Closed { .. })));
            assert_eq!(output, b"");
        }
    }

    #[test]
    fn other_majors_and_other_programs() {
        for version in [0x101, 0x300, 0x1_0207, u64::MAX] {
            let error = answer(&mut hello(CLIENT_MAGIC, version).as_slice(), &mut Vec::new());
            assert!(matches!(error, Err(Error::UnsupportedVersion { .. })), "{version:x}");
        }
        let error = read_server_hello(&mut b"Welcome to the machine".as_slice());
        assert!(matches!(error, Err(Error::Magic { got }) if &got == b"Welcome "));
    }

    #[test]
    fn the_client_speaks_first_and_at_once() {
        assert_eq!(client_hello(), *b"\xeb\x9d\x0c\x39\0\0\0\0\x08\x02\0\0\0\0\0\0");
        let version = read_server_hello(&mut hello(SERVER_MAGIC, 0x207).as_slice()).unwrap();
        assert_eq!(version, Version(0x207));
    }
}
