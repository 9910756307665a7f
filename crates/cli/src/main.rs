//! `drover`: builds without a cluster, makes requests of derivations, and talks about requests to a cluster. The same
//! program under the name `kubectl-drover` is a plugin of kubectl.
//!
//! Arguments come in two stages: `args` is what was typed, and each command decides what it means. Standard output has
//! results only; progress, logs and errors go to standard error.

mod args;
mod build;
mod cluster;
mod exit;
mod locate;
mod manifest;
mod order;
mod output;
mod plan;
mod request;
mod resolve;

use std::process::ExitCode;

use clap::Parser as _;

use crate::args::{Arguments, Command};
use crate::output::Format;

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Build(args) => build::run(&args),
        Command::Request(args) => request::run(&args),
        Command::Crds => output::print(&drover_api::crds(), Format::Yaml).map(|()| exit::DONE),
        Command::Plan(args) => plan::run(&args),
        Command::Submit(args) => cluster::submit(&args),
        Command::Wait(args) => cluster::wait(&args),
        Command::Logs(args) => cluster::logs(&args),
        Command::Describe(args) => cluster::describe(&args),
        Command::Cancel(args) => cluster::cancel(&args),
        Command::GetOutput(args) => cluster::get_output(&args),
    };
    exit::finish(outcome)
}
