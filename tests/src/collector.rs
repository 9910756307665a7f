//! A collector of traces, as far as that takes: HTTP on the loopback, and OpenTelemetry's own messages.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use prost::Message as _;

/// What an operator may take to send something.
const LIMIT: Duration = Duration::from_secs(60);

/// Takes every request, until the test's process ends.
pub struct Collector {
    pub address: SocketAddr,
    received: Receiver<Received>,
}

/// One request as it came.
pub struct Received {
    /// Method, path and version.
    pub line: String,
    /// By their names in small letters.
    pub headers: HashMap<String, String>,
    pub body: Vec<u8>,
}

impl Collector {
    /// Answers with these status codes, one a request, and with 200 afterwards.
    pub fn start(answers: Vec<u16>) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        let (say, received) = channel();
        let mut answers = answers.into_iter();
        thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                let status = answers.next().unwrap_or(200);
                // A connection that breaks is the client's to notice.
                let _ = serve(&connection, status, &say);
            }
        });
        Ok(Self { address, received })
    }

    /// The next request.
    pub fn next(&self) -> Result<Received> {
        self.received.recv_timeout(LIMIT).context("the collector received nothing")
    }

    /// All that have come by now.
    pub fn all(&self) -> Vec<Received> {
        self.received.try_iter().collect()
    }
}

impl Received {
    pub fn message(&self) -> Result<ExportTraceServiceRequest> {
        Ok(ExportTraceServiceRequest::decode(&*self.body)?)
    }

    pub fn spans(&self) -> Result<Vec<Span>> {
        let scopes = self.message()?.resource_spans.into_iter().flat_map(|of| of.scope_spans);
        Ok(scopes.flat_map(|of| of.spans).collect())
    }
}

/// The spans below this one, of which those without a parent have none, each as `shown` has it and indented below its own parent.
pub fn tree(spans: &[Span], parent: &[u8], shown: &dyn Fn(&Span) -> String) -> String {
    let mut below: Vec<&Span> = spans.iter().filter(|span| span.parent_span_id == parent).collect();
    below.sort_by_key(|span| (span.start_time_unix_nano, span.end_time_unix_nano));
    let mut text = String::new();
    for span in below {
        text += &format!("{}\n", shown(span));
        for line in tree(spans, &span.span_id, shown).lines() {
            text += &format!("  {line}\n");
        }
    }
    text
}

/// What failed, if something did.
pub fn error(span: &Span) -> Option<&str> {
    let status = span.status.as_ref().filter(|status| status.code() == StatusCode::Error);
    status.map(|status| &*status.message)
}

/// An attribute that is a text.
pub fn text<'a>(attributes: &'a [KeyValue], name: &str) -> Option<&'a str> {
    let found = attributes.iter().find(|attribute| attribute.key == name)?;
    match &found.value {
        Some(AnyValue { value: Some(Value::StringValue(text)) }) => Some(text),
        _ => None,
    }
}

/// One request a connection.
fn serve(connection: &TcpStream, status: u16, say: &Sender<Received>) -> Result<()> {
    let mut reader = BufReader::new(connection);
    let mut head = Vec::new();
    for line in reader.by_ref().lines() {
        match line? {
            line if line.is_empty() => break,
            line => head.push(line),
        }
    }
    let mut lines = head.into_iter();
    let line = lines.next().context("an empty request")?;
    let pair =
        |line: String| line.split_once(": ").map(|(name, value)| (name.to_lowercase(), value.to_owned()));
    let headers: HashMap<String, String> = lines.filter_map(pair).collect();
    let length = headers.get("content-length").context("a request without a length")?;
    let mut body = vec![0; length.parse()?];
    reader.read_exact(&mut body)?;
    // The test may be over.
    let _ = say.send(Received { line, headers, body });
    let mut connection = connection;
    Ok(write!(connection, "HTTP/1.1 {status} x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")?)
}
