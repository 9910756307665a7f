//! What outlives a build: processes that want to, and what the next build of the same id might find.

use std::fs;

use anyhow::{Result, ensure};
use drover_nix::{Hash, Method, Sha256};
use drover_serve::BuildStatus;

use super::den::{Den, USERS};

/// Children, daemons in sessions of their own, holders of the log's terminal, and process 1 of another namespace: all deaf
/// to signals, all with the output open, all writing. They are gone when the output is hashed: what is registered has the
/// hash that it is registered with, which real Nix finds in the end.
#[test]
fn no_process_survives_its_build() -> Result<()> {
    for user in USERS {
        let mut den = Den::new(user)?;
        let attack = den.attack(&["survive"])?;
        den.built(&attack)?;
        den.says("survivors run")?;
        ensure!(den.processes().is_empty(), "{user:?}: {:?}", den.processes());
        let names = || -> Result<Vec<_>> {
            let entries = fs::read_dir(den.object(&attack.out()))?;
            entries
                .map(|entry| Ok((entry.as_ref().map(fs::DirEntry::file_name).ok(), fs::read(entry?.path())?)))
                .collect()
        };
        let registered = names()?;
        ensure!(registered.len() > 1, "{user:?}: nothing has written");
        // The same with the network, whose hash no such builder can meet.
        let fixed = den.fixed(&["survive"], Method::Nar, Hash::from(Sha256::of(b"none")))?;
        let result = den.build(&fixed)?;
        ensure!(result.status == BuildStatus::OutputRejected, "{user:?}: {result:?}");
        ensure!(den.processes().is_empty(), "{user:?}: {:?}", den.processes());
        let entries = fs::read_dir(den.object(&attack.out()))?.count();
        ensure!(entries == registered.len(), "{user:?}: it is still written to");
        den.check()?;
    }
    Ok(())
}

/// The second build has the id of the first, in the same session.
#[test]
fn a_build_finds_nothing_of_the_one_before() -> Result<()> {
    for user in USERS {
        let mut den = Den::with_key(user)?;
        let leave = den.attack(&["leave"])?;
        den.built(&leave)?;
        let log = den.log();
        for kind in ["shared memory", "semaphores", "messages", "message queue", "key"] {
            ensure!(log.contains(&format!("{kind}: true")), "{user:?}: {kind} could not be left: {log}");
        }
        let mark = den.log().matches("over\n").count();
        let search = den.attack(&["search"])?;
        den.built(&search)?;
        crate::builds_fixture::eventually("it is over", || den.log().matches("over\n").count() > mark)?;
        den.none_worked(11, &[])?;
        den.check()?;
    }
    Ok(())
}
