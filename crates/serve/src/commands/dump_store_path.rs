//! The NAR of one valid path: nothing before it, nothing behind it.

use std::io::Write;

use drover_nix::{StoreDir, StorePath};

use super::Command;
use crate::Error;
use crate::wire::WireWrite as _;

pub(crate) fn write_request(output: &mut impl Write, dir: &StoreDir, path: &StorePath) -> Result<(), Error> {
    output.put_u64(Command::DumpStorePath as u64)?;
    output.put_path(dir, path)
}
