//! What is said when a privileged act is refused: the act with its arguments, the kernel's error, and what to do about it.
//! Pure. Every [`Step`] and every [`Act`] has words of its own; a test looks for one that has not.

use std::io;

use super::birth::Act;
use super::plan::{IdMap, Isolation, Step};

const MOUNTS: &str = "Builds need to mount within their own namespaces: look for a seccomp profile or a security module \
                      (AppArmor, SELinux) of the pod or machine that forbids mount, and leave seccompProfile unset";
const OLD_KERNEL: &str = "Use a kernel of at least 5.12 with the options that container runtimes need";

/// One line: what could not be done, why, and what next.
pub(crate) fn refusal(act: &str, error: &io::Error, advice: &str) -> String {
    format!("cannot set up the sandbox: cannot {act}: {error}. {advice}")
}

impl Step {
    /// What it does, to be read behind "cannot".
    pub(crate) fn act(&self) -> String {
        match self {
            Self::Session => "begin a session with default signals and standard input from /dev/null".into(),
            Self::DieWithParent => {
                "arrange for the build to die with its parent (prctl PR_SET_PDEATHSIG)".into()
            }
            Self::OomFirst => "raise the build's /proc/self/oom_score_adj".into(),
            Self::Loopback => "bring up lo in the build's network namespace (ioctl SIOCSIFFLAGS)".into(),
            Self::HostNames { host, domain } => {
                format!("set the host name {host} and the domain name {domain}")
            }
            Self::PrivateMounts => "make all mounts private (mount MS_PRIVATE|MS_REC on /)".into(),
            Self::Bind { source, target } => {
                format!("bind {} to {} (mount MS_BIND|MS_REC)", source.display(), target.display())
            }
            Self::ReadOnly { target } => format!("make {} read-only (mount_setattr)", target.display()),
            Self::ReadOnlyBelow { target } => {
                format!("make all mounts below {} read-only (mount_setattr)", target.display())
            }
            Self::MountProc { target } => format!("mount a fresh /proc on {}", target.display()),
            Self::PrivateTerminals => "mount terminals of its own (devpts)".into(),
            Self::MountShm { target } => format!("mount a tmpfs on {}", target.display()),
            Self::CgroupNamespace => "make a control group namespace (unshare CLONE_NEWCGROUP)".into(),
            Self::PivotRoot { root } => format!("make {} the root directory (pivot_root)", root.display()),
            Self::MoveRoot { root } => {
                format!("make {} the root directory (mount MS_MOVE, chroot)", root.display())
            }
            Self::NoNewPrivileges => "give up new privileges (prctl PR_SET_NO_NEW_PRIVS)".into(),
            Self::FilterSyscalls { .. } => "install the system call filter (seccomp)".into(),
            Self::ScopeSockets => "keep abstract sockets apart (landlock_restrict_self)".into(),
            Self::ConfineFiles { .. } => "confine the build to its files (landlock_restrict_self)".into(),
            Self::Personality { linux32: true } => {
                "take on the 32-bit personality (personality PER_LINUX32)".into()
            }
            Self::Personality { linux32: false } => "take on the ordinary personality".into(),
            Self::ChangeDir { path } => format!("change to the build directory {}", path.display()),
            Self::CloseDescriptors => "close all descriptors but the standard three (close_range)".into(),
            Self::LimitsAndUmask => "turn off core dumps and set the file mode mask".into(),
            Self::Ids { uid, gid } => format!("change to uid {uid} and gid {gid} (setresgid, setresuid)"),
            Self::Exec => "execute the builder".into(),
            Self::Exit => "end the trial".into(),
        }
    }

    /// What an administrator can do about a refusal.
    pub(crate) fn advice(&self) -> &'static str {
        match self {
            Self::Session => "See that /dev/null is there and readable",
            Self::DieWithParent => "A seccomp profile forbids prctl: leave seccompProfile unset",
            Self::OomFirst => "See that /proc is mounted and writable for this program",
            Self::Loopback => {
                "Builds need a network namespace of their own: the kernel needs CONFIG_NET_NS and CONFIG_INET"
            }
            Self::HostNames { .. } => {
                "A seccomp profile or a security module forbids sethostname in the build's own namespace: leave seccompProfile unset"
            }
            Self::PrivateMounts | Self::PrivateTerminals | Self::MountShm { .. } => MOUNTS,
            Self::Bind { .. } => {
                "See that both are there and that this program may read the first; beyond that, a seccomp profile or a security \
                 module may forbid mount: leave seccompProfile unset"
            }
            Self::ReadOnly { .. } | Self::ReadOnlyBelow { .. } => OLD_KERNEL,
            Self::MountProc { .. } => {
                "Give the pod `procMount: Unmasked` together with `hostUsers: false`: a masked /proc forbids a fresh one"
            }
            Self::CgroupNamespace => "Turn control groups of builds off with --no-use-cgroups",
            Self::PivotRoot { .. } => {
                "pivot_root is forbidden by a seccomp profile, or the machine runs from an initramfs: leave seccompProfile unset"
            }
            Self::MoveRoot { .. } => "Keep the capability SYS_CHROOT, beside SYS_ADMIN",
            Self::NoNewPrivileges | Self::FilterSyscalls { .. } => {
                "The kernel needs CONFIG_SECCOMP_FILTER, and no outer seccomp profile may forbid prctl and seccomp"
            }
            Self::ScopeSockets | Self::ConfineFiles { .. } => {
                "See that the paths are there; if a security module forbids Landlock, allow it"
            }
            Self::Personality { .. } => {
                "The seccomp profile forbids personality(PER_LINUX32): leave seccompProfile unset, or do not offer 32-bit systems"
            }
            Self::ChangeDir { .. } => {
                "See that the state directory is on a file system that this program may search"
            }
            Self::CloseDescriptors => OLD_KERNEL,
            Self::LimitsAndUmask => "A seccomp profile forbids setrlimit: leave seccompProfile unset",
            Self::Ids { .. } => "Keep the capabilities SETUID and SETGID, or run as a user other than root",
            Self::Exec | Self::Exit => "See the derivation's builder",
        }
    }
}

