//! Paths of this machine that every build sees, beside its inputs, because whoever runs it said so (Nix: `sandbox-paths`).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use drover_nix::StorePath;

use super::Builder;
use super::skeleton::Skeleton;
use crate::error::Error;

/// One item: `inside[=outside][?]`, where the question mark is for what may be absent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct ExtraPath {
    pub inside: PathBuf,
    pub outside: PathBuf,
    pub optional: bool,
}

impl ExtraPath {
    /// The error is one line.
    pub(crate) fn parse(item: &str) -> Result<Self, String> {
        let (paths, optional) = match item.strip_suffix('?') {
            Some(paths) => (paths, true),
            None => (item, false),
        };
        let (inside, outside) = paths.split_once('=').unwrap_or((paths, paths));
        let plain = |path: &str| {
            let path = Path::new(path);
            path.is_absolute()
                && path.components().skip(1).all(|part| matches!(part, std::path::Component::Normal(_)))
        };
        if !plain(inside) || inside == "/" || !Path::new(outside).is_absolute() {
            return Err(format!(
                "{item:?} is no path of a sandbox: INSIDE, INSIDE=OUTSIDE, or either with `?` behind it, absolute and without `..`"
            ));
        }
        Ok(Self { inside: inside.into(), outside: outside.into(), optional })
    }
}

impl Builder {
    /// Adds those that are not store paths.
    pub(super) fn add_extra_paths(&self, skeleton: &mut Skeleton) -> Result<(), Error> {
        for extra in &self.settings.extra_paths {
            if extra.inside.starts_with(self.store.store_dir().as_str())
                || extra.optional && std::fs::symlink_metadata(&extra.outside).is_err()
            {
                continue;
            }
            skeleton.bind(&extra.outside, &extra.inside.to_string_lossy())?;
        }
        Ok(())
    }

    /// Those that are store paths, with all that they refer to.
    pub(super) fn extra_store_paths(&self) -> Result<BTreeSet<StorePath>, Error> {
        let dir = self.store.store_dir();
        let mut paths = BTreeSet::new();
        for extra in &self.settings.extra_paths {
            let Ok(rest) = extra.inside.strip_prefix(dir.as_str()) else { continue };
            let path: StorePath = rest.to_string_lossy().parse()?;
            if self.store.is_valid(&path)? {
                paths.insert(path);
            } else if !extra.optional {
                return Err(drover_store::Error::NotValid { path }.into());
            }
        }
        Ok(if paths.is_empty() { paths } else { self.store.closure(&paths)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items() {
        let item = |text: &str, inside: &str, outside: &str, optional| {
            let expected = ExtraPath { inside: inside.into(), outside: outside.into(), optional };
            assert_eq!(ExtraPath::parse(text), Ok(expected), "{text}");
        };
        item("/a", "/a", "/a", false);
        item("/a?", "/a", "/a", true);
        item("/a/b=/c d/../e", "/a/b", "/c d/../e", false);
        item("/a=/b?", "/a", "/b", true);
        for bad in ["", "?", "a", "/", "/a/../b", "=/a", "/a=", "/a=b", "/=/a"] {
            assert!(ExtraPath::parse(bad).is_err(), "{bad}");
        }
    }
}
