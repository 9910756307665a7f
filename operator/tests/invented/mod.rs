//! An API server that is made up, for tests of many requests or of none: it keeps next to nothing and believes everything.

#![allow(clippy::unwrap_used)] // all of it is tests

use std::collections::HashSet;
use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use drover_operator::clock::Clock;
use drover_operator::controller::Parts;
use drover_operator::keys::Seed;
use drover_operator::metrics::Metrics;
use drover_operator::session::Ssh;
use drover_operator::settings::{Settings, Timeouts};
use drover_operator::trace::Tracer;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Bytes, Frame};
use hyper::{Method, Request, Response, StatusCode};
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};
use tower::service_fn;

type Answer = BoxBody<Bytes, Infallible>;

/// Lists of requests that are made up as they are asked for, of one class, and of no pods. Writes are believed.
#[derive(Clone)]
pub(crate) struct Server {
    /// How many requests there are.
    pub(crate) requests: usize,
    /// A directory: the class's cache.
    pub(crate) cache: PathBuf,
    /// Requests whose status says that they wait for their turn.
    pub(crate) seen: Arc<Mutex<HashSet<u32>>>,
}

impl Server {
    /// What an operator is made of that has this for its API server.
    pub(crate) fn parts(&self, clock: Clock, metrics: Arc<Metrics>) -> Parts {
        let server = self.clone();
        let service = service_fn(move |request| server.clone().answer(request));
        Parts {
            client: Client::new(service, "default"),
            settings: Settings {
                namespace: "drover-system".into(),
                builder_namespace: "drover-builders".into(),
                builder_image: "drover.test/none:1".into(),
                builder_pull_policy: "Never".into(),
                builder_pull_secrets: vec![],
                max_sessions: 1024,
                pod_deadline_seconds: 3600,
                work_dir: self.cache.clone(),
                concurrency: 16,
                timeouts: Timeouts::default(),
                scope: Default::default(),
            },
            seed: Seed::generate().unwrap(),
            metrics,
            health: Arc::default(),
            clock,
            conversation: Arc::new(Ssh),
            tracer: Tracer::off(),
        }
    }

    pub(crate) fn waiting(&self) -> usize {
        self.seen.lock().unwrap().len()
    }

    async fn answer(self, request: Request<Body>) -> Result<Response<Answer>, Infallible> {
        let (head, body) = request.into_parts();
        let query = head.uri.query().unwrap_or_default();
        if query.contains("watch=true") {
            // A watch that never has anything to say.
            let silence = futures::stream::pending::<Result<Frame<Bytes>, Infallible>>();
            return Ok(Response::new(StreamBody::new(silence).boxed()));
        }
        let body = body.collect().await.unwrap().to_bytes();
        let sent: Value = serde_json::from_slice(&body).unwrap_or_default();
        let words: Vec<&str> = head.uri.path().split('/').filter(|word| !word.is_empty()).collect();
        let list = |items: Vec<Value>, next: Option<usize>| {
            let metadata = json!({"resourceVersion": "1", "continue": next.map(|next| next.to_string())});
            json!({"kind": "List", "apiVersion": "v1", "metadata": metadata, "items": items})
        };
        let answer = match (&head.method, &words[..]) {
            (&Method::GET, [.., "buildrequests"]) => {
                let number = |name: &str| {
                    let mut pairs = query.split('&').filter_map(|pair| pair.split_once('='));
                    pairs.find(|(key, _)| *key == name).and_then(|(_, value)| value.parse::<usize>().ok())
                };
                let (from, limit) = (number("continue").unwrap_or(0), number("limit").unwrap());
                let to = (from + limit).min(self.requests);
                let items = (from..to).map(|number| build_request(u32::try_from(number).unwrap())).collect();
                list(items, (to < self.requests).then_some(to))
            }
            (&Method::GET, [.., "builderclasses"]) => list(vec![self.class()], None),
            (&Method::GET, [.., "pods"]) => list(vec![], None),
            (_, [.., "buildrequests", name] | [.., "buildrequests", name, "status"]) => {
                let number = name.trim_start_matches("request-").parse().unwrap();
                let mut request = build_request(number);
                if sent["status"].is_object() {
                    let conditions = sent["status"]["conditions"].as_array().cloned().unwrap_or_default();
                    if conditions.iter().any(|condition| condition["reason"] == "WaitingForConcurrency") {
                        self.seen.lock().unwrap().insert(number);
                    }
                    request["status"] = sent["status"].clone();
                    request["metadata"]["resourceVersion"] = "2".into();
                }
                request
            }
            // The pod of the one whose turn it is.
            (&Method::POST, [.., "pods"]) => sent,
            (&Method::POST | &Method::PATCH, ["apis", "events.k8s.io", ..]) => sent,
            (&Method::GET, [.., "pods", _]) => return Ok(failure(404)),
            (method, path) => panic!("{method} {path:?}"),
        };
        Ok(Response::new(text(&answer)))
    }

    fn class(&self) -> Value {
        json!({
            "apiVersion": "drover.build/v1alpha1", "kind": "BuilderClass",
            "metadata": {"name": "one", "uid": "class", "resourceVersion": "1"},
            "spec": {
                "default": true, "systems": ["x86_64-linux"], "concurrency": {"total": 1},
                "caches": [{"url": format!("file://{}", self.cache.display()), "push": true}],
            },
        })
    }
}

/// As `kubectl apply` leaves it: everything is there three times.
fn build_request(number: u32) -> Value {
    let spec = json!({"derivation": {
        "name": format!("package-{number}"), "system": "x86_64-linux", "builder": "/bin/sh",
        "args": ["-c", "echo hello > $out"], "env": {"number": number.to_string()}, "outputs": {"out": {}},
    }});
    json!({
        "apiVersion": "drover.build/v1alpha1", "kind": "BuildRequest",
        "metadata": {
            "name": format!("request-{number}"), "namespace": "team", "uid": format!("{number:036}"),
            "resourceVersion": "1", "generation": 1, "creationTimestamp": "2026-01-01T00:00:00Z",
            "annotations": {"kubectl.kubernetes.io/last-applied-configuration": spec.to_string()},
            "managedFields": [{"manager": "kubectl", "operation": "Update", "apiVersion": "drover.build/v1alpha1",
                "fieldsType": "FieldsV1", "fieldsV1": {"f:spec": spec}}],
        },
        "spec": spec,
    })
}

fn failure(code: u16) -> Response<Answer> {
    let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": code});
    let mut response = Response::new(text(&status));
    *response.status_mut() = StatusCode::from_u16(code).unwrap();
    response
}

fn text(answer: &Value) -> Answer {
    Full::new(Bytes::from(answer.to_string())).boxed()
}
