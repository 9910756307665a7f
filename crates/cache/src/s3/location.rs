//! S3 URLs as Nix writes them (Nix: s3-url.cc, s3-binary-cache-store.hh): `s3://BUCKET[/PREFIX][?SETTING=VALUE&…]`.
//!
//! Pure: where objects are and how they are written follows from the URL alone.

use reqwest::Url;

use super::sign::encode;
use crate::Error;
use crate::http;

/// Nix's default.
const REGION: &str = "us-east-1";
/// S3 takes no smaller parts, but for the last one of an object, and no larger ones.
const MIN_PART: u64 = 5 << 20;
const MAX_PART: u64 = 5 << 30;
const MAX_PARTS: u64 = 10_000;
/// Parts of this size, and of files that are larger: what is lost when one breaks off is sent again in seconds.
const PART: u64 = 64 << 20;
/// Longest that a bucket's name can be.
const MAX_BUCKET: usize = 63;

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Location {
    pub(crate) bucket: String,
    /// Of the first object: everything before its name, ends in a slash, encoded as it is signed.
    pub(crate) base: Url,
    pub(crate) region: String,
    /// Where keys are looked up, if the URL says so.
    pub(crate) profile: Option<String>,
    pub(crate) storage_class: Option<String>,
    pub(crate) parts: Parts,
    /// For people: bucket, prefix, and what leads there.
    shown: String,
}

/// How large files are written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Parts {
    /// Files that are larger than this are written in parts.
    threshold: u64,
    size: u64,
}

impl Location {
    pub(crate) fn parse(url: &str) -> Result<Self, Error> {
        Self::read(url).map_err(|why| Error::Url { url: http::transport::redacted(url), why })
    }

    fn read(url: &str) -> Result<Self, String> {
        let usage = || "expected s3://BUCKET[/PREFIX][?region=…&endpoint=…]".to_owned();
        let rest = url.strip_prefix("s3://").ok_or_else(usage)?;
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
        let prefix = prefix.trim_end_matches('/');
        let letter = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
        if bucket.is_empty() || bucket.len() > MAX_BUCKET || bucket == ".." || !bucket.bytes().all(letter) {
            return Err(format!("what follows s3:// cannot be the name of a bucket; {}", usage()));
        }
        if !prefix.is_empty() && prefix.split('/').any(|part| matches!(part, "" | "." | "..")) {
            return Err("the path below the bucket has parts that are empty, . or ..".into());
        }
        let settings = settings(query)?;
        let get = |name: &str| settings.iter().rev().find(|(key, _)| key == name).map(|(_, value)| value);
        let region = get("region").map_or(REGION, String::as_str);
        if region.is_empty() || !region.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
            return Err(format!("region={region:?} is no region"));
        }
        let scheme = get("scheme").map_or("https", String::as_str);
        let endpoint = get("endpoint").filter(|endpoint| !endpoint.is_empty());
        let style = get("addressing-style").map_or("auto", String::as_str);
        let base = base(bucket, region, scheme, endpoint.map(String::as_str), style, prefix)?;
        let mut shown = format!("s3://{place}").trim_end_matches('/').to_owned();
        let mut separator = '?';
        for name in ["endpoint", "scheme", "region"] {
            if let Some(value) = get(name) {
                shown += &format!("{separator}{name}={}", http::transport::redacted(value));
                separator = '&';
            }
        }
        Ok(Self {
            bucket: bucket.to_owned(),
            base,
            region: region.to_owned(),
            profile: get("profile").filter(|profile| !profile.is_empty()).cloned(),
            storage_class: get("storage-class").filter(|class| !class.is_empty()).cloned(),
            parts: Parts::read(&get)?,
            shown,
        })
    }

    /// Of one object. Names are plain text.
    pub(crate) fn object(&self, name: &str) -> Url {
        let mut url = self.base.clone();
        url.set_path(&format!("{}{}", self.base.path(), encode(name, true)));
        url
    }

    /// The same with a query, in whose values anything may be.
    pub(crate) fn query(url: &Url, query: &[(&str, &str)]) -> Url {
        let pairs: Vec<String> =
            query.iter().map(|(name, value)| format!("{name}={}", encode(value, false))).collect();
        let mut url = url.clone();
        url.set_query(Some(&pairs.join("&")));
        url
    }

    pub(crate) fn shown(&self, name: Option<&str>) -> String {
        match name {
            None => self.shown.clone(),
            Some(name) => {
                let place = self.shown.split('?').next().unwrap_or_default();
                format!("{place}/{name}")
            }
        }
    }
}

