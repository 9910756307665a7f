//! Builds derivations whose `.drv` files the server has, or fetches paths. The answer is a number that Nix's server
//! takes from its exit codes and Nix's client reads as a [`BuildStatus`]: only 0 means success to both.

use std::collections::BTreeSet;
use std::io::{Read, Write};

use drover_nix::{OutputName, StoreDir, StorePath};

use super::Command;
use crate::wire::{self, WireWrite as _};
use crate::{BuildOptions, BuildStatus, Error, Version};

const WHAT: &str = "a BuildPaths request";
/// Longest target, a path and names of outputs, in bytes.
const MAX_TARGET_LEN: u64 = wire::MAX_PATH_LEN + wire::MAX_VALUES;
/// All targets together, in bytes of memory.
const MAX_TARGETS_SIZE: u64 = 32 << 20;
/// What a target, or the name of an output, takes beside its text.
const OVERHEAD: u64 = 64;

/// What to make valid: `path` or `path!out,dev`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct BuildTarget {
    pub path: StorePath,
    /// None: all outputs of a `.drv`, or the path itself if it is none.
    pub outputs: Option<BTreeSet<OutputName>>,
}

pub(crate) struct Request {
    pub targets: Vec<BuildTarget>,
    pub options: BuildOptions,
}

impl Request {
    pub(crate) fn read(input: &mut impl Read, dir: &StoreDir, version: Version) -> Result<Self, Error> {
        let (mut targets, mut text, mut size) = (Vec::new(), Vec::new(), 0);
        for _ in 0..wire::read_count(input, wire::MAX_PATHS, WHAT)? {
            wire::read_string_into(input, &mut text, MAX_TARGET_LEN, WHAT)?;
            let names = text.iter().filter(|byte| matches!(byte, b'!' | b',')).count() as u64;
            size += text.len() as u64 + OVERHEAD * (1 + names);
            if size > MAX_TARGETS_SIZE {
                return Err(Error::TooLong { what: WHAT, got: size, limit: MAX_TARGETS_SIZE });
            }
            targets.push(BuildTarget::parse(dir, &text)?);
        }
        Ok(Self { targets, options: BuildOptions::read(input, version)? })
    }
}

impl BuildTarget {
    fn parse(dir: &StoreDir, text: &[u8]) -> Result<Self, Error> {
        let mut parts = text.splitn(2, |byte| *byte == b'!');
        let path = parts.next().unwrap_or_default(); // splitting gives at least one part
        let path = dir.parse(path).map_err(Error::nix("a path to be built"))?;
        let outputs = parts
            .next()
            .map(|names| names.split(|byte| *byte == b',').map(OutputName::new).collect::<Result<_, _>>());
        let outputs = outputs.transpose().map_err(Error::nix("the name of an output to be built"))?;
        Ok(Self { path, outputs })
    }

    fn print(&self, dir: &StoreDir) -> String {
        let path = dir.full(&self.path);
        match &self.outputs {
            None => path,
            Some(outputs) => {
                let names: Vec<&str> = outputs.iter().map(OutputName::as_str).collect();
                format!("{path}!{}", names.join(","))
            }
        }
    }
}

pub(crate) fn write_request(
    output: &mut impl Write,
    dir: &StoreDir,
    version: Version,
    targets: &[BuildTarget],
    options: &BuildOptions,
) -> Result<(), Error> {
    output.put_u64(Command::BuildPaths as u64)?;
    output.put_u64(targets.len() as u64)?;
    targets.iter().try_for_each(|target| output.put_string(target.print(dir).as_bytes()))?;
    options.write(output, version)
}

/// A failure is never sent as a number that some client takes for success, or cannot read.
pub(crate) fn write_answer(
    output: &mut impl Write,
    answer: &Result<(), (BuildStatus, String)>,
) -> Result<(), Error> {
    match answer {
        Ok(()) => output.put_u64(0),
        Err((status, message)) => {
            let status = if status.is_success() { BuildStatus::MiscFailure } else { *status };
            output.put_u64(status as u64)?;
            output.put_string(message.as_bytes())
        }
    }
}

pub(crate) fn read_answer(input: &mut impl Read) -> Result<(), Error> {
    const ACT: &str = "waiting for paths to be built";
    let number = wire::read_u64(input, ACT)?;
    if number == 0 {
        return Ok(());
    }
    let message = wire::read_string(input, wire::MAX_MESSAGE_LEN, ACT)?;
    // Nix's server sends exit codes here: 1 for most failures, 100 and above for builds.
    let status = match BuildStatus::from_wire(number) {
        Ok(status) if !status.is_success() => status,
        _ if number & 0xfc == 0x64 => BuildStatus::PermanentFailure,
        _ => BuildStatus::MiscFailure,
    };
    Err(Error::BuildPaths { status, message: String::from_utf8_lossy(&message).into_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DRV: &str = "/nix/store/i00sflxqsj37lfmf95m8mn0grv615hpj-a.drv";

    #[test]
    fn targets() {
        let dir = StoreDir::default();
        for text in [DRV.to_owned(), format!("{DRV}!out"), format!("{DRV}!dev,out")] {
            let target = BuildTarget::parse(&dir, text.as_bytes()).unwrap();
            assert_eq!(target.print(&dir), text);
        }
        for bad in ["", "!out", "/etc/passwd", &format!("{DRV}!"), &format!("{DRV}!a,,b")] {
            assert!(BuildTarget::parse(&dir, bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn failures_are_failures_to_every_client() {
        for status in [BuildStatus::Substituted, BuildStatus::AlreadyValid, BuildStatus::TimedOut] {
            let mut bytes = Vec::new();
            write_answer(&mut bytes, &Err((status, "no".into()))).unwrap();
            assert!(![0, 1, 2, 13].contains(&bytes[0]));
            assert!(matches!(
                read_answer(&mut bytes.as_slice()),
                Err(Error::BuildPaths { message, .. }) if message == "no"
            ));
        }
    }

    #[test]
    fn what_real_servers_answer() {
        for (number, expected) in
            [(1, BuildStatus::MiscFailure), (100, BuildStatus::PermanentFailure), (8, BuildStatus::TimedOut)]
        {
            let bytes = [number, 2, 0x6f6e].map(u64::to_le_bytes).concat();
            let error = read_answer(&mut bytes.as_slice()).unwrap_err();
            assert!(matches!(error, Error::BuildPaths { status, .. } if status == expected), "{number}");
        }
    }
}
