//! Too much of everything, and builders that do not end by themselves. The server survives, the reason is right, and the
//! next build of the same session works.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use drover_nix::{Hash, Method, Sha256};
use drover_serve::{BuildOptions, BuildStatus};

use super::den::{Den, USERS, User, furnish, gone};

/// Builds end so long after their limit at most, on a busy machine.
const SECONDS_LATE: u64 = 8;

#[test]
fn builders_that_hear_no_signal_end_in_time() -> Result<()> {
    for user in USERS {
        let mut den = Den::new(user)?;
        for (name, timeout_seconds, max_silent_seconds) in [("deaf", 1, 0), ("deaf", 0, 1), ("stop", 1, 0)] {
            let attack = den.attack(&[name])?;
            let options = BuildOptions { timeout_seconds, max_silent_seconds, ..BuildOptions::default() };
            let result = den.build_with(&attack, &options)?;
            ensure!(result.status == BuildStatus::TimedOut, "{user:?}: {name}: {result:?}");
            let took = result.stop_time - result.start_time;
            ensure!(took <= 1 + SECONDS_LATE, "{user:?}: {name} took {took} seconds");
            ensure!(den.processes().is_empty(), "{user:?}: {name}: {:?}", den.processes());
        }
        den.check()?;
    }
    Ok(())
}

/// What bounds the number of processes is the control group that the builder was started in (a pod's, as a rule); Nix
/// bounds nothing here either. What has to hold is that the server, which shares that bound, gets over it.
#[test]
fn a_fork_bomb_ends_in_time() -> Result<()> {
    for user in USERS {
        let group = Group::new("pids", user)?;
        group.set(&["pids.max"], "150")?;
        let mut den = Den::with(user, &[], &group.launcher())?;
        let attack = den.attack(&["bomb"])?;
        let options = BuildOptions { timeout_seconds: 3, ..BuildOptions::default() };
        let pending = den.start(&attack, &options)?;
        den.says("bomb")?;
        let full = den.build_dir()?.join("full");
        crate::builds_fixture::eventually("there is no room for another process", || full.exists())?;
        ensure!(den.processes().len() > 50, "{user:?}: it is no bomb");
        let result = den.join(pending)?;
        ensure!(result.status == BuildStatus::TimedOut, "{user:?}: {result:?}");
        let took = result.stop_time - result.start_time;
        ensure!(took <= 3 + SECONDS_LATE, "{user:?}: it took {took} seconds");
        gone(&den)?;
        den.check()?;
    }
    Ok(())
}

#[test]
fn a_builder_that_takes_all_memory_is_killed_and_not_the_server() -> Result<()> {
    for user in USERS {
        let group = Group::new("memory", user)?;
        group.set(&["memory.limit_in_bytes", "memory.max"], "268435456")?;
        let mut den = Den::with(user, &[], &group.launcher())?;
        let attack = den.attack(&["hog"])?;
        let result = den.build(&attack)?;
        den.says("hog")?;
        ensure!(
            [BuildStatus::PermanentFailure, BuildStatus::TransientFailure, BuildStatus::MiscFailure]
                .contains(&result.status),
            "{user:?}: {result:?}"
        );
        den.check()?;
    }
    Ok(())
}

#[test]
fn a_full_disk_is_the_disks_fault_and_passes() -> Result<()> {
    for user in USERS {
        let disk = Disk::new(96)?;
        for code in ["1", "0"] {
            let mut den = disk.den(user)?;
            let attack = den.attack(&["fill", code])?;
            let result = den.build(&attack)?;
            den.says("full")?;
            ensure!(result.status == BuildStatus::TransientFailure, "{user:?}: {code}: {result:?}");
            ensure!(!den.open()?.is_valid(&attack.out())?);
            den.check()?;
        }
    }
    Ok(())
}

/// A fixed output is copied, and what is a hole in the original takes room in the copy.
#[test]
fn a_hole_does_not_fit_into_a_copy() -> Result<()> {
    for user in USERS {
        let disk = Disk::new(96)?;
        let mut den = disk.den(user)?;
        let size = (1_u64 << 40).to_string();
        let attack = den.fixed(&["sparse", &size], Method::Flat, Hash::from(Sha256::of(b"none")))?;
        let result = den.build(&attack)?;
        ensure!(result.status == BuildStatus::TransientFailure, "{user:?}: {result:?}");
        den.check()?;
    }
    Ok(())
}

