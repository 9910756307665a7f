//! Whose keys requests to S3 are signed with: those given, else what the environment says, as AWS's own programs read it
//! and in the order of Nix (AWS SDKs and Tools Reference Guide, "Standardized credential providers"; Nix: aws-creds.cc):
//! variables, profiles, keys that are lent. Else nobody's, for buckets that are public.

use std::fs;
use std::io;
use std::path::PathBuf;

use super::lent::Place;
use super::sign::Keys;
use crate::{Credentials, Secret};

/// Most bytes of a file of profiles that are read.
const MAX_FILE: u64 = 1 << 20;

/// Variables of the environment.
pub(crate) type Environment<'a> = dyn Fn(&str) -> Option<String> + 'a;

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Found {
    /// Requests are anonymous.
    Nobody,
    Keys(Keys),
    Lent(Place),
}

/// Whose keys are for a bucket in `region`. The error is a sentence without secrets.
pub(crate) fn find(
    given: &Credentials,
    profile: Option<&str>,
    region: &str,
    environment: &Environment<'_>,
) -> Result<Found, String> {
    let get = |name: &str| environment(name).filter(|value| !value.is_empty());
    match given {
        // A netrc file is for the hosts that it names, and for HTTP's own way of asking.
        Credentials::None | Credentials::Netrc(_) => {}
        Credentials::Aws { access_key_id, secret_access_key, session_token } => {
            return Ok(Found::Keys(Keys {
                id: access_key_id.clone(),
                secret: secret_access_key.clone(),
                token: session_token.clone(),
            }));
        }
        _ => return Err("an S3 cache takes an access key's id and its secret as credentials".into()),
    }
    match (get("AWS_ACCESS_KEY_ID"), get("AWS_SECRET_ACCESS_KEY")) {
        (Some(id), Some(secret)) => {
            let token = get("AWS_SESSION_TOKEN").map(Secret::new);
            return Ok(Found::Keys(Keys { id, secret: Secret::new(secret), token }));
        }
        (None, None) => {}
        _ => {
            return Err(
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY go together; one of them is not set".into()
            );
        }
    }
    match (from_profile(profile, &get), Place::find(region, &get)) {
        (Ok(Some(keys)), _) => Ok(Found::Keys(keys)),
        (_, Some(place)) => Ok(Found::Lent(place)),
        (Ok(None), None) => Ok(Found::Nobody),
        (Err(why), None) => Err(why),
    }
}

fn from_profile(wanted: Option<&str>, get: &Environment<'_>) -> Result<Option<Keys>, String> {
    let named = wanted.map(str::to_owned).or_else(|| get("AWS_PROFILE"));
    let profile = named.as_deref().unwrap_or("default");
    let file = |variable: &str, name: &str| {
        let in_home = || get("HOME").map(|home| PathBuf::from(home).join(".aws").join(name));
        get(variable).map(PathBuf::from).or_else(in_home)
    };
    // In the second one, sections other than the default's have a word before their name.
    let places = [
        (file("AWS_SHARED_CREDENTIALS_FILE", "credentials"), profile.to_owned()),
        (
            file("AWS_CONFIG_FILE", "config"),
            if profile == "default" { profile.to_owned() } else { format!("profile {profile}") },
        ),
    ];
    let mut looked = Vec::new();
    for (path, section) in places {
        let Some(path) = path else { continue };
        let text = match read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(format!("cannot read {}: {error}", path.display())),
        };
        if let Some(keys) = keys_in(&text, &section) {
            return Ok(Some(keys));
        }
        looked.push(path.display().to_string());
    }
    match named {
        None => Ok(None),
        Some(name) if looked.is_empty() => {
            Err(format!("there is no file of AWS profiles, so none that is called {name:?}"))
        }
        Some(name) => Err(format!("no keys of a profile {name:?} in {}", looked.join(" or "))),
    }
}

fn read(path: &PathBuf) -> io::Result<String> {
    if fs::metadata(path)?.len() > MAX_FILE {
        return Err(io::Error::other(format!("it is larger than {MAX_FILE} bytes")));
    }
    fs::read_to_string(path)
}

