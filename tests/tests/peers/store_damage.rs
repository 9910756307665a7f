//! Stores that are not as they should be: damaged ones, about which Drover must say what real Nix says; and those that
//! cannot be opened, read, written or filled any further, about which it must say so and do no harm.

use std::collections::BTreeSet;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context as _, Result, ensure};
use drover_nix::{PathInfo, nar};
use drover_store::Access;
use drover_tests::{Nix, Peer};
use rusqlite::Connection;

use crate::store_parts::{Root, file_nar, findings_of_nix, info, no_leftovers, verify};

/// A kind of damage, whom it concerns, and who finds it.
struct Damage {
    what: &'static str,
    apply: fn(&Objects<'_>) -> Result<()>,
    /// Names of the paths that must be named.
    names: &'static [&'static str],
    found_by_nix: bool,
    /// Whether repairing removes it: what is missing and needed by none is made invalid.
    repaired: bool,
}

const fn damage(
    what: &'static str,
    names: &'static [&'static str],
    apply: fn(&Objects<'_>) -> Result<()>,
) -> Damage {
    Damage { what, apply, names, found_by_nix: true, repaired: false }
}

const DAMAGES: &[Damage] = &[
    damage("none", &[], |_| Ok(())),
    damage("a byte", &["tree"], |o| {
        o.forced(&o.path("tree").join("file"), |file| {
            Ok(std::fs::File::options().write(true).open(file)?.write_all_at(b"X", 2)?)
        })
    }),
    damage("a longer file", &["lone"], |o| {
        o.forced(&o.path("lone"), |file| Ok(std::fs::write(file, "longer than before")?))
    }),
    damage("an empty file", &["lone"], |o| o.forced(&o.path("lone"), |file| Ok(std::fs::write(file, "")?))),
    damage("a file less", &["tree"], |o| Ok(std::fs::remove_file(o.path("tree").join("file"))?)),
    damage("a file more", &["tree"], |o| Ok(std::fs::write(o.path("tree").join("more"), "")?)),
    damage("another name", &["tree"], |o| {
        Ok(std::fs::rename(o.path("tree").join("file"), o.path("tree").join("renamed"))?)
    }),
    damage("executable", &["lone"], |o| o.chmod("lone", 0o555)),
    damage("another target", &["link"], |o| {
        std::fs::remove_file(o.path("link"))?;
        Ok(std::os::unix::fs::symlink("/else/where", o.path("link"))?)
    }),
    damage("a file for a directory", &["tree"], |o| {
        drover_store::fs::delete(&o.path("tree"))?;
        Ok(std::fs::write(o.path("tree"), "")?)
    }),
    damage("a socket", &["lone"], |o| {
        std::fs::remove_file(o.path("lone"))?;
        std::os::unix::net::UnixListener::bind(o.path("lone"))?;
        Ok(())
    }),
    damage("missing, and referred to", &["tree"], |o| {
        drover_store::fs::delete(&o.path("tree"))?;
        Ok(())
    }),
    Damage { repaired: true, ..damage("missing", &["user"], |o| Ok(std::fs::remove_file(o.path("user"))?)) },
    Damage {
        repaired: true,
        ..damage("missing with all that refers to it", &["tree", "user"], |o| {
            drover_store::fs::delete(&o.path("tree"))?;
            Ok(std::fs::remove_file(o.path("user"))?)
        })
    },
    damage("two at once", &["lone", "link"], |o| {
        o.chmod("lone", 0o555)?;
        std::fs::remove_file(o.path("link"))?;
        Ok(std::fs::write(o.path("link"), "")?)
    }),
    damage("another hash in the database", &["lone"], |o| {
        let hash = format!("sha256:{}", "0".repeat(64));
        o.sql("UPDATE ValidPaths SET hash = ?1 WHERE path LIKE '%-lone'", &hash)
    }),
    // What neither looks at.
    damage("a mode that changes nothing", &[], |o| o.chmod("lone", 0o644)),
    damage("a time", &[], |o| {
        Ok(std::fs::File::open(o.path("lone"))?.set_modified(std::time::SystemTime::now())?)
    }),
    damage("what is not valid", &[], |o| {
        std::fs::write(o.path("lone").with_file_name("rubbish"), "")?;
        let stray = info("stray", b"", &[])?.path;
        Ok(std::fs::create_dir(o.path("lone").with_file_name(stray.as_str()))?)
    }),
    // What only Drover looks at.
    Damage {
        found_by_nix: false,
        ..damage("another size in the database", &["lone"], |o| {
            o.sql("UPDATE ValidPaths SET narSize = narSize + ?1 WHERE path LIKE '%-lone'", "8")
        })
    },
    Damage {
        found_by_nix: false,
        ..damage("a reference to nothing", &["Refs"], |o| {
            o.sql("DELETE FROM ValidPaths WHERE path LIKE ?1", "%-tree")
        })
    },
];

