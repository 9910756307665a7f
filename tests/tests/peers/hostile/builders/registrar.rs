//! What outputs may be, and what the one who registers them may be led to do.

use std::fs;
use std::os::unix::fs::MetadataExt as _;

use anyhow::{Result, ensure};
use drover_nix::{Hash, Method, Sha256};
use drover_serve::{BuildOptions, BuildStatus};

use super::den::{Den, USERS, User};

const BENIGN: &[u8] = b"benign\n";

fn flat(content: &[u8]) -> Hash {
    Hash::from(Sha256::of(content))
}

/// Symlinks to a directory outside under all names that copies, locks, links, scratch and temporary directories have or
/// might have, wherever a builder can write; the output is an ordinary file. Outputs are copied into directories that
/// no builder sees, so that there is nothing to fall for; the race for what it does see is in [`super::smuggling`].
#[test]
fn cve_2026_39860_planted_symlinks_lead_the_registrar_nowhere() -> Result<()> {
    for user in USERS {
        let mut den = Den::new(user)?;
        let plain = den.attack(&["plant"])?;
        let fixed = den.fixed(&["plant"], Method::Flat, flat(BENIGN))?;
        let recursive = den.fixed(&["plant"], Method::Nar, nar_of_benign()?)?;
        for mut attack in [plain, fixed, recursive] {
            let out = attack.out();
            let full = format!("{}.drv.chroot", attack.path);
            attack.drv.args.extend([full.into(), format!("{out}.tmp-1").into(), format!(".{out}").into()]);
            den.built(&attack)?;
            ensure!(fs::read(den.object(&out))? == BENIGN, "{user:?}");
        }
        den.says("planted 4")?;
        den.check()?;
    }
    Ok(())
}

/// The same names, planted before the build by someone who can write to the store directory itself (other members of
/// its group can, where Nix has made it): what is there under the names of scratch and outputs is not used but replaced.
#[test]
fn cve_2026_39860_symlinks_in_the_store_itself_are_replaced() -> Result<()> {
    for user in USERS {
        let mut den = Den::new(user)?;
        let (plain, fixed) = (den.attack(&["plant"])?, den.fixed(&["plant"], Method::Flat, flat(BENIGN))?);
        for attack in [&plain, &fixed] {
            let store = den.root().join("nix/store");
            for name in [format!("{}.chroot", attack.path), attack.out().to_string()] {
                std::os::unix::fs::symlink(den.canary(), store.join(name))?;
            }
            den.built(attack)?;
            ensure!(fs::read(den.object(&attack.out()))? == BENIGN, "{user:?}");
        }
        den.check()?;
    }
    Ok(())
}

/// What each odd output leads to.
#[test]
fn odd_outputs_are_kept_as_they_are_or_refused() -> Result<()> {
    use BuildStatus::{Built, OutputRejected};
    for user in USERS {
        let mut den = Den::new(user)?;
        for (kind, expected, said) in [
            // A symlink is a store object, wherever it leads.
            ("symlink", Built, ""),
            ("symlink-inside", Built, ""),
            ("parent-symlink", Built, ""),
            ("proc", Built, ""),
            ("unreadable", Built, ""),
            ("fifo", OutputRejected, "unsupported type"),
            ("fifo-inside", OutputRejected, "unsupported type"),
            ("socket", OutputRejected, "unsupported type"),
            ("socket-inside", OutputRejected, "unsupported type"),
            ("device", OutputRejected, "unsupported type"),
            ("device-inside", OutputRejected, "unsupported type"),
            ("writable", OutputRejected, "suspicious ownership or permission"),
            ("nothing", OutputRejected, "failed to produce output path"),
        ] {
            let attack = den.attack(&["output", kind])?;
            let result = den.build(&attack)?;
            ensure!(result.status == expected, "{user:?}: {kind}: {result:?}");
            ensure!(result.error_message.contains(said), "{user:?}: {kind}: {result:?}");
        }
        // A flat hash is that of a file, and no link is followed to one.
        let attack = den.fixed(&["output", "symlink"], Method::Flat, flat(b"untouched"))?;
        let result = den.build(&attack)?;
        ensure!(result.status == OutputRejected, "{user:?}: {result:?}");
        den.check()?;
    }
    Ok(())
}

