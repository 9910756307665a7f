//! A session from the client's side, against a server that answers anything. The client believes nothing that it did
//! not ask for, and hands on archives only as the grammar has them.
//!
//! The input is a count, as many acts, a byte each, and then all that the server ever says. The paths that the client
//! asks about are those whose text the answers have.

use std::collections::BTreeSet;
use std::io::{Read, Write};

use drover_nix::{PathInfo, Sha256, StoreDir, StorePath, nar};
use drover_serve::{BuildOptions, BuildTarget, Client, Error, serve};

use super::server::path;
use crate::session::{Call, Steps, Yes, client_hello, derivation, file_nar, paths_in, server_hello};

const MOST_ACTS: usize = 16;

/// What a client can do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Act {
    QueryValidPaths,
    QueryPathInfos,
    Dump,
    /// Twice, without waiting in between.
    Add,
    Build,
    BuildPaths,
    QueryClosure,
    Export,
    /// Twice with one request.
    Import,
}

pub(super) fn check(data: &[u8]) {
    let Some((count, rest)) = data.split_first() else { return };
    let Some((acts, answers)) = rest.split_at_checked(usize::from(*count) % MOST_ACTS) else { return };
    let mut paths = paths_in(answers);
    if paths.is_empty() {
        paths.insert(path("a"));
    }
    let step = 1 + data.last().map_or(0, |byte| usize::from(byte % 40));
    let input = Steps { bytes: answers, step };
    let Ok(mut client) = Client::connect(input, std::io::sink(), StoreDir::default()) else { return };
    for act in acts {
        let result = Act::ALL[usize::from(*act) % Act::ALL.len()].run(&mut client, &paths);
        match result {
            Ok(()) | Err(Error::BuildPaths { .. }) => {}
            Err(_) => return,
        }
    }
}

/// What our server answers to each act, at every version.
pub(super) fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for minor in [0, 3, 5, 6, 7, 8] {
        for (number, act) in (0u8..).zip(Act::ALL) {
            let request = act.request(minor, &[path("a"), path("b.drv")].into());
            let mut answers = Vec::new();
            let _ = serve(request.as_slice(), &mut answers, &mut Yes::default(), &StoreDir::default(), true);
            seeds.push([&[1, number][..], &answers].concat());
        }
    }
    seeds
}

/// Something to add.
fn addition(path: &StorePath, references: &BTreeSet<StorePath>) -> (PathInfo, Vec<u8>) {
    let nar = file_nar(b"contents");
    let info = PathInfo {
        path: path.clone(),
        nar_hash: Sha256::of(&nar),
        nar_size: nar.len() as u64,
        references: references.clone(),
        deriver: None,
        signatures: Vec::new(),
        ca: None,
    };
    (info, nar)
}

impl Act {
    pub(crate) const ALL: [Self; 9] = [
        Self::QueryValidPaths,
        Self::QueryPathInfos,
        Self::Dump,
        Self::Add,
        Self::Build,
        Self::BuildPaths,
        Self::QueryClosure,
        Self::Export,
        Self::Import,
    ];

    /// What a client of this version sends, greeting included; the greeting alone where the version has no such command.
    pub(crate) fn request(self, minor: u8, paths: &BTreeSet<StorePath>) -> Vec<u8> {
        let (hello, mut sent) = (server_hello(minor), Vec::new());
        if let Ok(mut client) = Client::connect(hello.as_slice(), &mut sent, StoreDir::default()) {
            // It fails where it waits for the answer: its request is complete by then.
            let _ = self.run(&mut client, paths);
        }
        // Our client says its own version, whatever the server's.
        sent[..16].copy_from_slice(&client_hello(minor));
        sent
    }

    /// Does it, and judges what came back. `paths` has one at least.
    pub(crate) fn run<R: Read, W: Write>(
        self,
        client: &mut Client<R, W>,
        paths: &BTreeSet<StorePath>,
    ) -> Result<(), Error> {
        let Some(first) = paths.first() else { return Ok(()) };
        match self {
            Self::QueryValidPaths => {
                let valid = client.query_valid_paths(paths, true, true)?;
                assert!(valid.is_subset(paths), "nobody asked for all of {valid:?}");
            }
            Self::QueryPathInfos => {
                for (path, info) in client.query_path_infos(paths)? {
                    assert!(paths.contains(&path) && info.path == path, "{path}: {info:?}");
                }
            }
            Self::Dump => {
                let mut received = Vec::new();
                let size = client.dump_store_path(first, &mut received)?;
                assert_eq!(received.len() as u64, size);
                let again = nar::Reader::new(received.as_slice()).skip_all();
                assert!(again.is_ok_and(|again| again == size), "an archive that is none was handed on");
            }
            Self::Add => {
                let (info, nar) = addition(first, paths);
                client.send_nar(&info, &mut nar.as_slice())?;
                client.send_nar(&info, &mut nar.as_slice())?;
                client.finish_nars()?;
            }
            Self::Build => {
                let drv = derivation("made", first);
                let result = client.build_derivation(&path("made.drv"), &drv, &BuildOptions::default())?;
                assert!(result.status.is_success() || !result.status.as_str().is_empty());
            }
            Self::BuildPaths => {
                let targets = paths.iter().map(|path| BuildTarget { path: path.clone(), outputs: None });
                client.build_paths(&targets.collect::<Vec<_>>(), &BuildOptions::default())?;
            }
            Self::QueryClosure => {
                client.query_closure(paths, true)?;
            }
            Self::Export => {
                let mut received = Vec::new();
                let infos = client.export_paths(paths, &mut received)?;
                assert_eq!(infos.iter().map(|info| info.path.clone()).collect::<BTreeSet<_>>(), *paths);
                let mut rest = received.as_slice();
                for info in &infos {
                    let (nar, after) = rest.split_at(usize::try_from(info.nar_size).unwrap_or(usize::MAX));
                    assert_eq!(Sha256::of(nar), info.nar_hash, "{}", info.path);
                    rest = after;
                }
                assert!(rest.is_empty(), "more than was said");
            }
            Self::Import => {
                let (info, nar) = addition(first, paths);
                let mut nars = [nar.as_slice(), nar.as_slice()];
                client.import_paths(nars.iter_mut().map(|nar| (&info, nar as &mut dyn Read)))?;
            }
        }
        Ok(())
    }

    /// The acts that a recorded session consists of, as far as this list has them.
    pub(crate) fn of(calls: &[Call]) -> Vec<Self> {
        let mut acts = Vec::new();
        for call in calls {
            let act = match call {
                Call::QueryValidPaths(..) => Self::QueryValidPaths,
                // One command asks for several; real clients ask for one path at a time.
                Call::PathInfo(_) => Self::QueryPathInfos,
                Call::Dump(_) => Self::Dump,
                // Two answers are awaited.
                Call::AddNar(_) => Self::Add,
                Call::Build(..) => Self::Build,
                Call::BuildPaths(..) => Self::BuildPaths,
                Call::QueryClosure(..) => Self::QueryClosure,
            };
            acts.push(act);
        }
        acts.truncate(MOST_ACTS - 1);
        acts
    }
}
