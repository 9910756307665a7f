//! Keys that are lent for some hours to whoever runs where a role says so: a pod with a service account's token (AWS STS API
//! Reference, AssumeRoleWithWebIdentity), or whatever has an agent at its side (EKS Pod Identity, ECS; AWS SDKs and Tools
//! Reference Guide, "Container credential provider"). What the environment must say is theirs, too.
//!
//! Owns one set of keys and renews it before it ends.

use std::fs;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use reqwest::{Method, StatusCode, Url};

use super::credentials::Environment;
use super::refusal::{self, Refusal, element};
use super::sign::{Keys, encode};
use crate::http::transport::{Transport, redacted};
use crate::{Error, Secret};

/// So long before the end, others are asked for.
const RENEWED: Duration = Duration::from_secs(300);
/// Who these keys are lent to, in the lender's account of it.
const SESSION: &str = "drover";
/// Most bytes of a token.
const MAX_TOKEN: u64 = 64 << 10;

/// Where keys are lent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Place {
    WebIdentity { endpoint: String, role: String, session: String, token_file: String },
    Container { url: String, token: Option<Token> },
}

/// What is shown to the agent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Token {
    Text(Secret),
    File(String),
}

pub(crate) struct Lender {
    place: Place,
    transport: Arc<Transport>,
    lent: Mutex<Option<Lent>>,
}

struct Lent {
    keys: Keys,
    until: Timestamp,
}

impl Place {
    /// What the environment says, None if nothing. `region` is where the bucket is.
    pub(crate) fn find(region: &str, get: &Environment<'_>) -> Option<Self> {
        let first = |names: &[&str]| names.iter().find_map(|name| get(name));
        if let (Some(token_file), Some(role)) = (get("AWS_WEB_IDENTITY_TOKEN_FILE"), get("AWS_ROLE_ARN")) {
            let region = first(&["AWS_REGION", "AWS_DEFAULT_REGION"]).unwrap_or_else(|| region.to_owned());
            let endpoint = first(&["AWS_ENDPOINT_URL_STS", "AWS_ENDPOINT_URL"]);
            let endpoint = endpoint.unwrap_or_else(|| format!("https://sts.{region}.amazonaws.com"));
            let session = get("AWS_ROLE_SESSION_NAME").unwrap_or_else(|| SESSION.to_owned());
            return Some(Self::WebIdentity { endpoint, role, session, token_file });
        }
        let relative = get("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI");
        let url = relative.map(|path| format!("http://169.254.170.2{path}"));
        let url = url.or_else(|| get("AWS_CONTAINER_CREDENTIALS_FULL_URI"))?;
        let file = get("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE").map(Token::File);
        let token = file
            .or_else(|| get("AWS_CONTAINER_AUTHORIZATION_TOKEN").map(|text| Token::Text(Secret::new(text))));
        Some(Self::Container { url, token })
    }
}

impl Lender {
    pub(crate) fn new(place: Place, transport: Arc<Transport>) -> Self {
        Self { place, transport, lent: Mutex::default() }
    }

    /// Keys that last a while yet. Those that still do are kept if no others are to be had.
    pub(crate) fn keys(&self) -> Result<Keys, Error> {
        let mut lent = self.lent.lock().unwrap_or_else(PoisonError::into_inner);
        let lasts = |lent: &&Lent, more: Duration| {
            Timestamp::now().checked_add(more).is_ok_and(|then| then < lent.until)
        };
        if let Some(lent) = lent.as_ref().filter(|lent| lasts(lent, RENEWED)) {
            return Ok(lent.keys.clone());
        }
        match self.ask() {
            Ok(new) => Ok(lent.insert(new).keys.clone()),
            Err(error) => match lent.as_ref().filter(|lent| lasts(lent, Duration::ZERO)) {
                Some(lent) => Ok(lent.keys.clone()),
                None => Err(error),
            },
        }
    }

