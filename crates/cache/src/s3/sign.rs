//! AWS Signature Version 4, as S3 wants it (Amazon S3 API Reference, "Authenticating Requests"): in a header, or in a URL
//! that somebody else may use for a while.
//!
//! Pure but for the time, which the caller gives. S3's own rules: paths are percent-encoded once, and the payload's hash
//! is a header of its own.

use std::fmt::Write as _;
use std::time::Duration;

use drover_nix::Sha256;
use jiff::Timestamp;
use reqwest::{Method, Url};
use ring::hmac;

use crate::Secret;

const ALGORITHM: &str = "AWS4-HMAC-SHA256";
const SERVICE: &str = "s3";
/// Where the payload is not signed: S3 takes it over any connection.
const UNSIGNED: &str = "UNSIGNED-PAYLOAD";

/// Who signs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Keys {
    pub(crate) id: String,
    pub(crate) secret: Secret,
    /// Of keys that were lent for a while.
    pub(crate) token: Option<Secret>,
}

/// What of a request is signed. The URL's path and query must be encoded by [`encode`] already.
pub(crate) struct Unsigned<'a> {
    pub(crate) method: Method,
    pub(crate) url: &'a Url,
    /// Names in lower case. `host` is added, and what signing itself brings.
    pub(crate) headers: Vec<(&'static str, String)>,
}

impl Unsigned<'_> {
    /// The headers to send: those given, and those that sign them. `payload` is the hash of the body.
    pub(crate) fn sign(
        mut self,
        keys: &Keys,
        region: &str,
        payload: Sha256,
        now: Timestamp,
    ) -> Vec<(&'static str, String)> {
        let payload = payload.to_hex();
        self.headers.push(("x-amz-content-sha256", payload.clone()));
        self.headers.push(("x-amz-date", date(now)));
        if let Some(token) = &keys.token {
            self.headers.push(("x-amz-security-token", token.expose().to_owned()));
        }
        let query = canonical_query(self.url);
        let (canonical, names) = self.canonical(&query, &payload);
        let scope = scope(region, now);
        let signature = signature(keys, region, now, &canonical);
        let authorization =
            format!("{ALGORITHM} Credential={}/{scope},SignedHeaders={names},Signature={signature}", keys.id);
        self.headers.push(("authorization", authorization));
        self.headers
    }

    /// A URL by which anybody can make this request until `valid` is over (a week at most), with any payload. The
    /// headers must be sent with it as they are.
    pub(crate) fn presign(self, keys: &Keys, region: &str, valid: Duration, now: Timestamp) -> Url {
        let mut url = self.url.clone();
        let names = self.names();
        let mut add = |name: &str, value: &str| {
            let query = url.query().map_or_else(String::new, |query| format!("{query}&"));
            url.set_query(Some(&format!("{query}{}={}", encode(name, false), encode(value, false))));
        };
        add("X-Amz-Algorithm", ALGORITHM);
        add("X-Amz-Credential", &format!("{}/{}", keys.id, scope(region, now)));
        add("X-Amz-Date", &date(now));
        add("X-Amz-Expires", &valid.as_secs().to_string());
        if let Some(token) = &keys.token {
            add("X-Amz-Security-Token", token.expose());
        }
        add("X-Amz-SignedHeaders", &names);
        let (canonical, _) = self.canonical(&canonical_query(&url), UNSIGNED);
        let signature = signature(keys, region, now, &canonical);
        let query = url.query().unwrap_or_default();
        let signed = format!("{query}&X-Amz-Signature={signature}");
        url.set_query(Some(&signed));
        url
    }

    /// The canonical request, and the names of the headers in it.
    fn canonical(&self, query: &str, payload: &str) -> (String, String) {
        let host = [("host", host(self.url))];
        let mut headers: Vec<&(&str, String)> = self.headers.iter().chain(&host).collect();
        headers.sort_unstable_by_key(|(name, _)| *name);
        let names = self.names();
        let mut text = format!("{}\n{}\n{query}\n", self.method, self.url.path());
        for (name, value) in headers {
            // Cannot fail: it writes to a string.
            let _ = writeln!(text, "{name}:{}", value.split_whitespace().collect::<Vec<_>>().join(" "));
        }
        let _ = write!(text, "\n{names}\n{payload}");
        (text, names)
    }

    fn names(&self) -> String {
        let mut names: Vec<&str> = self.headers.iter().map(|(name, _)| *name).chain(["host"]).collect();
        names.sort_unstable();
        names.join(";")
    }
}

