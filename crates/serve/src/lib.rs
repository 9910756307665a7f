//! Nix's serve protocol, `nix-store --serve [--write]`: what travels over one connection to one builder.
//!
//! This crate owns the protocol's bytes and nothing else: both halves work over `std::io::Read` and `Write` that the
//! caller brings, synchronously. It may not open files or sockets, start processes or know what a store looks like on
//! disk; a server's store is a [`Backend`]. The peer may be hostile: every length that it names has a named limit in
//! [`wire`], and nothing is allocated because a peer says so.
//!
//! In the order of its story: [`Version`] and greeting, [`wire`] primitives, what commands carry ([`BuildOptions`],
//! [`BuildResult`] and [`Cause`], path infos, derivations), one file a command in `commands`, and the two halves, [`Client`] and
//! [`serve`]. The protocol has no error frames: whatever goes wrong ends the session, except for a build that fails,
//! which is an answer like any other.

mod build_options;
mod build_result;
mod cause;
mod client;
mod commands;
mod derivation;
mod error;
mod greeting;
mod nar_copy;
#[cfg(test)]
mod notation;
mod path_info;
mod server;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;
mod version;
pub mod wire;

pub use build_options::BuildOptions;
pub use build_result::{BuildResult, BuildStatus, BuiltOutput};
pub use cause::Cause;
pub use client::{Client, Frames};
pub use commands::build_paths::BuildTarget;
pub use error::{BoxError, Error};
pub use nar_copy::Behind;
pub use path_info::ReceivedPath;
pub use server::{Backend, serve};
pub use version::{LATEST, Version};

/// Bytes of NARs a second below which Drover's server gives up fetching one by itself, so that a client which asks it to
/// fetch knows how long there may be no answer.
pub const SLOWEST_FETCH: u64 = 128 << 10;