#[test]
fn damage_is_what_nix_says_it_is() -> Result<()> {
    for nix in Nix::ALL {
        let peer = Peer::new(nix)?;
        for damage in DAMAGES {
            let (ours, theirs) = (Root::in_memory()?, Root::in_memory()?);
            for root in [&ours, &theirs] {
                (damage.apply)(&Objects { root, infos: fill(root)? })?;
            }
            let what = format!("{nix:?}, {}", damage.what);
            // The names that Nix mentions, whatever it says about them: the wording differs from version to version.
            let nix_says = findings_of_nix(&peer, &theirs)?.join("\n");
            let expected: &[&str] = if damage.found_by_nix { damage.names } else { &[] };
            ensure!(named(&nix_says) == expected.iter().copied().collect(), "{what}: {nix_says}");
            ensure!(expected.is_empty() == nix_says.is_empty(), "{what}: {nix_says}");

            let output = ours.builder(&["verify", "--check-contents"])?.output()?;
            let text = String::from_utf8_lossy(&output.stderr);
            ensure!(text.lines().count() == damage.names.len(), "{what}: {text}");
            ensure!(damage.names.iter().all(|name| text.contains(name)), "{what}: {text}");
            let code = i32::from(!damage.names.is_empty());
            ensure!(output.status.code() == Some(code), "{what}: {}", output.status);

            let output = ours.builder(&["verify", "--check-contents", "--repair"])?.output()?;
            let text = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.success() == (code == 0 || damage.repaired), "{what}: {text}");
            if damage.repaired {
                ensure!(text.lines().all(|line| line.starts_with("repaired: ")), "{what}: {text}");
                verify(&peer, &ours)?;
            }
        }
    }
    Ok(())
}

#[test]
fn a_store_that_cannot_be_used_is_left_alone() -> Result<()> {
    type Spoil = fn(&Root) -> Result<()>;
    let spoilt: [(&str, Spoil, &[&str]); 5] = [
        (
            "nothing",
            |root| Ok(std::fs::rename(root.path().join("nix"), root.path().join("gone"))?),
            &["there is no store"],
        ),
        ("no database", |root| Ok(std::fs::remove_file(root.state("db/db.sqlite"))?), &["there is no store"]),
        (
            "a newer schema",
            |root| Ok(std::fs::write(root.state("db/schema"), "11")?),
            &["schema 11", "newer"],
        ),
        (
            "no database but text",
            |root| Ok(std::fs::write(root.state("db/db.sqlite"), "text ".repeat(1000))?),
            &["not a database"],
        ),
        (
            "half a database",
            |root| {
                let file = std::fs::File::options().write(true).open(root.state("db/db.sqlite"))?;
                Ok(file.set_len(file.metadata()?.len() / 2)?)
            },
            &["malformed"],
        ),
    ];
    for (what, spoil, parts) in spoilt {
        let root = Root::new()?;
        fill(&root)?;
        checkpoint(&root)?;
        spoil(&root)?;
        for args in [&["verify"][..], &["verify", "--repair"], &["gc"], &["gc", "--dry-run"], &["serve"]] {
            let before = snapshot(root.path())?;
            let output = root.builder(args)?.stdin(std::process::Stdio::null()).output()?;
            let text = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.code() == Some(1), "{what}: {args:?} ends with {}: {text}", output.status);
            ensure!(
                text.lines().count() == 1 && parts.iter().all(|part| text.contains(part)),
                "{what}: {args:?}: {text}"
            );
            ensure!(snapshot(root.path())? == before, "{what}: {args:?} changes something");
        }
        let _ = drover_store::fs::delete(&root.path().join("gone"));
    }
    Ok(())
}

