//! The gate that every write to the API server passes: it lets through only while this process is known to lead.
//!
//! Leadership is known by this process's own monotonic clock and by nothing else. A renewal of the Lease opens the gate until
//! a moment that is earlier than the one from which another process may take over ([`crate::lease`]), so that a leader that
//! hears nothing falls silent by itself, before there is a second one. A write that is under way at that moment is given up.
//! Reads always pass: they can mislead nobody but this process.
//!
//! [`Gate`] is a tower layer of the kube client. The lease's own client does not have it.

use std::pin::Pin;
use std::task::{Context, Poll};

use futures::{FutureExt as _, TryFutureExt as _};
use hyper::{Method, Request};
use kube::client::Body;
use tokio::sync::watch;
use tokio::time::Instant;
use tower::{BoxError, Layer, Service};

/// Cheap to clone; all clones are the same gate.
#[derive(Clone, Debug)]
pub struct Gate(watch::Sender<State>);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// For a process that shares its cluster with no other.
    Always,
    /// Not a leader yet.
    NotYet,
    Until(Instant),
    /// For good: leadership that was lost or given back does not come again in this process.
    Closed,
}

/// Why a write was not sent, or not waited for.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("this process does not hold the lease, or no longer knows that it does; nothing is written")]
pub struct NotLeading;

impl Gate {
    /// A gate that stands open, for a process that needs no lease.
    pub fn open() -> Self {
        Self(watch::Sender::new(State::Always))
    }

    /// A gate that is shut until [`Self::open_until`].
    pub fn shut() -> Self {
        Self(watch::Sender::new(State::NotYet))
    }

    /// Opens it, or keeps it open, until then. Without effect once it was closed.
    pub fn open_until(&self, until: Instant) {
        self.0.send_if_modified(|state| {
            let changes = matches!(state, State::NotYet | State::Until(_));
            if changes {
                *state = State::Until(until);
            }
            changes
        });
    }

    /// Closes it for good. Writes that are under way are given up.
    pub fn close(&self) {
        self.0.send_replace(State::Closed);
    }

    /// Whether a write would pass now.
    pub fn is_open(&self) -> bool {
        match *self.0.borrow() {
            State::Always => true,
            State::NotYet | State::Closed => false,
            State::Until(until) => Instant::now() < until,
        }
    }

    /// Resolves as soon as no write would pass.
    pub async fn closed(&self) {
        let mut changes = self.0.subscribe();
        loop {
            let state = *changes.borrow_and_update();
            // The sender is `self`: it outlives the wait, so that there is a change to wait for.
            match state {
                State::NotYet | State::Closed => return,
                State::Always => {
                    let _ = changes.changed().await;
                }
                State::Until(until) if Instant::now() >= until => return,
                State::Until(until) => {
                    let _ = tokio::time::timeout_at(until, changes.changed()).await;
                }
            }
        }
    }
}

impl<S> Layer<S> for Gate {
    type Service = Gated<S>;

    fn layer(&self, inner: S) -> Gated<S> {
        Gated { gate: self.clone(), inner }
    }
}

/// A client's service behind a [`Gate`].
#[derive(Clone, Debug)]
pub struct Gated<S> {
    gate: Gate,
    inner: S,
}

impl<S> Service<Request<Body>> for Gated<S>
where
    S: Service<Request<Body>>,
    S::Future: Send + 'static,
    S::Response: Send + 'static,
    S::Error: Into<BoxError> + 'static,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(context).map_err(Into::into)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        if request.method() == Method::GET {
            return self.inner.call(request).map_err(Into::into).boxed();
        }
        if !self.gate.is_open() {
            return futures::future::ready(Err(NotLeading.into())).boxed();
        }
        let answer = self.inner.call(request);
        let gate = self.gate.clone();
        async move {
            tokio::select! {
                biased;
                answer = answer => answer.map_err(Into::into),
                () = gate.closed() => Err(NotLeading.into()),
            }
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use hyper::Response;
    use tower::{ServiceExt as _, service_fn};

    use super::*;

    const TEN: Duration = Duration::from_secs(10);

    #[tokio::test(start_paused = true)]
    async fn writes_pass_only_while_it_is_open() {
        let (gate, server) = (Gate::shut(), Server::default());
        assert!(server.send(&gate, Method::GET).await.is_ok(), "reading needs no lease");
        for method in [Method::POST, Method::PUT, Method::PATCH, Method::DELETE] {
            assert!(server.send(&gate, method.clone()).await.is_err_and(is_ours), "{method}");
        }
        assert_eq!(server.heard(), 1);

        gate.open_until(Instant::now() + TEN);
        server.send(&gate, Method::PATCH).await.unwrap();
        tokio::time::advance(TEN - Duration::from_millis(1)).await;
        server.send(&gate, Method::PATCH).await.unwrap();
        tokio::time::advance(Duration::from_millis(1)).await;
        // Nobody has said anything: the time alone has closed it.
        assert!(server.send(&gate, Method::PATCH).await.is_err_and(is_ours));
        gate.open_until(Instant::now() + TEN);
        server.send(&gate, Method::PATCH).await.unwrap();
        assert_eq!(server.heard(), 4);
    }

    #[tokio::test(start_paused = true)]
    async fn a_write_under_way_is_given_up_when_it_closes() {
        let (gate, server) = (Gate::shut(), Server::that_takes(Duration::from_secs(3600)));
        let began = Instant::now();
        gate.open_until(began + TEN);
        assert!(server.send(&gate, Method::POST).await.is_err_and(is_ours));
        assert_eq!(began.elapsed(), TEN);

        // A renewal in the meantime is heard of.
        let began = Instant::now();
        gate.open_until(began + TEN);
        let renewed = async {
            tokio::time::sleep(TEN / 2).await;
            gate.open_until(Instant::now() + TEN);
            tokio::time::sleep(TEN / 2).await;
            gate.close();
        };
        let (answer, ()) = tokio::join!(server.send(&gate, Method::POST), renewed);
        assert!(answer.is_err_and(is_ours));
        assert_eq!(began.elapsed(), TEN, "closed at once, not when the time had run out");
    }

    #[tokio::test(start_paused = true)]
    async fn closed_is_for_good() {
        let gate = Gate::shut();
        gate.open_until(Instant::now() + TEN);
        gate.close();
        // The answer to a renewal that was under way.
        gate.open_until(Instant::now() + TEN);
        assert!(!gate.is_open());
        gate.closed().await;
    }

    /// Counts what reaches it.
    #[derive(Clone, Default)]
    struct Server {
        heard: Arc<AtomicUsize>,
        takes: Duration,
    }

    impl Server {
        fn that_takes(takes: Duration) -> Self {
            Self { takes, ..Self::default() }
        }

        async fn send(&self, gate: &Gate, method: Method) -> Result<Response<()>, BoxError> {
            let Self { heard, takes } = self.clone();
            let service = gate.layer(service_fn(move |_: Request<Body>| {
                heard.fetch_add(1, Ordering::Relaxed);
                async move {
                    tokio::time::sleep(takes).await;
                    Ok::<_, Infallible>(Response::new(()))
                }
            }));
            service.oneshot(Request::builder().method(method).body(Body::empty()).unwrap()).await
        }

        fn heard(&self) -> usize {
            self.heard.load(Ordering::Relaxed)
        }
    }

    #[expect(clippy::needless_pass_by_value, reason = "for is_err_and")]
    fn is_ours(error: BoxError) -> bool {
        error.is::<NotLeading>()
    }
}
