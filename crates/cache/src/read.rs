//! Small files out of a cache, first of all `.drv` files.

use std::io::{BufReader, Read};

use drover_nix::derivation::{aterm, modulo};
use drover_nix::nar::{Event, Reader};
use drover_nix::{Derivation, StoreDir, StorePath};

use crate::{Cache, Error, VerifiedNar};

/// The content of a store object that is one regular file of at most `limit` bytes. None if the cache does not have it.
pub fn read_file(cache: &dyn Cache, path: &StorePath, limit: u64) -> Result<Option<Vec<u8>>, Error> {
    let Some(narinfo) = cache.narinfo(path)? else { return Ok(None) };
    let fail = |why: String| Error::Content { url: cache.url(), path: path.clone(), why };
    let nar = cache.nar(&narinfo)?;
    let mut reader = Reader::new(BufReader::new(VerifiedNar::new(nar, &narinfo.info)));
    let size = match reader.next().map_err(|error| fail(error.to_string()))? {
        Some(Event::File { size, .. }) if size <= limit => size,
        Some(Event::File { size, .. }) => {
            return Err(fail(format!("the file has {size} bytes; {limit} are allowed")));
        }
        _ => return Err(fail("it is not a file".into())),
    };
    // Grows as the bytes come, so that a claim alone takes no memory.
    let mut contents = Vec::new();
    reader.copy_contents(&mut contents).map_err(|error| fail(error.to_string()))?;
    debug_assert_eq!(contents.len() as u64, size);
    reader.skip_all().map_err(|error| fail(error.to_string()))?;
    // The verification is complete at the end of the stream only.
    let rest = reader.into_inner().read(&mut [0]).map_err(|error| fail(error.to_string()))?;
    if rest != 0 {
        return Err(fail("something follows the archive".into()));
    }
    Ok(Some(contents))
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