impl Parts {
    fn read<'a>(get: &impl Fn(&str) -> Option<&'a String>) -> Result<Self, String> {
        let number = |name: &str| match get(name) {
            None => Ok(None),
            Some(value) => {
                value.parse().map(Some).map_err(|_| format!("{name}={value:?} is no number of bytes"))
            }
        };
        let chunk = number("multipart-chunk-size")?.or(number("buffer-size")?);
        let size = chunk.unwrap_or(PART);
        if !(MIN_PART..=MAX_PART).contains(&size) {
            return Err(format!("multipart-chunk-size={size} is not between {MIN_PART} and {MAX_PART}"));
        }
        let threshold = match get("multipart-upload").map(String::as_str) {
            // What S3 takes in one request.
            Some("false" | "0") => MAX_PART,
            None | Some("true" | "1") => number("multipart-threshold")?.unwrap_or(size).min(MAX_PART),
            Some(other) => return Err(format!("multipart-upload={other:?} is neither true nor false")),
        };
        Ok(Self { threshold, size })
    }

    /// The size of each part but the last of a file of `size` bytes; None if it is written in one piece.
    pub(crate) fn of(self, size: u64) -> Option<u64> {
        (size > self.threshold).then(|| self.size.max(size.div_ceil(MAX_PARTS)))
    }
}

fn base(
    bucket: &str,
    region: &str,
    scheme: &str,
    endpoint: Option<&str>,
    style: &str,
    prefix: &str,
) -> Result<Url, String> {
    // A bucket with dots would need a certificate for several levels, which nobody has.
    let may = !bucket.contains('.');
    let in_host = match (style, endpoint) {
        ("auto", None) => may,
        ("auto", Some(_)) | ("path", _) => false,
        ("virtual", _) if may => true,
        ("virtual", _) => return Err("a bucket whose name has dots takes addressing-style=path".into()),
        _ => return Err(format!("addressing-style={style:?} is none of auto, path, virtual")),
    };
    let text = match endpoint {
        None => format!("{scheme}://s3.{region}.amazonaws.com"),
        Some(url) if url.contains("://") => url.to_owned(),
        Some(host) => format!("{scheme}://{host}"),
    };
    let mut url: Url = text.parse().map_err(|error| format!("endpoint: {error}"))?;
    if !matches!(url.scheme(), "http" | "https") || url.query().is_some() || url.fragment().is_some() {
        return Err(
            "endpoint is HOST[:PORT] or http(s)://HOST[:PORT][/PATH], and scheme http or https".into()
        );
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("keys do not belong into the endpoint; give them as this cache's credentials".into());
    }
    let host = url.host_str().unwrap_or_default().to_owned();
    if in_host {
        url.set_host(Some(&format!("{bucket}.{host}"))).map_err(|error| format!("endpoint: {error}"))?;
    }
    let mut path = url.path().trim_end_matches('/').to_owned();
    for part in [(!in_host).then_some(bucket), (!prefix.is_empty()).then_some(prefix)].into_iter().flatten() {
        path += &format!("/{}", encode(part, true));
    }
    url.set_path(&format!("{path}/"));
    Ok(url)
}

