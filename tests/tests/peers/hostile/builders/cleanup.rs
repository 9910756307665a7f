//! The directories of a build: made anew, deleted without leaving them, and what stays of failed builds.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, Result, ensure};
use drover_nix::{Hash, Method, Sha256};
use drover_serve::{BuildOptions, BuildStatus};
use rustix::fs::{Mode, OFlags, RenameFlags};

use super::den::{Den, STRANGER, USERS, User, as_user};

/// Someone exchanges every directory of the build directory for a symlink to another directory and back, as fast as
/// possible, while it is deleted. A builder cannot: it is dead by then. This is root, who can.
#[test]
fn cve_2025_46415_deleting_never_leaves_the_build_directory() -> Result<()> {
    const ROUNDS: usize = 6;
    const DIRECTORIES: usize = 60;
    for user in USERS {
        let mut den = Den::new(user)?;
        let victim = den.canary();
        for number in 0..20 {
            fs::write(victim.join(format!("f{number}")), "victim")?;
        }
        den.remember()?;
        for round in 0..ROUNDS {
            let attack = den.attack(&["tree", &DIRECTORIES.to_string()])?;
            let pending = den.start(&attack, &BuildOptions::default())?;
            crate::builds_fixture::eventually("it is ready", || {
                den.log().matches("ready\n").count() > round
            })?;
            let build = den.build_dir()?;
            let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
            let directory = rustix::fs::open(&build, flags, Mode::empty())?;
            rustix::fs::symlinkat(&victim, &directory, "link")?;
            let stop = Arc::new(AtomicBool::new(false));
            let stopped = Arc::clone(&stop);
            let racer = std::thread::spawn(move || {
                let mut exchanged = 0;
                while !stopped.load(Ordering::Relaxed) {
                    for number in (0..DIRECTORIES).rev() {
                        let name = format!("d{number}");
                        for _ in 0..2 {
                            let result = rustix::fs::renameat_with(
                                &directory,
                                &name,
                                &directory,
                                "link",
                                RenameFlags::EXCHANGE,
                            );
                            exchanged += usize::from(result.is_ok());
                        }
                    }
                }
                exchanged
            });
            den.let_go()?;
            let result = den.join(pending)?;
            stop.store(true, Ordering::Relaxed);
            let exchanged = racer.join().map_err(|_| anyhow::anyhow!("the race panicked"))?;
            ensure!(exchanged > DIRECTORIES, "{user:?}: the race has not run");
            ensure!(result.status == BuildStatus::PermanentFailure, "{user:?}: {result:?}");
        }
        den.check()?;
    }
    Ok(())
}

/// The names of build directories can be foreseen. What is there already is never used, whatever it is.
#[test]
fn cve_2025_52991_directories_that_were_made_by_others_are_not_used() -> Result<()> {
    for user in USERS {
        for kind in ["directory", "symlink", "file"] {
            let mut den = Den::new(user)?;
            let builds = den.state("builds");
            fs::create_dir_all(&builds)?;
            fs::set_permissions(&builds, Permissions::from_mode(0o755))?;
            rustix::fs::chown(&builds, Some(rustix::fs::Uid::from_raw(den.owner())), None)?;
            let server = den.server();
            let attack = den.attack(&["identity"])?;
            // The first numbers, which may be somebody's and are let be, and the scratch directory in the store, which is
            // nobody's but its own.
            const PLANTED: usize = 8;
            let top = |number: usize| builds.join(format!("nix-{server}-{number}"));
            let mut tops: Vec<_> = (0..PLANTED).map(top).collect();
            tops.push(den.object(&format!("{}.chroot", attack.path).parse()?));
            for top in &tops {
                // An ordinary user could not take away what belongs to others, and others cannot put it there.
                let owner = if user == User::Root { STRANGER } else { den.owner() };
                plant(kind, top, &den.canary(), owner)?;
            }
            let before: Vec<File> = if kind == "directory" {
                tops.iter().map(|top| Ok(File::open(top)?)).collect::<Result<_>>()?
            } else {
                Vec::new()
            };
            let pending = den.start(&attack, &BuildOptions::default())?;
            den.says("ready")?;
            let mut used = Vec::new();
            let first_free = top(PLANTED);
            for top in [&first_free].into_iter().chain(&tops) {
                let meta = fs::symlink_metadata(top)?;
                let held = |file: &File| file.metadata().is_ok_and(|held| held.ino() == meta.ino());
                if !meta.is_dir() || before.iter().any(held) {
                    continue;
                }
                let path = top.display();
                ensure!(meta.mode() & 0o7777 == 0o700, "{user:?}: {kind}: {path} is open");
                ensure!(meta.uid() == den.owner(), "{user:?}: {kind}: {path} belongs to {}", meta.uid());
                for planted in ["build/planted", "tmp/file", "store/file"] {
                    ensure!(!top.join(planted).exists(), "{user:?}: {kind}: {path} has {planted}");
                }
                used.push(top);
            }
            let expected = [Some(&first_free), tops.last()];
            ensure!(used.iter().copied().map(Some).eq(expected), "{user:?}: {kind}: {used:?} were made");
            fs::write(used[0].join("build/go"), "")?;
            let result = den.join(pending)?;
            ensure!(result.status == BuildStatus::Built, "{user:?}: {result:?}");
            for top in &tops {
                drover_store::fs::delete(top)?;
            }
            den.check()?;
        }
    }
    Ok(())
}

