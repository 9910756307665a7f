//! What the machine knows about a build's end that its exit status does not say: whether the kernel killed something for
//! want of memory while it ran, and whether a disk is full. Gathers only; [`super::verdict`] judges.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use drover_store::StoreLayout;
use rustix::fs::StatVfs;

use crate::sandbox::oom::{OomKills, OomWatch};

/// Less free disk than this after a failure means that the failure may be the disk's (Nix: derivation-builder.cc).
const LOW_DISK_BYTES: u64 = 8 << 20;
/// As few free inodes, where a file system has a number of them. Nix does not look.
const LOW_INODES: u64 = 16;

/// What is known once the build is over.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub(crate) struct Evidence {
    pub oom: OomKills,
    /// What was counted is this build's: it had a control group to itself, or no other build of this process ran at any time
    /// during this one.
    pub alone: bool,
    /// Which disk is nearly full, and of what.
    pub low_disk: Option<String>,
    /// No process of the build could have killed the builder by SIGKILL.
    pub contained: bool,
}

/// From a build's beginning to its end.
pub(crate) struct Watch {
    oom: OomWatch,
    own_group: bool,
    stay: Stay,
    contained: bool,
}

impl Watch {
    /// `group`: the directory of the build's own control group, if it has one. `contained`: it gets a process namespace of
    /// its own.
    pub(crate) fn begin(company: &Company, group: Option<&Path>, contained: bool) -> Self {
        // Without the controller for memory it counts nothing.
        let group = group.filter(|dir| dir.join("memory.events").exists());
        let own_group = group.is_some();
        Self { oom: OomWatch::start(group), own_group, stay: company.enter(), contained }
    }

    /// Call it before anything that the build has made is deleted, and before its control group is. `build_dir`: where it worked.
    pub(crate) fn end(self, layout: &StoreLayout, build_dir: &Path) -> Evidence {
        let disks = [layout.real_store_dir.as_path(), &layout.state_dir, build_dir];
        Evidence {
            oom: self.oom.kills(),
            alone: self.own_group || self.stay.was_alone(),
            low_disk: disks.into_iter().find_map(low_disk),
            contained: self.contained,
        }
    }
}

fn low_disk(dir: &Path) -> Option<String> {
    // A directory that is not there fills no disk.
    let lack = shortage(&rustix::fs::statvfs(dir).ok()?)?;
    Some(format!("{} has {lack}", dir.display()))
}

/// What there is too little of.
fn shortage(disk: &StatVfs) -> Option<String> {
    let bytes = disk.f_bavail.saturating_mul(disk.f_frsize);
    if bytes < LOW_DISK_BYTES {
        return Some(format!("only {bytes} bytes left"));
    }
    // File systems that make inodes as they are needed have none in total.
    (disk.f_files > 0 && disk.f_favail < LOW_INODES).then(|| format!("only {} inodes left", disk.f_favail))
}

/// The builds that run in this process.
#[derive(Clone, Default)]
pub(crate) struct Company {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    present: usize,
    arrivals: u64,
}

/// One build's time in it.
struct Stay {
    company: Company,
    found_nobody: bool,
    /// How many had come when it had.
    arrivals: u64,
}

impl Company {
    fn enter(&self) -> Stay {
        let mut state = self.lock();
        state.present += 1;
        state.arrivals += 1;
        Stay { company: self.clone(), found_nobody: state.present == 1, arrivals: state.arrivals }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Two numbers, whole between any two statements.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Stay {
    fn was_alone(&self) -> bool {
        self.found_nobody && self.company.lock().arrivals == self.arrivals
    }
}

impl Drop for Stay {
    fn drop(&mut self) {
        self.company.lock().present -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_ran_alone() {
        let company = Company::default();
        let first = company.enter();
        assert!(first.was_alone());
        let second = company.enter();
        assert!(!first.was_alone() && !second.was_alone());
        drop(second);
        assert!(!first.was_alone(), "there was another one for a while");
        drop(first);
        assert!(company.enter().was_alone());
    }

    #[test]
    fn disks_that_are_nearly_full() {
        let mut disk = rustix::fs::statvfs("/").unwrap();
        (disk.f_frsize, disk.f_bavail, disk.f_files, disk.f_favail) = (4096, 2048, 1000, 16);
        assert_eq!(shortage(&disk), None);
        disk.f_favail = 15;
        assert_eq!(shortage(&disk).as_deref(), Some("only 15 inodes left"));
        (disk.f_files, disk.f_favail) = (0, 0);
        assert_eq!(shortage(&disk), None, "it has no fixed number of inodes");
        disk.f_bavail = 2047;
        assert_eq!(shortage(&disk).as_deref(), Some("only 8384512 bytes left"));
        assert_eq!(low_disk(Path::new("/no/such/directory")), None);
    }
}
