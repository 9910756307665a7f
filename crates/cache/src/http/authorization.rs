//! Who we say that we are to an HTTP cache: one answer for its own origin, none for any other.

use drover_nix::netrc::Netrc;
use reqwest::Url;
use reqwest::blocking::RequestBuilder;
use reqwest::header::HeaderValue;

use crate::{Credentials, Secret};

pub(super) struct Authorization {
    /// Of the cache.
    origin: Url,
    scheme: Option<Scheme>,
}

enum Scheme {
    Basic(String, Secret),
    Bearer(Secret),
}

impl Authorization {
    /// For the cache at `base`, from which user and password are taken away. Its own go before those of a netrc file,
    /// which are for any host that the file names; any others beside them are a mistake. The error is a sentence.
    pub(super) fn new(base: &mut Url, credentials: &Credentials) -> Result<Self, String> {
        let in_url = take_user(base)?;
        let scheme = match (credentials, in_url) {
            (Credentials::None | Credentials::Netrc(_), Some((user, password))) => {
                Some(Scheme::Basic(user, password))
            }
            (Credentials::None, None) => None,
            (Credentials::Netrc(text), None) => {
                let netrc = Netrc::parse(text.expose().as_bytes()).map_err(|error| error.to_string())?;
                let found = base.host_str().and_then(|host| netrc.find(host));
                found.map(|(user, password)| Scheme::Basic(user.to_owned(), Secret::new(password)))
            }
            (Credentials::Aws { .. }, _) => {
                return Err("its credentials are keys of an S3 service, which only s3:// URLs take".into());
            }
            (_, Some(_)) => return Err("it names a user, and other credentials are given as well".into()),
            (Credentials::Basic { user, password }, None) => {
                Some(Scheme::Basic(user.clone(), password.clone()))
            }
            (Credentials::Bearer(token), None) => Some(Scheme::Bearer(token.clone())),
        };
        match &scheme {
            // RFC 7617, section 2: it would be read as the beginning of the password.
            Some(Scheme::Basic(user, _)) if user.contains(':') => {
                Err("the user's name has a colon in it, which HTTP cannot transport".into())
            }
            Some(Scheme::Bearer(token)) if HeaderValue::from_str(token.expose()).is_err() => {
                Err("the token has characters that HTTP cannot transport, such as a line's end".into())
            }
            _ => Ok(Self { origin: base.clone(), scheme }),
        }
    }

    /// Whether there is something to show to whoever answers at `url`.
    pub(super) fn is_for(&self, url: &Url) -> bool {
        self.scheme.is_some() && self.origin.origin() == url.origin()
    }

    /// `request`, which goes to `url`, with what it has to show there.
    pub(super) fn of(&self, request: RequestBuilder, url: &Url) -> RequestBuilder {
        match &self.scheme {
            Some(scheme) if self.is_for(url) => match scheme {
                Scheme::Basic(user, password) => request.basic_auth(user, Some(password.expose())),
                Scheme::Bearer(token) => request.bearer_auth(token.expose()),
            },
            _ => request,
        }
    }
}

/// User and password out of a URL.
pub(super) fn take_user(url: &mut Url) -> Result<Option<(String, Secret)>, String> {
    let decoded = |text: &str| decode(text).ok_or_else(|| "its user or password is not UTF-8".to_owned());
    let (user, password) = (decoded(url.username())?, decoded(url.password().unwrap_or(""))?);
    // Fails for URLs that cannot have any.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    Ok((!user.is_empty() || !password.is_empty()).then(|| (user, Secret::new(password))))
}

/// Undoes percent-encoding (RFC 3986, section 2.1). What only looks like it stays.
fn decode(text: &str) -> Option<String> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let digit = |at: usize| char::from(*after.get(at)?).to_digit(16);
        match (byte, digit(0), digit(1)) {
            (b'%', Some(high), Some(low)) => {
                // Two hexadecimal digits are a byte.
                decoded.push((high * 16 + low) as u8);
                rest = &after[2..];
            }
            _ => {
                decoded.push(byte);
                rest = after;
            }
        }
    }
    String::from_utf8(decoded).ok()
}
