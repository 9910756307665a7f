//! The NAR of one valid path from an offset on: no command of Nix's.
//!
//! A client that received the beginning over a connection that broke asks for the rest. It knows the size from
//! QueryPathInfos and the hash of the whole, so the answer has neither. Nothing announces this command: to any server but
//! Drover's it is one that it does not know, which ends the session, as the broken connection had done.

use std::io::{Read, Write};

use drover_nix::{StoreDir, StorePath};

use super::Command;
use crate::Error;
use crate::wire::{self, WireWrite as _};

/// The request of this command and of DumpStorePathFrames.
pub(crate) struct Request {
    pub path: StorePath,
    /// Bytes of the NAR that are left out.
    pub offset: u64,
}

impl Request {
    pub(crate) fn read(input: &mut impl Read, dir: &StoreDir) -> Result<Self, Error> {
        let path = wire::read_path(input, dir)?;
        Ok(Self { path, offset: wire::read_u64(input, "reading an offset")? })
    }

    pub(crate) fn write(
        &self,
        command: Command,
        output: &mut impl Write,
        dir: &StoreDir,
    ) -> Result<(), Error> {
        output.put_u64(command as u64)?;
        output.put_path(dir, &self.path)?;
        output.put_u64(self.offset)
    }
}
