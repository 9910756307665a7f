//! Under which ids of the machine a build runs. Where there is a pool, each build has one of its own while it runs,
//! guarded by the same lock files that Nix uses (Nix: user-lock.cc, `userpool/<uid>`).

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::error::Error;
use crate::sandbox::rungs::Ids;

/// A build's ids. Dropping it gives the uid back.
#[derive(Debug)]
pub(crate) struct BuildIds {
    pub uid: u32,
    pub gid: u32,
    lock: Option<File>,
}

impl BuildIds {
    /// Takes the first uid that nobody uses. None if all are in use.
    pub(crate) fn take(ids: Ids, state_dir: &Path) -> Result<Option<Self>, Error> {
        let (first_uid, count, gid) = match ids {
            Ids::Own { uid, gid } => return Ok(Some(Self { uid, gid, lock: None })),
            Ids::Pool { first_uid, count, gid } => (first_uid, count, gid),
        };
        let pool = state_dir.join("userpool");
        for uid in first_uid..first_uid + count {
            let path = pool.join(uid.to_string());
            let mut options = File::options();
            options.read(true).write(true).create(true).truncate(false).mode(0o600);
            let file = match options.open(&path) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    std::fs::create_dir_all(&pool).map_err(Error::file("create", &pool))?;
                    options.open(&path)
                }
                other => other,
            };
            let file = file.map_err(Error::file("open", &path))?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Some(Self { uid, gid, lock: Some(file) })),
                Err(Errno::WOULDBLOCK | Errno::INTR) => {}
                Err(errno) => return Err(Error::file("lock", &path)(errno.into())),
            }
        }
        Ok(None)
    }

    /// The ids that files must be given to, unless they are the caller's own.
    pub(crate) fn foreign(&self) -> Option<(u32, u32)> {
        self.lock.as_ref().map(|_| (self.uid, self.gid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_build_has_its_own() {
        let dir = std::env::temp_dir().join(format!("drover-ids-{}", std::process::id()));
        let pool = Ids::Pool { first_uid: 7, count: 2, gid: 6 };
        let take = || BuildIds::take(pool, &dir).unwrap();
        let (first, second) = (take().unwrap(), take().unwrap());
        assert_eq!((first.foreign(), second.foreign()), (Some((7, 6)), Some((8, 6))));
        assert!(take().is_none());
        drop(first);
        assert_eq!(take().unwrap().uid, 7);
        let own = BuildIds::take(Ids::Own { uid: 5, gid: 4 }, &dir).unwrap().unwrap();
        assert_eq!((own.uid, own.gid, own.foreign()), (5, 4, None));
        std::fs::remove_dir_all(dir).unwrap();
    }
}
