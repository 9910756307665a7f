//! The sandbox: Linux namespaces in which one build runs, and nothing else of this program.
//!
//! A build's process must be cloned by a program with a single thread, so this program starts itself again, once, as the
//! helper in [`child`], and asks it for sandboxes through [`launch`], which also hands each new process its [`plan`] over a
//! socket. The plan is a list of [`plan::Step`]s: its order is the security argument, and it is a pure value that tests can
//! read. The helper's own acts are [`birth::Act`]s. Both reach the kernel through the traits of [`kernel`] only, which
//! [`linux`] implements, and what is refused is said in the words of [`refusal`].
//!
//! [`rungs`] finds out what the machine allows; [`cgroup`], [`group`] and [`oom`] know control groups.
//!
//! Nothing in here knows stores or derivations.

pub(crate) mod birth;
pub(crate) mod cgroup;
pub(crate) mod child;
#[cfg(test)]
pub(crate) mod double;
pub(crate) mod group;
pub(crate) mod kernel;
pub(crate) mod landlock;
pub(crate) mod launch;
pub(crate) mod linux;
mod linux_parent;
pub(crate) mod oom;
pub(crate) mod plan;
pub(crate) mod refusal;
pub(crate) mod run;
pub(crate) mod rungs;
pub(crate) mod seccomp;
mod terminals;
