//! Sending requests and keeping at it, for whatever speaks HTTP to a cache: which requests those are is no matter here.
//!
//! Owns the client, what failures are waited out and for how long, and bodies that outlive their connection.

use std::io::{self, Read};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use reqwest::blocking::{Client, RequestBuilder, Response};
use reqwest::header::{CONTENT_ENCODING, HeaderMap, LOCATION, RETRY_AFTER};
use reqwest::{Method, StatusCode, Url, redirect};

use super::authorization::take_user;
use super::body::{Rest, Resuming};
use crate::tls::client_config;
use crate::{CacheOptions, Error, compression};

/// The first pause; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Slowest upload that is put up with, in bytes a second, on top of the time that any request has.
const SLOWEST_UPLOAD: u64 = 64 << 10;
/// Flow control over HTTP/2. Several NARs are open while one is read: were the connection's window not larger than all
/// of theirs together, those that wait would stop the one that is read.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 128 << 20;

/// Makes a request. Called for each attempt, since bodies are used up and signatures have a date.
pub(crate) type Request<'a> = dyn Fn() -> io::Result<RequestBuilder> + 'a;
/// The same, to be made again by whoever reads a body.
pub(crate) type Again = Box<dyn Fn() -> io::Result<RequestBuilder> + Send>;
/// Makes the request for this place, to which another one may have led.
pub(crate) type RequestAt<'a> = dyn Fn(&Url) -> io::Result<RequestBuilder> + 'a;
pub(crate) type AgainAt = Box<dyn Fn(&Url) -> io::Result<RequestBuilder> + Send>;

/// Steps from the place that was asked first.
const MAX_REDIRECTS: usize = 10;
/// Answers that lead elsewhere, where the same is to be asked.
const REDIRECTS: [StatusCode; 4] = [
    StatusCode::MOVED_PERMANENTLY,
    StatusCode::FOUND,
    StatusCode::TEMPORARY_REDIRECT,
    StatusCode::PERMANENT_REDIRECT,
];

pub(crate) struct Transport {
    pub(crate) client: Client,
    attempts: u32,
    stall_timeout: Duration,
}

