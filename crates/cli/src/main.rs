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
mod realised;
mod request;
mod resolve;

use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory as _, FromArgMatches as _};

use crate::args::{Arguments, Command};
use crate::output::Format;

fn main() -> ExitCode {
    let outcome = match arguments().command {
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

/// What was typed. As kubectl's plugin, help speaks of what people type there.
fn arguments() -> Arguments {
    let called = std::env::args_os().next().unwrap_or_default();
    let is_plugin = Path::new(&called).file_name().is_some_and(|name| name == "kubectl-drover");
    let mut command = Arguments::command().bin_name(if is_plugin { "kubectl drover" } else { "drover" });
    let matches = command.get_matches_mut();
    Arguments::from_arg_matches(&matches).unwrap_or_else(|error| error.format(&mut command).exit())
}
