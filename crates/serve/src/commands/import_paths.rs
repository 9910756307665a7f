//! The reverse of ExportPaths: a path's metadata arrives behind its NAR, so the NAR has to be kept somewhere first.
//! Hydra's C++ queue runner sends its inputs this way.

use std::collections::BTreeSet;
use std::io::{Read, Write};

use drover_nix::{StoreDir, StorePath};

use super::Command;
use super::export_paths::{END, MAGIC, MORE};
use crate::Error;
use crate::wire::{self, WireWrite as _};

const WHAT: &str = "an export stream";

/// What an export stream says about the NAR before it: no hash, no size, no signatures.
#[derive(PartialEq, Eq, Debug)]
pub(crate) struct Trailer {
    pub path: StorePath,
    pub references: BTreeSet<StorePath>,
    pub deriver: Option<StorePath>,
}

/// What comes before all NARs.
pub(crate) fn write_start(output: &mut impl Write) -> Result<(), Error> {
    output.put_u64(Command::ImportPaths as u64)
}

/// Whether another NAR follows.
pub(crate) fn read_more(input: &mut impl Read) -> Result<bool, Error> {
    match wire::read_u64(input, WHAT)? {
        MORE => Ok(true),
        END => Ok(false),
        other => Err(Error::invalid(WHAT, format!("it goes on with {other}, neither 0 nor 1"))),
    }
}

impl Trailer {
    pub(crate) fn read(input: &mut impl Read, dir: &StoreDir) -> Result<Self, Error> {
        if wire::read_u64(input, WHAT)? != MAGIC {
            return Err(Error::invalid(WHAT, "no magic number follows a NAR"));
        }
        let path = wire::read_path(input, dir)?;
        let references = wire::read_paths(input, dir)?;
        let deriver = wire::read_optional_path(input, dir)?;
        // An old signature, in a form that nothing checks any more.
        if wire::read_u64(input, WHAT)? == 1 {
            wire::read_string(input, wire::MAX_SHORT_LEN, WHAT)?;
        }
        Ok(Self { path, references, deriver })
    }
}
