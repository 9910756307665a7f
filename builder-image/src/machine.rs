//! What this machine offers builds, as far as the command line does not say: systems, features, cores, a shell.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use drover_nix::hash_modulo::SelfReferenceHash;

use crate::build::extra_paths::ExtraPath;
use crate::build::{Fetching, Settings};
use crate::cli::Cli;
use crate::platforms;
use crate::sandbox::rungs::Ids;
use crate::substitute;

/// Features that every machine has (Nix: globals.cc). `kvm` and `uid-range` have conditions; the latter is not offered.
const FEATURES: [&str; 3] = ["nixos-test", "benchmark", "big-parallel"];

pub(crate) fn settings(cli: &Cli) -> anyhow::Result<Settings> {
    let cores = match cli.cores {
        // Considers CPU quotas and affinity.
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        cores => cores,
    };
    let native = cli.system.clone().unwrap_or_else(native_system);
    let mut systems = vec![native];
    systems.extend(cli.extra_platforms.clone().unwrap_or_else(platforms::extra));
    let (ids, sandbox) = (Ids::detect(), cli.sandbox);
    let features = match &cli.system_features {
        Some(features) => features.iter().cloned().collect(),
        None => default_features(ids),
    };
    let linger = Duration::from_secs(cli.linger_seconds);
    let named =
        cli.sandbox_shell.clone().or_else(|| std::env::var_os("DROVER_SANDBOX_SHELL").map(PathBuf::from));
    let sandbox_shell = match named {
        Some(path) => Some(named_shell(&path)?),
        None => usual_shell(),
    };
    // What is said to be there takes the place of what is there as a rule.
    let replaced = |extra: &ExtraPath| extra.inside == Path::new("/bin/sh");
    let sandbox_shell = sandbox_shell.filter(|_| !cli.sandbox_paths.iter().any(replaced));
    let extra_paths = cli.sandbox_paths.clone();
    let fetching = Fetching {
        netrc: cli.netrc_file.as_deref().map(|path| readable("--netrc-file", path)).transpose()?,
        certificates: cli
            .ssl_cert_file
            .as_deref()
            .map(|path| readable("--ssl-cert-file", path))
            .transpose()?,
        mirrors: cli.hashed_mirrors.clone(),
    };
    let seconds = |count| (count > 0).then_some(Duration::from_secs(count));
    let substitution = substitute::Settings {
        urls: cli.substituters.clone(),
        public_keys: cli
            .public_keys
            .iter()
            .map(|key| key.parse().with_context(|| format!("--trusted-public-keys: {key:?}")))
            .collect::<Result<_, _>>()?,
        require_signatures: cli.require_signatures,
        connect_timeout: seconds(cli.connect_timeout_seconds),
        stall_timeout: seconds(cli.stall_timeout_seconds),
        netrc: fetching.netrc.clone(),
        certificates: fetching.bundle(),
    };
    let self_references = match (cli.self_references, std::env::var("DROVER_SELF_REFERENCE_HASH")) {
        (Some(named), _) => named,
        (None, Ok(text)) => text.parse().context("DROVER_SELF_REFERENCE_HASH")?,
        (None, Err(_)) => SelfReferenceHash::default(),
    };
    Ok(Settings {
        sandbox_shell,
        cores,
        systems,
        features,
        ids,
        sandbox,
        extra_paths,
        cgroups: cli.cgroups,
        fetching,
        network: cli.network,
        substitution,
        linger,
        self_references,
        trust: cli.trust.clone(),
    })
}

/// A file that the user named, which may change later but has to be there now. Absolute.
fn readable(option: &str, path: &Path) -> anyhow::Result<PathBuf> {
    let opened = File::open(path).and_then(|_| std::path::absolute(path));
    opened.map_err(|error| anyhow::anyhow!("cannot read {}, named by {option}: {error}", path.display()))
}

/// Nix's name of the system that this program was built for.
fn native_system() -> String {
    format!("{}-linux", std::env::consts::ARCH)
}

