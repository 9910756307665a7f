//! Sessions without `--write`: they read, on a file system that lets nobody write as well, and refuse the rest at once.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use drover_tests::program;
use xtask::run;

use super::notation::*;

const VERSION: Version = 0x207;
const END_LIMIT: Duration = Duration::from_secs(10);

fn start(mut command: Command) -> Result<Child> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().context("cannot start it")
}

/// Says this and hangs up.
fn say(command: Command, requests: &[u8]) -> Result<Output> {
    let mut child = start(command)?;
    child.stdin.take().context("no stdin")?.write_all(requests)?;
    Ok(child.wait_with_output()?)
}

fn builder(store: &Path, arguments: &[&str]) -> Result<Command> {
    let mut builder = Command::new(program("drover-builder")?);
    builder.args(arguments).arg("--store").arg(store);
    Ok(builder)
}

/// The same where the store lies on a file system that is mounted for reading only.
fn builder_on_read_only_mount(store: &Path) -> Result<Command> {
    let mut unshare = Command::new("unshare");
    let script = r#"mount --bind "$2" "$2" && mount -o remount,bind,ro "$2" && exec "$1" serve --store "$2""#;
    unshare.args(["--mount", "--propagation=private", "sh", "-c", script, "sh"]);
    unshare.arg(program("drover-builder")?).arg(store);
    Ok(unshare)
}

/// A store with a path and one that refers to it.
fn store() -> Result<tempfile::TempDir> {
    let dir = tempfile::tempdir()?;
    let hello = nar("hello\n");
    let source = Info { base: SOURCE, nar_size: HELLO_SIZE, nar_hash: HELLO_HEX, ..Info::default() };
    let user = Info { base: USER, references: &[SOURCE, USER], ..source.clone() };
    let requests = [client_hello(VERSION), source.addition(&hello), user.addition(&hello)].concat();
    let output = say(builder(dir.path(), &["serve", "--write"])?, &requests)?;
    ensure!(output.stdout == [server_hello(VERSION), u(1), u(1)].concat(), "{output:?}");
    Ok(dir)
}

/// Every file with what would show that it was written to; but for the database's shared memory, in which readers lock.
fn listing(dir: &Path) -> Result<BTreeMap<String, (u64, u32, i64, i64)>> {
    let mut found = BTreeMap::new();
    let mut pending = vec![dir.to_owned()];
    while let Some(path) = pending.pop() {
        let meta = std::fs::symlink_metadata(&path)?;
        if path.ends_with("db.sqlite-shm") {
            continue;
        }
        found.insert(path.display().to_string(), (meta.len(), meta.mode(), meta.mtime(), meta.mtime_nsec()));
        if meta.is_dir() {
            for entry in std::fs::read_dir(&path)? {
                pending.push(entry?.path());
            }
        }
    }
    Ok(found)
}

#[test]
fn readers_read_and_leave_no_trace() -> Result<()> {
    let dir = store()?;
    let hello = nar("hello\n");
    let source = Info { base: SOURCE, nar_size: HELLO_SIZE, nar_hash: HELLO_NIX32, ..Info::default() };
    let user = Info { base: USER, references: &[SOURCE, USER], ..source.clone() };
    let exchanges = [
        (client_hello(VERSION), server_hello(VERSION)),
        // To lock and to substitute is to write; asked of a reader they mean nothing.
        (query_valid_paths(true, true, &[SOURCE, MISSING, USER]), set(&[SOURCE, USER])),
        (query_path_infos(&[SOURCE, USER]), [source.item(VERSION), user.item(VERSION), s("")].concat()),
        (dump_store_path(USER), hello.clone()),
        (
            [u(5), u(0), set(&[SOURCE, USER])].concat(),
            [source.record(&hello, false), user.record(&hello, false), u(0)].concat(),
        ),
        (query_closure(true, &[USER]), set(&[SOURCE, USER])),
    ];
    let (requests, answers): (Vec<_>, Vec<_>) = exchanges.into_iter().unzip();
    let (requests, answers) = (requests.concat(), answers.concat());
    let before = listing(dir.path())?;
    for command in [
        builder(dir.path(), &["serve"])?,
        builder(dir.path(), &["--serve", "-v", "--option", "sandbox", "false", "--builders", ""])?,
        builder_on_read_only_mount(dir.path())?,
    ] {
        let shown = format!("{command:?}");
        let output = say(command, &requests)?;
        let log = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success() && output.stdout == answers, "{shown}: {:?}: {log}", output.stdout);
        ensure!(log.is_empty(), "{shown}: {log}");
        ensure!(listing(dir.path())? == before, "{shown} left a trace: {:?}", listing(dir.path())?);
    }
    // As in a copy of a store, where what programs share is not there and cannot be made.
    for file in ["db.sqlite-shm", "db.sqlite-wal"] {
        std::fs::remove_file(dir.path().join("nix/var/nix/db").join(file))?;
    }
    let output = say(builder_on_read_only_mount(dir.path())?, &requests)?;
    ensure!(output.status.success() && output.stdout == answers, "a copy: {output:?}");
    drover_store::fs::delete(&dir.path().join("nix"))?;
    Ok(())
}

#[test]
fn readers_are_refused_before_they_say_what_they_want() -> Result<()> {
    let dir = store()?;
    for (command, name) in
        [(4, "ImportPaths"), (6, "BuildPaths"), (8, "BuildDerivation"), (9, "AddToStoreNar")]
    {
        let mut child = start(builder(dir.path(), &["serve"])?)?;
        // Held open: the answer must come without another byte, and without an end.
        let mut stdin = child.stdin.take().context("no stdin")?;
        stdin.write_all(&[client_hello(VERSION), u(command)].concat())?;
        let ended =
            run::wait_for("the refused session to end", END_LIMIT, || Ok(child.try_wait()?.is_some()));
        if let Err(error) = ended {
            child.kill()?;
            return Err(error.context(name));
        }
        let output = child.wait_with_output()?;
        drop(stdin);
        let answer = &output.stdout;
        let log = String::from_utf8_lossy(&output.stderr);
        ensure!(*answer == server_hello(VERSION) && output.status.code() == Some(1), "{name}: {output:?}");
        ensure!(log.lines().count() == 1 && log.contains(name) && log.contains("--write"), "{name}: {log}");
    }
    drover_store::fs::delete(&dir.path().join("nix"))?;
    Ok(())
}
