//! Small files out of a cache, first of all `.drv` files.

use std::io::{ErrorKind, Read};

use drover_nix::derivation::{aterm, modulo};
use drover_nix::nar::{Event, Reader};
use drover_nix::{Derivation, NarInfo, StoreDir, StorePath};

use crate::{Cache, Error, VerifiedNar};

/// Bytes that an archive of one file has beside the file's, and some.
const AROUND_A_FILE: u64 = 1024;

/// The content of a store object that is one regular file of at most `limit` bytes. None if the cache does not have it.
pub fn read_file(cache: &dyn Cache, path: &StorePath, limit: u64) -> Result<Option<Vec<u8>>, Error> {
    let Some(narinfo) = cache.narinfo(path)? else { return Ok(None) };
    read_nar_file(cache, &narinfo, limit).map(Some)
}

/// The same where the narinfo file is at hand. The error is [`Error::Content`] if what the cache gives is wrong, and another
/// one if it gives nothing.
pub fn read_nar_file(cache: &dyn Cache, narinfo: &NarInfo, limit: u64) -> Result<Vec<u8>, Error> {
    let fail = |why: String| Error::Content { url: cache.url(), path: narinfo.info.path.clone(), why };
    let size = narinfo.info.nar_size;
    if size > limit.saturating_add(AROUND_A_FILE) {
        return Err(fail(format!("its archive has {size} bytes; a file of {limit} is allowed")));
    }
    // Grows as the bytes come, so that a claim alone takes no memory; verified when it is complete.
    let mut archive = Vec::new();
    let read = VerifiedNar::new(cache.nar(narinfo)?, &narinfo.info).read_to_end(&mut archive);
    read.map_err(|error| match error.kind() {
        ErrorKind::InvalidData => fail(error.to_string()),
        _ => Error::Read { url: cache.url(), source: error },
    })?;
    let mut reader = Reader::new(archive.as_slice());
    match reader.next().map_err(|error| fail(error.to_string()))? {
        Some(Event::File { size, .. }) if size <= limit => {}
        Some(Event::File { size, .. }) => {
            return Err(fail(format!("the file has {size} bytes; {limit} are allowed")));
        }
        _ => return Err(fail("it is not a file".into())),
    }
    let mut contents = Vec::new();
    reader.copy_contents(&mut contents).map_err(|error| fail(error.to_string()))?;
    reader.skip_all().map_err(|error| fail(error.to_string()))?;
    if !reader.into_inner().is_empty() {
        return Err(fail("something follows the archive".into()));
    }
    Ok(contents)
}

/// A derivation from a cache, proven to be the one that `path` names: its text and references lead to that path.
pub fn read_drv(cache: &dyn Cache, dir: &StoreDir, path: &StorePath) -> Result<Option<Derivation>, Error> {
    let fail = |why: String| Error::Content { url: cache.url(), path: path.clone(), why };
    let name = path.derivation_name().ok_or_else(|| fail("its name does not end in `.drv`".into()))?;
    let Some(text) = read_file(cache, path, aterm::MAX_LEN as u64)? else { return Ok(None) };
    let drv = aterm::parse(dir, name, &text).map_err(|error| fail(error.to_string()))?;
    let proven = aterm::print(dir, &drv).is_ok_and(|canonical| canonical == text)
        && modulo::drv_path(dir, &drv).is_ok_and(|computed| computed == *path);
    if !proven {
        return Err(fail("the file is not the derivation that the path names".into()));
    }
    Ok(Some(drv))
}
