//! Outputs that are in order, moved to where they belong and made valid.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use drover_nix::OutputName;
use drover_store::ValidPath;

use super::{Finished, Ready};
use crate::build::locks;
use crate::error::Error;

impl Finished<'_> {
    /// Outputs with known paths, whose locks the build holds, become valid together. Every other one has a lock of its
    /// own, taken only now, and is valid before the next is touched: nobody waits for one lock holding another.
    pub(super) fn place_all(&self, ready: Vec<(OutputName, Ready)>) -> Result<(), Error> {
        let is_known = |name: &OutputName| self.targets[name].known.is_some();
        let (known, unknown): (Vec<_>, Vec<_>) = ready.into_iter().partition(|(name, _)| is_known(name));
        if !known.is_empty() {
            self.place_together(known.iter().map(|(_, one)| one).collect())?;
        }
        for (_, one) in unknown {
            let path = &one.info.path;
            self.roots.add(path)?;
            let _held = locks::lock(self.store, vec![path.to_string()], self.interest, || {})?;
            self.place_once(&one)?;
        }
        Ok(())
    }

    /// Makes an output valid that has not the path which the derivation says. Somebody who waits for us may have the
    /// lock of that one, so that it is not waited for.
    pub(super) fn place_if_free(&self, one: Ready) -> Result<(), Error> {
        self.roots.add(&one.info.path)?;
        match locks::try_lock(self.store, vec![one.info.path.to_string()])? {
            Some(_held) => self.place_once(&one),
            None => Ok(()),
        }
    }

    /// What is valid has the same content, since its address is the same; ours is dropped. That it was built here is new.
    fn place_once(&self, one: &Ready) -> Result<(), Error> {
        match self.store.registration(&one.info.path)? {
            Some(there) if there.ultimate => Ok(()),
            Some(there) => Ok(self.store.register(&[ValidPath { ultimate: true, ..there }])?),
            None => self.place_together(vec![one]),
        }
    }

    /// All or none.
    fn place_together(&self, ready: Vec<&Ready>) -> Result<(), Error> {
        let placed = ready.iter().try_for_each(|one| self.place(one));
        let valid = ready.iter().map(|one| {
            let info = one.info.clone();
            ValidPath { info, ultimate: true, registration_time: 0 }
        });
        let registered = placed.and_then(|()| {
            self.store.register(&valid.collect::<Vec<_>>()).map_err(|error| match error {
                // What is in the files, and so the builder's doing: a `.drv` that is none, for instance.
                drover_store::Error::Derivation { .. } | drover_store::Error::ContentAddress { .. } => {
                    Error::output(error.to_string())
                }
                other => other.into(),
            })
        });
        if registered.is_err() {
            for one in ready {
                // Not valid, so that what is left behind is deleted by the next build or the next collection.
                let _left_behind = drover_store::fs::delete(&self.store.real_path(&one.info.path));
            }
        }
        registered
    }

    /// Moves an output to its place, which we hold the lock of; what lies there is not valid.
    fn place(&self, one: &Ready) -> Result<(), Error> {
        let (from, to) = (&one.made.from, self.store.real_path(&one.info.path));
        drover_store::fs::delete(&to)?;
        let metadata = fs::symlink_metadata(from).map_err(Error::file("examine", from))?;
        let is_dir = metadata.is_dir();
        // Moving a directory writes its `..`, which takes the right to write to it unless one is root.
        if is_dir {
            set_mode(from, 0o755)?;
        }
        fs::rename(from, &to).map_err(Error::file("move an output to", &to))?;
        if is_dir {
            set_mode(&to, 0o555)?;
        }
        Ok(())
    }
}

fn set_mode(path: &Path, mode: u32) -> Result<(), Error> {
    fs::set_permissions(path, Permissions::from_mode(mode)).map_err(Error::file("change the mode of", path))
}
