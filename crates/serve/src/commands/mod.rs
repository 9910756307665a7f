//! One file a command: its number, its request and its answer, each encoded and decoded in one place, so that the
//! client and the server cannot disagree. What a command means is the server's or the caller's business.

pub(crate) mod add_to_store_nar;
pub(crate) mod build_derivation;
pub(crate) mod build_paths;
pub(crate) mod dump_store_path;
pub(crate) mod dump_store_path_frames;
pub(crate) mod dump_store_path_from;
pub(crate) mod export_paths;
pub(crate) mod import_paths;
pub(crate) mod query_closure;
pub(crate) mod query_path_infos;
pub(crate) mod query_valid_paths;

use std::io::Read;

use crate::{Error, wire};

/// What the two commands that add to the store answer when they are done.
pub(crate) const DONE: u64 = 1;

/// Numbers as on the wire (Nix: serve-protocol.hh), and those of our own, far from where Nix counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(crate) enum Command {
    QueryValidPaths = 1,
    QueryPathInfos = 2,
    DumpStorePath = 3,
    ImportPaths = 4,
    ExportPaths = 5,
    BuildPaths = 6,
    QueryClosure = 7,
    BuildDerivation = 8,
    AddToStoreNar = 9,
    /// Four letters, `DROV`.
    DumpStorePathFrom = 0x4452_4f56,
    /// The next one.
    DumpStorePathFrames = 0x4452_4f57,
}

impl Command {
    const ALL: [Self; 11] = [
        Self::QueryValidPaths,
        Self::QueryPathInfos,
        Self::DumpStorePath,
        Self::ImportPaths,
        Self::ExportPaths,
        Self::BuildPaths,
        Self::QueryClosure,
        Self::BuildDerivation,
        Self::AddToStoreNar,
        Self::DumpStorePathFrom,
        Self::DumpStorePathFrames,
    ];

    /// The next command, or None at a clean end of the session.
    pub(crate) fn read(input: &mut impl Read) -> Result<Option<Self>, Error> {
        let Some(number) = wire::read_word_or_end(input, "reading a command")? else {
            return Ok(None);
        };
        let known = Self::ALL.into_iter().find(|command| *command as u64 == number);
        known.map(Some).ok_or(Error::UnknownCommand { number })
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::AddToStoreNar => "AddToStoreNar",
            Self::BuildDerivation => "BuildDerivation",
            Self::BuildPaths => "BuildPaths",
            Self::DumpStorePath => "DumpStorePath",
            Self::DumpStorePathFrames => "DumpStorePathFrames",
            Self::DumpStorePathFrom => "DumpStorePathFrom",
            Self::ExportPaths => "ExportPaths",
            Self::ImportPaths => "ImportPaths",
            Self::QueryClosure => "QueryClosure",
            Self::QueryPathInfos => "QueryPathInfos",
            Self::QueryValidPaths => "QueryValidPaths",
        }
    }

    /// Whether it changes the store.
    pub(crate) const fn writes(self) -> bool {
        matches!(self, Self::ImportPaths | Self::BuildPaths | Self::BuildDerivation | Self::AddToStoreNar)
    }
}

/// Reads the answer of a command that has nothing to say but that it is done.
pub(crate) fn read_done(input: &mut impl Read) -> Result<(), Error> {
    match wire::read_u64(input, "waiting for a path to be added")? {
        DONE => Ok(()),
        other => Err(Error::invalid("the answer to an added path", format!("it is {other} instead of 1"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        let numbers = (1..=9).chain([0x4452_4f56u64, 0x4452_4f57]);
        for (number, command) in numbers.zip(Command::ALL) {
            assert_eq!(Command::read(&mut number.to_le_bytes().as_slice()).unwrap(), Some(command));
        }
        for number in [0u64, 10, 13, u64::MAX] {
            let error = Command::read(&mut number.to_le_bytes().as_slice());
            assert!(matches!(error, Err(Error::UnknownCommand { .. })));
        }
        assert_eq!(Command::read(&mut [].as_slice()).unwrap(), None);
    }
}