#[test]
fn a_read_only_file_system_can_be_read() -> Result<()> {
    let peer = Peer::new(Nix::V2_34)?;
    let root = Root::new()?;
    let objects = fill(&root)?;
    let mounted = Mount::new(root.path(), &["--bind", &root.text()])?;
    mounted.run(&["-o", "remount,bind,ro"])?;
    let output = root.builder(&["verify", "--check-contents"])?.output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut session = crate::store_parts::Session::start(root.builder(&["serve"])?)?;
    for (info, nar) in &objects {
        let mut dumped = Vec::new();
        session.client.dump_store_path(&info.path, &mut dumped)?;
        ensure!(dumped == *nar);
    }
    session.end()?;
    for args in [&["gc"][..], &["verify", "--repair"], &["serve", "--write"]] {
        let output = root.builder(args)?.stdin(std::process::Stdio::null()).output()?;
        let text = String::from_utf8_lossy(&output.stderr).to_lowercase();
        ensure!(output.status.code() == Some(1) && text.lines().count() == 1, "{args:?}: {text}");
        ensure!(text.contains("read-only") || text.contains("readonly"), "{args:?}: {text}");
    }
    drop(mounted);
    verify(&peer, &root)
}

#[test]
fn a_full_disk_loses_nothing() -> Result<()> {
    let peer = Peer::new(Nix::V2_34)?;
    let root = Root::new()?;
    let disk = Mount::new(root.path(), &["-t", "tmpfs", "-o", "size=24m", "tmpfs"])?;
    let objects = fill(&root)?;
    let large = |i: u8, bytes: usize| -> Result<(PathInfo, Vec<u8>)> {
        let nar = file_nar(&vec![i; bytes])?;
        Ok((info(&format!("large-{i}"), &nar, &[])?, nar))
    };
    // More than there is room for, as one path and as several: the session ends with the reason, and what was valid is.
    for _ in 0..2 {
        let mut session = root.drover_session()?;
        let (small, nar) = large(1, 3 << 20)?;
        session.client.add_to_store_nar(&small, &mut &nar[..])?;
        let (big, nar) = large(2, 30 << 20)?;
        ensure!(session.client.add_to_store_nar(&big, &mut &nar[..]).is_err());
        let log = session.end_badly()?;
        ensure!(log.contains("No space left on device") && log.lines().count() == 1, "{log}");
        let store = root.store(Access::ReadOnly)?;
        ensure!(store.is_valid(&small.path)? && !store.is_valid(&big.path)?);
        no_leftovers(&root)?;
    }
    verify(&peer, &root)?;
    // Full to the last block: nothing can be added, everything can be read.
    let ballast = root.path().join("ballast");
    let filled = fill_up(&ballast)?;
    let mut session = root.drover_session()?;
    let (more, nar) = large(3, 100)?;
    ensure!(session.client.add_to_store_nar(&more, &mut &nar[..]).is_err(), "with {filled} bytes of ballast");
    let log = session.end_badly()?;
    ensure!(log.contains("No space left") || log.contains("full"), "{log}");
    let mut session = crate::store_parts::Session::start(root.builder(&["serve"])?)?;
    for (info, nar) in &objects {
        let mut dumped = Vec::new();
        session.client.dump_store_path(&info.path, &mut dumped)?;
        ensure!(dumped == *nar);
    }
    session.end()?;
    // And garbage can be collected, which makes room.
    let link = root.state("gcroots/kept");
    ensure!(
        std::os::unix::fs::symlink(format!("/nix/store/{}", objects[0].0.path), &link).is_err()
            || link.is_symlink()
    );
    // Not even the index of the database's log has room, as after a restart of the machine.
    let _ = std::fs::remove_file(root.state("db/db.sqlite-shm"));
    fill_up(&root.path().join("more-ballast"))?;
    ensure!(root.state("db/reserved").exists(), "there is nothing in reserve");
    let output = root.builder(&["gc"])?.output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    std::fs::remove_file(root.path().join("more-ballast"))?;
    std::fs::remove_file(ballast)?;
    verify(&peer, &root)?;
    let mut session = root.drover_session()?;
    let (more, nar) = large(3, 1 << 20)?;
    session.client.add_to_store_nar(&more, &mut &nar[..])?;
    session.end()?;
    verify(&peer, &root)?;
    drop(disk);
    Ok(())
}

