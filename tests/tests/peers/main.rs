//! The `peers` layer: against real Nix of every version that is supported. Run it by `cargo xtask test peers`.

mod cache;
mod fixtures;
mod serve;
mod store;
