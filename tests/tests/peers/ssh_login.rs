//! Who gets into the builder's SSH server: keys and certificates as ssh-keygen makes them, shown by OpenSSH's client.

use std::process::Command;

use anyhow::{Result, ensure};
use drover_serve::Client;
use drover_tests::program;
use xtask::run;

use crate::ssh_fixture::{Keys, Listener, Session, object, text};

#[test]
fn keys_by_line_and_by_file() -> Result<()> {
    let keys = Keys::new()?;
    let (one, two, three) = (keys.make("one")?, keys.make("two")?, keys.make("three")?);
    keys.make("stranger")?;
    let file = keys.path("authorized_keys");
    std::fs::write(&file, format!("# who may\n\n{two}\nrestrict,from=\"127.0.0.0/8\" {three}\n"))?;
    let file = file.display().to_string();
    let server = Listener::start(keys, &[&one, &file], &[])?;
    for name in ["one", "two", "three"] {
        server.try_login(name, &[])?.map_err(anyhow::Error::msg)?;
    }
    let refused = server.try_login("stranger", &[])?;
    ensure!(refused.as_ref().is_err_and(|said| said.contains("Permission denied")), "{refused:?}");
    // Whoever looks at the log finds out which key that was.
    let fingerprint =
        run::stdout(Command::new("ssh-keygen").arg("-lf").arg(server.keys().path("stranger.pub")))?;
    let fingerprint = fingerprint.split(' ').nth(1).unwrap_or_default();
    server.says(&format!("did not log in: ssh-ed25519 {fingerprint} is not authorized"))?;
    server.says("logged in as \"root\" by ssh-ed25519 SHA256:")?;
    // Other methods than keys are not offered.
    let mut command =
        server.ssh("stranger", &["-v", "-o", "PreferredAuthentications=password,keyboard-interactive"]);
    let said = text(&command.arg("x").output()?);
    ensure!(said.lines().any(|line| line.ends_with("that can continue: publickey")), "{said}");
    Ok(())
}

#[test]
fn a_key_is_bound_to_its_address_and_its_command() -> Result<()> {
    let keys = Keys::new()?;
    let (far, reader) = (keys.make("far")?, keys.make("reader")?);
    let far = format!("from=\"192.0.2.0/24\" {far}");
    let reader = format!("restrict,command=\"drover-builder serve\" {reader}");
    let server = Listener::start(keys, &[&far, &reader], &[])?;
    ensure!(server.try_login("far", &[])?.is_err());
    server.says("may not log in from 127.0.0.1")?;
    let Session { mut client, ssh } =
        Session::start(server.ssh("reader", &[]).arg("nix-store --serve --write"))?;
    let (info, nar) = object("unwelcome", 100)?;
    client.query_valid_paths(&[info.path.clone()].into(), false, false)?;
    ensure!(client.add_to_store_nar(&info, &mut nar.as_slice()).is_err());
    drop::<Client<_, _>>(client);
    let output = ssh.wait_with_output()?;
    ensure!(output.status.code() == Some(1) && text(&output).contains("AddToStoreNar"), "{}", text(&output));
    ensure!(server.objects()?.is_empty());
    Ok(())
}

#[test]
fn certificates() -> Result<()> {
    let keys = Keys::new()?;
    let (ca, deploy_ca) = (keys.make("ca")?, keys.make("deploy-ca")?);
    keys.make("other-ca")?;
    keys.make("user")?;
    let always = ["-n", "root", "-V", "always:forever"];
    // (name, authority, options to ssh-keygen, what the server says if it refuses)
    let cases: &[(&str, &str, &[&str], Option<&str>)] = &[
        ("good", "ca", &always, None),
        ("good-now", "ca", &["-n", "nix,root", "-V", "-1m:+10m", "-z", "7"], None),
        (
            "expired",
            "ca",
            &["-n", "root", "-V", "-2d:-1d"],
            Some("a certificate that expired, is not valid yet"),
        ),
        (
            "not-yet",
            "ca",
            &["-n", "root", "-V", "+1d:+2d"],
            Some("a certificate that expired, is not valid yet"),
        ),
        ("wrong-user", "ca", &["-n", "nobody"], Some("do not name the user \"root\"")),
        ("nobody", "ca", &[], Some("names no principals")),
        ("wrong-ca", "other-ca", &always, Some("its signer is not an authority here")),
        ("host", "ca", &["-h", "-n", "root"], Some("is not authorized")),
        (
            "unknown-option",
            "ca",
            &["-n", "root", "-O", "critical:owner@example.org=me"],
            Some("not understood"),
        ),
        ("serve-only", "ca", &["-n", "root", "-O", "force-command=nix-store --serve --write"], None),
        (
            "date-only",
            "ca",
            &["-n", "root", "-O", "force-command=/bin/date"],
            Some("for the command \"/bin/date\" only"),
        ),
        ("near", "ca", &["-n", "root", "-O", "source-address=127.0.0.0/8"], None),
        (
            "far",
            "ca",
            &["-n", "root", "-O", "source-address=192.0.2.1"],
            Some("not for clients at 127.0.0.1"),
        ),
        ("deployer", "deploy-ca", &["-n", "deploy"], None),
        ("no-deployer", "deploy-ca", &["-n", "root"], Some("is among [\"deploy\"]")),
    ];
    for (name, authority, options, _) in cases {
        keys.certify(name, "user", authority, options)?;
    }
    let line = format!("cert-authority {ca}");
    let deploy = format!("cert-authority,principals=\"deploy\" {deploy_ca}");
    let server = Listener::start(keys, &[&line, &deploy], &[])?;
    for (name, _, _, refusal) in cases {
        let result = server.try_login(name, &[])?;
        ensure!(result.is_err() == refusal.is_some(), "{name}: {result:?}\n{}", server.log_text());
        if let Some(refusal) = refusal {
            server.says(refusal)?;
        }
    }
    server.says("by certificate \"good-now\" (serial 7, signed by SHA256:")?;
    // The key by itself opens nothing, and neither does the authority's own.
    for name in ["user", "ca"] {
        ensure!(server.try_login(name, &[])?.is_err(), "{name}");
    }
    server.says("is not authorized")
}

#[test]
fn what_would_not_be_enforced_stops_the_start() -> Result<()> {
    let keys = Keys::new()?;
    let key = keys.make("id")?;
    let mut keygen = Command::new("ssh-keygen");
    run::run(keygen.args(["-q", "-t", "rsa", "-N", "", "-f"]).arg(keys.path("rsa")))?;
    let rsa = keys.public("rsa")?;
    let expiring = format!("expiry-time=\"20300101\" {key}");
    let store = keys.path("store").display().to_string();
    for (line, why) in [(&rsa, "only ssh-ed25519"), (&expiring, "would not be enforced")] {
        let mut command = Command::new(program("drover-builder")?);
        command.args(["listen", "--listen", "127.0.0.1:0", "--store", &store, "--authorized-key", line]);
        let output = command.output()?;
        ensure!(output.status.code() == Some(1) && text(&output).contains(why), "{}", text(&output));
        ensure!(output.stdout.is_empty(), "no host key is printed for a server that does not run");
    }
    Ok(())
}
