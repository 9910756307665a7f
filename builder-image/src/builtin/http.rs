//! One file by HTTP, as a stream: redirects, who we are to a host, what is worth another try (Nix: filetransfer.cc).

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use drover_nix::netrc::Netrc;
use reqwest::blocking::{Client, Response};
use reqwest::header::{LOCATION, RETRY_AFTER};
use reqwest::redirect::Policy;
use reqwest::{NoProxy, Proxy, Url};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use super::Job;

const MAX_REDIRECTS: usize = 10;
/// Nix: `connect-timeout` and `stalled-download-timeout`.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
const STALL_TIMEOUT: Duration = Duration::from_secs(300);
/// Longest pause that a server may ask for.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

pub(super) struct Http {
    client: Client,
    netrc: Netrc,
    /// Without any no server could be believed.
    authorities: usize,
}

/// Why there is no file.
pub(super) struct Failed {
    pub error: anyhow::Error,
    /// Another try may go better: not before so much time.
    pub again: Option<Duration>,
}

impl Http {
    pub(super) fn new(job: &Job) -> Result<Self> {
        let mut roots = rustls::RootCertStore::empty();
        let certificates = CertificateDer::pem_slice_iter(&job.certificates).collect::<Result<Vec<_>, _>>();
        let certificates =
            certificates.map_err(|error| anyhow!("the file of certificate authorities: {error}"))?;
        // Bundles hold old ones, too, that cannot be used and need not be.
        let (authorities, _unusable) = roots.add_parsable_certificates(certificates);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let mut client = Client::builder()
            .user_agent(concat!("drover/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            // In the blocking client: for the answer to begin, and for each piece of its body.
            .timeout(STALL_TIMEOUT)
            // Followed here, since each host has its own password.
            .redirect(Policy::none())
            .tls_backend_preconfigured(tls)
            .no_proxy();
        for proxy in proxies(&job.proxies)? {
            client = client.proxy(proxy);
        }
        Ok(Self { client: client.build()?, netrc: Netrc::parse(&job.netrc)?, authorities })
    }

    /// Opens what is at `url`, wherever that leads.
    pub(super) fn get(&self, url: &Url) -> Result<Response, Failed> {
        let mut at = url.clone();
        for _ in 0..=MAX_REDIRECTS {
            let response = self.get_one(&at, url)?;
            let status = response.status();
            if status.is_success() {
                return Ok(response);
            }
            if !status.is_redirection() {
                let again = may_pass(status.as_u16()).then(|| pause(&response));
                let error = anyhow!("the server answered {status}").context(whence(&at, url));
                return Err(Failed { error, again });
            }
            at = next(&at, &response).map_err(|error| Failed::forever(error.context(whence(&at, url))))?;
        }
        Err(Failed::forever(anyhow!("there are more than {MAX_REDIRECTS} redirects")))
    }

    fn get_one(&self, at: &Url, first: &Url) -> Result<Response, Failed> {
        if at.scheme() == "https" && self.authorities == 0 {
            return Err(Failed::forever(anyhow!(
                "no certificate authorities are known to the builder: give it a bundle by --ssl-cert-file"
            )));
        }
        let mut request = self.client.get(at.clone());
        // What was for an encrypted connection is not sent over a plain one because a server says so.
        let downgraded = first.scheme() == "https" && at.scheme() != "https";
        if at.username().is_empty()
            && !downgraded
            && let Some((user, password)) = at.host_str().and_then(|host| self.netrc.find(host))
        {
            request = request.basic_auth(user, Some(password));
        }
        request.send().map_err(|error| {
            let again = (!error.is_builder()).then_some(Duration::ZERO);
            let advice = if is_untrusted(&error) {
                "; if it should be trusted, add its authority to the bundle that the builder has by --ssl-cert-file"
            } else {
                ""
            };
            // A certificate will be no better in a second.
            let again = again.filter(|_| advice.is_empty());
            let error = anyhow::Error::from(error.without_url());
            let error = anyhow!("{}{advice}", crate::error::one_line(&error)).context(whence(at, first));
            Failed { error, again }
        })
    }
}

impl Failed {
    pub(super) fn forever(error: anyhow::Error) -> Self {
        Self { error, again: None }
    }

    pub(super) fn passing(error: anyhow::Error) -> Self {
        Self { error, again: Some(Duration::ZERO) }
    }
}

/// The body of an answer, which remembers whether it was the network that failed, not who reads from it.
pub(super) struct Body<'a, R> {
    inner: R,
    pub broke: &'a std::cell::Cell<bool>,
}

impl<'a, R> Body<'a, R> {
    pub(super) fn new(inner: R, broke: &'a std::cell::Cell<bool>) -> Self {
        Self { inner, broke }
    }
}

impl<R: Read> Read for Body<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.inner.read(buffer).inspect_err(|error| {
            if error.kind() != io::ErrorKind::Interrupted {
                self.broke.set(true);
            }
        })
    }
}

