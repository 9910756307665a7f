//! Files with more rights than a store object may have, and directories that others may enter.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

use anyhow::{Result, ensure};
use drover_nix::{Hash, Method, Sha256};
use drover_serve::{BuildOptions, BuildStatus};

use super::den::{Den, STRANGER, USERS, User, as_user};

/// What other users of the machine see of a build while it runs: nothing. Also who has the build's own id, as a process
/// that got out of another build would.
#[test]
fn cve_2024_38531_nobody_else_gets_into_the_directories_of_a_build() -> Result<()> {
    for user in USERS {
        let mut den = Den::new(user)?;
        let attack = den.attack(&["modes"])?;
        let pending = den.start(&attack, &BuildOptions::default())?;
        den.says("ready")?;
        let build = den.build_dir()?;
        let top = build.parent().unwrap_or(&build).to_owned();
        let scratch = den.object(&format!("{}.chroot", attack.path).parse()?);
        let output = scratch.join("store").join(attack.out().as_str());
        // The attack has opened all that is its own to everybody, and root sees that.
        for path in [&build, &top.join("tmp"), &output, &build.join("opened")] {
            ensure!(fs::metadata(path)?.mode() & 0o002 != 0 || *path == output, "{}", path.display());
        }
        let mut strangers = vec![(STRANGER, STRANGER)];
        if user == User::Root {
            strangers.extend([(30001, 30000), (30002, 30000), (65534, 65534)]);
        }
        for (uid, gid) in strangers {
            for path in [&build, &top, &scratch, &output, &build.join("opened"), &top.join("tmp/mknod")] {
                let path = path.display();
                let script = format!(
                    "[ -e {path}/. ] && echo enters; cat {path} && echo reads; ls {path}/ && echo lists; \
                     echo x >> {path} && echo writes; echo x > {path}/new && echo adds; :"
                );
                let said = as_user(uid, gid, &format!("({script}) 2>/dev/null"))?;
                ensure!(said.is_empty(), "{user:?}: to {uid} {path} says {said}");
            }
        }
        den.let_go()?;
        let result = den.join(pending)?;
        ensure!(result.status == BuildStatus::Built, "{result:?}");
        den.check()?;
    }
    Ok(())
}

/// Set-user-ID files by every call there is. Those that change a mode are refused; what a new file is born with cannot
/// outlive the build, nor be reached while it runs (see above); what is registered has none of it.
#[test]
fn nix_1_11_10_no_file_keeps_more_rights_than_a_store_object_has() -> Result<()> {
    for user in USERS {
        let mut den = Den::new(user)?;
        let attack = den.attack(&["modes"])?;
        let pending = den.start(&attack, &BuildOptions::default())?;
        den.says("ready")?;
        den.let_go()?;
        let result = den.join(pending)?;
        ensure!(result.status == BuildStatus::Built, "{user:?}: {result:?} {}", den.log());
        let attempts = den.attempts()?;
        let mut changed = 0;
        for (name, outcome) in &attempts {
            let born = ["open", "mknod", "openat2", "mkdir"].iter().any(|call| name.ends_with(call));
            // By a ring the kernel is asked without a call that a filter could see. It has to be gone afterwards.
            let ring = name.contains("io_uring");
            // The build's own directories may get any mode; those around it are the store's.
            let own = ["open /build", "open /tmp", "open /nix/store"].contains(&name.as_str());
            if born || own || ring {
                continue;
            }
            changed += 1;
            ensure!(["EPERM", "ENOTSUP", "EROFS", "ENOSYS"].contains(&outcome.as_str()), "{name}: {outcome}");
        }
        ensure!(changed >= 3 * 20, "only {changed} attempts: {attempts:?}");
        // The attributes were there, or else their absence shows nothing.
        ensure!(attempts["out io_uring system.posix_acl_access"] == "worked", "{attempts:?}");
        let out = den.object(&attack.out());
        for name in ["changed", "opened", "mknod", "openat2", "writable", "attributes", "mkdir", ""] {
            let mode = fs::symlink_metadata(out.join(name))?.permissions().mode() & 0o7777;
            // The list that opened `attributes` to everybody has made it executable, too.
            let expected = if name == "writable" { 0o444 } else { 0o555 };
            ensure!(mode == expected, "{name} has mode {mode:o}");
        }
        den.check()?;
    }
    Ok(())
}

/// A fixed output is copied: its files are new ones.
#[test]
fn nix_1_11_10_fixed_outputs_neither() -> Result<()> {
    for user in USERS {
        let mut den = Den::new(user)?;
        let wrong = Hash::from(Sha256::of(b"what nobody makes"));
        let attack = den.fixed(&["modes"], Method::Nar, wrong)?;
        let pending = den.start(&attack, &BuildOptions::default())?;
        den.says("ready")?;
        den.let_go()?;
        let result = den.join(pending)?;
        ensure!(result.status == BuildStatus::OutputRejected, "{user:?}: {result:?}");
        den.check()?;
    }
    Ok(())
}

/// Capabilities can be given to a file by whoever is root of a user namespace, and taken away by root alone: an ordinary
/// user's store has to refuse what it cannot clean, and say that it is the builder's doing.
#[test]
fn nix_1_11_10_no_file_keeps_a_capability() -> Result<()> {
    for user in USERS {
        let mut den = Den::new(user)?;
        let attack = den.attack(&["capability"])?;
        let result = den.build(&attack)?;
        ensure!(den.attempts()?["capability"] == "worked", "{}", den.log());
        match user {
            User::Root => ensure!(result.status == BuildStatus::Built, "{result:?}"),
            User::Ordinary => ensure!(
                result.status == BuildStatus::OutputRejected
                    && result.error_message.contains("security.capability"),
                "{result:?}"
            ),
        }
        den.check()?;
    }
    Ok(())
}
