//! One build over one connection to one builder: lock, copy, build, collect, verify, store.
//!
//! The operator runs it over SSH, `drover build` over a pipe to a child process; to this crate both are a reader and
//! a writer. It owns the order of things and every check of what a builder or a cache says. It may not start
//! builders, decide about attempts and retries, or know Kubernetes. It never has a whole NAR in memory, and what it
//! believes of an output it has computed from the bytes that it received.
//!
//! In the order of the story: a [`Job`] goes in; `closure` finds out what its inputs need, `fetch` has the
//! builder fetch what it lacks, `copy` sends the rest, `verdict` reads how the build ended, `collect` receives outputs, `verify` and `content` decide
//! whether they are what they must be, and an [`Outcome`] or a [`Failure`] comes out. On the way an [`Observer`]
//! hears [`Event`]s. `trust` answers before all that whether a request may have its output paths, by what `proofs` reads of
//! its `.drv`'s closure, and
//! `resolve` finds the derivation of one that names its `.drv` only.

mod closure;
mod collect;
mod content;
mod copy;
mod event;
mod failure;
mod fetch;
mod job;
mod kept;
mod outcome;
mod proofs;
mod receive;
mod resolve;
mod run;
#[cfg(test)]
mod tests;
mod trust;
mod verdict;
mod verify;

pub use closure::{MissingInputs, missing_inputs};
pub use event::{Event, Observer};
pub use failure::{Failure, Reason};
pub use job::{Job, Trust, drv_path_of};
pub use kept::Kept;
pub use outcome::{Outcome, Output, Tally, Timings, Transfer};
pub use proofs::Proofs;
pub use resolve::{Resolved, Unresolved, resolve};
pub use run::{all_outputs_in_cache, run, run_counting};
