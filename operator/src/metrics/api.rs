//! Counts what the operator asks of the API server: a tower layer of the kube client, inside the gate, so that what the gate
//! refuses is not counted.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use futures::FutureExt as _;
use hyper::{Method, Request, Response};
use kube::client::Body;
use tower::{Layer, Service};

use super::Metrics;
use super::table::OTHER;

/// Cheap to clone.
#[derive(Clone, Debug)]
pub struct Count(pub Arc<Metrics>);

impl<S> Layer<S> for Count {
    type Service = Counted<S>;

    fn layer(&self, inner: S) -> Counted<S> {
        Counted { metrics: self.0.clone(), inner }
    }
}

/// A client's service whose requests are counted.
#[derive(Clone, Debug)]
pub struct Counted<S> {
    metrics: Arc<Metrics>,
    inner: S,
}

impl<S, B> Service<Request<Body>> for Counted<S>
where
    S: Service<Request<Body>, Response = Response<B>>,
    S::Future: Send + 'static,
    S::Error: 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let verb = verb(request.method(), request.uri().path(), request.uri().query().unwrap_or_default());
        // One that is given up on the way, which the gate and time limits do, is counted as one without an answer.
        let pending = Pending { metrics: self.metrics.clone(), verb, begun: Instant::now(), code: None };
        let answer = self.inner.call(request);
        async move {
            // As a whole: the block would take the field that it writes, and nothing else.
            let mut pending = pending;
            let answer = answer.await;
            pending.code = answer.as_ref().ok().map(|answer| answer.status().as_u16());
            answer
        }
        .boxed()
    }
}

/// Counted when it goes.
struct Pending {
    metrics: Arc<Metrics>,
    verb: &'static str,
    begun: Instant,
    code: Option<u16>,
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.metrics.asked(self.verb, self.code, self.begun.elapsed());
    }
}

/// What the API server calls such a request (Kubernetes: staging/src/k8s.io/apiserver/pkg/endpoints/request/requestinfo.go).
fn verb(method: &Method, path: &str, query: &str) -> &'static str {
    match *method {
        Method::GET if query.split('&').any(|part| part == "watch=true" || part == "watch=1") => "watch",
        Method::GET if is_collection(path) => "list",
        Method::GET => "get",
        Method::POST => "create",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        _ => OTHER,
    }
}

/// `/api/VERSION/[namespaces/NAMESPACE/]KINDS` or `/apis/GROUP/VERSION/…`; a name behind it is one object.
fn is_collection(path: &str) -> bool {
    let mut parts = path.split('/').filter(|part| !part.is_empty());
    let skip = match parts.next() {
        Some("api") => 1,
        Some("apis") => 2,
        _ => return false,
    };
    matches!(parts.skip(skip).collect::<Vec<_>>().as_slice(), [_] | ["namespaces", _, _])
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use tower::{ServiceExt as _, service_fn};

    use super::*;

    #[test]
    fn verbs_are_those_of_the_audit_log() {
        let get = |uri: &str| {
            let (path, query) = uri.split_once('?').unwrap_or((uri, ""));
            verb(&Method::GET, path, query)
        };
        assert_eq!(get("/api/v1/namespaces/b/pods"), "list");
        assert_eq!(get("/api/v1/pods?limit=500"), "list");
        assert_eq!(get("/api/v1/namespaces/b/pods/p"), "get");
        assert_eq!(get("/api/v1/namespaces/b/pods/p/log?follow=true"), "get");
        assert_eq!(get("/api/v1/namespaces/b"), "get");
        assert_eq!(get("/apis/drover.build/v1alpha1/buildrequests?watch=true&timeoutSeconds=290"), "watch");
        assert_eq!(get("/apis/drover.build/v1alpha1/namespaces/t/buildrequests"), "list");
        assert_eq!(get("/apis/drover.build/v1alpha1/builderclasses/c"), "get");
        assert_eq!(get("/version"), "get");
        assert_eq!(verb(&Method::PATCH, "/apis/x/v1/namespaces/t/ys/z/status", ""), "patch");
        assert_eq!(verb(&Method::OPTIONS, "/", ""), "other");
    }

    #[tokio::test]
    async fn answers_are_counted_and_what_has_none() {
        let metrics = Arc::new(Metrics::new());
        let service = |code: Option<u16>| {
            Count(metrics.clone()).layer(service_fn(move |_: Request<Body>| async move {
                match code {
                    Some(code) => Ok(Response::builder().status(code).body(()).unwrap()),
                    None => std::future::pending::<Result<_, Infallible>>().await,
                }
            }))
        };
        let request = || Request::post("/api/v1/namespaces/b/pods").body(Body::empty()).unwrap();
        service(Some(201)).oneshot(request()).await.unwrap();
        service(Some(403)).oneshot(request()).await.unwrap();
        service(Some(418)).oneshot(request()).await.unwrap();
        assert!(service(None).oneshot(request()).now_or_never().is_none());
        let page = metrics.render();
        for (code, count) in [("201", 1), ("403", 1), ("other", 1), ("none", 1)] {
            let line = format!("drover_api_requests_total{{verb=\"create\",code=\"{code}\"}} {count}\n");
            assert!(page.contains(&line), "{line}{page}");
        }
        assert!(page.contains("drover_api_request_duration_seconds_count{verb=\"create\"} 4\n"), "{page}");
        assert!(!page.contains("verb=\"patch\",code"), "what never happened is not there");
    }
}
