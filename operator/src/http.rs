//! `/healthz`, `/readyz` and `/metrics`, over plain HTTP.
//!
//! Owns the listener and the three answers. It knows nothing of builds: what is to be shown comes from
//! [`crate::metrics::Metrics`].

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::CONTENT_TYPE;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;

use crate::error::Error;
use crate::metrics::Metrics;

/// The text format's name (OpenMetrics 1.0).
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// A client that sends no whole request head in this time is cut off.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// Serves until the process ends.
pub async fn serve(address: SocketAddr, metrics: Arc<Metrics>) -> Result<Infallible, Error> {
    let fail = |source| Error::File { act: "listen on", path: address.to_string().into(), source };
    let listener = TcpListener::bind(address).await.map_err(fail)?;
    let address = listener.local_addr().map_err(fail)?;
    tracing::info!(%address, "serving /healthz, /readyz and /metrics");
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Out of file descriptors, most likely: give others time to return theirs.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let metrics = metrics.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let response = answer(&request, &metrics);
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

fn answer(request: &Request<Incoming>, metrics: &Metrics) -> Response<Full<Bytes>> {
    let (status, content_type, body) = page(request.uri().path(), metrics);
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(content_type));
    response
}

fn page(path: &str, metrics: &Metrics) -> (StatusCode, &'static str, String) {
    const TEXT: &str = "text/plain; charset=utf-8";
    match path {
        "/healthz" => (StatusCode::OK, TEXT, "ok\n".into()),
        "/readyz" if metrics.is_ready() => (StatusCode::OK, TEXT, "ok\n".into()),
        "/readyz" => (
            StatusCode::SERVICE_UNAVAILABLE,
            TEXT,
            "the first list of build requests and pods has not come in yet\n".into(),
        ),
        "/metrics" => (StatusCode::OK, OPENMETRICS, metrics.render()),
        _ => (StatusCode::NOT_FOUND, TEXT, "there are /healthz, /readyz and /metrics\n".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_only_when_the_caches_are_filled() {
        let metrics = Metrics::new();
        assert_eq!(page("/readyz", &metrics).0, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(page("/healthz", &metrics).0, StatusCode::OK);
        metrics.set_ready(true);
        assert_eq!(page("/readyz", &metrics).0, StatusCode::OK);
        assert_eq!(page("/other", &metrics).0, StatusCode::NOT_FOUND);
        assert!(page("/metrics", &metrics).2.ends_with("# EOF\n"));
    }
}
