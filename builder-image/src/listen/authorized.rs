//! Who may log in: lines in the format of OpenSSH's `authorized_keys` (sshd(8)), and what each of them allows. Pure.
//!
//! A line may restrict its key only by options that are enforced here. An option that would restrict it in a way that is
//! not enforced is an error at start: a key that opens more than its owner wrote down is worse than a server that does not
//! run. What all options about terminals and forwarding speak of is never granted to anybody.

use std::net::IpAddr;

use anyhow::{Context as _, bail, ensure};
use russh::keys::{Algorithm, HashAlg, PublicKey};

use super::address::Networks;
use crate::cli::{self, Command};

/// Largest file of keys that is read.
pub(super) const MAX_KEYS_FILE: u64 = 1 << 20;
/// Options that grant or forbid what nobody gets here.
const WITHOUT_EFFECT: [&str; 13] = [
    "agent-forwarding",
    "no-agent-forwarding",
    "no-port-forwarding",
    "no-pty",
    "no-user-rc",
    "no-x11-forwarding",
    "permitlisten",
    "permitopen",
    "port-forwarding",
    "pty",
    "restrict",
    "user-rc",
    "x11-forwarding",
];

/// One line.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Rule {
    pub key: PublicKey,
    /// The key signs certificates and does not log in itself (`cert-authority`).
    pub authority: bool,
    /// One of these has to be among a certificate's; without the option it has to be the user's name.
    pub principals: Option<Vec<String>>,
    pub from: Option<Networks>,
    /// False where `command=` is a serve command without `--write`.
    pub write: bool,
}

/// What somebody who has logged in may do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Access {
    pub write: bool,
    /// Key or certificate, for the log.
    pub who: String,
}

/// Parses all lines of a text. The error says which line is wrong, and why.
pub(super) fn parse(text: &str) -> anyhow::Result<Vec<Rule>> {
    let lines = text.lines().enumerate().map(|(index, line)| (index + 1, line.trim()));
    lines
        .filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
        .map(|(number, line)| parse_line(line).with_context(|| format!("line {number}")))
        .collect()
}

/// Whether a key by itself may log in. The error is why not, for the log.
pub(super) fn judge(rules: &[Rule], key: &PublicKey, address: IpAddr) -> Result<Access, String> {
    let who = describe(key);
    let mut refusal = format!("{who} is not authorized");
    for rule in rules.iter().filter(|rule| !rule.authority && rule.key.key_data() == key.key_data()) {
        match &rule.from {
            Some(networks) if !networks.contains(address) => {
                refusal = format!("{who} may not log in from {address}");
            }
            _ => return Ok(Access { write: rule.write, who }),
        }
    }
    Err(refusal)
}

/// Algorithm and fingerprint.
pub(super) fn describe(key: &PublicKey) -> String {
    format!("{} {}", key.algorithm(), key.fingerprint(HashAlg::Sha256))
}

/// Whether a session under this forced command may write. None for what is no plain serve command: to run that instead
/// of what was asked for would give its key more than it was meant to have.
pub(super) fn forced_command(text: &str) -> Option<bool> {
    let mut words = text.split_ascii_whitespace();
    let program = words.next()?.rsplit('/').next()?;
    if !["drover-builder", "nix-store"].contains(&program) {
        return None;
    }
    let words: Vec<_> = words.map(str::to_owned).collect();
    // Options would have to act on one connection only; none does.
    let plain = words.iter().all(|word| ["serve", "--serve", "--write"].contains(&word.as_str()));
    match cli::parse(words).ok()?.command {
        Command::Serve { write } if plain => Some(write),
        _ => None,
    }
}

fn parse_line(line: &str) -> anyhow::Result<Rule> {
    let (options, key) = match is_key_type(line.split_ascii_whitespace().next().unwrap_or_default()) {
        true => ("", line),
        false => split_options(line)?,
    };
    let key = parse_key(key)?;
    let mut rule = Rule { key, authority: false, principals: None, from: None, write: true };
    for option in split_list(options)? {
        apply(&mut rule, option)?;
    }
    ensure!(
        rule.authority || rule.principals.is_none(),
        "principals= restricts certificates, and has no meaning without cert-authority"
    );
    Ok(rule)
}

