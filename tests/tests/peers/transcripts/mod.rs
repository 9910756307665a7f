//! The protocol byte for byte: what real clients say ([`recorded`]), and what no installed Nix says any more. The bytes of
//! the latter are put together here from the tables of the protocol, in a notation of their own ([`notation`]); nothing
//! of it is shared with the code that it tries.

mod client;
mod notation;
mod read_only;
mod recorded;
mod server;