/// The URL's settings, decoded. Those that neither Nix nor this program knows are refused: they could matter.
fn settings(query: &str) -> Result<Vec<(String, String)>, String> {
    const OWN: [&str; 10] = [
        "addressing-style",
        "buffer-size",
        "endpoint",
        "multipart-chunk-size",
        "multipart-threshold",
        "multipart-upload",
        "profile",
        "region",
        "scheme",
        "storage-class",
    ];
    let mut url: Url = "s3://bucket".parse().map_err(|error| format!("{error}"))?;
    // Nix decodes percent signs alone, forms also decode plus signs.
    url.set_query(Some(&query.replace('+', "%2B")));
    let pairs: Vec<_> = url.query_pairs().into_owned().filter(|(name, _)| !name.is_empty()).collect();
    match pairs.iter().find(|(name, _)| !OWN.contains(&name.as_str()) && !http::is_parameter(name)) {
        Some((name, _)) => Err(format!("parameter {name:?} is not known")),
        None => Ok(pairs),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(url: &str) -> String {
        Location::parse(url).unwrap().object("log/gtk+.drv").into()
    }

    /// Nix: src/libstore-tests/s3-url.cc has the same places for the same words.
    #[test]
    fn where_objects_are() {
        for (url, expected) in [
            ("s3://b", "https://b.s3.us-east-1.amazonaws.com/log/gtk%2B.drv"),
            ("s3://b/", "https://b.s3.us-east-1.amazonaws.com/log/gtk%2B.drv"),
            ("s3://b?region=eu-west-2&scheme=http", "http://b.s3.eu-west-2.amazonaws.com/log/gtk%2B.drv"),
            ("s3://b/a/c+d/", "https://b.s3.us-east-1.amazonaws.com/a/c%2Bd/log/gtk%2B.drv"),
            ("s3://my.b", "https://s3.us-east-1.amazonaws.com/my.b/log/gtk%2B.drv"),
            ("s3://b?addressing-style=path", "https://s3.us-east-1.amazonaws.com/b/log/gtk%2B.drv"),
            ("s3://b?endpoint=h.example:9000", "https://h.example:9000/b/log/gtk%2B.drv"),
            ("s3://b?endpoint=h.example&scheme=http", "http://h.example/b/log/gtk%2B.drv"),
            ("s3://b?endpoint=http://127.0.0.1:9000&scheme=https", "http://127.0.0.1:9000/b/log/gtk%2B.drv"),
            ("s3://b?endpoint=http%3A%2F%2Fh%2Fs3%2F", "http://h/s3/b/log/gtk%2B.drv"),
            ("s3://b?endpoint=h.example&addressing-style=virtual", "https://b.h.example/log/gtk%2B.drv"),
            ("s3://b/p?endpoint=http://h&priority=10", "http://h/b/p/log/gtk%2B.drv"),
        ] {
            assert_eq!(object(url), expected, "{url}");
        }
    }

    #[test]
    fn what_is_refused_and_what_is_shown() {
        for (url, says) in [
            ("s3://", "name of a bucket"),
            ("s3://a b", "name of a bucket"),
            ("s3://me:secret@b", "name of a bucket"),
            ("s3://b/../x", "empty, . or .."),
            ("s3://b?colour=secret", "\"colour\""),
            ("s3://b?region=x.y/z", "no region"),
            ("s3://b?endpoint=ftp://h", "endpoint is"),
            ("s3://b?scheme=ftp&endpoint=h", "endpoint is"),
            ("s3://b?endpoint=http://me:secret@h", "do not belong"),
            ("s3://b?addressing-style=odd", "none of auto"),
            ("s3://a.b?addressing-style=virtual", "dots"),
            ("s3://b?multipart-chunk-size=1000", "between"),
            ("s3://b?multipart-threshold=many", "no number"),
            ("s3://b?multipart-upload=perhaps", "neither"),
        ] {
            let error = Location::parse(url).unwrap_err().to_string();
            assert!(error.contains(says) && !error.contains("secret"), "{url}: {error}");
        }
        let location = Location::parse("s3://b/p/?profile=me&region=eu-west-2&endpoint=http://h:1").unwrap();
        assert_eq!(location.shown(None), "s3://b/p?endpoint=http://h:1/&region=eu-west-2");
        assert_eq!(location.shown(Some("x.narinfo")), "s3://b/p/x.narinfo");
        assert_eq!(location.profile.as_deref(), Some("me"));
        assert_eq!(Location::parse(&location.shown(None)).unwrap().base, location.base);
    }

    #[test]
    fn parts() {
        let of = |query: &str, size: u64| Location::parse(&format!("s3://b?{query}")).unwrap().parts.of(size);
        let mib = 1u64 << 20;
        assert_eq!(of("", 64 * mib), None);
        assert_eq!(of("", 64 * mib + 1), Some(64 * mib));
        assert_eq!(of("multipart-chunk-size=5242880", 6 * mib), Some(5 * mib));
        assert_eq!(of("buffer-size=5242880&multipart-threshold=10485760", 6 * mib), None);
        assert_eq!(of("multipart-upload=false", 1 << 32), None);
        assert_eq!(of("multipart-upload=false", 6 << 30), Some(64 * mib));
        // No more than 10,000 parts.
        let size = of("", 1 << 40).unwrap();
        assert!((1u64 << 40).div_ceil(size) <= MAX_PARTS && size <= MAX_PART);
    }
}
