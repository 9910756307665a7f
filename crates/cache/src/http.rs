//! Binary caches over HTTP: GET, HEAD and PUT of named files (Nix: http-binary-cache-store.cc, filetransfer.cc).
//!
//! Requests are sent again after failures that may pass, with growing pauses. A body that breaks off is taken up
//! where it stopped. No timeout is over a whole transfer, only over its standing still.

mod body;

use std::io::{self, Read};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use reqwest::blocking::{Body, Client, RequestBuilder, Response};
use reqwest::header::{CONTENT_ENCODING, CONTENT_TYPE, RETRY_AFTER};
use reqwest::{StatusCode, Url};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use crate::binary::{BinaryCache, Files};
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
    client: Client,
    /// Ends in a slash.
    base: Url,
    attempts: u32,
    stall_timeout: Duration,
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
    let tls = tls(options, base.scheme() == "https").map_err(fail)?;
    let client = Client::builder()
        .user_agent(concat!("drover/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(options.connect_timeout)
        // In the blocking client: for the answer to begin, and for each piece of its body.
        .timeout(options.stall_timeout)
        .tls_backend_preconfigured(tls)
        .http2_initial_stream_window_size(STREAM_WINDOW)
        .http2_initial_connection_window_size(CONNECTION_WINDOW)
        .build()
        .map_err(|error| fail(error.to_string()))?;
    let server =
        Server { client, base, attempts: options.attempts.max(1), stall_timeout: options.stall_timeout };
    Ok(BinaryCache::new(Http(Arc::new(server)), options))
}

/// A cache URL without the settings that Nix puts into its query. Others are refused: they could matter.
pub(crate) fn without_parameters(url: &str) -> Result<&str, Error> {
    let Some((base, query)) = url.split_once('?') else { return Ok(url) };
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let key = pair.split_once('=').map_or(pair, |(key, _)| key);
        if !PARAMETERS.contains(&key) {
            return Err(Error::Url { url: redacted(url), why: format!("parameter {key:?} is not known") });
        }
    }
    Ok(base)
}

/// Whether a status may be another one next time.
pub(crate) fn may_pass(status: u16) -> bool {
    matches!(status, 408 | 425 | 429 | 500 | 502 | 503 | 504)
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
        let response = self.0.send("look for", &url, &|| Ok(self.0.client.head(url.clone())))?;
        match response.status() {
            status if status.is_success() => Ok(true),
            // A server that does not know HEAD gets the file once more.
            StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED => Ok(false),
            status if is_missing(status) => Ok(false),
            status => Err(status_error("look for", &url, status)),
        }
    }

    fn put(
        &self,
        name: &str,
        content_type: &str,
        size: u64,
        body: &dyn Fn() -> io::Result<Box<dyn Read + Send>>,
    ) -> Result<(), Error> {
        let url = self.0.file(name)?;
        // Unlike the client's, this one is over the whole request.
        let timeout = self.0.stall_timeout + Duration::from_secs(size / SLOWEST_UPLOAD);
        let response = self.0.send("store", &url, &|| {
            let body = Body::sized(body()?, size);
            let request = self.0.client.put(url.clone()).timeout(timeout);
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
        let response = self.0.send("fetch", &url, &|| Ok(self.0.client.get(url.clone())))?;
        let status = response.status();
        if is_missing(status) {
            return Ok(None);
        }
        if status != StatusCode::OK {
            return Err(status_error("fetch", &url, status));
        }
        let encoding = response.headers().get(CONTENT_ENCODING).map(|value| value.to_str().unwrap_or("?"));
        let shown = || redacted(url.as_str());
        let encoding = compression::content_encoding(encoding.unwrap_or("")).ok_or_else(|| Error::Read {
            url: shown(),
            source: io::Error::other(format!("its Content-Encoding {encoding:?} is not supported")),
        })?;
        let body = body::Resuming::new(self.0.clone(), url.clone(), response);
        match compression::decoder(encoding, Box::new(body)) {
            Some(decoder) => Ok(Some(decoder.map_err(|source| Error::Read { url: shown(), source })?)),
            None => Err(Error::Compression { url: shown(), compression: encoding }),
        }
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

    /// Sends until there is an answer that counts, or no attempt is left.
    fn send(
        &self,
        act: &'static str,
        url: &Url,
        request: &dyn Fn() -> io::Result<RequestBuilder>,
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
}

/// Not there, as caches say it: object stores answer 403 where listing is forbidden.
fn is_missing(status: StatusCode) -> bool {
    matches!(status, StatusCode::NOT_FOUND | StatusCode::FORBIDDEN | StatusCode::GONE)
}

fn is_passing(error: &reqwest::Error) -> bool {
    !error.is_builder() && !error.is_redirect()
}

fn status_error(act: &'static str, url: &Url, status: StatusCode) -> Error {
    Error::Status { act, url: redacted(url.as_str()), status: status.as_u16() }
}

/// After failure number `attempt`.
fn pause(attempt: u32) -> Duration {
    FIRST_PAUSE.saturating_mul(1 << (attempt - 1).min(16)).min(LONGEST_PAUSE)
}

/// What the server asks for, in its simple form of seconds, within reason.
fn retry_after(response: &Response) -> Duration {
    let seconds = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
    Duration::from_secs(seconds.unwrap_or(0)).min(LONGEST_PAUSE)
}

/// For messages: without user, password and query, which may be secrets.
fn redacted(url: &str) -> String {
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

/// TLS by ring, whatever provider the process has as its default, or none.
fn tls(options: &CacheOptions, needed: bool) -> Result<rustls::ClientConfig, String> {
    let mut roots = rustls::RootCertStore::empty();
    let system = rustls_native_certs::load_native_certs();
    roots.add_parsable_certificates(system.certs);
    if let Some(path) = &options.certificates {
        let fail = |error: &dyn std::fmt::Display| {
            format!("cannot read certificates from {}: {error}", path.display())
        };
        for certificate in CertificateDer::pem_file_iter(path).map_err(|error| fail(&error))? {
            let certificate = certificate.map_err(|error| fail(&error))?;
            roots.add(certificate).map_err(|error| fail(&error))?;
        }
    }
    if needed && roots.is_empty() {
        return Err(
            "no certificate authorities are known here; install them, or name a PEM file of them in \
                    SSL_CERT_FILE"
                .into(),
        );
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

#[cfg(test)]
mod tests;