/// A directory of build directories that others can write to is refused: nothing in it could be relied on.
#[test]
fn cve_2025_52991_nothing_is_built_in_a_directory_that_others_can_change() -> Result<()> {
    for user in USERS {
        let mut den = Den::new(user)?;
        let builds = den.state("builds");
        for kind in ["writable", "symlink", "foreign"] {
            drover_store::fs::delete(&builds)?;
            match kind {
                "symlink" => symlink(den.canary(), &builds)?,
                _ => fs::create_dir(&builds)?,
            }
            if kind == "writable" {
                fs::set_permissions(&builds, Permissions::from_mode(0o777))?;
                rustix::fs::chown(&builds, Some(rustix::fs::Uid::from_raw(den.owner())), None)?;
            } else if kind == "foreign" {
                rustix::fs::chown(&builds, Some(rustix::fs::Uid::from_raw(STRANGER)), None)?;
            }
            let attack = den.attack(&["nothing"])?;
            let result = den.build(&attack)?;
            ensure!(result.status == BuildStatus::MiscFailure, "{user:?}: {kind}: {result:?}");
            ensure!(result.error_message.contains("builds"), "{user:?}: {kind}: {result:?}");
        }
        drover_store::fs::delete(&builds)?;
        den.check()?;
    }
    Ok(())
}

/// What a failed build leaves, kept or not, nobody else can change, and nothing of it is valid.
#[test]
fn cve_2025_52992_nothing_that_a_failed_build_leaves_is_writable_by_others() -> Result<()> {
    for user in USERS {
        for keep_failed in [false, true] {
            let mut den = Den::new(user)?;
            let options = BuildOptions { keep_failed, ..BuildOptions::default() };
            // Everything in there is open to everybody, as far as the builder can say.
            let attack = den.fixed(&["modes"], Method::Nar, Hash::from(Sha256::of(b"none")))?;
            let pending = den.start(&attack, &options)?;
            den.says("ready")?;
            den.let_go()?;
            let result = den.join(pending)?;
            ensure!(result.status == BuildStatus::OutputRejected, "{user:?}: {result:?}");
            ensure!(!den.open()?.is_valid(&attack.out())? && !den.object(&attack.out()).exists());
            let builds = den.state("builds");
            let kept: Vec<_> =
                fs::read_dir(&builds)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
            ensure!(kept.len() == usize::from(keep_failed), "{user:?}: {kept:?} {}", den.log());
            if let Some(top) = kept.first() {
                den.says(&format!("keeping build directory {}", top.join("build").display()))?;
                ensure!(top.join("build/changed").exists(), "nothing is kept");
                let mut queue = vec![top.clone()];
                while let Some(path) = queue.pop() {
                    let meta = fs::symlink_metadata(&path)?;
                    ensure!(
                        meta.mode() & 0o7022 == 0,
                        "{user:?}: {} has mode {:o}",
                        path.display(),
                        meta.mode()
                    );
                    ensure!(meta.uid() == den.owner(), "{user:?}: {} is {}'s", path.display(), meta.uid());
                    if meta.is_dir() {
                        for entry in fs::read_dir(&path)? {
                            queue.push(entry?.path());
                        }
                    }
                }
                let mut others = vec![STRANGER];
                if user == User::Root {
                    others.extend([30001, 65534]);
                }
                for uid in others {
                    for name in ["", "build", "build/writable", "build/opened", "build/attributes"] {
                        let path = top.join(name);
                        let path = path.display();
                        let script = format!(
                            "(echo x >> {path} && echo writes; echo x > {path}/new && echo adds; :) 2>&-"
                        );
                        let said = as_user(uid, 30000, &script)?;
                        ensure!(said.is_empty(), "{user:?}: {uid} {said} {path}");
                    }
                }
                drover_store::fs::delete(top)?;
            }
            den.check()?;
        }
    }
    Ok(())
}