/// Holes as large as files can be take no room, but more time to hash than anyone has: the session can end all the same.
#[test]
fn a_hole_of_eight_exbibytes_holds_nobody() -> Result<()> {
    for user in USERS {
        for size in [1_u64 << 40, (1 << 63) - 1] {
            let disk = Disk::new(96)?;
            let mut den = disk.den(user)?;
            let attack = den.attack(&["sparse", &size.to_string()])?;
            let pending = den.start(&attack, &BuildOptions::default())?;
            den.says("over\n")?;
            ensure!(den.attempts()?["make the hole"] == "worked", "{}", den.log());
            gone(&den)?;
            let server = den.server();
            let memory = peak_memory(server)?;
            den.hang_up()?;
            ensure!(memory < 64 << 10, "{memory} KiB of memory");
            ensure!(pending.failed(), "the client was answered");
        }
    }
    Ok(())
}

#[test]
fn one_line_of_a_gigabyte() -> Result<()> {
    // What the server passes on nobody has to keep.
    let mut den = Den::with(User::Root, &[], &["sh", "-c", "exec \"$@\" 2>/dev/null", "sh"])?;
    let attack = den.attack(&["line", &(1 << 30).to_string()])?;
    den.built(&attack)?;
    let memory = peak_memory(den.server())?;
    ensure!(memory < 64 << 10, "{memory} KiB of memory");
    den.check()
}

/// What terminals and log readers obey reaches the log as it was written, as under Nix; in the answer, which goes into
/// messages and status fields, nothing is left that does anything.
#[test]
fn a_log_full_of_commands() -> Result<()> {
    for user in USERS {
        let mut den = Den::new(user)?;
        let attack = den.attack(&["escapes"])?;
        let result = den.build(&attack)?;
        ensure!(result.status == BuildStatus::PermanentFailure, "{user:?}: {result:?}");
        let message = &result.error_message;
        ensure!(message.contains("failed with exit code 1") && message.contains("red"), "{message}");
        ensure!(!message.contains("fake\"") && !message.contains("setPhase"), "messages to Nix: {message}");
        let odd: Vec<char> = message.chars().filter(|c| c.is_control() && *c != '\n').collect();
        ensure!(odd.is_empty(), "{odd:?} in {message:?}");
        ensure!(den.log().contains("\x1b[31mred"), "the log is not what was written");
        den.check()?;
    }
    Ok(())
}

/// Most memory that a process has had, in KiB.
fn peak_memory(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no peak")?;
    Ok(line.trim().trim_end_matches(" kB").trim().parse()?)
}

/// A small disk, in memory.
struct Disk {
    dir: tempfile::TempDir,
}

impl Disk {
    fn new(mebibytes: u32) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("drover-disk-").tempdir_in("/tmp")?;
        let mut mount = Command::new("mount");
        mount
            .args(["-t", "tmpfs", "-o", &format!("size={mebibytes}m,mode=0755"), "drover-test"])
            .arg(dir.path());
        ensure!(mount.status()?.success(), "cannot mount a tmpfs: these tests take root");
        Ok(Self { dir })
    }

    /// A den on it.
    fn den(&self, user: User) -> Result<Den> {
        let dir = tempfile::Builder::new().prefix("den-").tempdir_in(self.dir.path())?;
        fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        furnish(dir.path(), user)?;
        Den::in_dir(user, dir, &[], &[])
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.dir.path()).status();
    }
}

/// A control group for a server and all that it starts.
struct Group {
    dir: PathBuf,
}

impl Group {
    fn new(controller: &str, user: User) -> Result<Self> {
        let name = format!("drover-test-{}-{user:?}", std::process::id());
        let first = PathBuf::from("/sys/fs/cgroup").join(controller);
        let unified = PathBuf::from("/sys/fs/cgroup");
        let parent = if first.is_dir() { first } else { unified.clone() };
        if parent == unified {
            // May be enabled already, and must be.
            let _ = fs::write(unified.join("cgroup.subtree_control"), format!("+{controller}"));
            let enabled = fs::read_to_string(unified.join("cgroup.subtree_control")).unwrap_or_default();
            ensure!(enabled.contains(controller), "this machine has no control groups for {controller}");
        }
        let dir = parent.join(name);
        fs::create_dir(&dir)?;
        if user == User::Ordinary {
            std::os::unix::fs::chown(dir.join("cgroup.procs"), Some(65534), None)?;
        }
        Ok(Self { dir })
    }

    /// Writes to the first of these files that there is.
    fn set(&self, files: &[&str], value: &str) -> Result<()> {
        let file = files.iter().map(|file| self.dir.join(file)).find(|file| file.exists());
        Ok(fs::write(file.context("no such limit")?, value)?)
    }

    /// Words that start a command in it.
    fn launcher(&self) -> Vec<&str> {
        // The last word becomes $0.
        vec![
            "sh",
            "-c",
            "echo $$ > \"$0/cgroup.procs\" && exec \"$@\"",
            self.dir.to_str().unwrap_or_default(),
        ]
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while fs::remove_dir(&self.dir).is_err() && Instant::now() < deadline {
            std::thread::yield_now();
        }
    }
}
