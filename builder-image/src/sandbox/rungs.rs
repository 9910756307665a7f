//! Which sandbox this machine allows: tries it, and says what to change where it does not. Never silently none.

use std::fmt;
use std::io;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::launch::{self, Report};
use super::plan::{Command, INSIDE_GID, INSIDE_UID, IdMap, Namespaces, Plan, Step, probe_steps};

/// First of the ids that builds run under, and how many there are: those that Nix's installers give their build users,
/// so that a store's `userpool` locks keep both apart.
const FIRST_BUILD_UID: u32 = 30_001;
const BUILD_UIDS: u32 = 128;
const BUILD_GID: u32 = 30_000;
/// How long the trial may take.
const PROBE_TIMEOUT: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// The ladder's rungs that full isolation stands on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Rung {
    /// User namespaces without any added right.
    Nested,
    /// The same, by a process that has SYS_ADMIN in its own user namespace.
    NestedAdmin,
}

impl fmt::Display for Rung {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nested => "nested",
            Self::NestedAdmin => "nested-admin",
        })
    }
}

/// Under which ids of this machine builds run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Ids {
    /// The caller's own: all that an ordinary user may map.
    Own { uid: u32, gid: u32 },
    /// One of a range for each build, never the store's owner.
    Pool { first_uid: u32, count: u32, gid: u32 },
}

impl Ids {
    /// A pool where the caller may map and give files to foreign ids, else the caller's own.
    pub(crate) fn detect() -> Self {
        let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
        let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
        if uid.is_root() && has_id_capabilities() && covers(&map, BUILD_GID, BUILD_UIDS + 1) {
            Self::Pool { first_uid: FIRST_BUILD_UID, count: BUILD_UIDS, gid: BUILD_GID }
        } else {
            Self::Own { uid: uid.as_raw(), gid: gid.as_raw() }
        }
    }
}

/// Tries the steps that machines refuse, in a directory of its own. The error says what was refused and what helps.
pub(crate) fn probe(ids: Ids) -> Result<Rung, String> {
    let scratch = std::env::temp_dir().join(format!("drover-probe-{}", std::process::id()));
    let made = std::fs::create_dir(&scratch);
    // Without a writable temporary directory there is still /proc itself to mount on.
    let target = if made.is_ok() { scratch.as_path() } else { Path::new("/proc") };
    let result = try_steps(probe_steps(target), ids);
    let _left = std::fs::remove_dir(&scratch);
    match result {
        Ok(()) => Ok(if has_sys_admin() { Rung::NestedAdmin } else { Rung::Nested }),
        Err(why) => Err(format!("{why}. {}", advice(&why))),
    }
}

fn try_steps(steps: Vec<Step>, ids: Ids) -> Result<(), String> {
    let (uid, gid) = match ids {
        Ids::Own { uid, gid } => (uid, gid),
        Ids::Pool { first_uid, gid, .. } => (first_uid, gid),
    };
    let namespaces = Namespaces {
        private_network: true,
        uid: IdMap { inside: INSIDE_UID, outside: uid },
        gid: IdMap { inside: INSIDE_GID, outside: gid },
    };
    let plan = Plan { namespaces, steps, command: Command::default() };
    let text = |error: io::Error| format!("cannot try the sandbox: {error}");
    let mut running = launch::start(&plan, None).map_err(text)?;
    loop {
        match running.report().map_err(text)? {
            Some(Report::Exited(0)) => return Ok(()),
            Some(Report::Failed(why) | Report::NotExecuted(why)) => return Err(why),
            Some(Report::Ready) => {}
            Some(other) => return Err(format!("cannot try the sandbox: it ended with {other:?}")),
            None => {
                let ready = poll(&mut [PollFd::new(running.control(), PollFlags::IN)], Some(&PROBE_TIMEOUT));
                if matches!(ready, Ok(0)) {
                    return Err("cannot try the sandbox: no answer within 10 seconds".into());
                }
            }
        }
    }
}

/// What an administrator can do about a refusal.
pub(crate) fn advice(why: &str) -> &'static str {
    if why.contains("clone") {
        "Allow user namespaces: in a pod leave seccompProfile unset (RuntimeDefault forbids them without SYS_ADMIN); on a \
         machine check /proc/sys/user/max_user_namespaces and its security modules' settings"
    } else if why.contains("MountProc") {
        "Give the pod `procMount: Unmasked` together with `hostUsers: false`: a masked /proc forbids a fresh one"
    } else if why.contains("map the ids") {
        "Keep the capabilities SETUID and SETGID, or run as a user other than root"
    } else {
        "See the builder's requirements on its pod"
    }
}

/// Whether every one of `count` ids from `first` is mapped, by the text of a `uid_map`.
fn covers(map: &str, first: u32, count: u32) -> bool {
    let ranges: Vec<(u64, u64)> = map
        .lines()
        .filter_map(|line| {
            let mut fields = line.split_whitespace().map(|field| field.parse::<u64>().ok());
            let (start, _, length) = (fields.next()??, fields.next()??, fields.next()??);
            Some((start, length))
        })
        .collect();
    (u64::from(first)..u64::from(first) + u64::from(count))
        .all(|id| ranges.iter().any(|(start, length)| (*start..start + length).contains(&id)))
}

/// CHOWN, FOWNER, SETGID and SETUID: what mapping and owning for another id takes.
fn has_id_capabilities() -> bool {
    const NEEDED: u64 = 1 | 1 << 3 | 1 << 6 | 1 << 7;
    effective_capabilities() & NEEDED == NEEDED
}

fn has_sys_admin() -> bool {
    effective_capabilities() & 1 << 21 != 0
}

fn effective_capabilities() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    line.and_then(|text| u64::from_str_radix(text.trim(), 16).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_ids() {
        let whole = "         0          0 4294967295\n";
        let pod = "0 1000000 65536\n";
        let split = "0 100 30050\n30050 9000 1000\n";
        assert!(
            covers(whole, BUILD_GID, 129) && covers(pod, BUILD_GID, 129) && covers(split, BUILD_GID, 129)
        );
        assert!(!covers("0 1000 1\n", BUILD_GID, 129));
        assert!(!covers("0 0 30000\n30002 0 1000\n", BUILD_GID, 129));
        assert!(!covers("", 0, 1));
    }

    #[test]
    fn refusals_come_with_advice() {
        assert!(advice("cannot set up the sandbox: step MountProc { … }: EPERM").contains("procMount"));
        assert!(advice("cannot clone the builder's process").contains("seccompProfile"));
    }
}