/// The comment is not looked at.
fn parse_key(text: &str) -> anyhow::Result<PublicKey> {
    let mut fields = text.split_ascii_whitespace();
    let (kind, data) = (fields.next().unwrap_or_default(), fields.next().unwrap_or_default());
    ensure!(
        !is_key_type(kind) || kind == "ssh-ed25519",
        "keys of type {kind} are not accepted, only ssh-ed25519 (make one: ssh-keygen -t ed25519)"
    );
    let key = PublicKey::from_openssh(&format!("{kind} {data}"))
        .with_context(|| format!("not a public key in OpenSSH's format: {text:?}"))?;
    ensure!(key.algorithm() == Algorithm::Ed25519, "not an Ed25519 key: {text:?}");
    Ok(key)
}

fn is_key_type(word: &str) -> bool {
    ["ssh-", "ecdsa-", "sk-"].iter().any(|prefix| word.starts_with(prefix))
}

fn apply(rule: &mut Rule, option: &str) -> anyhow::Result<()> {
    let (name, value) = match option.split_once('=') {
        Some((name, value)) => (name, Some(unquote(value).with_context(|| format!("in {option:?}"))?)),
        None => (option, None),
    };
    let name = name.to_ascii_lowercase();
    match (name.as_str(), value) {
        ("cert-authority", None) => rule.authority = true,
        ("principals", Some(value)) => {
            let names: Vec<String> = value.split(',').map(str::to_owned).collect();
            ensure!(names.iter().all(|name| !name.is_empty()), "principals= has an empty name");
            ensure!(rule.principals.replace(names).is_none(), "principals= is there twice");
        }
        ("from", Some(value)) => {
            let networks = Networks::parse(&value).map_err(anyhow::Error::msg).context("from=")?;
            ensure!(rule.from.replace(networks).is_none(), "from= is there twice");
        }
        ("command", Some(value)) => {
            rule.write &= forced_command(&value).with_context(|| {
                format!(
                    "command={value:?} is not run here: every command is `drover-builder serve --write`, or `drover-builder serve` for a key that may not write"
                )
            })?;
        }
        (name, _) if WITHOUT_EFFECT.contains(&name) => {}
        _ => bail!("the option {option:?} is not understood, and would not be enforced"),
    }
    Ok(())
}

/// Options end at the first blank outside quotes.
fn split_options(line: &str) -> anyhow::Result<(&str, &str)> {
    let end = outside_quotes(line).find(|(_, byte)| byte.is_ascii_whitespace());
    let (end, _) = end.with_context(|| format!("neither a key nor options and a key: {line:?}"))?;
    Ok((&line[..end], line[end..].trim_start()))
}

fn split_list(options: &str) -> anyhow::Result<Vec<&str>> {
    if options.is_empty() {
        return Ok(Vec::new());
    }
    let mut items = Vec::new();
    let mut start = 0;
    for (comma, _) in outside_quotes(options).filter(|(_, byte)| *byte == b',') {
        items.push(&options[start..comma]);
        start = comma + 1;
    }
    items.push(&options[start..]);
    ensure!(items.iter().all(|item| !item.is_empty()), "an empty option in {options:?}");
    Ok(items)
}

/// Bytes that no quotes enclose, with their places. A backslash keeps a quote from being one.
fn outside_quotes(text: &str) -> impl Iterator<Item = (usize, u8)> {
    let (mut quoted, mut escaped) = (false, false);
    text.bytes().enumerate().filter(move |(_, byte)| {
        let is_quote = *byte == b'"' && !escaped;
        escaped = *byte == b'\\' && !escaped;
        quoted ^= is_quote;
        !quoted && !is_quote
    })
}

