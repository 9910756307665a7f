//! `cargo xtask`: the command line of [`xtask`].

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::Result;
use clap::{Parser, Subcommand};
use xtask::parts::rootfs::Nix;
use xtask::{parts, root};

/// What people who work on Drover run.
#[derive(Parser)]
#[command(name = "cargo xtask", disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    act: Act,
}

#[derive(Subcommand)]
enum Act {
    /// Fetches and builds what tests need, and prints where it is
    Parts,
    /// Runs a program of a real Nix (2.8, 2.26 or 2.34), with this directory and /tmp
    Peer {
        version: Nix,
        #[arg(trailing_var_arg = true, required = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
}

fn main() -> ExitCode {
    match act(Arguments::parse().act) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn act(act: Act) -> Result<ExitCode> {
    match act {
        Act::Parts => print_parts(),
        Act::Peer { version, command } => peer(version, &command),
    }
}

fn print_parts() -> Result<ExitCode> {
    for nix in Nix::ALL {
        println!("nix {:<6}  {}", nix.version(), parts::rootfs::nix(nix)?.display());
    }
    println!("nginx       {}", parts::rootfs::nginx()?.display());
    println!("tcc         {}", parts::rootfs::tcc()?.display());
    println!("node        {}", parts::rootfs::node()?.display());
    println!("kubernetes  {}", parts::go::kubernetes()?.display());
    println!("helm        {}", parts::go::helm()?.display());
    Ok(ExitCode::SUCCESS)
}

fn peer(version: Nix, command: &[String]) -> Result<ExitCode> {
    use std::os::unix::process::CommandExt;
    let here: PathBuf = std::env::current_dir()?;
    let mut root = root::Root::new(parts::rootfs::nix(version)?).bind("/tmp", "/tmp");
    if !here.starts_with("/tmp") && here != std::path::Path::new("/") {
        root = root.bind(&here, &here);
    }
    let mut command_line: Command = root.cwd(&here).command(&command[0])?;
    Err(command_line.args(&command[1..]).exec().into())
}
