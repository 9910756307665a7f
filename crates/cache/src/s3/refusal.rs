//! What an S3 service says when it does not do what was asked (Amazon S3 API Reference, "Error responses").

use std::io::Read as _;

use reqwest::blocking::Response;

use crate::Error;
use crate::http::transport::{may_pass, redacted};

/// Most bytes of an answer in XML that are read.
pub(crate) const MAX_XML: u64 = 1 << 20;
/// Most characters of a service's sentence that are repeated.
const MAX_MESSAGE: usize = 300;

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Refusal {
    pub(crate) status: u16,
    /// Empty where the service did not say: answers to HEAD have no body.
    pub(crate) code: String,
    message: String,
    /// Where the bucket is, if that is what is wrong.
    region: Option<String>,
}

impl Refusal {
    /// Reads the answer. Nothing is wrong with one that says nothing.
    pub(crate) fn of(response: Response) -> Self {
        let status = response.status().as_u16();
        let header = response.headers().get("x-amz-bucket-region");
        let region = header.and_then(|value| value.to_str().ok()).map(plain);
        Self { region, ..Self::read(status, &text(response)) }
    }

    /// From the body of an answer that may be a refusal in spite of its status.
    pub(crate) fn read(status: u16, xml: &str) -> Self {
        let get = |name| element(xml, name).map(|text| plain(&text)).unwrap_or_default();
        let region = Some(get("Region")).filter(|region| !region.is_empty());
        Self { status, code: get("Code"), message: get("Message"), region }
    }

    /// The object is not there. Who may not list a bucket is told that access is denied (Nix takes it so, too); who is
    /// not known at all, or has no such bucket, must hear that.
    pub(crate) fn is_missing(&self) -> bool {
        match self.code.as_str() {
            "NoSuchKey" => true,
            "AccessDenied" => self.status == 403,
            "" => matches!(self.status, 403 | 404 | 410),
            _ => false,
        }
    }

    /// Whether the same request may be answered in another way in a moment, by its code: the status says it for most.
    pub(crate) fn may_pass(&self) -> bool {
        const CODES: [&str; 6] = [
            "InternalError",
            "OperationAborted",
            "RequestTimeout",
            "ServiceUnavailable",
            "SlowDown",
            "Throttling",
        ];
        may_pass(self.status) || CODES.contains(&self.code.as_str())
    }

    pub(crate) fn into_error(mut self, act: &'static str, url: &str) -> Error {
        if self.code.is_empty() && self.region.is_none() {
            return Error::Status { act, url: redacted(url), status: self.status };
        }
        if self.message.is_empty() {
            self.message = "it does not say more".to_owned();
        }
        let hint = match (self.code.as_str(), &self.region) {
            ("RequestTimeTooSkewed", _) => "set this machine's clock".to_owned(),
            ("NoSuchBucket", _) => "check the bucket's name, region= and endpoint=".to_owned(),
            ("AccessDenied" | "AllAccessDisabled", _) => {
                "give credentials that may do this in this bucket".to_owned()
            }
            (
                "InvalidAccessKeyId"
                | "SignatureDoesNotMatch"
                | "InvalidToken"
                | "ExpiredToken"
                | "TokenRefreshRequired"
                | "InvalidSecurity",
                _,
            ) => "check the credentials for this cache".to_owned(),
            (_, Some(region)) => format!("the bucket is in another region: give region={region}"),
            ("PermanentRedirect" | "TemporaryRedirect" | "AuthorizationHeaderMalformed", None) => {
                "check region= and endpoint=".to_owned()
            }
            _ => String::new(),
        };
        let message = self.message.trim_end_matches('.');
        let why = if hint.is_empty() { message.to_owned() } else { format!("{message}; {hint}") };
        let transient = self.may_pass();
        Error::S3 { act, url: redacted(url), status: self.status, code: self.code, why, transient }
    }
}

/// The text of an answer, as far as it is read.
pub(crate) fn text(response: Response) -> String {
    let mut bytes = Vec::new();
    // What breaks off says as much as came.
    let _ = response.take(MAX_XML).read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The text of the first element of this name. Enough for S3's answers, whose elements of interest have nothing in
/// them but text.
pub(crate) fn element(xml: &str, name: &str) -> Option<String> {
    let (_, rest) = xml.split_once(&format!("<{name}>"))?;
    let (text, _) = rest.split_once(&format!("</{name}>"))?;
    let entities =
        [("&lt;", "<"), ("&gt;", ">"), ("&quot;", "\""), ("&#34;", "\""), ("&apos;", "'"), ("&amp;", "&")];
    Some(entities.iter().fold(text.to_owned(), |text, (entity, plain)| text.replace(entity, plain)))
}

/// One short line.
fn plain(text: &str) -> String {
    let printable = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    printable.take(MAX_MESSAGE).collect::<String>().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(status: u16, code: &str) -> Refusal {
        let xml = format!(
            "<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>It says &quot;no&quot;.\n</Message></Error>"
        );
        Refusal::read(status, &xml)
    }

    #[test]
    fn what_is_missing_and_what_is_wrong() {
        for (status, code, missing) in [
            (404, "NoSuchKey", true),
            (403, "AccessDenied", true),
            (404, "", true),
            (403, "", true),
            (404, "NoSuchBucket", false),
            (403, "SignatureDoesNotMatch", false),
            (403, "InvalidAccessKeyId", false),
            (403, "RequestTimeTooSkewed", false),
            (403, "ExpiredToken", false),
            (401, "", false),
            (400, "AuthorizationHeaderMalformed", false),
        ] {
            assert_eq!(refusal(status, code).is_missing(), missing, "{status} {code}");
        }
        for (status, code, passes) in [
            (503, "SlowDown", true),
            (400, "RequestTimeout", true),
            (200, "InternalError", true),
            (403, "AccessDenied", false),
        ] {
            assert_eq!(refusal(status, code).may_pass(), passes, "{status} {code}");
            assert_eq!(refusal(status, code).into_error("fetch", "http://h/x").is_transient(), passes);
        }
    }

    #[test]
    fn sentences() {
        let said = |refusal: Refusal| refusal.into_error("fetch", "http://h/b/x?uploadId=hush").to_string();
        assert_eq!(
            said(refusal(403, "SignatureDoesNotMatch")),
            "cannot fetch http://h/b/x: the S3 service says SignatureDoesNotMatch (403): It says \"no\"; check the \
             credentials for this cache"
        );
        let xml = "<Error><Code>AuthorizationHeaderMalformed</Code><Region>eu-west-2</Region></Error>";
        assert!(said(Refusal::read(400, xml)).ends_with("give region=eu-west-2"));
        assert!(said(Refusal::read(500, "<html>")).contains("the server says 500"));
        let long = format!("<Code>X</Code><Message>{}</Message>", "x".repeat(10_000));
        assert!(said(Refusal::read(400, &long)).len() < 500);
    }
}
