//! Binary caches over HTTP: GET, HEAD and PUT of named files (Nix: http-binary-cache-store.cc, filetransfer.cc).
//!
//! Requests are sent again after failures that may pass, with growing pauses. A body that breaks off is taken up
//! where it stopped. No timeout is over a whole transfer, only over its standing still.

mod body;
pub(crate) mod transport;

use std::io::Read;
use std::sync::Arc;

use reqwest::blocking;
use reqwest::header::CONTENT_TYPE;
use reqwest::{StatusCode, Url, redirect};

use self::transport::{Transport, redacted};
use crate::binary::{BinaryCache, Body, Files};
use crate::{CacheOptions, Error};

/// Settings that Nix takes from a cache URL's query. They say how Nix itself writes and what it prefers; a reader can
/// do without.
const PARAMETERS: [&str; 18] = [
    "compression",
    "compression-level",
    "index-debug-info",
    "local-nar-cache",
    "log-compression",
    "ls-compression",
    "narinfo-compression",
    "parallel-compression",
    "path-info-cache-size",
    "priority",
    "secret-key",
    "secret-keys",
    "store",
    "system-features",
    "trusted",
    "want-mass-query",
    "write-nar-listing",
    "write-realisation",
];

#[derive(Clone)]
pub(crate) struct Http(Arc<Server>);

struct Server {
    transport: Arc<Transport>,
    /// Ends in a slash.
    base: Url,
}

pub(crate) fn open(url: &str, options: &CacheOptions) -> Result<BinaryCache<Http>, Error> {
    let fail = |why: String| Error::Url { url: redacted(url), why };
    let mut base: Url = without_parameters(url)?.parse().map_err(|error| fail(format!("{error}")))?;
    if base.host_str().is_none() || base.fragment().is_some() {
        return Err(fail("expected http(s)://HOST[:PORT][/PATH]".into()));
    }
    if !base.path().ends_with('/') {
        base.set_path(&format!("{}/", base.path()));
    }
    let transport =
        Transport::new(options, base.scheme() == "https", redirect::Policy::default()).map_err(fail)?;
    let server = Server { transport: Arc::new(transport), base };
    Ok(BinaryCache::new(Http(Arc::new(server)), options))
}

/// A cache URL without the settings that Nix puts into its query. Others are refused: they could matter.
pub(crate) fn without_parameters(url: &str) -> Result<&str, Error> {
    let Some((base, query)) = url.split_once('?') else { return Ok(url) };
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let key = pair.split_once('=').map_or(pair, |(key, _)| key);
        if !is_parameter(key) {
            return Err(Error::Url { url: redacted(url), why: format!("parameter {key:?} is not known") });
        }
    }
    Ok(base)
}

/// Whether Nix knows this setting of any binary cache.
pub(crate) fn is_parameter(name: &str) -> bool {
    PARAMETERS.contains(&name)
}

impl Files for Http {
    fn url(&self, name: Option<&str>) -> String {
        match name {
            None => redacted(self.0.base.as_str()).trim_end_matches('/').to_owned(),
            Some(name) => self.0.file(name).map_or_else(|_| name.to_owned(), |url| redacted(url.as_str())),
        }
    }

    fn open(&self, name: &str) -> Result<Option<Box<dyn Read + Send>>, Error> {
        let url = self.0.file(name)?;
        self.fetch(url)
    }

    fn open_url(&self, url: &str) -> Result<Option<Box<dyn Read + Send>>, Error> {
        match url.parse::<Url>() {
            Ok(parsed) if matches!(parsed.scheme(), "http" | "https") => self.fetch(parsed),
            _ => {
                let why = "only http:// and https:// URLs are followed".into();
                let source = drover_nix::Error::NarInfo { field: "URL", why };
                Err(Error::Format { url: redacted(url), source })
            }
        }
    }

    fn exists(&self, name: &str) -> Result<bool, Error> {
        let url = self.0.file(name)?;
        let response =
            self.0.transport.send("look for", &url, &|| Ok(self.0.transport.client.head(url.clone())))?;
        match response.status() {
            status if status.is_success() => Ok(true),
            // A server that does not know HEAD gets the file once more.
            StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED => Ok(false),
            status if is_missing(status) => Ok(false),
            status => Err(status_error("look for", &url, status)),
        }
    }

    fn put(&self, name: &str, content_type: &str, size: u64, body: &Body<'_>) -> Result<(), Error> {
        let url = self.0.file(name)?;
        let transport = &self.0.transport;
        let response = transport.send("store", &url, &|| {
            let body = blocking::Body::sized(body(0)?, size);
            let request = transport.client.put(url.clone()).timeout(transport.upload_timeout(size));
            Ok(request.header(CONTENT_TYPE, content_type).body(body))
        })?;
        match response.status() {
            status if status.is_success() => Ok(()),
            status => Err(status_error("store", &url, status)),
        }
    }
}

impl Http {
    fn fetch(&self, url: Url) -> Result<Option<Box<dyn Read + Send>>, Error> {
        let (client, target) = (self.0.transport.client.clone(), url.clone());
        let get = move || Ok(client.get(target.clone()));
        let response = self.0.transport.send("fetch", &url, &get)?;
        let status = response.status();
        if is_missing(status) {
            return Ok(None);
        }
        if status != StatusCode::OK {
            return Err(status_error("fetch", &url, status));
        }
        self.0.transport.body(&url, response, Box::new(get)).map(Some)
    }
}

impl Server {
    /// The URL of a file, which must not lead elsewhere. The name may have a query.
    fn file(&self, name: &str) -> Result<Url, Error> {
        let url = self.base.join(name).ok().filter(|url| {
            (url.scheme(), url.host(), url.port()) == (self.base.scheme(), self.base.host(), self.base.port())
                && url.path().starts_with(self.base.path())
        });
        url.ok_or_else(|| {
            let why = format!("{name:?} leads out of the cache");
            let source = drover_nix::Error::NarInfo { field: "URL", why };
            Error::Format { url: redacted(self.base.as_str()), source }
        })
    }
}

/// Not there, as caches say it: object stores answer 403 where listing is forbidden.
fn is_missing(status: StatusCode) -> bool {
    matches!(status, StatusCode::NOT_FOUND | StatusCode::FORBIDDEN | StatusCode::GONE)
}

fn status_error(act: &'static str, url: &Url, status: StatusCode) -> Error {
    Error::Status { act, url: redacted(url.as_str()), status: status.as_u16() }
}

#[cfg(test)]
mod tests;
