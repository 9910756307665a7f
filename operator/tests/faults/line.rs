//! The line between one operator and the API server, and what can go wrong on it: a tower service for the real kube client.
//!
//! It counts requests and events, so that a fault can be put at exactly one of them and the run be repeated. Time on the
//! line is virtual.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::{self, BoxFuture};
use futures::stream::{self, BoxStream, StreamExt as _};
use http_body_util::StreamBody;
use hyper::body::{Bytes, Frame};
use hyper::http::{Request, Response, header};
use kube::client::Body;
use tokio::sync::Notify;
use tokio::time::Instant;
use tower::Service;

use crate::double::routes::{Route, Verb};
use crate::double::server::{Answer, Call};
use crate::double::watch::{self, Watch};
use crate::double::{Failure, Server};

/// One way of a request or an answer.
const LATENCY: Duration = Duration::from_millis(1);
/// After this long a connection on which nothing comes is given up by the machine.
const SILENCE: Duration = Duration::from_secs(60);
/// How late an event is that is late.
const LATE: Duration = Duration::from_secs(45);
const BOOKMARK_INTERVAL: Duration = Duration::from_secs(60);

/// What goes wrong with a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Trouble {
    /// The operator is killed.
    Crash,
    /// 500.
    Internal,
    /// 429.
    TooMany,
    /// No answer comes.
    Silence,
    /// The connection breaks.
    Reset,
}

/// What goes wrong, once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fault {
    /// The request reaches nobody.
    Before(Trouble),
    /// It is done, and the answer does not arrive.
    After(Trouble),
    /// The read is answered from before the last change of what it asks for.
    Stale,
    /// The event does not come, the connection breaks, and the watch goes on from where it was.
    Broken,
    /// The event does not come, and the watch has to list again.
    Expired,
    /// The event does not come, and nobody says so until the watch ends by itself.
    Lost,
    /// The event comes late, and so does all that follows on that watch.
    Late,
}

impl Fault {
    fn is_of_events(self) -> bool {
        matches!(self, Self::Broken | Self::Expired | Self::Lost | Self::Late)
    }

    /// Whether a request can have it.
    fn fits(self, route: &Route) -> bool {
        match self {
            Self::Before(Trouble::Crash) | Self::After(Trouble::Crash) => route.verb.writes(),
            // A watch has no effect that an answer could be late for.
            Self::After(_) => route.verb != Verb::Watch,
            Self::Stale => matches!(route.verb, Verb::Get | Verb::List),
            Self::Before(_) => true,
            _ => false,
        }
    }
}

/// Where the one fault of a run is. Counts over all operators of the run.
#[derive(Default)]
pub(crate) struct Faults {
    plan: Option<(usize, Fault)>,
    seen: Mutex<usize>,
    /// What was hit.
    hit: Mutex<Option<String>>,
    /// Every request and event, in order.
    pub(crate) trace: Mutex<Vec<String>>,
    /// Requests that write, whatever becomes of them.
    pub(crate) writes: Mutex<Vec<String>>,
    pub(crate) crash: Notify,
}

impl Faults {
    pub(crate) fn none() -> Self {
        Self::default()
    }

    /// At the `nth` request or event that the fault fits, from 0.
    pub(crate) fn at(nth: usize, fault: Fault) -> Self {
        Self { plan: Some((nth, fault)), ..Self::default() }
    }

    /// What was hit; None if the run never came so far.
    pub(crate) fn hit(&self) -> Option<String> {
        self.hit.lock().expect("no panic in between").clone()
    }

    fn of_request(&self, route: &Route) -> Option<Fault> {
        if route.kind.plural == "events" {
            // Nothing follows from them, so nothing that befalls them is a case of its own.
            return None;
        }
        self.trace.lock().expect("no panic in between").push(route.to_string());
        if route.verb.writes() {
            self.writes.lock().expect("no panic in between").push(route.to_string());
        }
        let (_, fault) = self.plan?;
        if fault.fits(route) { self.take(fault, &route.to_string()) } else { None }
    }

