//! The sandbox: Linux namespaces in which one build runs, and nothing else of this program.
//!
//! A build's process must be cloned by a program with a single thread, so this program starts itself again, once, as the
//! helper in [`child`], and asks it for sandboxes through [`launch`], which also hands each new process its [`plan`] over a
//! socket. The plan is a list of [`plan::Step`]s: its order is the security argument, and it is a pure value that tests can read. Steps
//! reach the kernel through the trait [`kernel::Kernel`] only, which [`linux`] implements.
//!
//! Nothing in here knows stores or derivations.

pub(crate) mod cgroup;
pub(crate) mod child;
pub(crate) mod kernel;
pub(crate) mod launch;
pub(crate) mod linux;
#[allow(dead_code)] // until the verdict reads it
pub(crate) mod oom;
pub(crate) mod plan;
pub(crate) mod rungs;
pub(crate) mod seccomp;