#[test]
fn collecting_as_administrators_do() -> Result<()> {
    let peer = Peer::new(Nix::V2_34)?;
    let (ours, theirs) = (Root::new()?, Root::new()?);
    let bytes = 100_000;
    let mut dead = BTreeSet::new();
    for root in [&ours, &theirs] {
        let store = root.store(Access::ReadWrite)?;
        for i in 0..10_u8 {
            let nar = file_nar(&vec![i; bytes])?;
            let info = info(&format!("path-{i}"), &nar, &[])?;
            store.add_nar(&info, false, 0, &mut &nar[..])?;
            dead.insert(store.store_dir().full(&info.path));
        }
    }
    let lines = |output: &[u8]| -> BTreeSet<String> {
        String::from_utf8_lossy(output).lines().map(str::to_owned).collect()
    };
    // A dry run says what Nix says, and does nothing.
    let dry = run(ours.builder(&["gc", "--dry-run"])?)?;
    let print = run(with_args(&peer, &["--gc", "--print-dead", "--store", &theirs.text()])?)?;
    ensure!(lines(&dry.stdout) == dead && lines(&print.stdout) == dead, "{dry:?}");
    ensure!(ours.store(Access::ReadOnly)?.all_valid_paths()?.len() == 10);
    // A limit stops both after as many; each is named.
    let limited = run(ours.builder(&["gc", "--max-freed", "250000"])?)?;
    run(with_args(&peer, &["--gc", "--max-freed", "250000", "--store", &theirs.text()])?)?;
    let left = |root: &Root| -> Result<usize> { Ok(root.store(Access::ReadOnly)?.all_valid_paths()?.len()) };
    ensure!((left(&ours)?, left(&theirs)?) == (7, 7), "{} and {}", left(&ours)?, left(&theirs)?);
    let text = String::from_utf8_lossy(&limited.stderr).into_owned();
    ensure!(
        text.lines().count() == 3 && text.lines().all(|line| line.starts_with("deleted /nix/store/")),
        "{text}"
    );
    let text = String::from_utf8_lossy(&limited.stdout).into_owned();
    ensure!(text.starts_with("3 paths deleted, ") && text.ends_with(" 7 paths stay\n"), "{text}");
    // One that cannot be deleted is told of, and the others go.
    let stuck = ours.store(Access::ReadOnly)?.all_valid_paths()?.into_iter().next().context("none left")?;
    drover_store::fs::delete(&ours.object(&stuck))?;
    std::fs::create_dir_all(ours.object(&stuck).join("mounted"))?;
    let mount = Mount::new(&ours.object(&stuck).join("mounted"), &["-t", "tmpfs", "tmpfs"])?;
    let output = ours.builder(&["gc"])?.output()?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(1) && text.contains(&format!("{stuck}/mounted")), "{text}");
    ensure!(left(&ours)? == 0 && ours.object(&stuck).exists());
    drop(mount);
    run(ours.builder(&["gc"])?)?;
    no_leftovers(&ours)?;
    verify(&peer, &ours)
}

