//! Which sandbox this machine allows: tries it, and says what to change where it does not. Never silently none.

use std::fmt;
use std::io;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::launch::{self, Report};
use super::plan::{
    Birth, Command, INSIDE_GID, INSIDE_UID, IdMap, Isolation, Namespaces, Plan, Step, bare_probe_steps,
    probe_steps,
};

/// First of the ids that builds run under, and how many there are: those that Nix's installers give their build users,
/// so that a store's `userpool` locks keep both apart.
const FIRST_BUILD_UID: u32 = 30_001;
const BUILD_UIDS: u32 = 128;
const BUILD_GID: u32 = 30_000;
/// What a refusal says that may be over the next time: the trial itself failed.
pub(crate) const UNTRIED: &str = "cannot try the sandbox";
/// How long the trial may take.
const PROBE_TIMEOUT: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// The rungs of the sandbox ladder. A stronger one is greater.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Rung {
    /// The pod is the sandbox, for one build: that has an id of its own and no rights, and sees the pod.
    Pod,
    /// The same as [`Self::Nested`], by a process that needs SYS_ADMIN in its own user namespace for it.
    NestedAdmin,
    /// Namespaces of every kind for each build, made without any added right.
    Nested,
}

impl Rung {
    /// From the strongest.
    const LADDER: [Self; 3] = [Self::Nested, Self::NestedAdmin, Self::Pod];

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Nested => "nested",
            Self::NestedAdmin => "nested-admin",
            Self::Pod => "pod",
        }
    }

    pub(crate) fn parse(word: &str) -> Option<Self> {
        Self::LADDER.into_iter().find(|rung| rung.as_str() == word)
    }
}

impl fmt::Display for Rung {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
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

/// What of this process decides about rungs before anything is tried.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Standing {
    /// It has SYS_ADMIN.
    admin: bool,
    /// A system call filter is in force.
    filtered: bool,
}

/// The strongest rung that works here, if it is `floor` or stronger. The error says which works, what keeps the stronger
/// ones from working, and what helps. `pod` says whether the rung of that name could be used, apart from what is tried.
pub(crate) fn find(floor: Rung, ids: Ids, pod: &dyn Fn() -> Result<(), String>) -> Result<Rung, String> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let standing = Standing {
        admin: effective_capabilities(&status) & SYS_ADMIN != 0,
        filtered: field(&status, "Seccomp:").is_some_and(|mode| mode != "0"),
    };
    choose(floor, standing, &mut |rung| match rung {
        Rung::Nested => try_nested(ids, false),
        Rung::NestedAdmin => try_nested(ids, true),
        Rung::Pod => pod().and_then(|()| try_pod(ids)),
    })
}

fn choose(
    floor: Rung,
    standing: Standing,
    works: &mut dyn FnMut(Rung) -> Result<(), String>,
) -> Result<Rung, String> {
    let mut refused: Vec<String> = Vec::new();
    for rung in Rung::LADDER {
        let result = match rung {
            // Container runtimes' filters let a process with SYS_ADMIN make namespaces, and others not. Which of them
            // this one is cannot be told from within, so the capability counts as what builds stand on.
            Rung::Nested if standing.admin && standing.filtered => Err(
                "this process has SYS_ADMIN under a seccomp filter, as a rule one that allows namespaces for the sake of \
                 SYS_ADMIN only. Leave seccompProfile unset and do not add the capability"
                    .into(),
            ),
            Rung::NestedAdmin if !standing.admin => {
                Err("this process does not have SYS_ADMIN, which the container would have to add".into())
            }
            rung => works(rung),
        };
        match result {
            Ok(()) if rung >= floor => return Ok(rung),
            Ok(()) => {
                return Err(format!(
                    "the sandbox must be `{floor}` or stronger, and `{rung}` is the strongest that works here: {}. Change \
                     that, or allow the weaker one: `--sandbox {rung}`, which is `sandbox: {}` of a BuilderClass",
                    refused.join("; "),
                    in_class(rung)
                ));
            }
            Err(why) => refused.push(format!("`{rung}`: {why}")),
        }
    }
    Err(format!("the sandbox must be `{floor}` or stronger, and none works here: {}", refused.join("; ")))
}

/// The word of a BuilderClass for the rung.
fn in_class(rung: Rung) -> &'static str {
    match rung {
        Rung::Nested => "Nested",
        Rung::NestedAdmin => "NestedAdmin",
        Rung::Pod => "Pod",
    }
}

/// Tries the steps that machines refuse, in a directory of its own.
fn try_nested(ids: Ids, admin: bool) -> Result<(), String> {
    let scratch = std::env::temp_dir().join(format!("drover-probe-{}", std::process::id()));
    let made = std::fs::create_dir(&scratch);
    // Without a writable temporary directory there is still /proc itself to mount on.
    let target = if made.is_ok() { scratch.as_path() } else { Path::new("/proc") };
    let (uid, gid) = match ids {
        Ids::Own { uid, gid } => (uid, gid),
        Ids::Pool { first_uid, gid, .. } => (first_uid, gid),
    };
    let isolation = Isolation::Nested(Namespaces {
        private_network: true,
        admin,
        uid: IdMap { inside: INSIDE_UID, outside: uid },
        gid: IdMap { inside: INSIDE_GID, outside: gid },
    });
    let result = try_steps(isolation, ids, probe_steps(target, admin));
    let _left = std::fs::remove_dir(&scratch);
    result
}

