//! netrc files, in which Nix looks for what a host wants to see (Nix: netrc-file; curl: docs/CURLOPT_NETRC_FILE; the
//! format is ftp's).

use crate::Error;

/// Most bytes of a netrc file that are read: curl's limit (lib/netrc.c).
pub const MAX_LEN: usize = 128 << 10;

/// No Debug: what is printed ends up in a log.
#[derive(Default)]
pub struct Netrc(Vec<Machine>);

#[derive(Default)]
struct Machine {
    /// None is `default`: any host.
    host: Option<String>,
    login: String,
    password: String,
}

impl Netrc {
    /// Parses a whole file. Errors say what is wrong without repeating any of it.
    pub fn parse(text: &[u8]) -> Result<Self, Error> {
        if text.len() > MAX_LEN {
            return Err(fail(format!("it has {} bytes; {MAX_LEN} are allowed", text.len())));
        }
        let text = std::str::from_utf8(text).map_err(|_| fail("it is not UTF-8"))?;
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
                _ => return Err(fail("a word stands where 'machine', 'login' or the like is expected")),
            }
        }
        Ok(Self(machines))
    }

    /// User and password for a host: of its first entry, else of `default`. None if that names neither.
    pub fn find(&self, host: &str) -> Option<(&str, &str)> {
        let named =
            |machine: &&Machine| machine.host.as_deref().is_some_and(|name| name.eq_ignore_ascii_case(host));
        let machine =
            self.0.iter().find(named).or_else(|| self.0.iter().find(|machine| machine.host.is_none()))?;
        (!machine.login.is_empty() || !machine.password.is_empty())
            .then_some((machine.login.as_str(), machine.password.as_str()))
    }
}

fn fail(why: impl Into<String>) -> Error {
    Error::Netrc { why: why.into() }
}

fn value(rest: &mut &str, what: &str) -> Result<String, Error> {
    next_word(rest)?.ok_or_else(|| fail(format!("it ends after '{what}'")))
}

/// The next word: up to white space, or in quotes with backslashes. Comments are skipped.
fn next_word(rest: &mut &str) -> Result<Option<String>, Error> {
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
    Err(fail("a quote has no end"))
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
        assert_eq!(Netrc::parse(b"machine b default login d").unwrap().find("b"), None);
    }

    #[test]
    fn what_is_wrong_is_said_without_repeating_it() {
        for text in
            ["machine", "login secret", "machine a secret", "machine a password \"secret", "machine a login"]
        {
            let error = Netrc::parse(text.as_bytes()).err().unwrap().to_string();
            assert!(error.contains("netrc") && !error.contains("secret"), "{error}");
        }
        assert!(Netrc::parse(b"machine \xff").is_err());
        let long = format!("machine a password {}", "x".repeat(MAX_LEN));
        assert!(Netrc::parse(long.as_bytes()).is_err());
    }
}
