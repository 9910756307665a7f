//! Which trace a request belongs to, and the ids of its spans. Pure.

use std::fmt;

use drover_api::BuildRequest;
use jiff::Timestamp;
use kube::ResourceExt as _;
use ring::digest::{SHA256, digest};

use super::{Span, Value};

/// Names the span that caused a request, as W3C's Trace Context has it in the header of the same name.
pub const TRACEPARENT: &str = "drover.build/traceparent";

/// Longest annotation that is looked at. Version 00 has 55 bytes; later versions may append to that.
const MAX_TRACEPARENT: usize = 256;
/// Bytes of version 00.
const TRACEPARENT_LEN: usize = 55;

/// Never all zeros, which means "none".
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TraceId(pub [u8; 16]);

/// Never all zeros, which means "none".
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SpanId(pub [u8; 8]);

/// A request's place among traces.
#[derive(Clone, PartialEq, Debug)]
pub struct Context {
    trace: TraceId,
    /// The span that the request's own is a child of, and whether its trace is kept.
    remote: Option<(SpanId, bool)>,
    uid: String,
    namespace: String,
    name: String,
}

impl Context {
    /// Of the annotation [`TRACEPARENT`] if that is one; otherwise of the uid.
    pub fn of(request: &BuildRequest) -> Self {
        let uid = request.uid().unwrap_or_default();
        let named = request.annotations().get(TRACEPARENT).and_then(|text| parse(text));
        Self {
            trace: named.map_or_else(|| TraceId(prefix(uid.as_bytes())), |(trace, ..)| trace),
            remote: named.map(|(_, parent, is_sampled)| (parent, is_sampled)),
            namespace: request.namespace().unwrap_or_default(),
            name: request.name_any(),
            uid,
        }
    }

    pub fn trace(&self) -> TraceId {
        self.trace
    }

    /// The id of the span with this name, and with these numbers if there are several.
    pub fn id(&self, name: &str, numbers: &[i128]) -> SpanId {
        let mut text = format!("{}/{name}", self.uid);
        for number in numbers {
            text += &format!("/{number}");
        }
        SpanId(prefix(text.as_bytes()))
    }

    /// The span of the whole request, which all others are below.
    pub fn root(&self, start: Timestamp, end: Timestamp) -> Span {
        Span {
            parent: self.remote.map(|(parent, _)| parent),
            has_remote_parent: self.remote.is_some(),
            ..self.span("request", &[], self.id("request", &[]), start, end)
        }
    }

    /// Any other. An end before the start, as where a clock was set back, is moved to the start.
    pub fn span(
        &self,
        name: &'static str,
        numbers: &[i128],
        parent: SpanId,
        start: Timestamp,
        end: Timestamp,
    ) -> Span {
        Span {
            name,
            trace: self.trace,
            id: self.id(name, numbers),
            parent: Some(parent),
            has_remote_parent: false,
            is_sampled: self.remote.map(|(_, is_sampled)| is_sampled),
            start,
            end: end.max(start),
            error: None,
            attributes: vec![
                ("k8s.namespace.name", Value::from(&*self.namespace)),
                ("drover.request", Value::from(&*self.name)),
            ],
        }
    }
}

impl fmt::Debug for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for SpanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The begin of the text's SHA-256. One that is all zeros will not be met, and is not an id.
fn prefix<const N: usize>(text: &[u8]) -> [u8; N] {
    let mut id = [0; N];
    for (to, from) in id.iter_mut().zip(digest(&SHA256, text).as_ref()) {
        *to = *from;
    }
    if id == [0; N] { [1; N] } else { id }
}

/// `VERSION-TRACE-PARENT-FLAGS` in small hexadecimal digits: trace, parent, and whether the trace is kept. Anybody who may make
/// requests may write anything here.
fn parse(text: &str) -> Option<(TraceId, SpanId, bool)> {
    let text = text.as_bytes();
    let (head, rest) = text.split_at_checked(TRACEPARENT_LEN)?;
    if text.len() > MAX_TRACEPARENT || [2, 35, 52].iter().any(|dash| head[*dash] != b'-') {
        return None;
    }
    let [version] = hex(&head[..2])?;
    let is_known = match version {
        0 => rest.is_empty(),
        0xff => false,
        _ => rest.is_empty() || rest[0] == b'-',
    };
    let (trace, parent) = (hex::<16>(&head[3..35])?, hex::<8>(&head[36..52])?);
    let [flags] = hex(&head[53..])?;
    let is_one = is_known && trace != [0; 16] && parent != [0; 8];
    is_one.then_some((TraceId(trace), SpanId(parent), flags & 1 == 1))
}