/// For messages: without user, password and query, which may be secrets.
pub(super) fn shown(url: &Url) -> String {
    let mut url = url.clone();
    // Fails for URLs that cannot have any.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.set_query(None);
    url.into()
}

/// Where it went wrong, if that is not where everybody can see it.
fn whence(at: &Url, first: &Url) -> String {
    if at == first { "the transfer failed".into() } else { format!("the redirect to '{}' failed", shown(at)) }
}

fn next(at: &Url, response: &Response) -> Result<Url> {
    let status = response.status();
    let location =
        response.headers().get(LOCATION).with_context(|| format!("{status} without a location"))?;
    let location = location.to_str().context("its location is no text")?;
    let next = at.join(location).with_context(|| format!("its location {location:?} is no URL"))?;
    if !matches!(next.scheme(), "http" | "https") {
        bail!("it leads to a {} URL", next.scheme());
    }
    Ok(next)
}

/// Whether a status may be another one next time (Nix: filetransfer.cc; the same and 425).
fn may_pass(status: u16) -> bool {
    matches!(status, 408 | 425 | 429 | 500 | 502 | 503 | 504 | 520..=530)
}

/// What the server asks for, in its simple form of seconds, within reason.
fn pause(response: &Response) -> Duration {
    let seconds = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
    Duration::from_secs(seconds.unwrap_or(0)).min(LONGEST_PAUSE)
}

/// Whether the failure lies in the other side's certificate.
fn is_untrusted(error: &reqwest::Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(rustls::Error::InvalidCertificate(_)) = error.downcast_ref() {
            return true;
        }
        // An I/O error that holds another is not caused by that: it is that one, in its own words.
        let held = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        cause = match held {
            Some(held) => Some(held),
            None => error.source(),
        };
    }
    false
}

/// Proxies by the variables that curl knows.
fn proxies(variables: &BTreeMap<String, String>) -> Result<Vec<Proxy>> {
    let value = |names: &[&str]| {
        names
            .iter()
            .find_map(|name| variables.get(*name))
            .map(String::as_str)
            .filter(|value| !value.is_empty())
    };
    let except = value(&["no_proxy", "NO_PROXY"]).and_then(NoProxy::from_string);
    // Not HTTP_PROXY: servers that run programs for requests set variables of such names from headers.
    let [plain, encrypted, all] =
        [&["http_proxy"][..], &["https_proxy", "HTTPS_PROXY"], &["all_proxy", "ALL_PROXY"]].map(value);
    let made = [plain.map(Proxy::http), encrypted.map(Proxy::https), all.map(Proxy::all)];
    made.into_iter()
        .flatten()
        .map(|proxy| {
            let proxy =
                proxy.map_err(|error| anyhow!("one of the proxies is no URL: {}", error.without_url()))?;
            Ok(proxy.no_proxy(except.clone()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_in_urls_are_not_shown() {
        let url = "https://user:word@host.example/file?token=x".parse().unwrap();
        assert_eq!(shown(&url), "https://host.example/file");
        assert_eq!(whence(&url, &url), "the transfer failed");
        assert!(whence(&url, &"https://a.example".parse().unwrap()).contains("'https://host.example/file'"));
    }

    #[test]
    fn proxies_are_those_of_the_build() {
        let count = |pairs: &[(&str, &str)]| {
            proxies(&pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect())
                .map(|list| list.len())
        };
        assert_eq!(
            count(&[("http_proxy", "http://p:1"), ("all_proxy", "p:2"), ("https_proxy", "")]).unwrap(),
            2
        );
        assert_eq!(count(&[("HTTP_PROXY", "http://p:1"), ("no_proxy", "*")]).unwrap(), 0);
        assert!(count(&[("https_proxy", "http://")]).is_err());
    }

    #[test]
    fn which_answers_may_change() {
        assert!([408, 429, 500, 503, 522].into_iter().all(may_pass));
        assert!(![400, 401, 403, 404, 410, 501].into_iter().any(may_pass));
    }
}
