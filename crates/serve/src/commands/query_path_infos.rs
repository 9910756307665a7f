//! What is known about valid paths. Invalid ones are left out of the answer, which an empty string ends.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};

use drover_nix::{PathInfo, StoreDir, StorePath};

use super::Command;
use crate::path_info::{self, Unkeyed};
use crate::wire::{self, WireWrite as _};
use crate::{Error, Version};

pub(crate) fn write_request(
    output: &mut impl Write,
    dir: &StoreDir,
    paths: &BTreeSet<StorePath>,
) -> Result<(), Error> {
    output.put_u64(Command::QueryPathInfos as u64)?;
    output.put_paths(dir, paths)
}

pub(crate) fn write_item(
    output: &mut impl Write,
    dir: &StoreDir,
    version: Version,
    info: &PathInfo,
) -> Result<(), Error> {
    output.put_path(dir, &info.path)?;
    path_info::write_unkeyed(output, dir, version, info)
}

pub(crate) fn write_end(output: &mut impl Write) -> Result<(), Error> {
    output.put_string(b"")
}

/// Each path at most once, and none that was not asked for.
pub(crate) fn read_answer(
    input: &mut impl Read,
    dir: &StoreDir,
    version: Version,
    asked: &BTreeSet<StorePath>,
) -> Result<BTreeMap<StorePath, Unkeyed>, Error> {
    let mut infos = BTreeMap::new();
    while let Some(path) = wire::read_optional_path(input, dir)? {
        if !asked.contains(&path) {
            let why = format!("{path} was not asked for");
            return Err(Error::invalid("the answer to QueryPathInfos", why));
        }
        let info = Unkeyed::read(input, dir, version)?;
        if infos.insert(path.clone(), info).is_some() {
            return Err(Error::invalid("the answer to QueryPathInfos", format!("{path} is there twice")));
        }
    }
    Ok(infos)
}
