//! Having the builder fetch what it lacks, by its own caches, before anything is sent to it.
//!
//! It is asked for a slice at a time: while it fetches nothing moves on the connection, and whoever watches that wants to
//! know how long there may be nothing.

use std::collections::BTreeSet;
use std::io::{Read, Write};

use drover_nix::{NarInfo, StorePath};
use drover_serve::Client;

use crate::{Event, Failure, Observer};

/// Most bytes of NARs and most paths that are asked for at once. A path that is larger is asked for alone.
const SLICE_BYTES: u64 = 256 << 20;
const SLICE_PATHS: usize = 512;

/// What the builder fetched.
#[derive(Default)]
pub(crate) struct Fetched {
    pub paths: BTreeSet<StorePath>,
    pub bytes: u64,
}

/// Asks the builder to fetch `missing`, references first, which are locked already. What it could not fetch it says
/// nothing about: that is not in the answer.
pub(crate) fn fetch<R: Read, W: Write>(
    missing: &[(usize, &NarInfo)],
    client: &mut Client<R, W>,
    observer: &mut dyn Observer,
) -> Result<Fetched, Failure> {
    let mut fetched = Fetched::default();
    let mut rest = missing;
    while !rest.is_empty() {
        let (slice, behind) = rest.split_at(slice_len(rest));
        rest = behind;
        let size = |narinfo: &NarInfo| narinfo.info.nar_size;
        let asked: BTreeSet<StorePath> = slice.iter().map(|(_, narinfo)| narinfo.info.path.clone()).collect();
        let bytes = slice.iter().map(|(_, narinfo)| size(narinfo)).fold(0, u64::saturating_add);
        observer.event(Event::FetchStarted { paths: asked.len(), bytes });
        let valid = client
            .query_valid_paths(&asked, false, true)
            .map_err(Failure::builder("having the builder fetch inputs"))?;
        let came = slice.iter().filter(|(_, narinfo)| valid.contains(&narinfo.info.path));
        let bytes = came.map(|(_, narinfo)| size(narinfo)).fold(0, u64::saturating_add);
        observer.event(Event::Fetched { paths: valid.len(), bytes });
        fetched.paths.extend(valid);
        fetched.bytes = fetched.bytes.saturating_add(bytes);
    }
    Ok(fetched)
}

/// How many of the first paths make a slice; one at least.
fn slice_len(paths: &[(usize, &NarInfo)]) -> usize {
    let mut bytes = 0_u64;
    let fits = |(_, narinfo): &&(usize, &NarInfo)| {
        bytes = bytes.saturating_add(narinfo.info.nar_size);
        bytes <= SLICE_BYTES
    };
    paths.iter().take(SLICE_PATHS).take_while(fits).count().max(1)
}

#[cfg(test)]
mod tests {
    use drover_nix::narinfo::Compression;
    use drover_serve::testing::info_of;

    use super::*;

    #[test]
    fn slices_are_bounded_and_never_empty() {
        let of = |nar_size| {
            let path = "f8g8x4m83da3b2f79iv84q2r3qlc58lr-libc".parse().unwrap();
            let mut info = info_of(path, &[], b"x");
            info.nar_size = nar_size;
            NarInfo {
                info,
                url: "x".into(),
                compression: Compression::None,
                file_hash: None,
                file_size: None,
            }
        };
        let len = |sizes: &[u64]| {
            let infos: Vec<NarInfo> = sizes.iter().map(|size| of(*size)).collect();
            slice_len(&infos.iter().map(|info| (0, info)).collect::<Vec<_>>())
        };
        assert_eq!(len(&[1; 10]), 10);
        assert_eq!(len(&[1; SLICE_PATHS + 1]), SLICE_PATHS);
        assert_eq!(len(&[SLICE_BYTES / 2, SLICE_BYTES / 2, 1]), 2);
        assert_eq!(len(&[SLICE_BYTES + 1, 1]), 1);
        assert_eq!(len(&[u64::MAX, u64::MAX]), 1);
    }
}
