//! Export streams, as ImportPaths takes and ExportPaths gives them: what was taken is given again with the same contents.

use std::collections::{BTreeMap, BTreeSet};

use drover_nix::{PathInfo, StoreDir, StorePath};
use drover_serve::serve;

use super::server::path;
use crate::session::{Yes, client_hello, file_nar};

pub(super) fn check(data: &[u8]) {
    let Some(first) = import(data) else { return };
    let Some(given) = answer(&export_request(&first.keys().cloned().collect()), first.clone()) else {
        panic!("what was imported cannot be exported");
    };
    let second = import(&given).unwrap_or_else(|| panic!("our own export stream cannot be imported"));
    assert_eq!(first, second);
}

type Objects = BTreeMap<StorePath, (PathInfo, Vec<u8>)>;

/// What a session with this export stream adds, if it is one.
fn import(stream: &[u8]) -> Option<Objects> {
    let mut store = Yes::default();
    let request = [&client_hello(7)[..], &4u64.to_le_bytes(), stream].concat();
    serve(request.as_slice(), Vec::new(), &mut store, &StoreDir::default(), true).ok()?;
    Some(store.added)
}

/// What the server says behind its greeting.
fn answer(request: &[u8], added: Objects) -> Option<Vec<u8>> {
    let mut store = Yes { added, ..Yes::default() };
    let (request, mut answer) = ([&client_hello(7)[..], request].concat(), Vec::new());
    serve(request.as_slice(), &mut answer, &mut store, &StoreDir::default(), true).ok()?;
    Some(answer.split_off(16))
}

pub(super) fn seeds() -> Vec<Vec<u8>> {
    vec![0u64.to_le_bytes().into(), import_request()[8..].into(), two()]
}

/// ImportPaths of one path.
pub(super) fn import_request() -> Vec<u8> {
    [&4u64.to_le_bytes()[..], &record(&file_nar(b"contents"), &path("a"), &[]), &[0; 8]].concat()
}

pub(super) fn export_request(paths: &BTreeSet<StorePath>) -> Vec<u8> {
    let words = [5, 0, paths.len() as u64].map(u64::to_le_bytes).concat();
    paths.iter().fold(words, |request, path| [request, string(full(path).as_bytes())].concat())
}

/// A tree, and a file that refers to it and to itself, with an old signature.
fn two() -> Vec<u8> {
    let (a, b) = (path("a"), path("b"));
    let mut second = record(&file_nar(b"contents"), &b, &[&a, &b]);
    second.truncate(second.len() - 8);
    [&record(&super::nar::tree(), &a, &[])[..], &second, &1u64.to_le_bytes(), &string(b"sig"), &[0; 8]]
        .concat()
}

fn record(nar: &[u8], path: &StorePath, references: &[&StorePath]) -> Vec<u8> {
    let mut record = [&1u64.to_le_bytes()[..], nar, &0x4558_494eu64.to_le_bytes()].concat();
    record.extend(string(full(path).as_bytes()));
    record.extend((references.len() as u64).to_le_bytes());
    references.iter().for_each(|path| record.extend(string(full(path).as_bytes())));
    record.extend([0; 16]);
    record
}

fn full(path: &StorePath) -> String {
    StoreDir::default().full(path)
}

fn string(text: &[u8]) -> Vec<u8> {
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(text);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}
