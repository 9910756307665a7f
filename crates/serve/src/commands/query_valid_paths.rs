//! Which of a set of paths are valid; on request locks all of them first, then fetches those that are missing.

use std::collections::BTreeSet;
use std::io::{Read, Write};

use drover_nix::{StoreDir, StorePath};

use super::Command;
use crate::Error;
use crate::wire::{self, WireWrite as _};

pub(crate) struct Request {
    /// Keep them from the garbage collector until the session ends, valid or not.
    pub lock: bool,
    /// Fetch missing ones from the server's own substituters.
    pub substitute: bool,
    pub paths: BTreeSet<StorePath>,
}

impl Request {
    pub(crate) fn read(input: &mut impl Read, dir: &StoreDir) -> Result<Self, Error> {
        const ACT: &str = "reading a QueryValidPaths request";
        Ok(Self {
            lock: wire::read_bool(input, ACT)?,
            substitute: wire::read_bool(input, ACT)?,
            paths: wire::read_paths(input, dir)?,
        })
    }
}

pub(crate) fn write_request(
    output: &mut impl Write,
    dir: &StoreDir,
    paths: &BTreeSet<StorePath>,
    lock: bool,
    substitute: bool,
) -> Result<(), Error> {
    output.put_u64(Command::QueryValidPaths as u64)?;
    output.put_bool(lock)?;
    output.put_bool(substitute)?;
    output.put_paths(dir, paths)
}
