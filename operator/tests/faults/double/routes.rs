//! From a request's address to what it is about.

use std::collections::BTreeMap;

use hyper::http::{Method, Uri};

use super::Failure;
use super::store::{KINDS, Key, Kind, Part};

/// What a request wants.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Verb {
    Get,
    List,
    Watch,
    Create,
    Replace,
    Patch,
    Delete,
}

impl Verb {
    pub(crate) fn writes(self) -> bool {
        matches!(self, Self::Create | Self::Replace | Self::Patch | Self::Delete)
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Route {
    pub(crate) verb: Verb,
    pub(crate) kind: &'static Kind,
    /// None: cluster-scoped, or all namespaces.
    pub(crate) namespace: Option<String>,
    pub(crate) name: Option<String>,
    pub(crate) part: Part,
    pub(crate) query: BTreeMap<String, String>,
}

impl Route {
    pub(crate) fn parse(method: &Method, uri: &Uri) -> Result<Self, Failure> {
        let unknown = || Failure::not_modelled(&format!("{method} {uri}"));
        let query = uri.query().map(query).unwrap_or_default();
        let segments: Vec<&str> = uri.path().split('/').filter(|segment| !segment.is_empty()).collect();
        let (group, version, rest) = match segments.as_slice() {
            ["api", version, rest @ ..] => ("", *version, rest),
            ["apis", group, version, rest @ ..] => (*group, *version, rest),
            _ => return Err(unknown()),
        };
        let (namespace, rest) = match rest {
            // `namespaces/x` alone is the namespace itself.
            ["namespaces", namespace, rest @ ..] if !rest.is_empty() && *rest != ["status"] => {
                (Some((*namespace).to_owned()), rest)
            }
            rest => (None, rest),
        };
        let (plural, name, part) = match rest {
            [plural] => (*plural, None, Part::Main),
            [plural, name] => (*plural, Some((*name).to_owned()), Part::Main),
            [plural, name, "status"] => (*plural, Some((*name).to_owned()), Part::Status),
            _ => return Err(unknown()),
        };
        let mut kinds = KINDS.iter();
        let kind = kinds
            .find(|kind| (kind.group, kind.version, kind.plural) == (group, version, plural))
            .ok_or_else(unknown)?;
        let watches = query.get("watch").is_some_and(|watch| watch == "true" || watch == "1");
        let verb = match (method.as_str(), &name) {
            ("GET", Some(_)) => Verb::Get,
            ("GET", None) if watches => Verb::Watch,
            ("GET", None) => Verb::List,
            ("POST", None) => Verb::Create,
            ("PUT", Some(_)) => Verb::Replace,
            ("PATCH", Some(_)) => Verb::Patch,
            ("DELETE", Some(_)) => Verb::Delete,
            _ => return Err(unknown()),
        };
        Ok(Self { verb, kind, namespace, name, part, query })
    }

    /// The object that it is about, if it is about one.
    pub(crate) fn key(&self) -> Option<Key> {
        let namespace = self.namespace.clone().unwrap_or_default();
        Some(Key { kind: self.kind, namespace, name: self.name.clone()? })
    }

    pub(crate) fn query(&self, name: &str) -> Option<&str> {
        self.query.get(name).map(String::as_str)
    }
}

/// For people: `patch buildrequests/hello status`.
impl std::fmt::Display for Route {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", format!("{:?}", self.verb).to_lowercase(), self.kind.plural)?;
        if let Some(name) = &self.name {
            write!(f, "/{name}")?;
        }
        if self.part == Part::Status {
            write!(f, " status")?;
        }
        Ok(())
    }
}

fn query(text: &str) -> BTreeMap<String, String> {
    let pair = |pair: &str| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decode(key), decode(value))
    };
    text.split('&').filter(|part| !part.is_empty()).map(pair).collect()
}

/// Percent and plus, as forms are written.
fn decode(text: &str) -> String {
    let mut out = Vec::new();
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        out.push(match byte {
            b'+' => b' ',
            b'%' => {
                let mut digit = || bytes.next().and_then(|byte| char::from(byte).to_digit(16)).unwrap_or(0);
                (digit() * 16 + digit()) as u8
            }
            byte => byte,
        });
    }
    String::from_utf8_lossy(&out).into_owned()
}