/// Percent-encodes everything but letters, digits and `-._~`; and slashes, where `path` says so.
pub(crate) fn encode(text: &str, path: bool) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                encoded.push(char::from(byte));
            }
            b'/' if path => encoded.push('/'),
            _ => {
                // Cannot fail: it writes to a string.
                let _ = write!(encoded, "%{byte:02X}");
            }
        }
    }
    encoded
}

fn canonical_query(url: &Url) -> String {
    let pairs = url.query().unwrap_or_default().split('&').filter(|pair| !pair.is_empty());
    let mut pairs: Vec<_> = pairs.map(|pair| pair.split_once('=').unwrap_or((pair, ""))).collect();
    pairs.sort_unstable();
    pairs.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join("&")
}

/// As HTTP clients send it: without the scheme's own port.
fn host(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

fn signature(keys: &Keys, region: &str, now: Timestamp, canonical: &str) -> String {
    let hash = Sha256::of(canonical.as_bytes()).to_hex();
    let to_sign = format!("{ALGORITHM}\n{}\n{}\n{hash}", date(now), scope(region, now));
    let step = |key: &[u8], text: &str| hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text.as_bytes());
    let mut key = step(format!("AWS4{}", keys.secret.expose()).as_bytes(), &day(now));
    for part in [region, SERVICE, "aws4_request"] {
        key = step(key.as_ref(), part);
    }
    hex(step(key.as_ref(), &to_sign).as_ref())
}

fn scope(region: &str, now: Timestamp) -> String {
    format!("{}/{region}/{SERVICE}/aws4_request", day(now))
}

fn date(now: Timestamp) -> String {
    now.strftime("%Y%m%dT%H%M%SZ").to_string()
}

fn day(now: Timestamp) -> String {
    now.strftime("%Y%m%d").to_string()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of the examples in Amazon's documentation.
    fn keys() -> Keys {
        Keys {
            id: "AKIAIOSFODNN7EXAMPLE".into(),
            secret: Secret::new("wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"),
            token: None,
        }
    }

    fn then() -> Timestamp {
        "2013-05-24T00:00:00Z".parse().unwrap()
    }

    fn signature_of(method: Method, rest: &str, headers: &[(&'static str, &str)], body: &[u8]) -> String {
        let url = format!("https://examplebucket.s3.amazonaws.com/{rest}").parse().unwrap();
        let headers = headers.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
        let signed =
            Unsigned { method, url: &url, headers }.sign(&keys(), "us-east-1", Sha256::of(body), then());
        let (_, authorization) = signed.into_iter().find(|(name, _)| *name == "authorization").unwrap();
        authorization.split_once("Signature=").unwrap().1.to_owned()
    }

    /// Amazon S3 API Reference, "Examples: Signature Calculations" of the header-based authentication.
    #[test]
    fn the_four_examples_of_amazon() {
        assert_eq!(
            signature_of(Method::GET, "test.txt", &[("range", "bytes=0-9")], b""),
            "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
        );
        let headers =
            [("date", "Fri, 24 May 2013 00:00:00 GMT"), ("x-amz-storage-class", "REDUCED_REDUNDANCY")];
        assert_eq!(
            signature_of(Method::PUT, &encode("test$file.text", true), &headers, b"Welcome to Amazon S3."),
            "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd"
        );
        assert_eq!(
            signature_of(Method::GET, "?lifecycle", &[], b""),
            "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543"
        );
        assert_eq!(
            signature_of(Method::GET, "?prefix=J&max-keys=2", &[], b""),
            "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"
        );
    }

    /// The same reference, "Authenticating Requests: Using Query Parameters".
    #[test]
    fn the_presigned_example_of_amazon() {
        let url: Url = "https://examplebucket.s3.amazonaws.com/test.txt".parse().unwrap();
        let request = Unsigned { method: Method::GET, url: &url, headers: Vec::new() };
        let signed = request.presign(&keys(), "us-east-1", Duration::from_secs(86400), then());
        let signature = signed.query_pairs().find(|(name, _)| name == "X-Amz-Signature").unwrap().1;
        assert_eq!(signature, "aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404");
        assert!(
            signed.as_str().starts_with("https://examplebucket.s3.amazonaws.com/test.txt?X-Amz-Algorithm")
        );
    }

    #[test]
    fn what_is_encoded() {
        assert_eq!(encode("log/gtk+-3.0?x=1 ü~", true), "log/gtk%2B-3.0%3Fx%3D1%20%C3%BC~");
        assert_eq!(encode("a/b", false), "a%2Fb");
        // The URL's parser leaves it as it is.
        let url: Url = format!("http://h/{}", encode("gtk+-3.0'(x)", true)).parse().unwrap();
        assert_eq!(url.path(), "/gtk%2B-3.0%27%28x%29");
    }
}
