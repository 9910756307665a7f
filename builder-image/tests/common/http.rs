//! A server on the loopback interface that answers as a test says, by HTTP or HTTPS, and remembers what it was asked.

use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::thread;

use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

/// What a server does with a request.
#[derive(Clone)]
pub(crate) enum Reply {
    Status(u16),
    Body(Vec<u8>),
    /// Announces all of it and sends so many bytes.
    Broken(Vec<u8>, usize),
    /// Sends so many bytes and then nothing, until the client is gone.
    Stalled(Vec<u8>, usize),
    Redirect(String),
}

pub(crate) struct Server {
    pub(crate) url: String,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Server {
    /// Answers the request for a path that is the n-th one of all, from 0 on.
    pub(crate) fn start(
        address: &str,
        tls: Option<Arc<rustls::ServerConfig>>,
        reply: impl Fn(&str, usize) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind((address, 0)).unwrap();
        let scheme = if tls.is_some() { "https" } else { "http" };
        let url = format!("{scheme}://{}", listener.local_addr().unwrap());
        let requests = Arc::<Mutex<Vec<String>>>::default();
        let (log, reply) = (Arc::clone(&requests), Arc::new(reply));
        // Ends with the process: nothing waits for it.
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (log, reply, tls) = (Arc::clone(&log), Arc::clone(&reply), tls.clone());
                thread::spawn(move || match tls {
                    None => serve(stream, &log, &*reply),
                    Some(config) => {
                        let connection = rustls::ServerConnection::new(config).unwrap();
                        serve(rustls::StreamOwned::new(connection, stream), &log, &*reply);
                    }
                });
            }
        });
        Self { url, requests }
    }

    /// One body for every path.
    pub(crate) fn of(body: &[u8]) -> Self {
        let body = body.to_vec();
        Self::start("127.0.0.1", None, move |_, _| Reply::Body(body.clone()))
    }

    /// The heads of all requests so far, in lower case.
    pub(crate) fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

fn serve(stream: impl Read + Write, log: &Mutex<Vec<String>>, reply: &dyn Fn(&str, usize) -> Reply) {
    let mut stream = BufReader::new(stream);
    let mut head = String::new();
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        if line.trim_end().is_empty() {
            break;
        }
        head.push_str(&line);
    }
    let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
    let number = {
        let mut log = log.lock().unwrap();
        log.push(head.to_lowercase());
        log.len() - 1
    };
    let (status, headers, body, sent) = match reply(&path, number) {
        Reply::Status(status) => (status, String::new(), Vec::new(), 0),
        Reply::Redirect(to) => (302, format!("location: {to}\r\n"), Vec::new(), 0),
        Reply::Body(body) => (200, String::new(), body, usize::MAX),
        Reply::Broken(body, at) => (200, String::new(), body, at),
        Reply::Stalled(body, at) => {
            let _ = write!(stream.get_mut(), "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
            let _ = stream.get_mut().write_all(&body[..at]).and_then(|()| stream.get_mut().flush());
            let _gone = stream.read_to_end(&mut Vec::new());
            return;
        }
    };
    let length = body.len();
    let _ = write!(
        stream.get_mut(),
        "HTTP/1.1 {status} As Told\r\ncontent-length: {length}\r\nconnection: close\r\n{headers}\r\n"
    );
    let _ = stream.get_mut().write_all(&body[..sent.min(length)]);
    let _ = stream.get_mut().flush();
}

/// A certificate authority of the test's own, as PEM, and a server that it vouches for: 127.0.0.1.
pub(crate) fn authority() -> (String, Arc<rustls::ServerConfig>) {
    let authority_key = rcgen::KeyPair::generate().unwrap();
    let mut parameters = rcgen::CertificateParams::new(Vec::new()).unwrap();
    parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let certificate = parameters.self_signed(&authority_key).unwrap();
    let authority = rcgen::Issuer::new(parameters, authority_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let server = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    let server = server.signed_by(&key, &authority).unwrap();
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![server.der().clone()], key)
        .unwrap();
    (certificate.pem(), Arc::new(config))
}