fn try_pod(ids: Ids) -> Result<(), String> {
    let Ids::Pool { first_uid, gid, .. } = ids else {
        return Err(
            "builds need an id of their own, and this process cannot change ids. Run it as root with the capabilities \
             CHOWN, FOWNER, SETGID and SETUID, where the ids 30000 to 30128 are mapped"
                .into(),
        );
    };
    try_steps(Isolation::Trial, ids, bare_probe_steps(first_uid, gid))
}

fn try_steps(isolation: Isolation, ids: Ids, steps: Vec<Step>) -> Result<(), String> {
    let foreign_ids = matches!(ids, Ids::Pool { .. });
    let birth = Birth { isolation, foreign_ids, group: None };
    let plan = Plan { birth, steps, command: Command::default() };
    let text = |error: io::Error| format!("{UNTRIED}: {error}");
    let mut running = launch::start(&plan, None).map_err(text)?;
    loop {
        match running.report().map_err(text)? {
            Some(Report::Exited(0)) => return Ok(()),
            Some(Report::Failed(why) | Report::NotExecuted(why)) => return Err(why),
            Some(Report::Ready) => {}
            Some(Report::Lost) => return Err(format!("{UNTRIED}: its helper process died")),
            Some(other) => return Err(format!("{UNTRIED}: it ended with {other:?}")),
            None => {
                let ready = poll(&mut [PollFd::new(running.control(), PollFlags::IN)], Some(&PROBE_TIMEOUT));
                if matches!(ready, Ok(0)) {
                    return Err(format!("{UNTRIED}: no answer within 10 seconds"));
                }
            }
        }
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
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    effective_capabilities(&status) & NEEDED == NEEDED
}

const SYS_ADMIN: u64 = 1 << 21;

/// By the text of a process's `status`.
fn effective_capabilities(status: &str) -> u64 {
    field(status, "CapEff:").and_then(|text| u64::from_str_radix(text, 16).ok()).unwrap_or(0)
}

fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim)
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

    const ROOT: Standing = Standing { admin: true, filtered: false };
    const CONFINED: Standing = Standing { admin: true, filtered: true };
    const ORDINARY: Standing = Standing { admin: false, filtered: false };

    /// Chooses where these rungs work; which were tried.
    fn chosen(floor: Rung, standing: Standing, work: &[Rung]) -> (Result<Rung, String>, Vec<Rung>) {
        let mut tried = Vec::new();
        let result = choose(floor, standing, &mut |rung| {
            tried.push(rung);
            if work.contains(&rung) { Ok(()) } else { Err(format!("{rung} was refused. Mend {rung}")) }
        });
        (result, tried)
    }

    #[test]
    fn the_strongest_that_works_is_taken() {
        use Rung::{Nested, NestedAdmin, Pod};
        for (floor, standing, work, rung) in [
            (Nested, ORDINARY, &Rung::LADDER[..], Nested),
            (Nested, ROOT, &Rung::LADDER, Nested),
            (Pod, ROOT, &Rung::LADDER, Nested),
            (NestedAdmin, CONFINED, &Rung::LADDER, NestedAdmin),
            (NestedAdmin, ROOT, &[NestedAdmin], NestedAdmin),
            (Pod, ORDINARY, &[Pod], Pod),
            (Pod, CONFINED, &[Pod], Pod),
        ] {
            let (chosen, tried) = chosen(floor, standing, work);
            assert_eq!(chosen, Ok(rung), "{floor} {standing:?}");
            assert_eq!(tried.last(), Some(&rung), "nothing is tried beyond what works");
        }
    }

    #[test]
    fn a_weaker_one_than_allowed_is_an_error_that_says_everything() {
        use Rung::{Nested, NestedAdmin, Pod};
        let why = chosen(Nested, ORDINARY, &[Pod]).0.unwrap_err();
        for part in [
            "`nested` or stronger",
            "`pod` is the strongest",
            "Mend nested",
            "--sandbox pod",
            "sandbox: Pod",
            "SYS_ADMIN",
        ] {
            assert!(why.contains(part), "no {part:?} in {why}");
        }
        let why = chosen(NestedAdmin, ORDINARY, &[Pod]).0.unwrap_err();
        assert!(why.contains("`nested-admin` or stronger"), "{why}");
        // The capability is what namespaces stand on there, whether or not they would work without.
        let (refused, tried) = chosen(Nested, CONFINED, &Rung::LADDER);
        let why = refused.unwrap_err();
        assert!(why.contains("`nested-admin` is the strongest") && why.contains("seccomp filter"), "{why}");
        assert_eq!(tried, [NestedAdmin]);
    }

    #[test]
    fn none_is_an_error_that_names_all() {
        let why = chosen(Rung::Pod, ROOT, &[]).0.unwrap_err();
        for part in ["none works here", "Mend nested", "Mend nested-admin", "Mend pod"] {
            assert!(why.contains(part), "no {part:?} in {why}");
        }
    }

    #[test]
    fn fields_of_a_status() {
        let status = "Name:\tx\nCapEff:\t0000000000200001\nSeccomp:\t2\nSeccomp_filters:\t1\n";
        assert_eq!(
            (effective_capabilities(status) & SYS_ADMIN, field(status, "Seccomp:")),
            (SYS_ADMIN, Some("2"))
        );
        assert_eq!((effective_capabilities(""), field("", "Seccomp:")), (0, None));
    }

    #[test]
    fn words() {
        assert!(Rung::LADDER.into_iter().all(|rung| Rung::parse(rung.as_str()) == Some(rung)));
        assert_eq!(Rung::parse("none"), None);
        assert!(Rung::LADDER.is_sorted_by(|stronger, weaker| stronger > weaker));
    }
}
