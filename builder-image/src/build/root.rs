//! What every build finds beside its inputs: which devices, which shell, which files of `/etc` (Nix: chroot.cc,
//! linux-derivation-builder.cc).

use std::path::Path;
use std::sync::PoisonError;

use drover_nix::derivation::DerivationType;

use super::Builder;
use super::ids::BuildIds;
use super::scratch::{self, BUILD_DIR};
use super::skeleton::{Placed, Skeleton};
use crate::error::Error;
use crate::network::{self, Network};
use crate::sandbox::plan::{INSIDE_GID, INSIDE_UID};

const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Host files that builds with network access need, where they exist.
const NETWORK_FILES: [&str; 3] = [RESOLV_CONF, "/etc/services", "/etc/hosts"];
const DEVICES: [&str; 6] = ["full", "null", "random", "tty", "urandom", "zero"];

impl Builder {
    /// The skeleton of a build's root, on disk.
    pub(super) fn skeleton(
        &self,
        kind: DerivationType,
        network: &Network,
        ids: &BuildIds,
    ) -> Result<Placed, Error> {
        if !kind.is_sandboxed() {
            // The machine's name servers and certificates may change while this program runs.
            return self.describe(kind, network, ids)?.place(self.store.layout());
        }
        // Whole between any two statements.
        let mut ready = self.skeleton.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(placed) = ready.as_ref().filter(|placed| placed.root.is_dir()) {
            return Ok(placed.clone());
        }
        let placed = self.describe(kind, network, ids)?.place(self.store.layout())?;
        *ready = Some(placed.clone());
        Ok(placed)
    }

    fn describe(&self, kind: DerivationType, network: &Network, ids: &BuildIds) -> Result<Skeleton, Error> {
        let mut skeleton = Skeleton::new(ids.foreign().map(|(_, gid)| gid));
        for directory in
            ["/bin", "/proc", "/tmp", "/dev/shm", "/dev/pts", BUILD_DIR, self.store.store_dir().as_str()]
        {
            skeleton.directory(directory);
        }
        for (name, target) in [
            ("/dev/fd", "/proc/self/fd"),
            ("/dev/ptmx", "/dev/pts/ptmx"),
            ("/dev/stdin", "/proc/self/fd/0"),
            ("/dev/stdout", "/proc/self/fd/1"),
            ("/dev/stderr", "/proc/self/fd/2"),
        ] {
            skeleton.symlink(name, Path::new(target));
        }
        skeleton.file("/etc/passwd", scratch::passwd(INSIDE_UID, INSIDE_GID).as_bytes());
        skeleton.file("/etc/group", scratch::group(INSIDE_GID).as_bytes());
        if kind.is_sandboxed() {
            skeleton.file("/etc/hosts", scratch::HOSTS.as_bytes());
        } else {
            skeleton.file("/etc/nsswitch.conf", scratch::NSSWITCH.as_bytes());
            let own = if matches!(network, Network::Pasta(_)) { network::resolv_conf() } else { None };
            if let Some(text) = &own {
                skeleton.file(RESOLV_CONF, text.as_bytes());
            }
            for file in NETWORK_FILES.into_iter().filter(|file| own.is_none() || *file != RESOLV_CONF) {
                // Often a symlink to where a resolver's daemon writes: bind what it leads to.
                if let Ok(real) = std::fs::canonicalize(file) {
                    skeleton.bind(&real, file)?;
                }
            }
            if let Some(bundle) = self.settings.fetching.bundle() {
                skeleton.bind(&bundle, "/etc/ssl/certs/ca-certificates.crt")?;
            }
        }
        if let Some(shell) = &self.settings.sandbox_shell {
            skeleton.bind(shell, "/bin/sh")?;
        }
        let kvm = self.settings.features.contains("kvm").then_some("kvm");
        for device in DEVICES.into_iter().chain(kvm) {
            let path = format!("/dev/{device}");
            if Path::new(&path).exists() {
                skeleton.bind(Path::new(&path), &path)?;
            }
        }
        self.add_extra_paths(&mut skeleton)?;
        Ok(skeleton)
    }
}
