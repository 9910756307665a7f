//! What a built-in builder is told ([`crate::builtin`]), gathered where files of this machine can be read: the sandbox has
//! none of them, and hands the job to the one process that it is for.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use drover_nix::derivation::DerivationType;
use drover_nix::{BasicDerivation, DerivationOutput, Method, OutputName, StoreDir, StorePath};

use crate::builtin::{Job, PREFIX};
use crate::error::Error;
use crate::sandbox::plan::Program;

/// Bytes of a file that fetching takes: passwords, certificates. The usual bundle has a quarter of a million.
const MAX_FILE_LEN: u64 = 16 << 20;
/// What curl takes for proxies.
const PROXY_VARIABLES: [&str; 7] =
    ["http_proxy", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"];

/// How this builder fetches.
#[derive(Clone, Default, Debug)]
pub(crate) struct Fetching {
    /// Users and passwords by host.
    pub netrc: Option<PathBuf>,
    /// Certificate authorities that are trusted, if not those of this machine.
    pub certificates: Option<PathBuf>,
    /// URLs below which files are found by their hashes.
    pub mirrors: Vec<String>,
}

impl Fetching {
    /// The file of certificate authorities that are trusted: the one that was named, else this machine's.
    pub(crate) fn bundle(&self) -> Option<PathBuf> {
        let environment = ["NIX_SSL_CERT_FILE", "SSL_CERT_FILE"]
            .into_iter()
            .filter_map(std::env::var_os)
            .map(PathBuf::from);
        let named = self.certificates.clone().into_iter().chain(environment);
        let usual = [PathBuf::from("/etc/ssl/certs/ca-certificates.crt")];
        named.chain(usual).find_map(|path| std::fs::canonicalize(path).ok().filter(|path| path.is_file()))
    }
}

/// Whether a derivation's builder is part of this program.
pub(super) fn is_builtin(drv: &BasicDerivation) -> bool {
    drv.builder.starts_with(PREFIX)
}

/// The job of a built-in builder. `program` is what would be executed otherwise: its environment says which proxies the
/// derivation lets in.
pub(super) fn job(
    dir: &StoreDir,
    drv: &BasicDerivation,
    kind: DerivationType,
    outputs: &BTreeMap<OutputName, StorePath>,
    program: &Program,
    fetching: &Fetching,
) -> Result<Job, Error> {
    let name = String::from_utf8_lossy(drv.builder.get(PREFIX.len()..).unwrap_or_default()).into_owned();
    let fetches = name == "fetchurl";
    // Secrets are for the one that needs them, and for nobody where it would refuse to fetch.
    let fetches = fetches && !kind.is_sandboxed();
    let file =
        |path: Option<&Path>| path.filter(|_| fetches).map(read).transpose().map(Option::unwrap_or_default);
    // As they are in the derivation: what an ordinary builder would not see in its environment, a built-in one does.
    let attributes = drv.env.iter().map(|(key, value)| {
        let entry = [key.as_slice(), b"=", value.as_slice()].concat();
        CString::new(entry).map_err(|_| Error::input(format!("the attribute {key} has a NUL byte in it")))
    });
    let variable = |name: &&str| {
        let entries = program.env.iter().filter_map(|entry| entry.to_str().ok()?.split_once('='));
        let (name, value) = entries.into_iter().find(|(key, _)| key == name)?;
        Some((name.to_owned(), value.to_owned()))
    };
    Ok(Job {
        name,
        attributes: attributes.collect::<Result<_, _>>()?,
        outputs: outputs.iter().map(|(name, path)| (name.to_string(), dir.full(path))).collect(),
        may_fetch: !kind.is_sandboxed(),
        mirrored: drv.outputs.get(&OutputName::out()).and_then(mirrored),
        mirrors: fetching.mirrors.clone(),
        proxies: PROXY_VARIABLES.iter().filter_map(variable).collect(),
        netrc: file(fetching.netrc.as_deref())?,
        certificates: file(fetching.bundle().as_deref())?,
    })
}

/// The name by which mirrors have a flat fixed output.
fn mirrored(output: &DerivationOutput) -> Option<String> {
    match output {
        DerivationOutput::CaFixed(ca) if ca.method == Method::Flat => {
            Some(format!("{}/{}", ca.hash.algo, ca.hash.to_hex()))
        }
        _ => None,
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let mut contents = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MAX_FILE_LEN + 1).read_to_end(&mut contents));
    read.map_err(Error::file("read", path))?;
    if contents.len() as u64 > MAX_FILE_LEN {
        let why = std::io::Error::other(format!("it has more than {MAX_FILE_LEN} bytes"));
        return Err(Error::file("read", path)(why));
    }
    Ok(contents)
}