#[test]
fn both_know_the_same_roots() -> Result<()> {
    for nix in Nix::ALL {
        let peer = Peer::new(nix)?;
        let (ours, theirs) = (Root::new()?, Root::new()?);
        let mut processes = Vec::new();
        let names = [
            "direct", "inside", "nested", "indirect", "file", "profile", "cwd", "open", "garbage", "unrooted",
        ];
        for root in [&ours, &theirs] {
            let store = root.store(Access::ReadWrite)?;
            let add = |name: &str| -> Result<String> {
                let mut writer = nar::Writer::new(Vec::new());
                writer.directory()?;
                writer.entry(b"bin")?;
                writer.file_bytes(true, root.text().as_bytes())?;
                writer.end_directory()?;
                let nar = writer.finish()?;
                let info = info(name, &nar, &[])?;
                store.add_nar(&info, false, 0, &mut &nar[..])?;
                Ok(info.path.to_string())
            };
            let path = names.iter().map(|name| add(name)).collect::<Result<Vec<_>>>()?;
            let link = |target: String, name: &str| -> Result<()> {
                let link = root.state(name);
                std::fs::create_dir_all(link.parent().context("no parent")?)?;
                Ok(std::os::unix::fs::symlink(target, link)?)
            };
            let full = |i: usize| format!("/nix/store/{}", path[i]);
            let outside = root.path().join("outside");
            std::os::unix::fs::symlink(full(3), &outside)?;
            link(full(0), "gcroots/direct")?;
            link(full(1) + "/bin", "gcroots/inside")?;
            link(full(2), "gcroots/some/where/nested")?;
            link(outside.to_string_lossy().into_owned(), "gcroots/auto/indirect")?;
            std::fs::write(root.state("gcroots").join(&path[4]), "")?;
            link(full(5), "profiles/profile-1-link")?;
            link("profile-1-link".into(), "profiles/profile")?;
            // None of these is one.
            link("/no/where".into(), "gcroots/auto/broken")?;
            link("/no/where".into(), "gcroots/broken")?;
            link(full(8).replace("garbage", "garbag"), "gcroots/almost")?;
            link("/etc/passwd".into(), "gcroots/elsewhere")?;
            std::fs::write(root.state("gcroots/some/file"), full(9))?;
            let real = |i: usize| root.path().join("nix/store").join(&path[i]);
            processes.push(Child(Command::new("sleep").arg("100").current_dir(real(6)).spawn()?));
            let open = std::fs::File::open(real(7).join("bin"))?;
            processes.push(Child(Command::new("sleep").arg("100").stdin(open).spawn()?));
        }
        run(ours.builder(&["gc"])?)?;
        run(with_args(&peer, &["--gc", "--store", &theirs.text()])?)?;
        let left = |root: &Root| -> Result<BTreeSet<String>> {
            let paths = root.store(Access::ReadOnly)?.all_valid_paths()?;
            Ok(paths.iter().map(|path| path.name().to_owned()).collect())
        };
        let (our_left, mut their_left) = (left(&ours)?, left(&theirs)?);
        ensure!(our_left == names[..8].iter().map(|name| (*name).to_owned()).collect(), "{our_left:?}");
        // Nix looks for logical paths only, and these processes see the real ones, as all do outside of a sandbox: it would
        // take away what they use.
        their_left.extend(["cwd", "open"].map(str::to_owned));
        ensure!(our_left == their_left, "{nix:?}: {their_left:?}");
        for root in [&ours, &theirs] {
            ensure!(
                !root.state("gcroots/auto/broken").is_symlink() && root.state("gcroots/broken").is_symlink(),
                "{nix:?}"
            );
        }
        drop(processes);
        run(ours.builder(&["gc"])?)?;
        ensure!(left(&ours)?.len() == 6);
        verify(&peer, &ours)?;
    }
    Ok(())
}

struct Child(std::process::Child);

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn with_args(peer: &Peer, args: &[&str]) -> Result<Command> {
    let mut command = peer.command("nix-store")?;
    command.args(args);
    Ok(command)
}

fn run(mut command: Command) -> Result<Output> {
    let output = command.output()?;
    ensure!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    Ok(output)
}

/// The objects of a store that is to be damaged.
struct Objects<'a> {
    root: &'a Root,
    infos: Vec<(PathInfo, Vec<u8>)>,
}

