//! The plan against a simulated cluster: all reachable worlds, long random lives, and each rule by itself.

mod attempts;
mod explore;
mod random;
mod sim;
mod verdicts;
mod waiting;

use drover_api::ReasonKind;

use super::*;