impl Transport {
    /// With `https`, an authority that certificates can be checked against must be known. The error is a sentence.
    pub(crate) fn new(
        options: &CacheOptions,
        https: bool,
        redirects: redirect::Policy,
    ) -> Result<Self, String> {
        let client = Client::builder()
            .user_agent(concat!("drover/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(options.connect_timeout)
            // In the blocking client: for the answer to begin, and for each piece of its body.
            .timeout(options.stall_timeout)
            .redirect(redirects)
            .tls_backend_preconfigured(client_config(options.certificates.as_deref(), https)?)
            .http2_initial_stream_window_size(STREAM_WINDOW)
            .http2_initial_connection_window_size(CONNECTION_WINDOW)
            .build()
            .map_err(|error| error.to_string())?;
        Ok(Self { client, attempts: options.attempts.max(1), stall_timeout: options.stall_timeout })
    }

    /// How often a request is sent, and a body taken up.
    pub(crate) fn attempts(&self) -> u32 {
        self.attempts
    }

    /// Sends until there is an answer that counts, or no attempt is left.
    pub(crate) fn send(
        &self,
        act: &'static str,
        url: &Url,
        request: &Request<'_>,
    ) -> Result<Response, Error> {
        let mut attempt = 1;
        loop {
            let request = request().map_err(|source| Error::Read { url: redacted(url.as_str()), source })?;
            let pause = match request.send() {
                Ok(response) if attempt < self.attempts && may_pass(response.status().as_u16()) => {
                    pause(attempt).max(retry_after(&response))
                }
                Ok(response) => return Ok(response),
                Err(error) if attempt < self.attempts && is_passing(&error) => pause(attempt),
                Err(error) => {
                    let source = error.without_url();
                    return Err(Error::Request { act, url: redacted(url.as_str()), source });
                }
            };
            thread::sleep(pause);
            attempt += 1;
        }
    }

    /// The same, wherever that leads. Followed here, for the client would show to a second place of another host what is
    /// for the first one only, and make a GET of an upload.
    pub(crate) fn follow(
        &self,
        act: &'static str,
        method: &Method,
        url: &Url,
        request: &RequestAt<'_>,
    ) -> Result<Response, Error> {
        let mut at = url.clone();
        for _ in 0..=MAX_REDIRECTS {
            let response = self.send(act, &at, &|| request(&at))?;
            let status = response.status();
            // "See what became of it there" is no answer to an upload.
            let leads =
                REDIRECTS.contains(&status) || status == StatusCode::SEE_OTHER && *method != Method::PUT;
            match location(&at, &response).filter(|_| leads) {
                Some(next) => at = next,
                None => return Ok(response),
            }
        }
        let source = io::Error::other(format!("it leads to more than {MAX_REDIRECTS} other places"));
        Err(Error::Read { url: redacted(url.as_str()), source })
    }

    /// The body of an answer to a GET, its `Content-Encoding` undone. `again` makes the request anew where it breaks off.
    pub(crate) fn body(
        self: &Arc<Self>,
        url: &Url,
        response: Response,
        again: Again,
    ) -> Result<Box<dyn Read + Send>, Error> {
        let (transport, from) = (Arc::clone(self), url.clone());
        let rest = move |range: &HeaderMap| {
            transport.send("fetch the rest of", &from, &|| Ok(again()?.headers(range.clone())))
        };
        self.resuming(url, response, Box::new(rest))
    }

    /// The same for what was [followed](Self::follow).
    pub(crate) fn body_from(
        self: &Arc<Self>,
        url: &Url,
        response: Response,
        again: AgainAt,
    ) -> Result<Box<dyn Read + Send>, Error> {
        let (transport, from) = (Arc::clone(self), url.clone());
        let rest = move |range: &HeaderMap| {
            let get = |at: &Url| Ok(again(at)?.headers(range.clone()));
            transport.follow("fetch the rest of", &Method::GET, &from, &get)
        };
        self.resuming(url, response, Box::new(rest))
    }

    fn resuming(&self, url: &Url, response: Response, rest: Rest) -> Result<Box<dyn Read + Send>, Error> {
        let encoding = response.headers().get(CONTENT_ENCODING).map(|value| value.to_str().unwrap_or("?"));
        let shown = || redacted(url.as_str());
        let encoding = compression::content_encoding(encoding.unwrap_or("")).ok_or_else(|| Error::Read {
            url: shown(),
            source: io::Error::other(format!("its Content-Encoding {encoding:?} is not supported")),
        })?;
        let body = Resuming::new(response, self.attempts(), rest);
        match compression::decoder(encoding, Box::new(body)) {
            Some(decoder) => decoder.map_err(|source| Error::Read { url: shown(), source }),
            None => Err(Error::Compression { url: shown(), compression: encoding }),
        }
    }

    /// For a request that carries so many bytes. Unlike the client's, this timeout is over the whole request.
    pub(crate) fn upload_timeout(&self, size: u64) -> Duration {
        self.stall_timeout + Duration::from_secs(size / SLOWEST_UPLOAD)
    }
}

/// Whether a status may be another one next time.
pub(crate) fn may_pass(status: u16) -> bool {
    matches!(status, 408 | 425 | 429 | 500 | 502 | 503 | 504)
}

/// After failure number `attempt`, from 1 on.
pub(crate) fn pause(attempt: u32) -> Duration {
    FIRST_PAUSE.saturating_mul(1 << (attempt - 1).min(16)).min(LONGEST_PAUSE)
}

/// For messages: without user, password and query, which may be secrets.
pub(crate) fn redacted(url: &str) -> String {
    match url.parse::<Url>() {
        Ok(mut url) => {
            // Fails for URLs that cannot have any.
            let _ = url.set_username("");
            let _ = url.set_password(None);
            url.set_query(None);
            url.into()
        }
        Err(_) => url.split(['?', '@']).next().unwrap_or_default().to_owned(),
    }
}

/// Where an answer leads, by http or https.
fn location(from: &Url, response: &Response) -> Option<Url> {
    let to = response.headers().get(LOCATION)?.to_str().ok()?;
    let mut to = from.join(to).ok().filter(|to| matches!(to.scheme(), "http" | "https"))?;
    // Nobody is told by a server who to be.
    let _ = take_user(&mut to);
    Some(to)
}

fn is_passing(error: &reqwest::Error) -> bool {
    !error.is_builder() && !error.is_redirect()
}

/// What the server asks for, in its simple form of seconds, within reason.
fn retry_after(response: &Response) -> Duration {
    let seconds = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
    Duration::from_secs(seconds.unwrap_or(0)).min(LONGEST_PAUSE)
}
