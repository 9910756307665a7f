//! An API server in memory, for the real kube client: a store with versions and a history, the verbs that the operator
//! uses, and watches.
//!
//! It owns nothing of Drover: [`store`] keeps objects and what became of them, [`routes`] reads a request's address,
//! [`server`] answers, [`watch`] streams. What it does not know it refuses with 501 instead of guessing. Where
//! behaviour matters, the `control-plane` layer runs the same calls against a real API server.

pub(crate) mod failure;
pub(crate) mod routes;
pub(crate) mod selector;
pub(crate) mod server;
pub(crate) mod store;
pub(crate) mod watch;

pub(crate) use failure::Failure;
pub(crate) use server::Server;
pub(crate) use store::{Change, Key};
