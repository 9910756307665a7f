//! The closure of some paths under references, themselves included.

use std::collections::BTreeSet;
use std::io::{Read, Write};

use drover_nix::{StoreDir, StorePath};

use super::Command;
use crate::Error;
use crate::wire::{self, WireWrite as _};

pub(crate) struct Request {
    /// Also the valid outputs of every `.drv` on the way.
    pub include_outputs: bool,
    pub paths: BTreeSet<StorePath>,
}

impl Request {
    pub(crate) fn read(input: &mut impl Read, dir: &StoreDir) -> Result<Self, Error> {
        let include_outputs = wire::read_bool(input, "reading a QueryClosure request")?;
        Ok(Self { include_outputs, paths: wire::read_paths(input, dir)? })
    }
}

pub(crate) fn write_request(
    output: &mut impl Write,
    dir: &StoreDir,
    paths: &BTreeSet<StorePath>,
    include_outputs: bool,
) -> Result<(), Error> {
    output.put_u64(Command::QueryClosure as u64)?;
    output.put_bool(include_outputs)?;
    output.put_paths(dir, paths)
}
