//! A response's body that outlives its connection.

use std::io::{self, ErrorKind, Read};
use std::sync::Arc;
use std::thread;

use reqwest::blocking::Response;
use reqwest::header::{CONTENT_RANGE, ETAG, HeaderValue, IF_RANGE, RANGE};
use reqwest::{StatusCode, Url};

use super::transport::{Again, Transport, pause};

pub(super) struct Resuming {
    transport: Arc<Transport>,
    url: Url,
    response: Response,
    again: Again,
    position: u64,
    /// Failures since the last byte came.
    failures: u32,
    /// So that the rest is of the same file as the beginning.
    etag: Option<HeaderValue>,
}

impl Resuming {
    pub(super) fn new(transport: Arc<Transport>, url: Url, response: Response, again: Again) -> Self {
        // A weak tag does not promise the same bytes.
        let strong = |tag: &&HeaderValue| !tag.as_bytes().starts_with(b"W/");
        let etag = response.headers().get(ETAG).filter(strong).cloned();
        Self { transport, url, response, again, position: 0, failures: 0, etag }
    }

    /// Asks for the rest. The server may send all of it again, which is read past.
    fn resume(&mut self) -> io::Result<()> {
        let response = self
            .transport
            .send("fetch the rest of", &self.url, &|| {
                let mut request = (self.again)()?;
                if self.position > 0 {
                    request = request.header(RANGE, format!("bytes={}-", self.position));
                    if let Some(etag) = &self.etag {
                        request = request.header(IF_RANGE, etag);
                    }
                }
                Ok(request)
            })
            .map_err(io::Error::other)?;
        let begins = |range: &HeaderValue| {
            range.to_str().is_ok_and(|range| range.starts_with(&format!("bytes {}-", self.position)))
        };
        match response.status() {
            StatusCode::PARTIAL_CONTENT if response.headers().get(CONTENT_RANGE).is_some_and(begins) => {
                self.response = response;
                Ok(())
            }
            StatusCode::OK if self.etag.is_none() || response.headers().get(ETAG) == self.etag.as_ref() => {
                self.response = response;
                let skipped = io::copy(&mut (&mut self.response).take(self.position), &mut io::sink())?;
                if skipped < self.position {
                    return Err(ErrorKind::UnexpectedEof.into());
                }
                Ok(())
            }
            StatusCode::OK => Err(io::Error::other("the file changed while it was fetched")),
            status => Err(io::Error::other(format!("the server answers {status} to a request for the rest"))),
        }
    }
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
                if self.failures >= self.transport.attempts() {
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