/// Files of the environment (`passAsFile`, structured attributes) get their owner by their descriptor, in a directory
/// that nobody else can enter, before the builder exists. What was planted under their names is not even there any more.
#[test]
fn cve_2025_52993_no_owner_is_changed_through_a_name() -> Result<()> {
    for user in USERS {
        let mut den = Den::new(user)?;
        let victim = den.canary().join("file");
        let owner = fs::metadata(&victim)?.uid();
        let mut plain = den.attack(&["files"])?;
        plain.set("passAsFile", "text");
        plain.set("text", "some text");
        let mut structured = den.attack(&["files"])?;
        let json = serde_json::json!({ "out": "x", "text": "some text" });
        structured.set("__json", &json.to_string());
        let server = den.server();
        let name = format!(".attr-{}", Sha256::of(b"text").to_nix32());
        let builds = den.state("builds");
        fs::create_dir_all(&builds)?;
        rustix::fs::chown(&builds, Some(rustix::fs::Uid::from_raw(den.owner())), None)?;
        for number in 0..8 {
            let build = builds.join(format!("nix-{server}-{number}/build"));
            fs::create_dir_all(&build)?;
            for name in [&name, ".attrs.json", ".attrs.sh"] {
                symlink(&victim, build.join(name))?;
            }
            if user == User::Ordinary {
                give(build.parent().context("it has one")?, den.owner())?;
            }
        }
        for attack in [&plain, &structured] {
            let result = den.build(attack)?;
            ensure!(
                result.status == BuildStatus::Built || attack.path == structured.path,
                "{user:?}: {result:?}"
            );
        }
        den.says("textPath: 9")?;
        ensure!(fs::metadata(&victim)?.uid() == owner && fs::read(&victim)? == b"untouched", "{user:?}");
        for number in 0..8 {
            drover_store::fs::delete(&builds.join(format!("nix-{server}-{number}")))?;
        }
        den.check()?;
    }
    Ok(())
}

/// Puts something where a directory of a build is to be, with something in it that may not be found there later.
fn plant(kind: &str, top: &Path, victim: &Path, owner: u32) -> Result<()> {
    match kind {
        "directory" => {
            fs::create_dir_all(top.join("build"))?;
            fs::write(top.join("build/planted"), "")?;
            symlink(victim, top.join("tmp"))?;
            symlink(victim, top.join("store"))?;
            fs::set_permissions(top, Permissions::from_mode(0o777))?;
            give(top, owner)?;
        }
        "symlink" => symlink(victim, top)?,
        _ => fs::write(top, "planted")?,
    }
    Ok(())
}

/// Gives a directory and what is directly in it to a user.
fn give(dir: &Path, uid: u32) -> Result<()> {
    std::os::unix::fs::lchown(dir, Some(uid), None)?;
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        std::os::unix::fs::lchown(&path, Some(uid), None)?;
        if fs::symlink_metadata(&path)?.is_dir() {
            give(&path, uid)?;
        }
    }
    Ok(())
}