/// The keys in a section of such a file: `[NAME]`, and lines `KEY = VALUE`.
fn keys_in(text: &str, section: &str) -> Option<Keys> {
    let mut inside = false;
    let (mut id, mut secret, mut token) = (None, None, None);
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix('[').and_then(|line| line.split(']').next()) {
            inside = name.split_whitespace().eq(section.split_whitespace());
        } else if let (true, Some((key, value))) = (inside, line.split_once('=')) {
            let value = value.trim().to_owned();
            match key.trim() {
                "aws_access_key_id" => id = Some(value),
                "aws_secret_access_key" => secret = Some(Secret::new(value)),
                "aws_session_token" => token = Some(Secret::new(value)),
                _ => {}
            }
        }
    }
    Some(Keys { id: id?, secret: secret?, token })
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "# mine\n[default]\naws_access_key_id = D\naws_secret_access_key=hush1\nregion = x\n\n[ work ]\naws_access_key_id=W\naws_secret_access_key = hush2 \naws_session_token = lent\n[half]\naws_access_key_id = H\n";

    fn ask(given: &Credentials, profile: Option<&str>, variables: &[(&str, &str)]) -> Result<Found, String> {
        let get =
            |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        find(given, profile, "eu-west-2", &get)
    }

    fn keys(found: Result<Found, String>) -> Option<Keys> {
        match found.unwrap() {
            Found::Keys(keys) => Some(keys),
            _ => None,
        }
    }

    fn id(found: Result<Found, String>) -> Option<String> {
        keys(found).map(|keys| keys.id)
    }

    #[test]
    fn given_before_environment_before_profile() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("credentials");
        fs::write(&file, FILE).unwrap();
        let file = ("AWS_SHARED_CREDENTIALS_FILE", file.to_str().unwrap());
        let environment = [("AWS_ACCESS_KEY_ID", "E"), ("AWS_SECRET_ACCESS_KEY", "hush"), file];
        let given = Credentials::Aws {
            access_key_id: "G".into(),
            secret_access_key: Secret::new("hush"),
            session_token: None,
        };
        assert_eq!(id(ask(&given, Some("work"), &environment)).as_deref(), Some("G"));
        assert_eq!(id(ask(&Credentials::None, Some("work"), &environment)).as_deref(), Some("E"));
        assert_eq!(id(ask(&Credentials::None, None, &[file])).as_deref(), Some("D"));
        assert_eq!(id(ask(&Credentials::None, None, &[file, ("AWS_PROFILE", "work")])).as_deref(), Some("W"));
        let work = keys(ask(&Credentials::None, Some("work"), &[file])).unwrap();
        assert_eq!((work.secret.expose(), work.token.unwrap().expose()), ("hush2", "lent"));
        // Lent ones are asked for where there are none.
        let pod = [("AWS_WEB_IDENTITY_TOKEN_FILE", "/t"), ("AWS_ROLE_ARN", "arn:r")];
        assert!(matches!(ask(&Credentials::None, None, &pod), Ok(Found::Lent(_))));
        assert_eq!(id(ask(&Credentials::None, None, &[&pod[..], &[file]].concat())).as_deref(), Some("D"));
        // Where there is nothing, and nothing was asked for, requests are anonymous.
        assert_eq!(ask(&Credentials::None, None, &[]), Ok(Found::Nobody));
        assert_eq!(
            ask(&Credentials::None, None, &[("HOME", dir.path().to_str().unwrap())]),
            Ok(Found::Nobody)
        );
        fs::create_dir(dir.path().join(".aws")).unwrap();
        let config = "[profile work]\naws_access_key_id = C\naws_secret_access_key = hush\n";
        fs::write(dir.path().join(".aws/config"), config).unwrap();
        let home = [("HOME", dir.path().to_str().unwrap())];
        assert_eq!(id(ask(&Credentials::None, Some("work"), &home)).as_deref(), Some("C"));
    }

    #[test]
    fn what_cannot_be_right_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("credentials");
        fs::write(&file, FILE).unwrap();
        let file = ("AWS_SHARED_CREDENTIALS_FILE", file.to_str().unwrap());
        let bearer = Credentials::Bearer(Secret::new("hush"));
        for (given, profile, variables, says) in [
            (&bearer, None, vec![], "access key"),
            (&Credentials::None, None, vec![("AWS_ACCESS_KEY_ID", "E")], "go together"),
            (&Credentials::None, Some("half"), vec![file], "no keys of a profile \"half\""),
            (&Credentials::None, Some("gone"), vec![], "no file of AWS profiles"),
        ] {
            let error = ask(given, profile, &variables).unwrap_err();
            assert!(error.contains(says) && !error.contains("hush"), "{error}");
        }
    }
}