/// Hard links to what others own cannot be made: all of that lies on other mounts (`escape::no_way_out` tries it). Those
/// between outputs are allowed, as in Nix, and a third name of the file goes with the scratch directory.
#[test]
fn hard_links_between_outputs_are_files_of_both() -> Result<()> {
    for user in USERS {
        let mut den = Den::new(user)?;
        let mut attack = den.attack(&["output", "hard-links"])?;
        let second = attack.second()?;
        den.built(&attack)?;
        for path in [attack.out(), second] {
            let file = den.object(&path).join("file");
            ensure!(fs::read(&file)? == b"shared\n" && fs::metadata(&file)?.nlink() == 2, "{user:?}");
        }
        den.check()?;
    }
    Ok(())
}

#[test]
fn names_that_are_hard_to_say() -> Result<()> {
    for user in USERS {
        let mut den = Den::new(user)?;
        let attack = den.attack(&["names"])?;
        den.built(&attack)?;
        let count = fs::read_dir(den.object(&attack.out()))?.count();
        ensure!(count == 8, "{count} names");
        // A path that still can be said, and one that real Nix could not get past in verifying the store.
        for (names, expected) in [("15", BuildStatus::Built), ("20", BuildStatus::OutputRejected)] {
            let attack = den.attack(&["long", names])?;
            let result = den.build(&attack)?;
            ensure!(result.status == expected, "{user:?}: {names}: {result:?}");
            ensure!(result.error_message.len() < 4096, "{user:?}: a message of kilobytes");
        }
        den.check()?;
    }
    Ok(())
}

#[test]
fn ten_thousand_levels_are_refused_and_cleaned_up() -> Result<()> {
    for (user, levels) in [(User::Root, "10000"), (User::Ordinary, "1000")] {
        let mut den = Den::new(user)?;
        let attack = den.attack(&["deep", levels])?;
        let result = den.build(&attack)?;
        ensure!(result.status == BuildStatus::OutputRejected, "{user:?}: {result:?}");
        ensure!(result.error_message.len() < 64 << 10, "a message of {} bytes", result.error_message.len());
        den.check()?;
    }
    Ok(())
}

#[test]
fn a_hundred_thousand_files() -> Result<()> {
    let mut den = Den::new(User::Root)?;
    let attack = den.attack(&["many", "100000"])?;
    den.built(&attack)?;
    den.check()
}

/// CVE-2024-36050: a cache of hashes let someone approve one source and another one be built. Here a fixed output is
/// taken for there only if its path, which its hash is in, is valid in the store; and it becomes valid only by its content.
#[test]
fn cve_2024_36050_a_fixed_output_is_reused_by_its_declared_hash_only() -> Result<()> {
    for user in USERS {
        let mut den = Den::new(user)?;
        let nothing = flat(b"nothing\n");
        let first = den.fixed(&["nothing"], Method::Flat, nothing.clone())?;
        den.built(&first)?;
        // Another way to the same hash needs no build; it would have failed.
        let mut second = first.clone();
        second.path = den.attack(&["unused"])?.path;
        second.drv.args = vec!["mark".into(), "deaf".into()];
        second.drv.name = first.drv.name.clone();
        second.path = drover_nix::StoreDir::default().make_path(
            "text",
            Sha256::of(second.path.as_str().as_bytes()),
            &format!("{}.drv", first.drv.name),
        )?;
        let result = den.build(&second)?;
        ensure!(result.status == BuildStatus::AlreadyValid, "{user:?}: {result:?}");
        // The same builder, name and everything under another hash is another output, and refused.
        let other = den.fixed(&["nothing"], Method::Flat, flat(b"something else\n"))?;
        // What lies under that path without being valid is believed as little.
        fs::write(den.object(&other.out()), b"something else\n")?;
        let result = den.build(&other)?;
        ensure!(result.status == BuildStatus::OutputRejected, "{user:?}: {result:?}");
        ensure!(result.error_message.contains("hash mismatch"), "{user:?}: {result:?}");
        ensure!(!den.object(&other.out()).exists(), "{user:?}: it is still there");
        // Nor by another method: the same digest means another path.
        let other = den.fixed(&["nothing"], Method::Nar, nothing)?;
        let result = den.build_with(&other, &BuildOptions::default())?;
        ensure!(result.status == BuildStatus::OutputRejected, "{user:?}: {result:?}");
        den.check()?;
    }
    Ok(())
}

fn nar_of_benign() -> Result<Hash> {
    let dir = tempfile::tempdir()?;
    fs::write(dir.path().join("f"), BENIGN)?;
    let mut nar = Vec::new();
    drover_store::fs::dump(&dir.path().join("f"), &mut nar)?;
    Ok(Hash::from(Sha256::of(&nar)))
}
