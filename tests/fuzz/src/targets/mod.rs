//! The targets, one file each.

mod aterm;
mod build_result;
mod client;
mod export;
mod json;
mod names;
mod nar;
mod narinfo;
mod server;

pub(crate) use client::Act;

/// One thing that is fuzzed.
pub struct Target {
    pub name: &'static str,
    /// Panics where something does not hold.
    pub(crate) check: fn(&[u8]),
    /// Inputs that are all right or nearly so, made by this crate.
    pub(crate) seeds: fn() -> Vec<Vec<u8>>,
    /// Bytes of memory that it may take whatever the input is: buffers of a fixed size, mostly.
    pub(crate) fixed_memory: usize,
    /// Bytes of memory for each byte of input.
    pub(crate) memory_per_byte: usize,
}

pub const TARGETS: [Target; 9] = [
    // What a client sends: every command's request. Two buffers, and both of them for the second run.
    Target { check: server::check, seeds: server::seeds, ..target("server", 2 << 20, 64) },
    // What a server answers.
    Target { check: client::check, seeds: client::seeds, ..target("client", 2 << 20, 64) },
    Target { check: nar::check, seeds: nar::seeds, ..target("nar", 1 << 20, 16) },
    Target { check: export::check, seeds: export::seeds, ..target("export", 3 << 20, 64) },
    Target { check: build_result::check, seeds: build_result::seeds, ..target("build-result", 2 << 20, 64) },
    Target { check: narinfo::check, seeds: narinfo::seeds, ..target("narinfo", 64 << 10, 64) },
    Target { check: aterm::check, seeds: aterm::seeds, ..target("aterm", 64 << 10, 64) },
    Target { check: json::check, seeds: json::seeds, ..target("derivation-json", 64 << 10, 256) },
    Target { check: names::check, seeds: names::seeds, ..target("names", 64 << 10, 64) },
];

const fn target(name: &'static str, fixed_memory: usize, memory_per_byte: usize) -> Target {
    Target { name, check: |_| {}, seeds: Vec::new, fixed_memory, memory_per_byte }
}
