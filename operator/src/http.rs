//! `/healthz`, `/readyz` and `/metrics`, over plain HTTP.
//!
//! Owns the listener and the three answers. It knows nothing of builds: what is to be shown comes from
//! [`crate::metrics::Metrics`] and [`crate::health::Health`]. It has a thread and a runtime of its own, so that it can say that
//! the other one stands still.

use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::CONTENT_TYPE;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};

use crate::error::Error;
use crate::health::{Check, Health};
use crate::metrics::Metrics;

/// The text format's name (OpenMetrics 1.0).
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// A client that sends no whole request head in this time is cut off.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// What the pages show.
#[derive(Clone)]
pub struct Pages {
    pub metrics: Arc<Metrics>,
    pub health: Arc<Health>,
}

/// Serves until the process ends; listens already when this returns.
pub fn serve(address: SocketAddr, pages: Pages) -> Result<SocketAddr, Error> {
    let fail = |source| Error::File { act: "listen on", path: address.to_string().into(), source };
    let listener = TcpListener::bind(address).map_err(fail)?;
    listener.set_nonblocking(true).map_err(fail)?;
    let address = listener.local_addr().map_err(fail)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(fail)?;
    let listener = {
        // The caller may be in a runtime of its own, and cannot wait here.
        let _inside = runtime.enter();
        tokio::net::TcpListener::from_std(listener).map_err(fail)?
    };
    std::thread::Builder::new()
        .name("http".into())
        .spawn(move || runtime.block_on(accept(listener, pages)))
        .map_err(fail)?;
    tracing::info!(%address, "serving /healthz, /readyz and /metrics");
    Ok(address)
}

async fn accept(listener: tokio::net::TcpListener, pages: Pages) -> Infallible {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Out of file descriptors, most likely: give others time to return theirs.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let pages = pages.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let response = answer(&request, &pages);
                async move { Ok::<_, Infallible>(response) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .serve_connection(TokioIo::new(stream), service);
            if let Err(error) = connection.await {
                tracing::debug!(error = &error as &dyn std::error::Error, "HTTP connection ended early");
            }
        });
    }
}

fn answer(request: &Request<Incoming>, pages: &Pages) -> Response<Full<Bytes>> {
    let query = request.uri().query().unwrap_or_default();
    let (status, content_type, body) = page(request.uri().path(), query, pages);
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(content_type));
    response
}

fn page(path: &str, query: &str, pages: &Pages) -> (StatusCode, &'static str, String) {
    const TEXT: &str = "text/plain; charset=utf-8";
    let now = Instant::now();
    let checked = |name: &str, checks: Vec<Check>| {
        let is_verbose = query.split('&').any(|word| word == "verbose" || word.starts_with("verbose="));
        let (status, text) = verdict(name, &checks, is_verbose);
        (status, TEXT, text)
    };
    match path {
        "/healthz" => checked("healthz", pages.health.live(now)),
        "/readyz" => checked("readyz", pages.health.ready(now)),
        "/metrics" => {
            pages.metrics.set_ready(pages.health.ready(now).iter().all(|check| check.result.is_ok()));
            (StatusCode::OK, OPENMETRICS, pages.metrics.render())
        }
        _ => (StatusCode::NOT_FOUND, TEXT, "there are /healthz, /readyz and /metrics\n".into()),
    }
}

/// In the form that Kubernetes' own components have (apiserver/pkg/server/healthz): a line for each check where it is asked for
/// or where one fails.
fn verdict(name: &str, checks: &[Check], is_verbose: bool) -> (StatusCode, String) {
    let is_well = checks.iter().all(|check| check.result.is_ok());
    if is_well && !is_verbose {
        return (StatusCode::OK, "ok\n".into());
    }
    let mut text = String::new();
    for Check { name, result } in checks {
        match result {
            Ok(()) => text.push_str(&format!("[+]{name} ok\n")),
            Err(why) => text.push_str(&format!("[-]{name} failed: {why}\n")),
        }
    }
    text.push_str(&format!("{name} check {}\n", if is_well { "passed" } else { "failed" }));
    (if is_well { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, text)
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpStream;

    use super::*;
    use crate::health::Loop;

    fn pages() -> Pages {
        Pages { metrics: Arc::new(Metrics::new()), health: Arc::new(Health::new()) }
    }

    #[test]
    fn each_check_has_its_line() {
        let pages = pages();
        let (status, _, text) = page("/readyz", "", &pages);
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(
            text,
            "[+]shutdown ok\n[-]lease failed: it has not been read yet\n[-]watches failed: they have not begun yet\n\
             readyz check failed\n"
        );
        pages.health.lease_seen();
        assert_eq!(page("/readyz", "", &pages), (StatusCode::OK, "text/plain; charset=utf-8", "ok\n".into()));
        let (status, _, text) = page("/readyz", "verbose", &pages);
        assert_eq!(
            (status, text.as_str()),
            (StatusCode::OK, "[+]shutdown ok\n[+]lease ok\nreadyz check passed\n")
        );
        assert_eq!(page("/other", "", &pages).0, StatusCode::NOT_FOUND);
        assert!(page("/metrics", "", &pages).2.ends_with("# EOF\n"));
    }

    /// Every thread of the runtime is blocked, and the page says so.
    #[test]
    fn a_runtime_that_stands_still_is_told_of() {
        let pages = pages();
        let address = serve("127.0.0.1:0".parse().unwrap(), pages.clone()).unwrap();
        let get = || {
            let mut connection = TcpStream::connect(address).unwrap();
            write!(connection, "GET /healthz?verbose HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                .unwrap();
            let mut answer = String::new();
            connection.read_to_string(&mut answer).unwrap();
            answer
        };
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (blocked, block) = std::sync::mpsc::channel::<()>();
        runtime.spawn(async move { block.recv() });
        runtime.spawn(pages.health.clone().beat_runtime());
        // It answers, whatever that runtime does.
        assert!(get().starts_with("HTTP/1.1 200"), "{}", get());
        // As if it had been blocked for longer than the patience with it.
        let begun = Instant::now().checked_sub(Duration::from_secs(31)).unwrap();
        pages.health.beat_at(Loop::Runtime, begun);
        let answer = get();
        assert!(
            answer.starts_with("HTTP/1.1 503") && answer.contains("[-]runtime failed: no sign of life"),
            "{answer}"
        );
        drop(blocked);
        // It goes on by itself.
        let limit = Instant::now() + Duration::from_secs(30);
        while !get().starts_with("HTTP/1.1 200") {
            assert!(Instant::now() < limit, "{}", get());
        }
    }
}
