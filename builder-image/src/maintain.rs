//! `gc` and `verify`: what whoever looks after a store runs on it. What was asked for goes to standard output, what it is
//! about meanwhile to standard error.

use std::process::ExitCode;

use anyhow::Result;
use drover_store::{Access, GcOptions, LocalStore};

use crate::{existing, open, parse_uri};

/// Deletes what no root needs. Fails if something that should go is still there.
pub(crate) fn gc(uri: &str, options: &GcOptions) -> Result<ExitCode> {
    let store = open_to_collect(uri)?;
    if store.is_being_collected()? {
        eprintln!("drover-builder: another collector is at work; waiting for it to end");
    }
    let report = store.collect_garbage(options)?;
    for path in &report.paths {
        let full = store.store_dir().full(path);
        if options.dry_run { println!("{full}") } else { eprintln!("deleted {full}") }
    }
    for failure in &report.failures {
        eprintln!("drover-builder: {failure}");
    }
    let (count, bytes, alive) = (report.paths.len(), report.bytes_freed, report.alive);
    if options.dry_run {
        eprintln!("{count} paths would be deleted, {bytes} bytes as archives, {alive} paths would stay");
    } else {
        println!("{count} paths deleted, {bytes} bytes freed, {alive} paths stay");
    }
    Ok(code(report.failures.is_empty()))
}

/// Compares the database with the disk. Fails if there are problems that were not repaired.
pub(crate) fn verify(uri: &str, contents: bool, repair: bool) -> Result<ExitCode> {
    let access = if repair { Access::ReadWrite } else { Access::ReadOnly };
    existing(&parse_uri(uri)?)?;
    let store = open(uri, access)?;
    let report = if repair { store.repair(contents)? } else { store.verify(contents)? };
    report.repaired.iter().for_each(|line| eprintln!("repaired: {line}"));
    report.problems.iter().for_each(|line| eprintln!("{line}"));
    let (checked, problems) = (report.paths_checked, report.problems.len());
    println!("{checked} paths checked, {problems} problems");
    Ok(code(report.problems.is_empty()))
}

/// A store that is there: who mistypes its name wants no new one. A disk that is so full that the database cannot even be opened is no reason to leave it so: there is a reserve.
fn open_to_collect(uri: &str) -> Result<LocalStore> {
    let layout = existing(&parse_uri(uri)?)?;
    let error = match open(uri, Access::ReadWrite) {
        Err(error) if error.downcast_ref().is_some_and(drover_store::Error::is_disk_full) => error,
        other => return other,
    };
    if layout.release_reserve() { open(uri, Access::ReadWrite) } else { Err(error) }
}

fn code(success: bool) -> ExitCode {
    if success { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
