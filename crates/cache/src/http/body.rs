//! A response's body that outlives its connection.

use std::io::{self, ErrorKind, Read};
use std::thread;

use reqwest::StatusCode;
use reqwest::blocking::Response;
use reqwest::header::{
    CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, HeaderValue, IF_RANGE, LAST_MODIFIED, RANGE,
};

use super::transport::pause;
use crate::Error;

/// Makes the request again, with these headers.
pub(super) type Rest = Box<dyn Fn(&HeaderMap) -> Result<Response, Error> + Send>;

pub(super) struct Resuming {
    response: Response,
    rest: Rest,
    attempts: u32,
    position: u64,
    /// Failures since the last byte came.
    failures: u32,
    version: Version,
}

/// So that the rest is of the same file as the beginning.
struct Version {
    etag: Option<HeaderValue>,
    modified: Option<HeaderValue>,
    length: Option<u64>,
}

impl Version {
    fn of(response: &Response) -> Self {
        let headers = response.headers();
        // A weak tag does not promise the same bytes.
        let strong = |tag: &&HeaderValue| !tag.as_bytes().starts_with(b"W/");
        let etag = headers.get(ETAG).filter(strong).cloned();
        let length = headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
        Self { etag, modified: headers.get(LAST_MODIFIED).cloned(), length }
    }

    /// What the server should compare.
    fn condition(&self) -> Option<&HeaderValue> {
        self.etag.as_ref().or(self.modified.as_ref())
    }

    /// Whether a whole file is this one, as far as that can be told.
    fn is(&self, other: &Self) -> bool {
        let same_length = || self.length.is_none() || self.length == other.length;
        match (&self.etag, &self.modified) {
            (Some(etag), _) => Some(etag) == other.etag.as_ref(),
            (None, modified) => *modified == other.modified && same_length(),
        }
    }
}

impl Resuming {
    pub(super) fn new(response: Response, attempts: u32, rest: Rest) -> Self {
        let version = Version::of(&response);
        Self { response, rest, attempts, position: 0, failures: 0, version }
    }

    /// Asks for the rest. The server may send all of it again, which is read past.
    fn resume(&mut self) -> io::Result<()> {
        let changed = || io::Error::other("the file changed while it was fetched");
        let mut range = HeaderMap::new();
        if self.position > 0 {
            let bytes = format!("bytes={}-", self.position);
            range.insert(RANGE, HeaderValue::from_str(&bytes).map_err(io::Error::other)?);
            if let Some(condition) = self.version.condition() {
                range.insert(IF_RANGE, condition.clone());
            }
        }
        let response = (self.rest)(&range).map_err(io::Error::other)?;
        match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let (_, length) = content_range(&response)
                    .filter(|(begins, _)| *begins == self.position)
                    .ok_or_else(|| io::Error::other("the server sends another part than the rest"))?;
                if self.version.length.is_some() && length.is_some() && self.version.length != length {
                    return Err(changed());
                }
                self.response = response;
                Ok(())
            }
            StatusCode::OK if self.position > 0 && !self.version.is(&Version::of(&response)) => {
                Err(changed())
            }
            StatusCode::OK => {
                self.response = response;
                let skipped = io::copy(&mut (&mut self.response).take(self.position), &mut io::sink())?;
                if skipped < self.position {
                    return Err(ErrorKind::UnexpectedEof.into());
                }
                Ok(())
            }
            status => Err(io::Error::other(format!("the server answers {status} to a request for the rest"))),
        }
    }
}

/// Where a part begins, and how long the whole is (RFC 9110, section 14.4).
fn content_range(response: &Response) -> Option<(u64, Option<u64>)> {
    let range = response.headers().get(CONTENT_RANGE)?.to_str().ok()?.strip_prefix("bytes ")?;
    let (part, length) = range.split_once('/')?;
    Some((part.split_once('-')?.0.parse().ok()?, length.parse().ok()))
}

impl Read for Resuming {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut error = match self.response.read(buffer) {
                Ok(count) => {
                    self.position += count as u64;
                    if count > 0 {
                        self.failures = 0;
                    }
                    return Ok(count);
                }
                Err(error) => error,
            };
            loop {
                self.failures += 1;
                if self.failures >= self.attempts {
                    return Err(error);
                }
                thread::sleep(pause(self.failures));
                match self.resume() {
                    Ok(()) => break,
                    Err(again) => error = again,
                }
            }
        }
    }
}
