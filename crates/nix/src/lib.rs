//! Nix's data: store paths, hashes, derivations, NAR archives, narinfo files and signatures.
//!
//! This crate owns formats and arithmetic. It may not touch files, the network, the clock, the environment or an
//! async runtime: whatever streams does so over `std::io::Read` and `Write` that the caller brings. Everything that
//! it parses may come from a hostile peer; every length has a named limit.
//!
//! In the order of its story: how bytes are named ([`base32`], [`hash`], [`store_path`], [`content_address`]), what is
//! hashed for that ([`content_hash`], [`hash_modulo`], [`git`]), what is built ([`derivation`], [`json`]), what travels
//! ([`nar`], [`references`], [`rewrite`]), in which [`order`], and what is said about it ([`path_info`], [`signature`],
//! [`narinfo`]), and who may ask ([`netrc`]).

pub mod base32;
pub mod content_address;
pub mod content_hash;
pub mod derivation;
mod error;
pub mod git;
pub mod hash;
pub mod hash_modulo;
pub mod json;
pub mod nar;
pub mod narinfo;
pub mod netrc;
pub mod order;
pub mod path_info;
pub mod references;
pub mod rewrite;
pub mod signature;
pub mod store_path;

pub use content_address::{ContentAddress, Method};
pub use derivation::{BasicDerivation, Derivation, DerivationOutput, OutputName};
pub use error::Error;
pub use hash::{Hash, HashAlgo, Sha256};
pub use narinfo::NarInfo;
pub use path_info::PathInfo;
pub use store_path::{StoreDir, StorePath};
