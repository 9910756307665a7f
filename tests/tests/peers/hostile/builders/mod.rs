//! Builders that attack: the sandbox, the machine around it, other builds, the store, and the server itself.
//!
//! Every published advisory about building that Nix has had is a test of its own here:
//!
//! | advisory | what it was | test |
//! |---|---|---|
//! | CVE-2024-27297 | a descriptor of a fixed output in other hands | `smuggling::cve_2024_27297_…` |
//! | CVE-2026-39860 | symlinks where the registrar writes | `registrar::cve_2026_39860_…` |
//! | CVE-2024-38531 | build directories that others can enter | `modes::cve_2024_38531_…` |
//! | Nix 1.11.10 | set-user-ID files left for later | `modes::nix_1_11_10_…` |
//! | CVE-2025-46415 | deletion through exchanged directories | `cleanup::cve_2025_46415_…` |
//! | CVE-2025-46416 | builds that pass descriptors to each other | `smuggling::cve_2025_46416_…` |
//! | CVE-2025-52991 | build directories that were made by others | `cleanup::cve_2025_52991_…` |
//! | CVE-2025-52992 | what failed builds leave, writable by others | `cleanup::cve_2025_52992_…` |
//! | CVE-2025-52993 | changes of owner through exchanged names | `cleanup::cve_2025_52993_…` |
//! | CVE-2025-53819 | builds that run as root | `escape::cve_2025_53819_…` |
//! | CVE-2024-36050 | one hash approved, another one built | `registrar::cve_2024_36050_…` |
//!
//! The attacks are the program in `tests/attacks`; each runs under a server that is root, whose builds have ids of their
//! own, and under one that is an ordinary user, whose builds have that user's.

mod cleanup;
mod den;
mod escape;
mod floods;
mod leftovers;
mod modes;
mod registrar;
mod smuggling;
