//! A whole session from the server's side. Where the bytes are cut in transit makes no difference.

use drover_nix::{Sha256, StoreDir, StorePath};
use drover_serve::serve;

use super::client::Act;
use crate::session::{Call, Steps, Yes, client_hello};

pub(super) fn check(data: &[u8]) {
    let whole = run(data, usize::MAX);
    let step = 1 + data.last().map_or(0, |byte| usize::from(byte % 40));
    let cut = run(data, step);
    assert_eq!(whole.1, cut.1, "the calls");
    assert_eq!(whole.0, cut.0, "the answers");
    assert_eq!(whole.2, cut.2, "the end");
}

/// Answers, calls, and how it ended.
fn run(data: &[u8], step: usize) -> (Vec<u8>, Vec<Call>, Result<(), String>) {
    let (mut answers, mut store) = (Vec::new(), Yes::default());
    let input = Steps { bytes: data, step };
    let end = serve(input, &mut answers, &mut store, &StoreDir::default(), true);
    let end = end.map_err(|error| {
        let text = error.to_string();
        assert!(!text.contains('\n'), "an error is one line: {text:?}");
        text
    });
    (answers, store.calls, end)
}

/// Every command, alone, at the versions that differ.
pub(super) fn seeds() -> Vec<Vec<u8>> {
    let paths = [path("a"), path("b.drv")].into();
    let versions = [0, 2, 3, 5, 6, 7, 8];
    let each = |minor| Act::ALL.into_iter().map(move |act| (minor, act));
    let requests = versions.into_iter().flat_map(each).map(|(minor, act)| act.request(minor, &paths));
    let import = [client_hello(7), super::export::import_request()].concat();
    let export = [client_hello(7), super::export::export_request(&[path("a")].into())].concat();
    requests.chain([import, export]).collect()
}

pub(super) fn path(name: &str) -> StorePath {
    let path = StoreDir::default().make_path("output:out", Sha256::of(name.as_bytes()), name);
    path.unwrap_or_else(|_| unreachable!("the name is valid"))
}