    fn of_event(&self, event: &serde_json::Value) -> Option<Fault> {
        let object = &event["object"];
        let what = format!(
            "event {} {}/{} {}",
            event["type"].as_str().unwrap_or_default(),
            object["kind"].as_str().unwrap_or_default(),
            object["metadata"]["name"].as_str().unwrap_or_default(),
            object["metadata"]["resourceVersion"].as_str().unwrap_or_default(),
        );
        self.trace.lock().expect("no panic in between").push(what.clone());
        let (_, fault) = self.plan?;
        if fault.is_of_events() { self.take(fault, &what) } else { None }
    }

    fn take(&self, fault: Fault, what: &str) -> Option<Fault> {
        let mut seen = self.seen.lock().expect("no panic in between");
        let nth = *seen;
        *seen += 1;
        if self.plan != Some((nth, fault)) {
            return None;
        }
        *self.hit.lock().expect("no panic in between") = Some(what.to_owned());
        Some(fault)
    }
}

/// One operator's line. Dead as soon as its operator is.
#[derive(Clone)]
pub(crate) struct Line {
    pub(crate) server: Arc<Server>,
    pub(crate) faults: Arc<Faults>,
    pub(crate) client: u32,
    pub(crate) alive: Arc<AtomicBool>,
}

type Answered = Response<StreamBody<BoxStream<'static, io::Result<Frame<Bytes>>>>>;

impl Service<Request<Body>> for Line {
    type Response = Answered;
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<Answered>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let line = self.clone();
        Box::pin(async move { line.carry(request).await })
    }
}

impl Line {
    async fn carry(&self, request: Request<Body>) -> io::Result<Answered> {
        let (head, body) = request.into_parts();
        let body = body.collect_bytes().await.map_err(io::Error::other)?;
        let header = |name| {
            head.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned()
        };
        let route = match Route::parse(&head.method, &head.uri) {
            Ok(route) => route,
            Err(failure) => return Ok(refused(&failure)),
        };
        let call = Call {
            client: self.client,
            accept: header(header::ACCEPT),
            content_type: header(header::CONTENT_TYPE),
            body: body.to_vec(),
            route,
        };
        tokio::time::sleep(LATENCY).await;
        self.while_alive().await;
        let fault = self.faults.of_request(&call.route);
        if let Some(Fault::Before(trouble)) = fault {
            return self.suffer(trouble).await;
        }
        let as_of = match fault {
            Some(Fault::Stale) => Some(self.before_last_change(&call)),
            _ => None,
        };
        let answer = self.server.answer(&call, as_of);
        if let Some(Fault::After(trouble)) = fault {
            return self.suffer(trouble).await;
        }
        tokio::time::sleep(LATENCY).await;
        self.while_alive().await;
        match answer {
            Ok(Answer::Object(code, object)) => Ok(answered(code, object.to_string().into_bytes())),
            Ok(Answer::Watch(watch, first)) => Ok(self.stream(watch, first)),
            Err(failure) => Ok(refused(&failure)),
        }
    }

    /// What a dead operator's tasks want reaches nobody.
    async fn while_alive(&self) {
        if !self.alive.load(Ordering::Relaxed) {
            future::pending::<Infallible>().await;
        }
    }

    async fn suffer(&self, trouble: Trouble) -> io::Result<Answered> {
        match trouble {
            Trouble::Crash => {
                self.alive.store(false, Ordering::Relaxed);
                self.faults.crash.notify_one();
                future::pending().await
            }
            Trouble::Internal => Ok(refused(&Failure::internal())),
            Trouble::TooMany => Ok(refused(&Failure::too_many_requests())),
            Trouble::Silence => {
                tokio::time::sleep(SILENCE).await;
                Err(io::ErrorKind::TimedOut.into())
            }
            Trouble::Reset => Err(io::ErrorKind::ConnectionReset.into()),
        }
    }

    /// The version before the newest one that matters to the read.
    fn before_last_change(&self, call: &Call) -> u64 {
        let store = self.server.store();
        let key = call.route.key();
        let matters = store.history.iter().rev().find(|change| match &key {
            Some(key) => change.key == *key,
            None => {
                let namespace = call.route.namespace.as_ref();
                change.key.kind == call.route.kind
                    && namespace.is_none_or(|namespace| *namespace == change.key.namespace)
            }
        });
        matters.map_or(0, |change| change.version - 1)
    }

