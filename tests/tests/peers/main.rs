//! The `peers` layer: against real Nix of every version that is supported. Run it by `cargo xtask test peers`.

mod bench;
mod build;
mod cache;
mod clients;
mod command_line;
mod fixtures;
mod hostile;
mod peer_sshd;
mod remote_builds;
mod serve;
mod session;
mod ssh_bench;
mod ssh_fixture;
mod ssh_login;
mod ssh_server;
mod store;
mod store_collector;
mod store_damage;
mod store_metadata;
mod store_parts;
mod store_schema;
mod store_shared;
mod transcripts;
