//! Build results of every version: what the client accepts, the server writes so that the client reads the same again.
//! The first byte is the version's minor number.

use std::collections::BTreeSet;

use drover_nix::StoreDir;
use drover_nix::signature::Signature;
use drover_serve::{BuildOptions, BuildResult, BuildStatus, BuiltOutput, Client, Error, serve};

use super::client::Act;
use super::server::path;
use crate::session::{Yes, derivation, server_hello};

const VERSIONS: u8 = 9;

pub(super) fn check(data: &[u8]) {
    let Some((version, answer)) = data.split_first() else { return };
    let minor = version % VERSIONS;
    let Ok((result, _)) = read(minor, answer) else { return };
    // Behind it the answer to one more question: it is found only if neither too much nor too little was taken.
    let written = [&write(minor, &result)[..], &[0; 8]].concat();
    match read(minor, &written) {
        Ok((again, next)) => assert!(again == result && next, "2.{minor}: {result:?} became {again:?}"),
        Err(error) => panic!("2.{minor}: {result:?} cannot be read again: {error}"),
    }
}

/// Also whether the answer to an empty question follows.
fn read(minor: u8, answer: &[u8]) -> Result<(BuildResult, bool), Error> {
    let stream = [&server_hello(minor)[..], answer].concat();
    let mut client = Client::connect(stream.as_slice(), std::io::sink(), StoreDir::default())?;
    let drv = derivation("made", &path("made"));
    let result = client.build_derivation(&path("made.drv"), &drv, &BuildOptions::default())?;
    Ok((result, client.query_valid_paths(&BTreeSet::new(), false, false).is_ok()))
}

/// The server's answer, without its greeting.
fn write(minor: u8, result: &BuildResult) -> Vec<u8> {
    let request = Act::Build.request(minor, &[path("made")].into());
    let (mut answers, mut store) = (Vec::new(), Yes { result: Some(result.clone()), ..Yes::default() });
    let end = serve(request.as_slice(), &mut answers, &mut store, &StoreDir::default(), true);
    end.unwrap_or_else(|error| panic!("{result:?} cannot be written: {error}"));
    answers.split_off(16)
}

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let mut built = BuildResult::new(BuildStatus::Built);
    built.start_time = 1;
    let signature = Signature { key_name: "key-1".into(), bytes: [7; 64] };
    for (name, signatures) in [("out", vec![signature]), ("dev", vec![])] {
        let name = name.parse().unwrap_or_else(|_| unreachable!("the name is valid"));
        built.built_outputs.insert(name, BuiltOutput { path: path("a"), signatures });
    }
    let failed = BuildResult::failure(BuildStatus::TimedOut, "too slow\nby far");
    let each = |minor: u8| [&built, &failed].map(|result| [&[minor][..], &write(minor, result)].concat());
    (0..VERSIONS).flat_map(each).collect()
}
