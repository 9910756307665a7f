//! What people who work on Drover run, as a library: the command line is `main.rs`, the tests are the other user.
//!
//! - [`parts`] fetches and builds what tests need (Debian root filesystems, Kubernetes' programs, Helm), once per machine.
//! - [`root`] runs a program inside such a root filesystem.
//! - [`cluster`] is a real one-node cluster; [`control_plane`] is etcd and kube-apiserver alone; [`audit`] reads what either
//!   of them was asked.
//! - [`images`] makes the two OCI images; [`crds`], [`chart`], [`docs`] and [`layers`] are the checks and the tests.
//! - [`development`] is the programs as people who work on them compile them.
//! - [`permissions`] is the list of what the operator may do, and why.
//! - [`limit`] ends what takes too long.
//! - [`fuzz`] runs the targets of `tests/fuzz`; [`mutants`] takes guards away and sees tests fail.
//! - [`prometheus`] is a real Prometheus, for what is said of metrics.
//! - [`bench`] measures Drover beside the programs that people use today.
//!
//! Nothing of the product may depend on this crate.

pub mod audit;
pub mod bench;
pub mod chart;
pub mod cluster;
pub mod control_plane;
pub mod crds;
pub mod dashboard;
pub mod development;
pub mod docs;
pub mod fuzz;
pub mod images;
pub mod layers;
pub mod limit;
pub mod mutants;
pub mod parts;
pub mod permissions;
pub mod pki;
pub mod platform;
pub mod prometheus;
pub mod root;
pub mod run;

use std::path::PathBuf;

/// The checkout that this program was built from.
pub fn checkout() -> PathBuf {
    // Cargo tells the running program first: a binary that was built elsewhere must not point back there.
    let manifest =
        std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    let manifest = PathBuf::from(manifest);
    manifest.ancestors().find(|dir| dir.join("Cargo.lock").is_file()).unwrap_or(&manifest).to_path_buf()
}
