//! What can be typed. Nothing is decided here: each command turns what was typed into what is meant.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::exit;
use crate::output::Format;

/// Ephemeral Nix builders: builds derivations on this machine or on a Kubernetes cluster.
#[derive(Parser)]
#[command(version, after_help = exit::HELP, propagate_version = true, disable_help_subcommand = true)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Builds here, without a cluster, and prints the requests with their status
    #[command(after_help = exit::HELP)]
    Build(Build),
    /// Prints the BuildRequests of derivations: .drv files, or what `nix derivation show` prints
    #[command(after_help = exit::HELP)]
    Request(Request),
    /// Prints the CustomResourceDefinitions
    Crds,
    /// Creates BuildRequests on the cluster
    #[command(after_help = exit::HELP)]
    Submit(Submit),
    /// Waits until BuildRequests have ended; exits with 1 if one of them failed
    #[command(after_help = exit::HELP)]
    Wait(Wait),
    /// Prints the log of a BuildRequest's build
    #[command(after_help = exit::HELP)]
    Logs(Logs),
    /// Says where a BuildRequest stands, and what happened to it
    #[command(after_help = exit::HELP)]
    Describe(Named),
    /// Stops a BuildRequest
    #[command(after_help = exit::HELP)]
    Cancel(Cancel),
    /// Prints the store paths of a BuildRequest's outputs
    #[command(after_help = exit::HELP)]
    GetOutput(GetOutput),
    /// Says what building would take: order, inputs that are missing, outputs that are there
    #[command(after_help = exit::HELP)]
    Plan(Plan),
}

#[derive(Args)]
pub(crate) struct Build {
    #[command(flatten)]
    pub(crate) files: Files,

    /// Binary cache for inputs: file://, http://, https://, s3://, or a local store. Without --push, the first that is
    /// a file:// takes the outputs; without one of these either, drover's own in $XDG_CACHE_HOME does
    #[arg(long = "cache", value_name = "URL")]
    pub(crate) caches: Vec<String>,

    /// Binary cache that takes the outputs and logs; inputs come from it as well
    #[arg(long, value_name = "URL")]
    pub(crate) push: Option<String>,

    /// File with a secret key (`name:base64`, as `nix key generate-secret` makes it) that signs the outputs
    #[arg(long, value_name = "FILE")]
    pub(crate) secret_key_file: Option<PathBuf>,

    /// Key whose signatures of inputs are believed (`name:base64`). Without any, caches are believed unsigned
    #[arg(long = "trusted-public-key", value_name = "KEY")]
    pub(crate) public_keys: Vec<String>,

    /// Users and passwords of caches, by host [default: /etc/nix/netrc, if it can be read]
    #[arg(long, value_name = "FILE")]
    pub(crate) netrc_file: Option<PathBuf>,

    /// Root of the store to build in [default: $XDG_STATE_HOME/drover/store]
    #[arg(long, value_name = "ROOT")]
    pub(crate) store: Option<PathBuf>,

    /// How to print the requests
    #[arg(short, long, value_enum, default_value_t = Format::Yaml)]
    pub(crate) output: Format,

    /// Show the build's log only
    #[arg(long)]
    pub(crate) no_progress: bool,

    #[command(flatten)]
    pub(crate) limits: Limits,

    /// The drover-builder program [default: next to drover, or in PATH]
    #[arg(long, env = "DROVER_BUILDER", value_name = "PROGRAM")]
    pub(crate) builder: Option<PathBuf>,
}

/// How a build is bounded whose request does not say, and what is left of it.
#[derive(Args, Clone)]
pub(crate) struct Limits {
    /// Keep the build directory of a build that fails; the log says where it is
    #[arg(short = 'K', long)]
    pub(crate) keep_failed: bool,

    /// Longest time that a build may take, unless its request says
    #[arg(long, value_name = "SECONDS")]
    pub(crate) timeout: Option<u32>,

    /// Longest time that a build may print nothing, unless its request says
    #[arg(long, value_name = "SECONDS")]
    pub(crate) max_silent_time: Option<u32>,

    /// Most bytes that a build may print, unless its request says
    #[arg(long, value_name = "BYTES")]
    pub(crate) max_log_bytes: Option<u64>,
}

#[derive(Args)]
pub(crate) struct Request {
    /// .drv files, or files with the JSON of `nix derivation show` (`-`: standard input)
    #[arg(required = true, value_name = "DRV")]
    pub(crate) derivations: Vec<PathBuf>,

    /// Local store that has the .drv files of inputs
    #[arg(long, value_name = "URI", default_value = "local")]
    pub(crate) store: String,

    /// Print the requests of all derivations below as well, inputs first
    #[arg(long)]
    pub(crate) recursive: bool,

    /// Name the .drv files only (`drvPath`), for clusters whose caches have them (`nix copy --derivation`)
    #[arg(long)]
    pub(crate) by_path: bool,

    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct Plan {
    #[command(flatten)]
    pub(crate) files: Files,

    /// Binary cache to look in, as for `build`
    #[arg(long = "cache", value_name = "URL")]
    pub(crate) caches: Vec<String>,
}

#[derive(Args)]
pub(crate) struct Files {
    /// BuildRequests in YAML (`-`: standard input), or .drv files
    #[arg(required = true, value_name = "FILE|DRV")]
    pub(crate) files: Vec<PathBuf>,

    /// Of .drv files, take in all derivations below as well, inputs first
    #[arg(long)]
    pub(crate) recursive: bool,
}

/// Where on which cluster.
#[derive(Args)]
pub(crate) struct Target {
    /// Namespace [default: that of the kubeconfig's context]
    #[arg(short, long, value_name = "NAMESPACE")]
    pub(crate) namespace: Option<String>,

    /// Context of the kubeconfig
    #[arg(long, value_name = "CONTEXT")]
    pub(crate) context: Option<String>,
}

#[derive(Args)]
pub(crate) struct Submit {
    #[command(flatten)]
    pub(crate) files: Files,
    #[command(flatten)]
    pub(crate) target: Target,
    /// Name .drv files only (`drvPath`), for clusters whose caches have them (`nix copy --derivation`)
    #[arg(long)]
    pub(crate) by_path: bool,
    /// Wait until they have ended. What needs another one's output is sent when that is built
    #[arg(long)]
    pub(crate) wait: bool,
}

#[derive(Args)]
pub(crate) struct Wait {
    /// Names of BuildRequests
    #[arg(required = true)]
    pub(crate) names: Vec<String>,
    #[command(flatten)]
    pub(crate) target: Target,
    /// Seconds to wait at most
    #[arg(long, value_name = "SECONDS")]
    pub(crate) timeout: Option<u64>,
}

#[derive(Args)]
pub(crate) struct Named {
    /// Name of a BuildRequest
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) target: Target,
}

#[derive(Args)]
pub(crate) struct Logs {
    #[command(flatten)]
    pub(crate) named: Named,
    /// Go on while the build runs
    #[arg(short, long)]
    pub(crate) follow: bool,
}

#[derive(Args)]
pub(crate) struct Cancel {
    /// Names of BuildRequests
    #[arg(required = true)]
    pub(crate) names: Vec<String>,
    #[command(flatten)]
    pub(crate) target: Target,
}

#[derive(Args)]
pub(crate) struct GetOutput {
    #[command(flatten)]
    pub(crate) named: Named,
    /// Name of the output [default: all, with their names if there are several]
    #[arg(value_name = "OUTPUT")]
    pub(crate) output: Option<String>,
}
