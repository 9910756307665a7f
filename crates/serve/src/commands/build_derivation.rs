//! Builds a derivation that the request carries whole: no `.drv` file need exist on the server.

use std::io::{Read, Write};

use drover_nix::{BasicDerivation, StoreDir, StorePath};

use super::Command;
use crate::wire::{self, WireWrite as _};
use crate::{BuildOptions, Error, Version, derivation};

pub(crate) struct Request {
    /// Ends in `.drv`; gives the derivation its name.
    pub drv_path: StorePath,
    pub derivation: BasicDerivation,
    pub options: BuildOptions,
}

impl Request {
    pub(crate) fn read(input: &mut impl Read, dir: &StoreDir, version: Version) -> Result<Self, Error> {
        let drv_path = wire::read_path(input, dir)?;
        let derivation = derivation::read(input, dir, &drv_path)?;
        let options = BuildOptions::read(input, version)?;
        Ok(Self { drv_path, derivation, options })
    }
}

pub(crate) fn write_request(
    output: &mut impl Write,
    dir: &StoreDir,
    version: Version,
    drv_path: &StorePath,
    derivation: &BasicDerivation,
    options: &BuildOptions,
) -> Result<(), Error> {
    if drv_path.derivation_name() != Some(derivation.name.as_str()) {
        let why = format!("{drv_path} is not a name for the derivation {}", derivation.name);
        return Err(Error::invalid("a BuildDerivation request", why));
    }
    output.put_u64(Command::BuildDerivation as u64)?;
    output.put_path(dir, drv_path)?;
    derivation::write(output, dir, derivation)?;
    options.write(output, version)
}