fn default_features(ids: Ids) -> BTreeSet<String> {
    const FOR_ALL: u32 = 0o006;
    let usable = |device: File| match ids {
        Ids::Own { .. } => true,
        // Builds are nobody's group there, and could not open what this program can. Nix offers it nevertheless.
        Ids::Pool { .. } => {
            device.metadata().is_ok_and(|metadata| metadata.permissions().mode() & FOR_ALL == FOR_ALL)
        }
    };
    let kvm = File::options().read(true).write(true).open("/dev/kvm").is_ok_and(usable);
    FEATURES.into_iter().chain(kvm.then_some("kvm")).map(str::to_owned).collect()
}

/// The shell that the user named, which has to be one that works alone.
fn named_shell(path: &Path) -> anyhow::Result<PathBuf> {
    let real = std::fs::canonicalize(path)
        .map_err(|error| anyhow::anyhow!("cannot use {} as the sandbox's shell: {error}", path.display()))?;
    if !is_static(&real) {
        anyhow::bail!(
            "cannot use {} as the sandbox's shell: it is not a statically linked program, and the sandbox has no libraries",
            path.display()
        );
    }
    Ok(real)
}

/// The first shell that is there, of those that our image and Debian's busybox-static have.
fn usual_shell() -> Option<PathBuf> {
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join("busybox")));
    let usual = ["/bin/busybox", "/usr/bin/busybox"].map(PathBuf::from);
    usual
        .into_iter()
        .chain(beside)
        .find_map(|path| std::fs::canonicalize(path).ok().filter(|path| is_static(path)))
}

/// Whether it is an ELF program without an interpreter.
fn is_static(path: &Path) -> bool {
    /// Headers lie within the first page in every program that a linker makes.
    const HEAD: u64 = 4096;
    let mut head = Vec::new();
    let read = File::open(path).and_then(|file| file.take(HEAD).read_to_end(&mut head));
    read.is_ok() && has_no_interpreter(&head) == Some(true)
}

/// Reads the program headers of a 64-bit little-endian ELF file. None if it is none, or they are not all in `head`.
fn has_no_interpreter(head: &[u8]) -> Option<bool> {
    const INTERPRETER: u32 = 3;
    let u16_at = |at: usize| Some(u16::from_le_bytes(head.get(at..at + 2)?.try_into().ok()?));
    let u32_at = |at: usize| Some(u32::from_le_bytes(head.get(at..at + 4)?.try_into().ok()?));
    let u64_at = |at: usize| Some(u64::from_le_bytes(head.get(at..at + 8)?.try_into().ok()?));
    if !head.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let (table, size, count) = (u64_at(32)?, usize::from(u16_at(54)?), usize::from(u16_at(56)?));
    let table = usize::try_from(table).ok().filter(|table| *table < head.len())?;
    for index in 0..count {
        if u32_at(table.checked_add(index * size)?)? == INTERPRETER {
            return Some(false);
        }
    }
    Some(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elf(kinds: &[u32]) -> Vec<u8> {
        let mut bytes = vec![0; 64];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[32] = 64;
        bytes[54] = 56;
        bytes[56] = u8::try_from(kinds.len()).unwrap();
        for kind in kinds {
            let at = bytes.len();
            bytes.resize(at + 56, 0);
            bytes[at..at + 4].copy_from_slice(&kind.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn programs_that_need_libraries_are_told() {
        assert_eq!(has_no_interpreter(&elf(&[1, 1, 2])), Some(true));
        assert_eq!(has_no_interpreter(&elf(&[6, 3, 1])), Some(false));
        assert_eq!(has_no_interpreter(b"#!/bin/sh"), None);
        assert_eq!(has_no_interpreter(&elf(&[1, 3])[..100]), None);
    }

    #[test]
    fn systems_are_named_as_nix_does() {
        assert!(native_system().ends_with("-linux"));
    }
}
