//! Several NARs in one answer, each with its metadata behind it: the format of `nix-store --export`. Nix's servers
//! have it up to 2.31 only; ours keeps it for old clients.

use std::collections::BTreeSet;
use std::io::{Read, Write};

use drover_nix::{PathInfo, StoreDir, StorePath};

use super::Command;
use crate::Error;
use crate::wire::{self, WireWrite as _};

/// Between a NAR and its metadata (Nix: export-import.hh, exportMagic).
pub(crate) const MAGIC: u64 = 0x4558_494e;
/// Before each NAR.
pub(crate) const MORE: u64 = 1;
/// Behind the last one.
pub(crate) const END: u64 = 0;

/// The word that once asked for signatures is read and ignored.
pub(crate) fn read_request(input: &mut impl Read, dir: &StoreDir) -> Result<BTreeSet<StorePath>, Error> {
    let _sign = wire::read_u64(input, "reading an ExportPaths request")?;
    wire::read_paths(input, dir)
}

/// The same word is 0: no server since 2.0 signs what it exports.
pub(crate) fn write_request(
    output: &mut impl Write,
    dir: &StoreDir,
    paths: &BTreeSet<StorePath>,
) -> Result<(), Error> {
    output.put_u64(Command::ExportPaths as u64)?;
    output.put_u64(0)?;
    output.put_paths(dir, paths)
}

/// What follows a NAR.
pub(crate) fn write_trailer(output: &mut impl Write, dir: &StoreDir, info: &PathInfo) -> Result<(), Error> {
    output.put_u64(MAGIC)?;
    output.put_path(dir, &info.path)?;
    output.put_paths(dir, &info.references)?;
    output.put_optional_path(dir, info.deriver.as_ref())?;
    output.put_u64(0)
}