/// `digits` are twice as many as bytes, or it is None.
fn hex<const N: usize>(digits: &[u8]) -> Option<[u8; N]> {
    let digit = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    if digits.len() != 2 * N {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn request(annotation: Option<&str>) -> BuildRequest {
        let mut request = BuildRequest::new("hello", Default::default());
        request.metadata.namespace = Some("ci".into());
        request.metadata.uid = Some("3f1d".into());
        let annotation = annotation.map(|text| (TRACEPARENT.to_owned(), text.to_owned()));
        request.metadata.annotations = Some(annotation.into_iter().collect());
        request
    }

    /// Another process, and another version of Drover, must come to the same: `printf 3f1d | sha256sum`.
    #[test]
    fn ids_follow_from_the_uid_alone() {
        let context = Context::of(&request(None));
        assert_eq!(context.trace(), TraceId(prefix(b"3f1d")));
        assert_eq!(context.id("attempt", &[2]), SpanId(prefix(b"3f1d/attempt/2")));
        assert_eq!(format!("{:?}", TraceId(prefix(b"abc"))), "ba7816bf8f01cfea414140de5dae2223");
        let (start, end) = (Timestamp::UNIX_EPOCH, Timestamp::UNIX_EPOCH);
        let root = context.root(start, end);
        assert_eq!((root.parent, root.has_remote_parent, root.is_sampled), (None, false, None));
        let mut other = request(None);
        other.metadata.uid = Some("3f1e".into());
        assert_ne!(Context::of(&other).trace(), context.trace());
        let ids = [context.id("attempt", &[1]), context.id("wait", &[1]), context.id("attempt", &[2])];
        assert!(ids.iter().enumerate().all(|(at, id)| !ids[..at].contains(id)));
    }

    #[test]
    fn a_traceparent_gives_trace_parent_and_whether_it_is_kept() {
        let context = Context::of(&request(Some(GOOD)));
        assert_eq!(format!("{:?}", context.trace()), "0af7651916cd43dd8448eb211c80319c");
        let root = context.root(Timestamp::UNIX_EPOCH, Timestamp::UNIX_EPOCH);
        assert_eq!(format!("{:?}", root.parent.unwrap()), "b7ad6b7169203331");
        assert_eq!((root.has_remote_parent, root.is_sampled), (true, Some(true)));
        // Two requests of one trace do not share spans.
        assert_eq!(root.id, Context::of(&request(None)).id("request", &[]));
        let dropped = GOOD.replace("-01", "-00");
        assert!(!parse(&dropped).unwrap().2);
        // A later version, with something behind it.
        let later = format!("01{}", &GOOD[2..]);
        assert_eq!(parse(&later), parse(GOOD));
        assert_eq!(parse(&format!("{later}-more")), parse(GOOD));
    }

    #[test]
    fn what_is_no_traceparent_is_as_if_it_were_not_there() {
        let long = format!("01{}-{}", &GOOD[2..], "x".repeat(MAX_TRACEPARENT));
        let bad = [
            "",
            "00",
            &GOOD[..54],
            &format!("{GOOD}-more"),
            &format!("01{}more", &GOOD[2..]),
            &format!("ff{}", &GOOD[2..]),
            &GOOD.to_uppercase(),
            &GOOD.replace('-', "_"),
            &GOOD.replace("0af7651916cd43dd8448eb211c80319c", &"0".repeat(32)),
            &GOOD.replace("b7ad6b7169203331", &"0".repeat(16)),
            &GOOD.replace('b', "g"),
            // As many bytes, cut within a character.
            &format!("{}é", &GOOD[..54]),
            &"é".repeat(40),
            &long,
        ];
        let without = Context::of(&request(None));
        for text in bad {
            assert_eq!(Context::of(&request(Some(text))), without, "{text:?}");
        }
    }
}
