//! Binary caches in S3 buckets, as Nix keeps them there (Nix: s3-binary-cache-store.cc), over S3's REST API.
//!
//! Owns what is S3's own: addresses, signatures, refusals and uploads in parts. Sending, retrying and resuming is
//! [`crate::http::transport`]'s. Requests go to the bucket's own host only: redirects are not followed, and neither are full
//! URLs in narinfo files.

mod credentials;
mod lent;
mod location;
mod multipart;
mod refusal;
mod sign;
#[cfg(test)]
mod tests;

use std::io::{self, Read};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use drover_nix::Sha256;
use drover_nix::hash::Sha256Hasher;
use jiff::Timestamp;
use reqwest::blocking::{self, RequestBuilder, Response};
use reqwest::header::CONTENT_LENGTH;
use reqwest::{Method, StatusCode, Url, redirect};

use self::credentials::Found;
use self::lent::Lender;
use self::location::Location;
use self::refusal::Refusal;
use self::sign::{Keys, Unsigned};
use crate::binary::{BinaryCache, Body, Files};
use crate::http::transport::{Transport, pause};
use crate::{CacheOptions, Error};

/// S3's own limit.
const MAX_VALID: Duration = Duration::from_secs(7 * 24 * 3600);
/// Bytes that are hashed at a time.
const BUFFER: usize = 128 << 10;

#[derive(Clone)]
pub(crate) struct S3(Arc<Bucket>);

struct Bucket {
    location: Location,
    keys: Keyring,
    transport: Arc<Transport>,
}

enum Keyring {
    /// Requests are anonymous.
    Nobody,
    Own(Keys),
    Lent(Lender),
}

/// What a request is about, before it is signed.
#[derive(Clone, Copy)]
struct Call<'a> {
    act: &'static str,
    method: &'a Method,
    url: &'a Url,
    headers: &'a [(&'static str, String)],
}

/// A piece of a file: its hash is known before it is sent.
struct Payload<'a> {
    body: &'a Body<'a>,
    offset: u64,
    len: u64,
    hash: Sha256,
}

/// What a URL lets others do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Presigned {
    Get,
    Put,
}

pub(crate) fn open(url: &str, options: &CacheOptions) -> Result<BinaryCache<S3>, Error> {
    Ok(BinaryCache::new(connect(url, options)?, options))
}

fn connect(url: &str, options: &CacheOptions) -> Result<S3, Error> {
    let location = Location::parse(url)?;
    let fail = |why| Error::Url { url: location.shown(None), why };
    let environment = |name: &str| std::env::var(name).ok();
    let (given, profile) = (&options.credentials, location.profile.as_deref());
    let found = credentials::find(given, profile, &location.region, &environment).map_err(fail)?;
    let https = location.base.scheme() == "https";
    let transport = Arc::new(Transport::new(options, https, redirect::Policy::none()).map_err(fail)?);
    let keys = match found {
        Found::Nobody => Keyring::Nobody,
        Found::Keys(keys) => Keyring::Own(keys),
        Found::Lent(place) => Keyring::Lent(Lender::new(place, Arc::clone(&transport))),
    };
    let bucket = Bucket { location, keys, transport };
    Ok(S3(Arc::new(bucket)))
}

/// A URL by which whoever has it may GET or PUT one file of an S3 cache until `valid` is over (at most a week, and no
/// longer than keys that were lent): `name` as in the cache, `nar/….nar.zst` for instance.
pub fn presign(
    url: &str,
    options: &CacheOptions,
    method: Presigned,
    name: &str,
    valid: Duration,
) -> Result<String, Error> {
    let S3(bucket) = connect(url, options)?;
    let fail = |why: &str| Error::Url { url: bucket.location.shown(None), why: why.to_owned() };
    let Some(keys) = bucket.keys.get()? else {
        return Err(fail("only who has keys can let others use them"));
    };
    if valid < Duration::from_secs(1) || valid > MAX_VALID {
        return Err(fail("S3 lets others in for a second at least, and a week at most"));
    }
    let method = match method {
        Presigned::Get => Method::GET,
        Presigned::Put => Method::PUT,
    };
    let object = bucket.location.object(name);
    let unsigned = Unsigned { method, url: &object, headers: Vec::new() };
    Ok(unsigned.presign(&keys, &bucket.location.region, valid, Timestamp::now()).into())
}

impl Files for S3 {
    fn url(&self, name: Option<&str>) -> String {
        self.0.location.shown(name)
    }

    fn open(&self, name: &str) -> Result<Option<Box<dyn Read + Send>>, Error> {
        let url = self.0.location.object(name);
        let call = Call { act: "fetch", method: &Method::GET, url: &url, headers: &[] };
        match self.0.answer(call, None)? {
            Ok(response) if response.status() == StatusCode::OK => {
                let (bucket, target) = (Arc::clone(&self.0), url.clone());
                let again = move || {
                    let call = Call { act: "fetch", method: &Method::GET, url: &target, headers: &[] };
                    bucket.request(call, Sha256::of(b""))
                };
                self.0.transport.body(&url, response, Box::new(again)).map(Some)
            }
            Ok(response) => {
                let status = response.status().as_u16();
                Err(Error::Status { act: "fetch", url: self.url(Some(name)), status })
            }
            Err(refusal) if refusal.is_missing() => Ok(None),
            Err(refusal) => Err(refusal.into_error("fetch", url.as_str())),
        }
    }

