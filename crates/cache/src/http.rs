//! Binary caches over HTTP: GET, HEAD and PUT of named files (Nix: http-binary-cache-store.cc, filetransfer.cc).
//!
//! Requests are sent again after failures that may pass, with growing pauses. A body that breaks off is taken up
//! where it stopped. No timeout is over a whole transfer, only over its standing still. Redirects are followed;
//! credentials are for the cache's own origin and go nowhere else.

mod authorization;
mod body;
pub(crate) mod transport;

use std::io::Read;
use std::sync::Arc;

use reqwest::blocking::{self, RequestBuilder, Response};
use reqwest::header::CONTENT_TYPE;
use reqwest::{Method, StatusCode, Url, redirect};

use self::authorization::Authorization;
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
    authorization: Authorization,
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
        Transport::new(options, base.scheme() == "https", redirect::Policy::none()).map_err(fail)?;
    let authorization = Authorization::new(&mut base, &options.credentials).map_err(fail)?;
    let server = Server { transport: Arc::new(transport), authorization, base };
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
            Ok(mut parsed) if matches!(parsed.scheme(), "http" | "https") => {
                // Nobody is told by a cache who to be.
                let _ = authorization::take_user(&mut parsed);
                self.fetch(parsed)
            }
            _ => {
                let why = "only http:// and https:// URLs are followed".into();
                let source = drover_nix::Error::NarInfo { field: "URL", why };
                Err(Error::Format { url: redacted(url), source })
            }
        }
    }

    fn exists(&self, name: &str) -> Result<bool, Error> {
        let (server, url) = (&self.0, self.0.file(name)?);
        let response = server.send("look for", Method::HEAD, &url)?;
        match response.status() {
            status if status.is_success() => Ok(true),
            // A server that does not know HEAD gets the file once more.
            StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED => Ok(false),
            _ if server.is_missing(&response) => Ok(false),
            _ => Err(server.status_error("look for", &url, &response)),
        }
    }

    fn put(&self, name: &str, content_type: &str, size: u64, body: &Body<'_>) -> Result<(), Error> {
        let (server, url) = (&self.0, self.0.file(name)?);
        let timeout = server.transport.upload_timeout(size);
        let response = server.transport.follow("store", &Method::PUT, &url, &|at| {
            let body = blocking::Body::sized(body(0)?, size);
            let request = server.request(Method::PUT, at).timeout(timeout);
            Ok(request.header(CONTENT_TYPE, content_type).body(body))
        })?;
        match response.status() {
            status if status.is_success() => Ok(()),
            _ => Err(server.status_error("store", &url, &response)),
        }
    }
}

impl Http {
    fn fetch(&self, url: Url) -> Result<Option<Box<dyn Read + Send>>, Error> {
        let server = Arc::clone(&self.0);
        let response = server.send("fetch", Method::GET, &url)?;
        if server.is_missing(&response) {
            return Ok(None);
        }
        if response.status() != StatusCode::OK {
            return Err(server.status_error("fetch", &url, &response));
        }
        let transport = Arc::clone(&server.transport);
        let again = move |at: &Url| Ok(server.request(Method::GET, at));
        transport.body_from(&url, response, Box::new(again)).map(Some)
    }
}

impl Server {
    fn request(&self, method: Method, url: &Url) -> RequestBuilder {
        self.authorization.of(self.transport.client.request(method, url.clone()), url)
    }

    /// Without a body.
    fn send(&self, act: &'static str, method: Method, url: &Url) -> Result<Response, Error> {
        self.transport.follow(act, &method, url, &|at| Ok(self.request(method.clone(), at)))
    }

    /// The URL of a file, which must not lead elsewhere. The name may have a query.
    fn file(&self, name: &str) -> Result<Url, Error> {
        let url = self
            .base
            .join(name)
            .ok()
            .filter(|url| url.origin() == self.base.origin() && url.path().starts_with(self.base.path()));
        url.ok_or_else(|| {
            let why = format!("{name:?} leads out of the cache");
            let source = drover_nix::Error::NarInfo { field: "URL", why };
            Error::Format { url: redacted(self.base.as_str()), source }
        })
    }

    /// Not there, as caches say it: object stores answer 403 where listing is forbidden. From one that was shown
    /// credentials it means what it says.
    fn is_missing(&self, response: &Response) -> bool {
        match response.status() {
            StatusCode::NOT_FOUND | StatusCode::GONE => true,
            StatusCode::FORBIDDEN => !self.authorization.is_for(response.url()),
            _ => false,
        }
    }

    fn status_error(&self, act: &'static str, url: &Url, response: &Response) -> Error {
        let (status, url) = (response.status(), redacted(url.as_str()));
        let shown = self.authorization.is_for(response.url());
        match status {
            StatusCode::UNAUTHORIZED => Error::Denied { act, url, status: status.as_u16(), shown },
            StatusCode::FORBIDDEN if shown => Error::Denied { act, url, status: status.as_u16(), shown },
            _ => Error::Status { act, url, status: status.as_u16() },
        }
    }
}

#[cfg(test)]
mod tests;
