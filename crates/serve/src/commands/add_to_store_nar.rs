//! Adds one path. Its NAR follows the metadata raw, without a length of its own: `narSize` says where it ends.

use std::io::Write;

use drover_nix::StoreDir;

use super::Command;
use crate::wire::WireWrite as _;
use crate::{Error, ReceivedPath};

/// All but the NAR.
pub(crate) fn write_request(
    output: &mut impl Write,
    dir: &StoreDir,
    path: &ReceivedPath,
) -> Result<(), Error> {
    output.put_u64(Command::AddToStoreNar as u64)?;
    path.write(output, dir)
}
