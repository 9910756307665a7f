//! `drover-builder`: one program that owns a store and builds into it.
//!
//! In the order of its story: the command line ([`cli`]), a session on standard input and output ([`stdio`]) or over
//! SSH ([`listen`]), what it answers ([`backend`]), how a derivation is built ([`build`]), in what ([`sandbox`]), and the
//! builders that are part of this program ([`builtin`]); [`network`] connects builds that may fetch, and [`substitute`]
//! fetches what others have built.
//! Only [`listen`] is asynchronous; everything below it is plain threads.

mod backend;
mod build;
mod builtin;
mod cli;
mod error;
mod listen;
mod machine;
mod maintain;
mod network;
mod nix_options;
mod platforms;
mod sandbox;
mod stdio;
mod substitute;

use std::io::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use drover_store::{Access, LocalStore, StoreLayout, StoreUri};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::build::Builder;
use crate::cli::{Cli, Command};

/// Exit code where the machine allows no sandbox (sysexits.h: EX_CONFIG): starting again is of no use. The operator knows
/// it, and the 2 of options that are not understood.
const UNFIT: u8 = 78;
/// Exit code of `listen` after SIGTERM, which is the shell's for that signal (128 + 15): a pod that was told to go is told
/// from one whose builder ended by itself. The operator knows it.
const TOLD_TO_END: u8 = 143;
/// How long the last line may wait for room.
const LAST_WORDS: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
/// Bytes that a pipe which has room at all takes without waiting (PIPE_BUF).
const ROOM: usize = 4096;

fn main() -> ExitCode {
    abort_on_panic();
    // The helper reads no command line but this word, and must stay single-threaded.
    if std::env::args_os().nth(1).is_some_and(|word| word == sandbox::launch::HELPER_COMMAND) {
        return sandbox::child::main();
    }
    let words = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned());
    let cli = match cli::parse(words) {
        Ok(cli) => cli,
        Err(why) => {
            eprintln!("drover-builder: {why}");
            return ExitCode::from(2);
        }
    };
    // What a store holds is not secret, and Nix's programs all have this mask.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    let result = run(&cli);
    sandbox::launch::shut_down();
    match result {
        Ok(code) => code,
        Err(error) => {
            complain(&format!("drover-builder: {}\n", error::last_words(&error)));
            match error.downcast_ref() {
                Some(error::Error::Unfit { .. }) => ExitCode::from(UNFIT),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

/// A builder whose thread has panicked would hold its locks and say nothing; one that is gone is a builder that was lost, and
/// another one takes over.
fn abort_on_panic() {
    let say = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        say(panic);
        std::process::abort();
    }));
}

/// The last line on standard error. Whoever reads that may be stalled, and shall not keep this program from its end; but
/// where there is room the line is written, however busy the machine is.
fn complain(line: &str) {
    let stderr = rustix::stdio::stderr();
    let mut room = [PollFd::new(&stderr, PollFlags::OUT)];
    if poll(&mut room, Some(&LAST_WORDS)).is_ok() && room[0].revents().contains(PollFlags::OUT) {
        let _nobody_reads = std::io::stderr().write_all(&line.as_bytes()[..line.len().min(ROOM)]);
    }
}

fn run(cli: &Cli) -> anyhow::Result<ExitCode> {
    match &cli.command {
        Command::Help => print!("{}", cli::USAGE),
        Command::Version => println!("drover-builder {}", env!("CARGO_PKG_VERSION")),
        Command::Serve { write } => {
            let builder = builder(cli, *write)?;
            // Where there is none, the build says why.
            if let (true, Ok(rung)) = (cli.say_sandbox, builder.rung()) {
                // In one piece: whoever reads it looks at what comes first.
                let _nobody_reads = std::io::stderr().write_all(format!("sandbox: {rung}\n").as_bytes());
            }
            stdio::serve(builder, *write)?;
        }
        Command::Listen { address, authorized_keys, host_key, max_sessions, login_grace_seconds } => {
            let options = listen::Options {
                address,
                authorized_keys,
                host_key: host_key.as_deref(),
                max_sessions: *max_sessions,
                login_grace: Duration::from_secs(*login_grace_seconds),
            };
            listen::run(&options, builder(cli, true)?)?;
            return Ok(ExitCode::from(TOLD_TO_END));
        }
        Command::Gc(options) => return maintain::gc(&cli.store, options),
        Command::Verify { contents, repair } => return maintain::verify(&cli.store, *contents, *repair),
    }
    Ok(ExitCode::SUCCESS)
}

fn builder(cli: &Cli, write: bool) -> anyhow::Result<Builder> {
    let access = if write { Access::ReadWrite } else { Access::ReadOnly };
    let settings = machine::settings(cli)?;
    Ok(Builder::new(open(&cli.store, access)?, settings))
}

/// Where a store lies that is there.
fn existing(uri: &StoreUri) -> anyhow::Result<StoreLayout> {
    let layout = uri.layout();
    if !layout.state_dir.join("db/db.sqlite").exists() {
        anyhow::bail!("there is no store at {}; serve --write makes one", layout.real_store_dir.display());
    }
    Ok(layout)
}

fn parse_uri(uri: &str) -> anyhow::Result<StoreUri> {
    let uri = StoreUri::parse(uri)?;
    // Nix does no more about them either: what a newer one knows must not keep an older one from its store.
    for name in &uri.unknown {
        eprintln!("drover-builder: warning: the store's parameter {name:?} is unknown, and ignored");
    }
    Ok(uri.with_environment()?)
}

fn open(uri: &str, access: Access) -> anyhow::Result<LocalStore> {
    let uri = parse_uri(uri)?;
    let access = if uri.read_only { Access::ReadOnly } else { access };
    // A reader may come before the first writer, and then there is nothing to read.
    let layout = if access == Access::ReadOnly { existing(&uri)? } else { uri.layout() };
    Ok(LocalStore::open(layout, access)?)
}