impl Act {
    /// What it does, to be read behind "cannot".
    pub(crate) fn act(&self) -> String {
        let map = |file: &str, map: &IdMap| {
            format!("map the ids of the build's user namespace ({file} \"{} {} 1\")", map.inside, map.outside)
        };
        match self {
            Self::DropGroups => "give up supplementary groups (setgroups)".into(),
            Self::KillAllOf { uid } => format!("kill what runs under the build's uid {uid} already"),
            Self::Clone { isolation, group } => {
                let (namespaces, call) = match isolation {
                    Isolation::Nested(_) => (" into namespaces of its own", " (clone CLONE_NEWUSER)"),
                    Isolation::Uid(_) | Isolation::Trial => ("", ""),
                };
                match group {
                    Some(group) => format!(
                        "clone the builder's process{namespaces} in the control group {} (clone3 CLONE_INTO_CGROUP)",
                        group.display()
                    ),
                    None => format!("clone the builder's process{namespaces}{call}"),
                }
            }
            Self::MapUid(ids) => map("uid_map", ids),
            Self::DenySetgroups => {
                "deny setgroups in the build's user namespace (/proc/PID/setgroups)".into()
            }
            Self::MapGid(ids) => map("gid_map", ids),
        }
    }

    /// What an administrator can do about a refusal.
    pub(crate) fn advice(&self) -> &'static str {
        match self {
            Self::DropGroups => "Keep the capability SETGID, or run as a user other than root",
            Self::KillAllOf { .. } => "Keep the capabilities KILL and SETUID",
            Self::Clone { group: Some(_), .. } => {
                "If builds work with --no-use-cgroups, leave it so; otherwise allow user namespaces"
            }
            Self::Clone { isolation: Isolation::Nested(_), .. } => {
                "Allow user namespaces: in a pod leave seccompProfile unset (RuntimeDefault forbids them without SYS_ADMIN); \
                 on a machine check /proc/sys/user/max_user_namespaces and its security modules' settings"
            }
            Self::Clone { isolation: Isolation::Uid(_) | Isolation::Trial, .. } => {
                "The limit on processes or memory is reached: raise it"
            }
            Self::MapUid(_) | Self::MapGid(_) => {
                "Keep the capabilities SETUID and SETGID, or run as a user other than root"
            }
            Self::DenySetgroups => "See that /proc is mounted and writable for this program",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::double::{every_act, every_step};

    #[test]
    fn every_refusal_has_words_of_its_own() {
        let texts: Vec<(String, &str)> = every_step()
            .iter()
            .map(|step| (step.act(), step.advice()))
            .chain(every_act().iter().map(|act| (act.act(), act.advice())))
            .collect();
        for (index, (act, advice)) in texts.iter().enumerate() {
            assert!(!act.is_empty() && !advice.is_empty(), "{act}");
            // The rest of a sentence behind "cannot", and a sentence without its full stop.
            assert!(act.starts_with(char::is_lowercase), "{act}");
            assert!(advice.starts_with(char::is_uppercase) || advice.starts_with("pivot_root"), "{advice}");
            assert!(!advice.ends_with('.'), "{advice}");
            assert!(texts.iter().skip(index + 1).all(|(other, _)| other != act), "{act}");
        }
    }

    #[test]
    fn a_refusal_says_what_why_and_what_next() {
        let step = Step::MountProc { target: "/r/proc".into() };
        let text = refusal(&step.act(), &io::Error::from_raw_os_error(libc::EPERM), step.advice());
        for part in ["mount a fresh /proc on /r/proc", "(os error 1)", "procMount: Unmasked"] {
            assert!(text.contains(part), "{text}");
        }
    }
}