    fn ask(&self) -> Result<Lent, Error> {
        match &self.place {
            Place::WebIdentity { endpoint, role, session, token_file } => {
                let token = token(token_file)?;
                let form: Vec<String> = [
                    ("Action", "AssumeRoleWithWebIdentity"),
                    ("Version", "2011-06-15"),
                    ("RoleArn", role),
                    ("RoleSessionName", session),
                    ("WebIdentityToken", token.expose()),
                ]
                .map(|(name, value)| format!("{name}={}", encode(value, false)))
                .into();
                let headers = [("content-type", "application/x-www-form-urlencoded")];
                let text = self.answer(Method::POST, endpoint, &headers, &form.join("&"))?;
                let get = |name: &str| element(&text, name);
                let names = ["AccessKeyId", "SecretAccessKey", "SessionToken", "Expiration"];
                lent(names.map(get)).ok_or_else(|| odd(endpoint))
            }
            Place::Container { url, token: shown } => {
                let shown = match shown {
                    None => None,
                    Some(Token::Text(text)) => Some(text.clone()),
                    Some(Token::File(file)) => Some(token(file)?),
                };
                let header = shown.as_ref().map(|token| ("authorization", token.expose()));
                let text = self.answer(Method::GET, url, header.as_slice(), "")?;
                let json: serde_json::Value = serde_json::from_str(&text).map_err(|_| odd(url))?;
                let get = |name: &str| json[name].as_str().map(str::to_owned);
                lent(["AccessKeyId", "SecretAccessKey", "Token", "Expiration"].map(get))
                    .ok_or_else(|| odd(url))
            }
        }
    }

    fn answer(
        &self,
        method: Method,
        url: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Result<String, Error> {
        const ACT: &str = "get keys from";
        let url: Url =
            url.parse().map_err(|error| Error::Url { url: redacted(url), why: format!("{error}") })?;
        let response = self.transport.send(ACT, &url, &|| {
            let request = self.transport.client.request(method.clone(), url.clone()).body(body.to_owned());
            Ok(headers.iter().fold(request, |request, (name, value)| request.header(*name, *value)))
        })?;
        match response.status() {
            StatusCode::OK => Ok(refusal::text(response)),
            _ => Err(Refusal::of(response).into_error(ACT, url.as_str())),
        }
    }
}

fn lent([id, secret, token, until]: [Option<String>; 4]) -> Option<Lent> {
    let keys = Keys { id: id?, secret: Secret::new(secret?), token: Some(Secret::new(token?)) };
    Some(Lent { keys, until: until?.parse().ok()? })
}

fn odd(url: &str) -> Error {
    let source = io::Error::new(io::ErrorKind::InvalidData, "it answers, but not with keys");
    Error::Read { url: redacted(url), source }
}

/// Read anew each time: it is replaced before it ends.
fn token(file: &str) -> Result<Secret, Error> {
    let read = || {
        if fs::metadata(file)?.len() > MAX_TOKEN {
            return Err(io::Error::other(format!("it is larger than {MAX_TOKEN} bytes")));
        }
        fs::read_to_string(file)
    };
    let text = read().map_err(|source| Error::Io { act: format!("read the token in {file}"), source })?;
    Ok(Secret::new(text.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_keys_are_lent() {
        let find = |variables: &[(&str, &str)]| {
            let get = |name: &str| {
                variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
            };
            Place::find("eu-west-2", &get)
        };
        let irsa = [("AWS_WEB_IDENTITY_TOKEN_FILE", "/t"), ("AWS_ROLE_ARN", "arn:r")];
        let expected = |endpoint: &str| {
            let (endpoint, role, session, token_file) =
                (endpoint.into(), "arn:r".into(), "drover".into(), "/t".into());
            Some(Place::WebIdentity { endpoint, role, session, token_file })
        };
        assert_eq!(find(&irsa), expected("https://sts.eu-west-2.amazonaws.com"));
        assert_eq!(
            find(&[&irsa[..], &[("AWS_REGION", "x-1")]].concat()),
            expected("https://sts.x-1.amazonaws.com")
        );
        assert_eq!(
            find(&[&irsa[..], &[("AWS_ENDPOINT_URL_STS", "http://sts")]].concat()),
            expected("http://sts")
        );
        assert_eq!(find(&irsa[..1]), None);
        let agent = [
            ("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://169.254.170.23/v1/credentials"),
            ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", "/t"),
        ];
        let token = Some(Token::File("/t".into()));
        assert_eq!(find(&agent), Some(Place::Container { url: agent[0].1.into(), token }));
    }
}
