//! Fixtures: the real parts that tests run against, each as a value that cleans up when it is dropped.
//!
//! [`Peer`] is a real Nix, [`HttpCache`] a real nginx that serves a binary cache, [`S3Server`] a real S3 service,
//! [`ControlPlane`] a real API server and [`Cluster`] a real node; [`Remote`] is a real Nix with Drover as its remote
//! store. Nothing here imitates any of them. The parts come from `xtask`, which fetches what is missing; they take root,
//! but for [`ControlPlane`] and [`S3Server`]. [`sqlite`] is real software to build, [`record`] what real clients say,
//! [`corpus`] a derivation for each thing that a builder has to do.
//! [`audit`] reads from an API server's audit log what Drover must never do.
//! [`collector`] receives what the operator says by OpenTelemetry.
//! [`rights`] compares what RBAC grants with what the log shows to be used.

pub mod audit;
pub mod collector;
pub mod corpus;
pub mod faults;
mod http_cache;
pub mod installation;
mod keeper;
pub mod pages;
mod peer;
mod programs;
pub mod record;
mod remote;
pub mod rights;
mod s3_server;
pub mod sqlite;
pub mod sshd;

pub use http_cache::HttpCache;
pub use installation::Installation;
pub use keeper::LogKeeper;
pub use peer::Peer;
pub use programs::{copy_program, images, program};
pub use remote::Remote;
pub use s3_server::S3Server;
pub use sshd::Sshd;
pub use xtask::cluster::{Cluster, NODE_ADDRESS};
pub use xtask::control_plane::ControlPlane;
pub use xtask::parts::rootfs::Nix;