    fn stream(&self, watch: Watch, first: Vec<serde_json::Value>) -> Answered {
        let flow = Flow {
            due: Instant::now() + watch.timeout,
            bookmark: Instant::now() + BOOKMARK_INTERVAL,
            pending: first.iter().map(watch::line).collect(),
            changed: self.server.changed(),
            line: self.clone(),
            watch,
            state: State::Flowing,
        };
        let frames = stream::unfold(flow, |mut flow| async move {
            let frame = flow.next().await?;
            Some((frame.map(|bytes| Frame::data(bytes.into())), flow))
        });
        let mut response = Response::new(StreamBody::new(frames.boxed()));
        response
            .headers_mut()
            .insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
        response
    }
}

/// A watch on its way.
struct Flow {
    line: Line,
    watch: Watch,
    pending: VecDeque<Vec<u8>>,
    changed: tokio::sync::watch::Receiver<u64>,
    due: Instant,
    bookmark: Instant,
    state: State,
}

#[derive(PartialEq, Eq)]
enum State {
    Flowing,
    /// An event was lost: the next connection will have to list again.
    Lossy,
    /// The connection breaks behind what is pending.
    Breaking,
    /// The stream ends behind what is pending.
    Ending,
}

impl Flow {
    async fn next(&mut self) -> Option<io::Result<Vec<u8>>> {
        loop {
            self.line.while_alive().await;
            if let Some(line) = self.pending.pop_front() {
                return Some(Ok(line));
            }
            match self.state {
                State::Ending => return None,
                State::Breaking => {
                    self.state = State::Ending;
                    return Some(Err(io::ErrorKind::ConnectionReset.into()));
                }
                State::Flowing | State::Lossy => {}
            }
            if self.take_changes().await {
                continue;
            }
            tokio::select! {
                // The server outlives its watches.
                _ = self.changed.changed() => tokio::time::sleep(LATENCY).await,
                () = tokio::time::sleep_until(self.due) => {
                    if self.state == State::Lossy {
                        self.expire();
                    }
                    self.state = State::Ending;
                }
                () = tokio::time::sleep_until(self.bookmark), if self.watch.bookmarks && self.state == State::Flowing => {
                    self.bookmark += BOOKMARK_INTERVAL;
                    self.pending.push_back(watch::line(&self.watch.bookmark(self.watch.version, false)));
                }
            }
        }
    }

    /// Takes in what has happened since; whether there is anything new to be sent or to be done.
    async fn take_changes(&mut self) -> bool {
        let changes: Vec<_> = {
            let store = self.line.server.store();
            // Versions count from 1 without a gap.
            store.history[self.watch.version as usize..].to_vec()
        };
        for change in changes {
            if let Some(event) = self.watch.event(&change) {
                match self.line.faults.of_event(&event) {
                    Some(Fault::Broken) => {
                        self.state = State::Breaking;
                        return true;
                    }
                    Some(Fault::Expired) => {
                        self.expire();
                        self.state = State::Ending;
                        return true;
                    }
                    Some(Fault::Lost) => self.state = State::Lossy,
                    fault => {
                        if fault == Some(Fault::Late) {
                            tokio::time::sleep(LATE).await;
                        }
                        self.pending.push_back(watch::line(&event));
                    }
                }
            }
            self.watch.version = change.version;
            if !self.pending.is_empty() {
                return true;
            }
        }
        false
    }

    fn expire(&mut self) {
        let failure = Failure::expired(self.watch.version, self.watch.version + 1);
        self.pending.push_back(watch::line(&watch::error(&failure)));
    }
}

fn answered(code: u16, body: Vec<u8>) -> Answered {
    let frame = stream::once(future::ready(Ok(Frame::data(Bytes::from(body)))));
    let response = Response::builder().status(code).header(header::CONTENT_TYPE, "application/json");
    response.body(StreamBody::new(frame.boxed())).expect("a code and a header that are right")
}

fn refused(failure: &Failure) -> Answered {
    answered(failure.code, failure.status().to_string().into_bytes())
}
