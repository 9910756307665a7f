//! The command line: `serve` in our spelling and in Nix's, `listen`, `gc`, `verify`. Pure: it turns words into values.

use std::path::PathBuf;

use drover_nix::StorePath;
use drover_nix::hash_modulo::SelfReferenceHash;
use drover_store::GcOptions;

use crate::build::extra_paths::ExtraPath;
use crate::build::trust::Trust;
use crate::network::Choice;
use crate::nix_options;
use crate::sandbox::rungs::Rung;

pub(crate) const USAGE: &str = "\
Builds Nix derivations in a store of its own, for clients that speak Nix's serve protocol.

Usage:
  drover-builder serve [--write] [OPTIONS]     the protocol on standard input and output, the log on standard error
  drover-builder --serve [--write] [OPTIONS]   the same, as Nix and Hydra spell it
  drover-builder listen --listen ADDRESS --authorized-key KEY|FILE [--host-key FILE] [OPTIONS]
                                               the same over SSH; the first line on standard output is the host key
  drover-builder gc [--dry-run] [--max-freed SIZE] [--store URI]
                                               deletes what no root needs
  drover-builder verify [--check-contents] [--repair] [--store URI]
                                               compares the database with the disk; exit code 1 if they differ

Options:
  --store URI               a root directory, or `local` with ?root=, store=, real=, state= (default: local)
  --linger SECONDS          how long a build outlives its connection, and how long its end and its log are kept for
                            who asks for the same again (default: 0)
  --sandbox RUNG            the weakest sandbox that builds may have: nested, nested-admin or pod (default: nested); the
                            strongest that works is used
  --sandbox-paths LIST      what else of this machine builds see, with blanks between: INSIDE or INSIDE=OUTSIDE, and `?`
                            behind what may be absent; store paths bring what they refer to
  --no-use-cgroups          no control group for each build, where one could be made
  --say-sandbox             of serve: the first line on standard error is `sandbox: RUNG`, if builds can have one
  --sandbox-shell PATH      a static shell that builds see as /bin/sh (default: busybox, where there is one)
  --network auto|pasta|host|none
                            what builds that may fetch have: a network of their own by pasta, this program's, or none
                            (default: auto, which is pasta where it works and this program's elsewhere)
  --substituters LIST       URLs of caches, with blanks between, the preferred one first: what clients ask to have
                            fetched comes from there (default: none); `?trusted=true` behind one believes it unsigned
  --trusted-public-keys LIST
                            keys, NAME:BASE64, one of which must have signed what is not content-addressed
  --no-require-sigs         believe caches unsigned
  --connect-timeout SECONDS, --stalled-download-timeout SECONDS
                            how long a cache may take to be connected to (default: 5) and may say nothing (default: 15)
                            before it is left alone for a while
  --netrc-file FILE         users and passwords by host, for caches and builtin:fetchurl; no build sees the file
  --ssl-cert-file FILE      certificate authorities that caches may have, and that builds which fetch trust (default:
                            NIX_SSL_CERT_FILE, SSL_CERT_FILE, or the machine's own)
  --hashed-mirrors LIST     URLs below which builtin:fetchurl looks for flat files by their hashes first
  --cores NUMBER            NIX_BUILD_CORES (default: 0, as many as there are)
  --system SYSTEM           what this machine builds for (default: its own)
  --extra-platforms LIST    what else it builds for (default: on x86_64 i686-linux and the processor's levels)
  --system-features LIST    what derivations may require (default: nixos-test benchmark big-parallel, and kvm)
  --self-reference-hash with-offsets|without-offsets
                            what the path of a content-addressed output that refers to itself is made of: as Nix 2.35
                            does it (the default), or as Nix 2.17 to 2.34, where other content can be given the same
                            path. Also the environment variable DROVER_SELF_REFERENCE_HASH
  --trust verified|claimed  whether the paths of input-addressed outputs have to follow from the derivation that a client
                            sends (default: claimed, since clients of Nix send what cannot be proven from itself)
  --proven-derivation PATH  with --trust verified, a derivation whose paths were proven otherwise: where its .drv would be
                            if it had no derivations as inputs; can be given several times
  --only-derivation PATH    builds nothing but this, named in the same way; can be given several times
  --max-sessions NUMBER     how many sessions `listen` serves at once (default: 64)
  --login-grace SECONDS     how long a connection to `listen` may take to log in (default: 20)
Options of gc:
  --dry-run, --print-dead   only print the paths that would be deleted
  --max-freed SIZE          stop after so many bytes; with K, M, G or T behind it, so many times 1024
  --keep-outputs            keep what living derivations build
  --no-keep-derivations     do not keep the derivations of living paths
Options of verify:
  --check-contents          also hash everything
  --repair                  make missing paths invalid, delete damaged entries of .links
Options of Nix that change nothing here are accepted: --builders, --max-jobs, --option, -v, --quiet and their like.
";

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Command {
    Serve {
        write: bool,
    },
    Listen {
        address: String,
        authorized_keys: Vec<String>,
        host_key: Option<PathBuf>,
        max_sessions: usize,
        login_grace_seconds: u64,
    },
    Gc(GcOptions),
    Verify {
        contents: bool,
        repair: bool,
    },
    Help,
    Version,
}

/// The whole command line. Lists are None where they were not given.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Cli {
    pub command: Command,
    pub store: String,
    pub linger_seconds: u64,
    /// The weakest that is allowed.
    pub sandbox: Rung,
    pub sandbox_paths: Vec<ExtraPath>,
    pub cgroups: bool,
    /// Say on standard error which one they have.
    pub say_sandbox: bool,
    pub sandbox_shell: Option<PathBuf>,
    pub network: Choice,
    pub netrc_file: Option<PathBuf>,
    pub ssl_cert_file: Option<PathBuf>,
    pub hashed_mirrors: Vec<String>,
    pub substituters: Vec<String>,
    pub public_keys: Vec<String>,
    pub require_signatures: bool,
    /// Of caches; 0 for the usual ones.
    pub connect_timeout_seconds: u64,
    pub stall_timeout_seconds: u64,
    /// 0 for as many as there are.
    pub cores: usize,
    pub system: Option<String>,
    pub extra_platforms: Option<Vec<String>>,
    pub system_features: Option<Vec<String>>,
    pub self_references: Option<SelfReferenceHash>,
    pub trust: Trust,
}

/// Parses the words behind the program's name. The error is one line.
pub(crate) fn parse(words: impl IntoIterator<Item = String>) -> Result<Cli, String> {
    let mut words = words.into_iter().peekable();
    let mut command = None;
    let (mut write, mut contents, mut repair) = (false, false, false);
    let mut substitute = true;
    let mut gc = GcOptions::default();
    let (mut address, mut authorized_keys, mut host_key) = (None, Vec::new(), None);
    let (mut max_sessions, mut login_grace_seconds) = (64, 20);
    let mut cli = Cli {
        command: Command::Help,
        store: "local".into(),
        linger_seconds: 0,
        sandbox: Rung::Nested,
        sandbox_paths: Vec::new(),
        cgroups: true,
        say_sandbox: false,
        sandbox_shell: None,
        network: Choice::Auto,
        netrc_file: None,
        ssl_cert_file: None,
        hashed_mirrors: Vec::new(),
        substituters: Vec::new(),
        public_keys: Vec::new(),
        require_signatures: true,
        connect_timeout_seconds: 0,
        stall_timeout_seconds: 0,
        cores: 0,
        system: None,
        extra_platforms: None,
        system_features: None,
        self_references: None,
        trust: Trust::default(),
    };
    while let Some(word) = words.next() {
        // Both `--name value` and `--name=value`.
        let (name, mut inline) = match word.split_once('=') {
            Some((name, value)) if name.starts_with("--") => (name.to_owned(), Some(value.to_owned())),
            _ => (word.clone(), None),
        };
        // Nix has a `--sandbox` without a value: that builds are sandboxed, as they are here in any case.
        if name == "--sandbox" {
            let value = inline.or_else(|| words.next_if(|next| Rung::parse(next).is_some()));
            if let Some(value) = value {
                cli.sandbox = Rung::parse(&value)
                    .ok_or_else(|| format!("--sandbox: {value:?} is not nested, nested-admin or pod"))?;
            }
            continue;
        }
        let mut value =
            || inline.take().or_else(|| words.next()).ok_or_else(|| format!("{name} needs a value"));
        match name.as_str() {
            "--help" | "-h" | "help" => return Ok(Cli { command: Command::Help, ..cli }),
            "--version" => return Ok(Cli { command: Command::Version, ..cli }),
            "serve" | "--serve" => set_command(&mut command, "serve")?,
            "listen" => set_command(&mut command, "listen")?,
            "gc" => set_command(&mut command, "gc")?,
            "verify" => set_command(&mut command, "verify")?,
            "--write" => write = true,
            "--check-contents" => contents = true,
            "--repair" => repair = true,
            "--dry-run" | "--print-dead" => gc.dry_run = true,
            "--max-freed" => gc.max_freed = Some(size(&name, &value()?)?),
            "--keep-outputs" => gc.keep_outputs = true,
            "--no-keep-outputs" => gc.keep_outputs = false,
            "--keep-derivations" => gc.keep_derivations = true,
            "--no-keep-derivations" => gc.keep_derivations = false,
            "--option" => {
                let setting = value()?;
                let value = words.next().ok_or_else(|| format!("--option {setting} needs a value"))?;
                match setting.as_str() {
                    "keep-outputs" | "gc-keep-outputs" => gc.keep_outputs = boolean(&setting, &value)?,
                    "keep-derivations" | "gc-keep-derivations" => {
                        gc.keep_derivations = boolean(&setting, &value)?;
                    }
                    "substituters" => cli.substituters = words_of(&value),
                    "extra-substituters" => cli.substituters.extend(words_of(&value)),
                    "trusted-public-keys" => cli.public_keys = words_of(&value),
                    "extra-trusted-public-keys" => cli.public_keys.extend(words_of(&value)),
                    "require-sigs" => cli.require_signatures = boolean(&setting, &value)?,
                    "substitute" => substitute = boolean(&setting, &value)?,
                    _ => {}
                }
            }
            "--substituters" => cli.substituters = words_of(&value()?),
            "--extra-substituters" => cli.substituters.extend(words_of(&value()?)),
            "--trusted-public-keys" => cli.public_keys = words_of(&value()?),
            "--extra-trusted-public-keys" => cli.public_keys.extend(words_of(&value()?)),
            "--require-sigs" => cli.require_signatures = true,
            "--no-require-sigs" => cli.require_signatures = false,
            "--connect-timeout" => cli.connect_timeout_seconds = number(&name, &value()?)?,
            "--stalled-download-timeout" => cli.stall_timeout_seconds = number(&name, &value()?)?,
            "--substitute" => substitute = true,
            "--no-substitute" => substitute = false,
            "--store" => cli.store = value()?,
            "--listen" => address = Some(value()?),
            "--authorized-key" => authorized_keys.push(value()?),
            "--host-key" => host_key = Some(value()?.into()),
            "--sandbox-paths" | "--extra-sandbox-paths" => {
                for item in value()?.split_whitespace() {
                    cli.sandbox_paths.push(ExtraPath::parse(item).map_err(|why| format!("{name}: {why}"))?);
                }
            }
            "--use-cgroups" => cli.cgroups = true,
            "--no-use-cgroups" => cli.cgroups = false,
            "--say-sandbox" => cli.say_sandbox = true,
            "--sandbox-shell" => cli.sandbox_shell = Some(value()?.into()),
            "--network" => {
                cli.network = value()?.parse().map_err(|why| format!("{name}: {why}"))?;
            }
            "--netrc-file" => cli.netrc_file = Some(value()?.into()),
            "--ssl-cert-file" => cli.ssl_cert_file = Some(value()?.into()),
            "--hashed-mirrors" => cli.hashed_mirrors = list(&value()?),
            "--linger" => cli.linger_seconds = number(&name, &value()?)?,
            "--cores" => cli.cores = number(&name, &value()?)?,
            "--max-sessions" => max_sessions = number(&name, &value()?)?,
            "--login-grace" => login_grace_seconds = number(&name, &value()?)?,
            "--system" => cli.system = Some(value()?),
            "--extra-platforms" => cli.extra_platforms = Some(list(&value()?)),
            "--trust" => {
                cli.trust.verified = match value()?.as_str() {
                    "verified" => true,
                    "claimed" => false,
                    other => return Err(format!("{name}: {other:?} is neither verified nor claimed")),
                };
            }
            "--proven-derivation" => drop(cli.trust.proven.insert(derivation(&name, &value()?)?)),
            "--only-derivation" => drop(cli.trust.only.insert(derivation(&name, &value()?)?)),
            "--self-reference-hash" => {
                let value = value()?;
                cli.self_references =
                    Some(value.parse().map_err(|_| {
                        format!("{name}: {value:?} is neither with-offsets nor without-offsets")
                    })?);
            }
            "--system-features" => cli.system_features = Some(list(&value()?)),
            other => match nix_options::words_after(other) {
                Some(count) => (inline.is_some().into()..count).for_each(|_: usize| {
                    words.next();
                }),
                None => return Err(format!("unknown argument {word:?}; see drover-builder --help")),
            },
        }
    }
    if !substitute {
        cli.substituters.clear();
    }
    cli.command = match command {
        Some("serve") => Command::Serve { write },
        Some("listen") => {
            let address = address.ok_or("listen needs --listen ADDRESS, for instance 0.0.0.0:2222")?;
            if authorized_keys.is_empty() {
                return Err("listen needs --authorized-key: without one nobody could log in".into());
            }
            Command::Listen { address, authorized_keys, host_key, max_sessions, login_grace_seconds }
        }
        Some("gc") => Command::Gc(gc),
        Some("verify") => Command::Verify { contents, repair },
        _ => return Err("a command is needed: serve, listen, gc or verify; see drover-builder --help".into()),
    };
    Ok(cli)
}

fn set_command(command: &mut Option<&'static str>, name: &'static str) -> Result<(), String> {
    match command.replace(name) {
        Some(before) if before != name => Err(format!("{before} and {name} cannot be had at once")),
        _ => Ok(()),
    }
}

fn number<N: std::str::FromStr>(name: &str, text: &str) -> Result<N, String> {
    text.parse().map_err(|_| format!("{name}: {text:?} is not a whole number"))
}

/// Bytes, as Nix takes them: a number, and K, M, G or T for powers of 1024.
fn size(name: &str, text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        Some(b'T' | b't') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    let number = number::<u64>(name, digits)?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{name}: {text:?} is more than there can be"))
}

/// The path of a `.drv`, whatever the store's directory.
fn derivation(name: &str, text: &str) -> Result<StorePath, String> {
    let base = text.rsplit('/').next().unwrap_or(text);
    match base.parse::<StorePath>() {
        Ok(path) if path.is_derivation() => Ok(path),
        Ok(_) => Err(format!("{name}: {text:?} does not end in `.drv`")),
        Err(error) => Err(format!("{name}: {error}")),
    }
}

fn boolean(name: &str, text: &str) -> Result<bool, String> {
    match text {
        "true" | "yes" | "1" => Ok(true),
        "false" | "no" | "0" => Ok(false),
        _ => Err(format!("{name}: {text:?} is neither true nor false")),
    }
}

/// As Nix has lists in settings.
fn words_of(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

fn list(text: &str) -> Vec<String> {
    text.split([' ', ',']).filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Cli, String> {
        super::parse(line.split(' ').filter(|word| !word.is_empty()).map(str::to_owned))
    }

    #[test]
    fn serve_in_every_spelling() {
        for line in [
            "serve --write",
            "--serve --write",
            "--write --serve",
            "--builders x --serve -v --write",
            "-vvv --option a b --serve --extra-experimental-features c --no-substitute --write -j 4",
        ] {
            assert_eq!(parse(line).unwrap().command, Command::Serve { write: true }, "{line}");
        }
        assert_eq!(parse("--serve").unwrap().command, Command::Serve { write: false });
        let line = "--option sandbox true serve --max-jobs=3 --store /x --cores 2 --linger=9";
        let cli = parse(line).unwrap();
        assert_eq!((cli.store.as_str(), cli.cores, cli.linger_seconds), ("/x", 2, 9));
    }

    #[test]
    fn saying_the_sandbox_is_asked_for() {
        assert!(!parse("serve --write").unwrap().say_sandbox);
        assert!(parse("serve --say-sandbox --write").unwrap().say_sandbox);
    }

    #[test]
    fn whose_word_counts() {
        assert!(!parse("serve --write").unwrap().trust.verified);
        let drv = "q4mzjdlh5px6977h7v5fdsk1p33yg583-x.drv";
        let line =
            format!("serve --trust verified --proven-derivation /nix/store/{drv} --only-derivation={drv}");
        let trust = parse(&line).unwrap().trust;
        assert!(trust.verified);
        let named = [drv.parse().unwrap()].into();
        assert_eq!((&trust.proven, &trust.only), (&named, &named));
        for wrong in ["--trust yes", "--only-derivation x", &format!("--proven-derivation {}", &drv[..34])] {
            assert!(parse(&format!("serve {wrong}")).is_err(), "{wrong}");
        }
    }

    #[test]
    fn listen() {
        let line =
            "listen --listen 127.0.0.1:0 --authorized-key a --authorized-key b --host-key k --login-grace 3";
        let expected = Command::Listen {
            address: "127.0.0.1:0".into(),
            authorized_keys: vec!["a".into(), "b".into()],
            host_key: Some("k".into()),
            max_sessions: 64,
            login_grace_seconds: 3,
        };
        assert_eq!(parse(line).unwrap().command, expected);
        assert!(parse("listen --listen 127.0.0.1:0").unwrap_err().contains("--authorized-key"));
        assert!(parse("listen --authorized-key a").unwrap_err().contains("--listen"));
    }

    #[test]
    fn the_rest() {
        let verify = |contents, repair| Command::Verify { contents, repair };
        assert_eq!(parse("verify --check-contents").unwrap().command, verify(true, false));
        assert_eq!(parse("verify --repair").unwrap().command, verify(false, true));
        let gc = GcOptions::default();
        assert_eq!(parse("gc --store local").unwrap().command, Command::Gc(gc.clone()));
        let most = |max_freed| Command::Gc(GcOptions { max_freed: Some(max_freed), ..gc.clone() });
        assert_eq!(parse("gc --max-freed=7").unwrap().command, most(7));
        assert_eq!(parse("gc --max-freed 3G").unwrap().command, most(3 << 30));
        let line = "gc --print-dead --option keep-outputs true --option x y --no-keep-derivations";
        let all = GcOptions { max_freed: None, keep_outputs: true, keep_derivations: false, dry_run: true };
        assert_eq!(parse(line).unwrap().command, Command::Gc(all));
        assert_eq!(parse("--help").unwrap().command, Command::Help);
        let line = "serve --netrc-file /n --ssl-cert-file=/c --hashed-mirrors http://a,http://b";
        let cli = parse(line).unwrap();
        assert_eq!((cli.netrc_file, cli.ssl_cert_file), (Some("/n".into()), Some("/c".into())));
        assert_eq!(cli.hashed_mirrors, ["http://a", "http://b"]);
        let cli = parse("serve --self-reference-hash=without-offsets").unwrap();
        assert_eq!(cli.self_references, Some(SelfReferenceHash::WithoutOffsets));
        assert_eq!(parse("serve --network none").unwrap().network, Choice::None);
        let features = parse("serve --system-features kvm,big-parallel").unwrap().system_features.unwrap();
        assert_eq!(features, ["kvm", "big-parallel"]);
    }

    #[test]
    fn caches_and_what_is_believed_of_them() {
        let words = |line: &[&str]| super::parse(line.iter().map(|word| (*word).to_owned())).unwrap();
        let cli = words(&["serve"]);
        assert!(cli.substituters.is_empty() && cli.public_keys.is_empty() && cli.require_signatures);
        let cli = words(&[
            "serve",
            "--substituters",
            "http://a  file:///b",
            "--extra-substituters=http://c?trusted=true",
            "--trusted-public-keys",
            "a:x b:y",
            "--option",
            "extra-trusted-public-keys",
            "c:z",
            "--no-require-sigs",
            "--stalled-download-timeout=7",
        ]);
        assert_eq!((cli.connect_timeout_seconds, cli.stall_timeout_seconds), (0, 7));
        assert_eq!(cli.substituters, ["http://a", "file:///b", "http://c?trusted=true"]);
        assert_eq!(cli.public_keys, ["a:x", "b:y", "c:z"]);
        assert!(!cli.require_signatures);
        let cli = words(&["--option", "substituters", "http://a", "serve", "--no-substitute"]);
        assert_eq!(cli.substituters, <[String; 0]>::default());
    }

    #[test]
    fn the_sandbox() {
        assert_eq!(parse("serve").unwrap().sandbox, Rung::Nested);
        assert_eq!(parse("serve --sandbox pod").unwrap().sandbox, Rung::Pod);
        assert_eq!(parse("--sandbox=nested-admin serve").unwrap().sandbox, Rung::NestedAdmin);
        // As Nix spells it, where it is no more than what is so anyway.
        let cli = parse("--sandbox serve --write").unwrap();
        assert_eq!((cli.sandbox, cli.command), (Rung::Nested, Command::Serve { write: true }));
        assert!(
            parse("serve --use-cgroups").unwrap().cgroups
                && !parse("serve --no-use-cgroups").unwrap().cgroups
        );
        let paths = parse("serve --sandbox-paths=/a --extra-sandbox-paths /b=/c?").unwrap().sandbox_paths;
        assert_eq!(paths, ["/a", "/b=/c?"].map(|item| ExtraPath::parse(item).unwrap()));
        assert!(parse("serve --sandbox-paths a").unwrap_err().contains("--sandbox-paths"));
        assert!(parse("serve --sandbox=none").unwrap_err().contains("nested-admin"));
    }

    #[test]
    fn what_is_refused() {
        for line in [
            "",
            "--write",
            "serve listen",
            "serve --store",
            "serve --bogus",
            "serve --cores many",
            "serve --network slirp",
            "serve --self-reference-hash sometimes",
            "gc --max-freed 3X",
            "gc --max-freed 99999999T",
            "gc --option keep-outputs perhaps",
            "gc --option keep-outputs",
            "frobnicate",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
