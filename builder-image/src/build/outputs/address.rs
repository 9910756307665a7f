//! The paths of outputs that follow from their content (Nix: derivation-builder.cc, newInfoFromCA).
//!
//! An output refers to itself and to others by scratch paths. Those of the others are replaced by the final ones first;
//! its own counts as zeros while the content is hashed, and is replaced once the hash has given the final path.

use std::fs;
use std::os::unix::fs::MetadataExt as _;

use drover_nix::content_hash::content_hashes;
use drover_nix::{ContentAddress, Hash, HashAlgo, Method, OutputName, StorePath};

use super::made::{Made, Scanned};
use super::{Finished, Ready, Rewrites};
use crate::error::Error;

impl Finished<'_> {
    /// Gives an output its path, and adds that to `rewrites`.
    pub(super) fn address(
        &self,
        name: &OutputName,
        made: Made,
        method: Method,
        algo: HashAlgo,
        rewrites: &mut Rewrites,
    ) -> Result<Ready, Error> {
        let own = &self.targets[name].scratch;
        if matches!(method, Method::Flat | Method::Text) {
            self.expect_flat(own, &made)?;
        }
        // Nothing to find where nothing was found, which spares a copy.
        let needed = made.found.iter().any(|path| path != own && rewrites.contains_key(path));
        let mut made = if needed { self.rewrite(made, rewrites)? } else { made };
        let hash = self.content_hash(&made, method, algo, own)?;
        let final_of = |path: &StorePath| rewrites.get(path).unwrap_or(path).clone();
        let others = made.references.iter().filter(|path| *path != own).map(final_of).collect();
        let refers_to_itself = made.references.contains(own);
        let ca = ContentAddress { method, hash };
        let refused = |why: String| {
            Error::output(format!(
                "output '{name}' of '{}' cannot be content-addressed: {why}",
                self.full(self.drv_path)
            ))
        };
        let path = ca
            .store_path(self.store.store_dir(), &name.path_name(&self.drv.name), &others, refers_to_itself)
            .map_err(|error| refused(error.to_string()))?;
        if path != *own && made.found.contains(own) {
            if method == Method::Git {
                // Only where the reference is discarded: the final path would change what git has hashed.
                return Err(refused("what it says of itself changes its hash as git computes it".into()));
            }
            made = self.rewrite(made, &[(own.clone(), path.clone())].into())?;
        }
        rewrites.insert(own.clone(), path.clone());
        let mut references = others;
        references.extend(refers_to_itself.then(|| path.clone()));
        let info = self.info(path, &made, references, Some(ca));
        Ok(Ready { made, info })
    }

    fn expect_flat(&self, path: &StorePath, made: &Made) -> Result<(), Error> {
        let metadata = fs::symlink_metadata(&made.from).map_err(Error::file("examine", &made.from))?;
        if metadata.is_file() && metadata.mode() & 0o100 == 0 {
            return Ok(());
        }
        Err(Error::output(format!(
            "output path '{}' should be a regular file that is not executable, since its hash is that of a flat file",
            self.full(path)
        )))
    }

    fn content_hash(
        &self,
        made: &Made,
        method: Method,
        algo: HashAlgo,
        own: &StorePath,
    ) -> Result<Hash, Error> {
        if (method, algo) == (Method::Nar, HashAlgo::Sha256) && !made.found.contains(own) {
            return Ok(made.nar_hash.into());
        }
        let hashes = drover_store::fs::with_nar(&made.from, |inner| {
            content_hashes(method, algo, Scanned { inner, scanner: None, interest: self.interest }, own)
        });
        self.interest.check()?;
        let hashes = hashes?.map_err(|error| match error {
            drover_nix::Error::NarIo { source, .. } => Error::file("read", &made.from)(source),
            other => Error::output(format!("output '{}' cannot be hashed: {other}", self.full(own))),
        })?;
        Ok(hashes.get(self.self_references).clone())
    }
}
