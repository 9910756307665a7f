//! Which of its class's caches a builder fetches from by itself, and what it is told of them. Pure.

use std::net::IpAddr;

use drover_api::{ClassCache, FetchedBy};

/// Endings of names that are a cluster's or a machine's own.
const OWN_NAMES: [&str; 5] = [".svc", ".cluster.local", ".local", ".internal", ".localhost"];

/// The builder's options for these caches; none if it is to fetch from none. The URLs carry no parameters but
/// `trusted=true`, for a cache without keys, whose word is believed unsigned.
pub(super) fn options(caches: &[ClassCache]) -> Vec<String> {
    let mut urls: Vec<String> = Vec::new();
    let mut keys: Vec<&str> = Vec::new();
    for cache in caches {
        let Some(url) = fetched_from(cache) else { continue };
        urls.push(match cache.public_keys.is_empty() {
            true => format!("{url}?trusted=true"),
            false => url.to_owned(),
        });
        for key in &cache.public_keys {
            if !keys.contains(&key.as_str()) {
                keys.push(key);
            }
        }
    }
    if urls.is_empty() {
        return Vec::new();
    }
    let mut options = vec!["--substituters".to_owned(), urls.join(" ")];
    if !keys.is_empty() {
        // A key that one cache has is believed of another, too: it signs contents, not places.
        options.extend(["--trusted-public-keys".to_owned(), keys.join(" ")]);
    }
    options
}

/// The cache's URL without parameters, which are for whoever writes there; None if builders do not fetch from it.
fn fetched_from(cache: &ClassCache) -> Option<&str> {
    let (scheme, rest) = cache.url.split_once("://")?;
    let rest = rest.split('?').next().unwrap_or(rest);
    let authority = rest.split('/').next().unwrap_or(rest);
    // What a cache wants to see, no builder has; the URL is in the pod's specification.
    let secret = cache.credentials_secret_ref.is_some() || authority.contains('@');
    // The builder's list of URLs is divided by blanks.
    let plain = !rest.is_empty() && !rest.contains(char::is_whitespace) && !rest.contains('#');
    if secret || !plain || !matches!(scheme, "http" | "https") {
        return None;
    }
    let wanted = match cache.fetched_by {
        FetchedBy::Auto => is_public(host(authority)),
        FetchedBy::Builders => true,
        FetchedBy::Operator => false,
    };
    wanted.then(|| &cache.url[..scheme.len() + "://".len() + rest.len()])
}

/// Without port and brackets.
fn host(authority: &str) -> &str {
    match authority.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(rest),
        None => authority.split(':').next().unwrap_or(authority),
    }
}

/// Whether a host is one that a builder reaches where it reaches anything: the chart's policy, as it is without being told
/// otherwise, lets it reach public addresses only.
fn is_public(host: &str) -> bool {
    match host.parse() {
        Ok(IpAddr::V4(address)) => {
            let [first, second, ..] = address.octets();
            let shared = first == 100 && second & 0xc0 == 64;
            !(address.is_private() || address.is_loopback() || address.is_link_local() || shared)
        }
        Ok(IpAddr::V6(address)) => {
            !(address.is_loopback() || address.is_unique_local() || address.is_unicast_link_local())
        }
        Err(_) => {
            let name = host.trim_end_matches('.').to_ascii_lowercase();
            name.contains('.') && !OWN_NAMES.iter().any(|ending| name.ends_with(ending))
        }
    }
}

#[cfg(test)]
mod tests {
    use drover_api::SecretKeyRef;

    use super::*;

    fn cache(url: &str) -> ClassCache {
        ClassCache { url: url.into(), ..ClassCache::default() }
    }

    #[test]
    fn what_a_builder_is_told() {
        let signed = |url: &str, keys: &[&str]| ClassCache {
            public_keys: keys.iter().map(|key| (*key).to_owned()).collect(),
            ..cache(url)
        };
        let caches = [
            signed("https://a.example.org/cache?priority=3&trusted=true", &["a-1:x", "a-2:y"]),
            cache("http://b.example.org?compression=xz"),
            signed("https://c.example.org", &["a-1:x"]),
        ];
        assert_eq!(
            options(&caches),
            [
                "--substituters",
                "https://a.example.org/cache http://b.example.org?trusted=true https://c.example.org",
                "--trusted-public-keys",
                "a-1:x a-2:y",
            ]
        );
        assert_eq!(options(&caches[1..2]), ["--substituters", "http://b.example.org?trusted=true"]);
        assert!(options(&[]).is_empty());
    }

    #[test]
    fn what_wants_credentials_stays_with_the_operator() {
        let secret = Some(SecretKeyRef { name: "s".into(), key: None });
        for fetched_by in [FetchedBy::Auto, FetchedBy::Builders] {
            for url in ["https://me:hush@a.example.org", "https://me@a.example.org/x"] {
                assert!(options(&[ClassCache { fetched_by, ..cache(url) }]).is_empty(), "{url}");
            }
            let credentials_secret_ref = secret.clone();
            let private = ClassCache { fetched_by, credentials_secret_ref, ..cache("https://a.example.org") };
            assert!(options(&[private]).is_empty());
        }
    }

    #[test]
    fn what_builders_cannot_reach_is_not_asked_of_them() {
        for (url, auto, builders) in [
            ("https://cache.example.org", true, true),
            ("https://cache.example.org:8443/x", true, true),
            ("http://203.0.113.7", true, true),
            ("http://[2001:db8::7]:80", true, true),
            ("http://10.1.2.3", false, true),
            ("http://192.168.0.1:8080", false, true),
            ("http://169.254.1.1", false, true),
            ("http://100.64.0.1", false, true),
            ("http://127.0.0.1", false, true),
            ("http://[fd00::1]", false, true),
            ("http://cache", false, true),
            ("http://cache.tools.svc", false, true),
            ("http://cache.tools.svc.cluster.local:80/", false, true),
            ("file:///srv/cache", false, false),
            ("s3://bucket", false, false),
            ("http://a b", false, false),
            ("https://", false, false),
        ] {
            for (fetched_by, expected) in
                [(FetchedBy::Auto, auto), (FetchedBy::Builders, builders), (FetchedBy::Operator, false)]
            {
                let options = options(&[ClassCache { fetched_by, ..cache(url) }]);
                assert_eq!(!options.is_empty(), expected, "{url} {fetched_by:?}");
            }
        }
    }
}
