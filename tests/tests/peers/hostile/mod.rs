//! Abuse of the builder as a process: what a client may send, where it may stop, and what must be left of it. Nothing.

mod archives;
mod arena;
mod builders;
mod bytes;
mod disconnect;
mod race;
mod requests;
mod server;