fn unquote(value: &str) -> anyhow::Result<String> {
    let inner = value.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
    let inner = inner.context("the value has to stand in double quotes")?;
    Ok(inner.replace("\\\"", "\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ";
    const ECDSA: &str = "ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlzdHAyNTYAAABBBEmKSENjQEezOmxkZMy7opKgwFB9nkt5YRrYMjNuG5N87uRgg6CLrbo5wAdT/y6v0mKV0U2w0WZ2YB/++Tpockg=";
    const LOCAL: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    fn rule(line: &str) -> Rule {
        parse(line).unwrap().remove(0)
    }

    fn error(line: &str) -> String {
        format!("{:#}", parse(line).unwrap_err())
    }

    #[test]
    fn lines_comments_and_blanks() {
        let rules = parse(&format!("# a comment\n\n{KEY}\n  {KEY} who it is\r\n\t# {KEY}\n")).unwrap();
        assert_eq!(rules.len(), 2);
        assert_eq!(rules[0].key.key_data(), rules[1].key.key_data());
        assert!(rules[0].write && !rules[0].authority && rules[0].principals.is_none());
    }

    #[test]
    fn options_that_are_enforced() {
        let line =
            format!(r#"restrict,cert-authority,principals="root,nix builder",from="10.0.0.0/8" {KEY} ca"#);
        let authority = rule(&line);
        assert!(authority.authority && authority.write);
        assert_eq!(authority.principals.unwrap(), ["root", "nix builder"]);
        assert!(authority.from.unwrap().contains([10, 1, 1, 1].into()));
        assert!(rule(&format!(r#"Command="nix-store --serve --write",no-pty {KEY}"#)).write);
        assert!(!rule(&format!(r#"command="/usr/bin/drover-builder serve" {KEY}"#)).write);
    }

    #[test]
    fn what_would_not_be_enforced_is_an_error() {
        for (options, what) in [
            (r#"expiry-time="20300101""#, "not understood"),
            (r#"environment="A=b""#, "not understood"),
            ("verify-required", "not understood"),
            (r#"command="/bin/sh""#, "is not run here"),
            (r#"command="drover-builder serve --store /other""#, "is not run here"),
            (r#"command="drover-builder gc""#, "is not run here"),
            (r#"from="*.example.com""#, "neither an address nor a network"),
            (r#"principals="root""#, "without cert-authority"),
            (r#"cert-authority,principals="""#, "empty name"),
            ("cert-authority,principals=root", "double quotes"),
            (r#"from="10.0.0.1",from="10.0.0.2""#, "twice"),
            ("restrict,,cert-authority", "empty option"),
            (r#"from="10.0.0.1 "#, "neither a key nor options"),
        ] {
            let error = error(&format!("# first\n{options} {KEY}"));
            assert!(error.contains(what) && error.contains("line 2"), "{options}: {error}");
        }
    }

    #[test]
    fn other_kinds_of_keys_are_refused_at_start() {
        assert!(error(ECDSA).contains("only ssh-ed25519"), "{}", error(ECDSA));
        assert!(error(&format!("restrict {ECDSA}")).contains("only ssh-ed25519"));
        assert!(error("ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAAAgQ==").contains("only ssh-ed25519"));
        assert!(error("ssh-ed25519 AAAA").contains("not a public key"));
        assert!(error("nonsense").contains("neither a key nor options"));
    }

    #[test]
    fn who_gets_in() {
        let other = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f";
        let (key, other) = (rule(KEY).key, rule(other).key);
        let rules = parse(&format!("cert-authority {KEY}\nfrom=\"192.0.2.0/24\" {KEY}")).unwrap();
        assert!(judge(&rules, &other, LOCAL).unwrap_err().contains("is not authorized"));
        assert!(judge(&rules, &key, LOCAL).unwrap_err().contains("may not log in from 127.0.0.1"));
        assert!(judge(&rules, &key, [192, 0, 2, 1].into()).unwrap().who.starts_with("ssh-ed25519 SHA256:"));
        // An authority's own key is no login, and a later line may allow what an earlier one does not.
        assert!(judge(&rules[..1], &key, [192, 0, 2, 1].into()).is_err());
        let rules = parse(&format!("from=\"192.0.2.1\" {KEY}\ncommand=\"nix-store --serve\" {KEY}")).unwrap();
        assert!(!judge(&rules, &key, LOCAL).unwrap().write);
    }
}
