//! The builders that are part of this program: `builtin:fetchurl`, `builtin:buildenv` and `builtin:unpack-channel`
//! (Nix: src/libstore/builtins).
//!
//! They run where any builder would be executed: in a process of their own, in the complete sandbox, under the build's
//! ids and with the system call filter on. What they are given is a [`Job`]; they know no store, read no environment of
//! this program, and write to their outputs and to standard error only.

mod archive;
mod buildenv;
mod compression;
mod fetchurl;
mod http;
mod unpack_channel;

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, anyhow};
use serde::{Deserialize, Serialize};

/// What a derivation's `builder` begins with if it is one of these.
pub(crate) const PREFIX: &[u8] = b"builtin:";

/// Everything that a built-in builder knows.
#[derive(Clone, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Job {
    /// Behind `builtin:`.
    pub name: String,
    /// The derivation's own environment, `NAME=value` each, as it is in the derivation.
    #[serde(skip)]
    pub attributes: Vec<CString>,
    /// Where each output is to be put, absolute, as the build sees it.
    pub outputs: BTreeMap<String, String>,
    /// Whether the derivation is one that may fetch: fixed-output or impure.
    pub may_fetch: bool,
    /// Under which name mirrors have the output, if it is fixed and flat: `sha256/` and the digits, for instance.
    pub mirrored: Option<String>,
    /// Mirrors by hash, tried first.
    pub mirrors: Vec<String>,
    /// `http_proxy` and its like, as far as the derivation lets them in.
    pub proxies: BTreeMap<String, String>,
    /// The contents of a netrc file.
    #[serde(skip)]
    pub netrc: Vec<u8>,
    /// Certificate authorities to trust, in PEM.
    #[serde(skip)]
    pub certificates: Vec<u8>,
}

/// Does the job; the exit code. What went wrong is on standard error.
pub(crate) fn run(job: &Job) -> i32 {
    let builder = match job.name.as_str() {
        "fetchurl" => fetchurl::run,
        "buildenv" => buildenv::run,
        "unpack-channel" => unpack_channel::run,
        other => {
            eprintln!("there is no built-in builder 'builtin:{other}'");
            return 1;
        }
    };
    match builder(job) {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("builtin:{}: {}", job.name, crate::error::one_line(&error));
            1
        }
    }
}

impl Job {
    /// An attribute that has to be there.
    fn attribute(&self, name: &str) -> Result<&OsStr> {
        self.optional(name).with_context(|| format!("the derivation has no attribute '{name}'"))
    }

    fn optional(&self, name: &str) -> Option<&OsStr> {
        self.attributes.iter().find_map(|entry| {
            let rest = entry.as_bytes().strip_prefix(name.as_bytes())?;
            rest.strip_prefix(b"=").map(OsStr::from_bytes)
        })
    }

    /// An attribute that has to be there and text.
    fn text(&self, name: &str) -> Result<&str> {
        let value = self.attribute(name)?;
        value.to_str().ok_or_else(|| anyhow!("the attribute '{name}' is not UTF-8"))
    }

    /// True only for exactly `1`.
    fn flag(&self, name: &str) -> bool {
        self.optional(name).is_some_and(|value| value == "1")
    }

    /// Where the output `out` goes.
    fn out(&self) -> Result<&Path> {
        self.outputs.get("out").map(Path::new).context("the derivation has no output 'out'")
    }
}

#[cfg(test)]
mod testing {
    use super::*;

    /// A job with these attributes whose output is `out`.
    pub(super) fn job(attributes: &[(&str, &str)], out: &Path) -> Job {
        let entry = |(name, value): &(&str, &str)| CString::new(format!("{name}={value}")).unwrap();
        Job {
            attributes: attributes.iter().map(entry).collect(),
            outputs: [("out".to_owned(), out.to_str().unwrap().to_owned())].into(),
            ..Job::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_found_by_their_whole_name() {
        let job =
            testing::job(&[("url", "u=v"), ("urls", "x"), ("empty", ""), ("unpack", "1")], Path::new("/o"));
        assert_eq!(job.text("url").unwrap(), "u=v");
        assert_eq!(job.optional("empty").unwrap(), "");
        assert!(job.optional("ur").is_none());
        assert!(job.flag("unpack") && !job.flag("url") && !job.flag("executable"));
        assert!(job.attribute("src").unwrap_err().to_string().contains("no attribute 'src'"));
        assert_eq!(job.out().unwrap(), Path::new("/o"));
        assert!(Job::default().out().is_err());
    }
}
