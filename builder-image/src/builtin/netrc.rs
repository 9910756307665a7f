//! netrc files: which user and password a host wants (curl: docs/CURLOPT_NETRC_FILE; the format is ftp's).

use anyhow::{Result, bail};

#[derive(Default)]
pub(super) struct Netrc(Vec<Machine>);

/// No Debug: what is printed ends up in a log.
#[derive(Default)]
struct Machine {
    /// None is `default`: any host.
    host: Option<String>,
    login: String,
    password: String,
}

impl Netrc {
    pub(super) fn parse(text: &[u8]) -> Result<Self> {
        let Ok(text) = std::str::from_utf8(text) else { bail!("the netrc file is not UTF-8") };
        let mut machines = Vec::<Machine>::new();
        let mut rest = text;
        while let Some(word) = next_word(&mut rest)? {
            match (word.as_str(), machines.last_mut()) {
                ("machine", _) => {
                    let host = value(&mut rest, "machine")?;
                    machines.push(Machine { host: Some(host), ..Machine::default() });
                }
                ("default", _) => machines.push(Machine::default()),
                ("login", Some(machine)) => machine.login = value(&mut rest, "login")?,
                ("password", Some(machine)) => machine.password = value(&mut rest, "password")?,
                ("account", Some(_)) => drop(value(&mut rest, "account")?),
                // Commands for ftp, up to an empty line.
                ("macdef", _) => rest = rest.split_once("\n\n").map_or("", |(_, rest)| rest),
                // Not what it is: it may be a password in the wrong place.
                _ => bail!("the netrc file has a word where 'machine', 'login' or the like is expected"),
            }
        }
        Ok(Self(machines))
    }

    /// User and password for a host: of its first entry, else of `default`.
    pub(super) fn find(&self, host: &str) -> Option<(&str, &str)> {
        let named =
            |machine: &&Machine| machine.host.as_deref().is_some_and(|name| name.eq_ignore_ascii_case(host));
        let machine =
            self.0.iter().find(named).or_else(|| self.0.iter().find(|machine| machine.host.is_none()))?;
        Some((&machine.login, &machine.password))
    }
}

fn value(rest: &mut &str, what: &str) -> Result<String> {
    match next_word(rest)? {
        Some(value) => Ok(value),
        None => bail!("the netrc file ends after '{what}'"),
    }
}

/// The next word: up to white space, or in quotes with backslashes. Comments are skipped.
fn next_word(rest: &mut &str) -> Result<Option<String>> {
    loop {
        *rest = rest.trim_start();
        if !rest.starts_with('#') {
            break;
        }
        *rest = rest.split_once('\n').map_or("", |(_, rest)| rest);
    }
    if rest.is_empty() {
        return Ok(None);
    }
    let Some(quoted) = rest.strip_prefix('"') else {
        let end = rest.find(char::is_whitespace).unwrap_or(rest.len());
        let (word, behind) = rest.split_at(end);
        *rest = behind;
        return Ok(Some(word.to_owned()));
    };
    let mut word = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => {
                *rest = &quoted[at + 1..];
                return Ok(Some(word));
            }
            '\\' => match characters.next() {
                Some((_, 'n')) => word.push('\n'),
                Some((_, 't')) => word.push('\t'),
                Some((_, 'r')) => word.push('\r'),
                Some((_, other)) => word.push(other),
                None => break,
            },
            other => word.push(other),
        }
    }
    bail!("the netrc file has a quote without an end")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_and_the_rest() {
        let text = "# comment machine x\nmachine a.example login u password p#1\nmachine B.example\n\tpassword \"q \\\"r\\\\\" \
                    account z login v\nmacdef init\nmachine trap login t password t\n\nmachine a.example login second \
                    password no\ndefault login d password e\n";
        let netrc = Netrc::parse(text.as_bytes()).unwrap();
        assert_eq!(netrc.find("a.example"), Some(("u", "p#1")));
        assert_eq!(netrc.find("b.EXAMPLE"), Some(("v", "q \"r\\")));
        assert_eq!(netrc.find("trap"), Some(("d", "e")));
        assert_eq!(Netrc::parse(b"machine a login u").unwrap().find("b"), None);
        assert_eq!(Netrc::parse(b"").unwrap().find("b"), None);
    }

    #[test]
    fn what_is_wrong_is_said_without_repeating_it() {
        for text in
            ["machine", "login secret", "machine a secret", "machine a password \"secret", "machine a login"]
        {
            let error = Netrc::parse(text.as_bytes()).err().unwrap().to_string();
            assert!(!error.contains("secret"), "{error}");
        }
    }
}