impl Objects<'_> {
    fn path(&self, name: &str) -> PathBuf {
        let found = self.infos.iter().find(|(info, _)| info.path.name() == name);
        self.root.object(&found.expect("the table names objects that there are").0.path)
    }

    /// Changes a file as someone does who may.
    fn forced(&self, file: &Path, change: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let mode = std::fs::metadata(file)?.permissions();
        std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o644))?;
        change(file)?;
        Ok(std::fs::set_permissions(file, mode)?)
    }

    fn chmod(&self, name: &str, mode: u32) -> Result<()> {
        Ok(std::fs::set_permissions(self.path(name), std::fs::Permissions::from_mode(mode))?)
    }

    /// As someone does who knows nothing of foreign keys.
    fn sql(&self, statement: &str, parameter: &str) -> Result<()> {
        let database = Connection::open(self.root.state("db/db.sqlite"))?;
        database.pragma_update(None, "foreign_keys", false)?;
        ensure!(database.execute(statement, [parameter])? == 1);
        Ok(())
    }
}

/// `tree`, `user` that refers to it, `lone` and `link`.
fn fill(root: &Root) -> Result<Vec<(PathInfo, Vec<u8>)>> {
    let store = root.store(Access::ReadWrite)?;
    let mut objects: Vec<(PathInfo, Vec<u8>)> = Vec::new();
    let mut writer = nar::Writer::new(Vec::new());
    writer.directory()?;
    writer.entry(b"file")?;
    writer.file_bytes(false, b"content")?;
    writer.end_directory()?;
    let tree = writer.finish()?;
    let tree_info = info("tree", &tree, &[])?;
    let user = file_nar(b"user")?;
    let user_info = info("user", &user, &[&tree_info.path])?;
    let lone = file_nar(b"lone")?;
    let mut writer = nar::Writer::new(Vec::new());
    writer.symlink(b"/some/where")?;
    let link = writer.finish()?;
    objects.push((tree_info, tree));
    objects.push((user_info, user));
    objects.push((info("lone", &lone, &[])?, lone));
    objects.push((info("link", &link, &[])?, link));
    for (info, nar) in &objects {
        store.add_nar(info, false, 0, &mut &nar[..])?;
    }
    Ok(objects)
}

/// Which of the objects a text mentions.
fn named(text: &str) -> BTreeSet<&'static str> {
    ["tree", "user", "lone", "link"].into_iter().filter(|name| text.contains(&format!("-{name}"))).collect()
}

/// Everything that is there, and what the state's files hold.
fn snapshot(root: &Path) -> Result<Vec<(PathBuf, Option<Vec<u8>>)>> {
    fn walk(path: &Path, found: &mut Vec<(PathBuf, Option<Vec<u8>>)>) -> Result<()> {
        for entry in std::fs::read_dir(path)? {
            let path = entry?.path();
            let meta = std::fs::symlink_metadata(&path)?;
            if meta.is_dir() {
                walk(&path, found)?;
            }
            // The log's index, which every reader makes and none keeps; and a lock has no content.
            if !path.ends_with("db.sqlite-shm") && !path.ends_with("db.sqlite-wal") {
                found.push((path.clone(), meta.is_file().then(|| std::fs::read(&path)).transpose()?));
            }
        }
        Ok(())
    }
    let mut found = Vec::new();
    walk(root, &mut found)?;
    found.sort();
    Ok(found)
}

/// Has all that is in the log copied into the database, so that damage to it is not mended from there.
fn checkpoint(root: &Root) -> Result<()> {
    let database = Connection::open(root.state("db/db.sqlite"))?;
    database.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))?;
    Ok(())
}

/// Writes zeros until there is no room; returns how many.
fn fill_up(file: &Path) -> Result<u64> {
    use std::io::Write as _;
    let mut file = std::fs::File::create(file)?;
    for size in [1 << 20, 4096, 1] {
        while file.write_all(&vec![0; size]).is_ok() {}
    }
    Ok(file.metadata()?.len())
}

/// A mount that goes with its guard.
struct Mount(PathBuf);

impl Mount {
    fn new(at: &Path, args: &[&str]) -> Result<Self> {
        let mount = Self(at.to_owned());
        mount.run(args)?;
        Ok(mount)
    }

    fn run(&self, args: &[&str]) -> Result<()> {
        run(mount_command(args, &self.0)).map(drop)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

fn mount_command(args: &[&str], at: &Path) -> Command {
    let mut command = Command::new("mount");
    command.args(args).arg(at);
    command
}