    fn open_url(&self, url: &str) -> Result<Option<Box<dyn Read + Send>>, Error> {
        let why = "a cache in a bucket keeps its NARs there, and no full URLs".into();
        let source = drover_nix::Error::NarInfo { field: "URL", why };
        Err(Error::Format { url: crate::http::transport::redacted(url), source })
    }

    fn exists(&self, name: &str) -> Result<bool, Error> {
        Ok(self.0.size(&self.0.location.object(name))?.is_some())
    }

    fn put(&self, name: &str, content_type: &str, size: u64, body: &Body<'_>) -> Result<(), Error> {
        let url = self.0.location.object(name);
        let mut headers = vec![("content-type", content_type.to_owned())];
        if let Some(class) = &self.0.location.storage_class {
            headers.push(("x-amz-storage-class", class.clone()));
        }
        if let Some(part) = self.0.location.parts.of(size) {
            return multipart::upload(&self.0, &url, &headers, size, part, body);
        }
        let call = Call { act: "store", method: &Method::PUT, url: &url, headers: &headers };
        self.0.put(call, &Payload::new(&url, body, 0, size)?).map(drop)
    }
}

impl Bucket {
    /// The request, signed as of now.
    fn request(&self, call: Call<'_>, payload: Sha256) -> io::Result<RequestBuilder> {
        let headers = match self.keys.get().map_err(io::Error::other)? {
            None => call.headers.to_vec(),
            Some(keys) => {
                let unsigned =
                    Unsigned { method: call.method.clone(), url: call.url, headers: call.headers.to_vec() };
                unsigned.sign(&keys, &self.location.region, payload, Timestamp::now())
            }
        };
        let request = self.transport.client.request(call.method.clone(), call.url.clone());
        Ok(headers.into_iter().fold(request, |request, (name, value)| request.header(name, value)))
    }

    /// Sends until there is an answer that counts. S3 says with statuses that stand for ever, too, that something may
    /// pass; only its code tells.
    fn answer(
        &self,
        call: Call<'_>,
        payload: Option<&Payload<'_>>,
    ) -> Result<Result<Response, Refusal>, Error> {
        let mut attempt = 1;
        loop {
            let response = self.transport.send(call.act, call.url, &|| {
                let Some(payload) = payload else { return self.request(call, Sha256::of(b"")) };
                let body = (payload.body)(payload.offset)?.take(payload.len);
                let request = self.request(call, payload.hash)?;
                let request = request.timeout(self.transport.upload_timeout(payload.len));
                Ok(request.body(blocking::Body::sized(body, payload.len)))
            })?;
            if response.status().is_success() {
                return Ok(Ok(response));
            }
            let refusal = Refusal::of(response);
            let again = crate::http::transport::may_pass(refusal.status);
            if again || !refusal.may_pass() || attempt >= self.transport.attempts() {
                return Ok(Err(refusal));
            }
            thread::sleep(pause(attempt));
            attempt += 1;
        }
    }

    /// The answer to a request that has to succeed.
    fn expect(&self, call: Call<'_>, payload: Option<&Payload<'_>>) -> Result<Response, Error> {
        self.answer(call, payload)?.map_err(|refusal| refusal.into_error(call.act, call.url.as_str()))
    }

    fn put(&self, call: Call<'_>, payload: &Payload<'_>) -> Result<Response, Error> {
        self.expect(call, Some(payload))
    }

    /// The size of an object; None if there is none, or nobody may know.
    fn size(&self, url: &Url) -> Result<Option<u64>, Error> {
        let call = Call { act: "look for", method: &Method::HEAD, url, headers: &[] };
        match self.answer(call, None)? {
            Ok(response) => {
                // Not the body's length, which is nothing.
                let size =
                    response.headers().get(CONTENT_LENGTH).and_then(|size| size.to_str().ok()?.parse().ok());
                Ok(Some(size.unwrap_or(0)))
            }
            Err(refusal) if refusal.is_missing() => Ok(None),
            Err(refusal) => Err(refusal.into_error("look for", url.as_str())),
        }
    }
}

impl Keyring {
    fn get(&self) -> Result<Option<Keys>, Error> {
        match self {
            Self::Nobody => Ok(None),
            Self::Own(keys) => Ok(Some(keys.clone())),
            Self::Lent(lender) => lender.keys().map(Some),
        }
    }
}

impl<'a> Payload<'a> {
    /// Reads the piece once, for its hash: the service refuses anything else in its place.
    fn new(url: &Url, body: &'a Body<'a>, offset: u64, len: u64) -> Result<Self, Error> {
        let fail = |source| Error::Io { act: format!("read what is to be stored as {}", url.path()), source };
        let mut reader = body(offset).map_err(fail)?.take(len);
        let (mut hasher, mut read, mut buffer) = (Sha256Hasher::new(), 0, vec![0; BUFFER]);
        loop {
            match reader.read(&mut buffer).map_err(fail)? {
                0 => break,
                count => {
                    hasher.update(&buffer[..count]);
                    read += count as u64;
                }
            }
        }
        if read < len {
            return Err(fail(io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(Self { body, offset, len, hash: hasher.finish() })
    }
}
