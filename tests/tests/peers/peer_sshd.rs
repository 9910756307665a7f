//! Real Nix clients, a real OpenSSH server, and Drover's builder as the one command that a key may run.

use anyhow::{Context as _, Result, ensure};
use drover_tests::record::CHAIN;
use drover_tests::sshd::ADDRESS;
use drover_tests::{Nix, Remote, Sshd, program};

/// Keys of the server.
const WRITER: usize = 0;
const NICE_WRITER: usize = 1;
const READER: usize = 2;

/// A server with a key each for what people write behind `command=`.
fn start(remote: &Remote) -> Result<Sshd> {
    let commands = [
        remote.builder_command("server", "serve --write"),
        format!("nice -n20 {}", remote.builder_command("server", "--serve --write --builders ''")),
        remote.builder_command("server", "--serve"),
    ];
    let builder = program("drover-builder")?;
    Sshd::start(&commands.each_ref().map(String::as_str), &[&builder])
}

#[test]
fn every_real_client_through_a_real_server() -> Result<()> {
    let uri = format!("ssh://root@{ADDRESS}");
    for nix in Nix::ALL {
        let mut remote = Remote::new(nix)?;
        let sshd = start(&remote)?;
        remote.through_ssh(&sshd, WRITER)?;
        let said = |what: &str| format!("{what}; sshd: {}", sshd.log());

        // Built over there, each derivation in a connection of its own, and copied back.
        let machine = format!("{uri} x86_64-linux - 2 1");
        let args = ["--no-out-link", "--max-jobs", "0", "--builders", &machine, "-A", "user", "-E", CHAIN];
        let output = remote.output("nix-build", &args)?;
        let log = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success() && log.contains("loud"), "{nix:?}: {log}; sshd: {}", sshd.log());
        let out = String::from_utf8(output.stdout)?;
        let out = out.lines().next().context("nix-build prints no path")?;
        ensure!(remote.object("server", out).is_file(), "{nix:?}: it was built elsewhere");

        // There and back, with compression, several connections over one master, and as another key has it.
        let source = remote.run("nix-store", &["--add", "/etc/passwd"])?;
        let source = source.trim();
        remote
            .nix(&["copy", "--to", &format!("{uri}?compress=true"), source])
            .with_context(|| said("there"))?;
        ensure!(remote.object("server", source).is_file(), "{nix:?}: it did not arrive");
        remote.run("nix-store", &["--delete", source])?;
        remote.through_ssh(&sshd, NICE_WRITER)?;
        // Before it starts a master, older Nix waits for a lock that it holds itself, whatever the server is.
        let master = if nix != Nix::V2_34 { uri.clone() } else { format!("{uri}?max-connections=3") };
        remote.nix(&["copy", "--no-check-sigs", "--from", &master, source]).with_context(|| said("back"))?;
        ensure!(remote.object("client", source).is_file(), "{nix:?}: it did not come back");
        let copy = ["--to", "--use-substitutes", &format!("root@{ADDRESS}"), out];
        remote.run("nix-copy-closure", &copy).with_context(|| said("nix-copy-closure"))?;

        // A reader reads, and learns that it may no more.
        remote.through_ssh(&sshd, READER)?;
        remote.run("nix-store", &["--delete", source])?;
        remote.nix(&["copy", "--no-check-sigs", "--from", &uri, source]).with_context(|| said("a reader"))?;
        let other = remote.run("nix-store", &["--add", "/etc/group"])?;
        let refused = remote.output(
            "nix",
            &["copy", "--to", &uri, other.trim(), "--extra-experimental-features", "nix-command"],
        )?;
        let log = String::from_utf8_lossy(&refused.stderr);
        ensure!(!refused.status.success() && log.contains("--write"), "{nix:?}: {log}");
        for store in ["server", "client"] {
            remote.verify(store)?;
        }
    }
    Ok(())
}
