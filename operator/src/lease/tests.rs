//! Candidates before one API server that answers, hangs, or forgets to answer; in virtual time.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use http_body_util::BodyExt as _;
use hyper::{Method, Request, Response, StatusCode};
use k8s_openapi::api::coordination::v1::LeaseSpec;
use kube::client::Body;
use serde_json::json;
use tokio::task::JoinSet;
use tower::service_fn;

use super::*;

const DURATION: Duration = Duration::from_secs(15);
const DEADLINE: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_secs(2);
const TICK: Duration = Duration::from_millis(100);

#[tokio::test(start_paused = true)]
async fn one_leads_and_the_other_takes_over_when_it_is_gone() {
    let server = Server::default();
    let (first, second) = (Gate::shut(), Gate::shut());
    let leader = server.candidate("first", &first).await;
    assert!(first.is_open());
    let mut other = Box::pin(server.candidate("second", &second));
    assert!(tokio::time::timeout(DURATION * 4, &mut other).await.is_err(), "two leaders");
    assert!(first.is_open(), "renewed all the time");
    assert_eq!(server.holder().as_deref(), Some("first"));

    // As if it was killed: it says nothing.
    drop(leader);
    let died = Instant::now();
    let _leader = other.await;
    assert!(!first.is_open() && second.is_open());
    let waited = died.elapsed();
    assert!((DURATION - RETRY..=DURATION + RETRY).contains(&waited), "{waited:?}");
    assert_eq!(server.spec().and_then(|spec| spec.lease_transitions), Some(1));
}

#[tokio::test(start_paused = true)]
async fn a_silent_api_server_ends_leadership_before_another_can_begin() {
    let server = Server::default();
    let (first, second) = (Gate::shut(), Gate::shut());
    let mut leader = server.candidate("first", &first).await;
    tokio::time::sleep(DURATION).await;
    server.expect([Answer::Never].into_iter().cycle().take(100));
    let hung = Instant::now();
    first.closed().await;
    // Of the last renewal's age, which is at most a retry period, is counted too.
    let after = hung.elapsed();
    assert!((DEADLINE - RETRY..=DEADLINE).contains(&after), "{after:?}");
    let error = leader.lost().await;
    assert!(error.to_string().contains("gave no answer"), "{error}");
    assert_eq!(hung.elapsed(), after, "the process hears of it at the same time");
    server.expect([]);
    let _leader = server.candidate("second", &second).await;
    assert!(hung.elapsed() >= DURATION - RETRY, "{:?}", hung.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_stolen_lease_stops_writes_at_the_next_renewal() {
    for thief in [Some("thief"), None] {
        let server = Server::default();
        let gate = Gate::shut();
        let mut leader = server.candidate("first", &gate).await;
        tokio::time::sleep(DURATION).await;
        match thief {
            Some(thief) => server.steal(thief),
            None => server.delete(),
        }
        let stolen = Instant::now();
        gate.closed().await;
        assert!(stolen.elapsed() <= RETRY, "{:?}", stolen.elapsed());
        let error = leader.lost().await.to_string();
        assert!(error.contains(thief.map_or("deleted", |_| "thief holds it")), "{error}");
        assert_eq!(server.holder().as_deref(), thief, "it was not written over");
    }
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_is_given_back_is_taken_at_once() {
    let server = Server::default();
    let (first, second) = (Gate::shut(), Gate::shut());
    let leader = server.candidate("first", &first).await;
    let standing_by = server.clone();
    let other = tokio::spawn(async move { standing_by.candidate("second", &second).await });
    tokio::time::sleep(DURATION).await;
    let gate = first.clone();
    server.on_write(move |lease| {
        let is_free = lease.spec.as_ref().is_some_and(|spec| spec.holder_identity.is_none());
        assert!(!is_free || !gate.is_open(), "given back while writes could still pass");
    });
    leader.release().await.unwrap();
    let released = Instant::now();
    let _other = other.await.unwrap();
    assert!(released.elapsed() <= RETRY, "{:?}", released.elapsed());
}

#[tokio::test(start_paused = true)]
async fn lost_answers_lose_no_leadership() {
    let server = Server::default();
    let gate = Gate::shut();
    // The very first write, and a renewal later on.
    server.expect([Answer::Good, Answer::DoneButUnsaid]);
    let mut leader = server.candidate("first", &gate).await;
    server.expect([Answer::DoneButUnsaid, Answer::Broken, Answer::Good]);
    let lost = tokio::time::timeout(DURATION * 3, leader.lost()).await;
    assert!(lost.is_err(), "{lost:?}");
    assert!(gate.is_open());
    // And giving it back still works after one.
    server.expect([Answer::DoneButUnsaid]);
    tokio::time::sleep(RETRY * 2).await;
    leader.release().await.unwrap();
    assert_eq!(server.holder(), None);
}

#[tokio::test(start_paused = true)]
async fn whoever_is_second_to_take_an_expired_lease_is_refused() {
    let server = Server::default();
    server.steal("dead");
    let gates = [Gate::shut(), Gate::shut(), Gate::shut()];
    for (name, gate) in ["a", "b", "c"].into_iter().zip(&gates) {
        let (server, gate) = (server.clone(), gate.clone());
        tokio::spawn(async move { server.candidate(name, &gate).await.lost().await });
    }
    tokio::time::sleep(DURATION + RETRY * 3).await;
    assert_eq!(gates.iter().filter(|gate| gate.is_open()).count(), 1);
}

/// Whatever the API server does, no two gates are open at the same time; and when it is well again, one is.
#[tokio::test(start_paused = true)]
async fn never_two_whatever_fails() {
    for seed in 0..40u64 {
        let server = Server::default();
        let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = move |below: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % below
        };
        let answers: Vec<_> = (0..100)
            .map(|_| match next(6) {
                0 | 1 => Answer::Good,
                2 => Answer::Never,
                3 => Answer::DoneButUnsaid,
                4 => Answer::Broken,
                _ => Answer::Late(Duration::from_millis(next(4000))),
            })
            .collect();
        server.expect(answers);
        let gates: Arc<Mutex<Vec<Gate>>> = Arc::default();
        let mut processes = JoinSet::new();
        for name in ["a", "b", "c"] {
            let (server, gates) = (server.clone(), gates.clone());
            // A process that has lost it is started again.
            processes.spawn(async move {
                for life in 0.. {
                    let gate = Gate::shut();
                    gates.lock().unwrap().push(gate.clone());
                    server.candidate(&format!("{name}-{life}"), &gate).await.lost().await;
                    assert!(!gate.is_open());
                }
            });
        }
        let open = || gates.lock().unwrap().iter().filter(|gate| gate.is_open()).count();
        let begin = Instant::now();
        while !server.is_well() {
            assert!(open() <= 1, "seed {seed}, after {:?}", begin.elapsed());
            tokio::time::sleep(TICK).await;
        }
        let well = Instant::now();
        while open() == 0 {
            assert!(well.elapsed() <= DURATION + DEADLINE + RETRY * 3, "seed {seed}: nobody leads");
            tokio::time::sleep(TICK).await;
        }
    }
}

#[test]
fn times_that_keep_nobody_apart_are_refused() {
    let seconds = Duration::from_secs;
    assert!(Timing::new(seconds(15), seconds(10), seconds(2)).is_ok());
    for (duration, deadline, retry) in [(10, 10, 2), (15, 10, 10), (15, 10, 0)] {
        assert!(Timing::new(seconds(duration), seconds(deadline), seconds(retry)).is_err());
    }
}

/// What becomes of one request.
#[derive(Clone, Copy, Debug)]
enum Answer {
    Good,
    /// Not done, not answered.
    Never,
    /// Done, not answered.
    DoneButUnsaid,
    /// 500, not done.
    Broken,
    /// Done and answered after a while.
    Late(Duration),
}

type OnWrite = Box<dyn FnMut(&Lease) + Send>;

/// An API server with one Lease in it.
#[derive(Clone, Default)]
struct Server(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    lease: Option<Lease>,
    version: u64,
    answers: VecDeque<Answer>,
    on_write: Option<OnWrite>,
}

impl Server {
    async fn candidate(&self, name: &str, gate: &Gate) -> Leadership {
        let server = self.clone();
        let service = service_fn(move |request: Request<Body>| server.clone().answer(request));
        let election = Election {
            namespace: "drover-system".into(),
            name: "drover".into(),
            identity: name.into(),
            timing: Timing::new(DURATION, DEADLINE, RETRY).unwrap(),
        };
        Leadership::acquire(Client::new(service, "default"), election, gate.clone(), Arc::default()).await
    }

    /// Answers the next requests like this, and well after that.
    fn expect(&self, answers: impl IntoIterator<Item = Answer>) {
        self.0.lock().unwrap().answers = answers.into_iter().collect();
    }

    fn is_well(&self) -> bool {
        self.0.lock().unwrap().answers.is_empty()
    }

    fn on_write(&self, check: impl FnMut(&Lease) + Send + 'static) {
        self.0.lock().unwrap().on_write = Some(Box::new(check));
    }

    fn spec(&self) -> Option<LeaseSpec> {
        self.0.lock().unwrap().lease.as_ref()?.spec.clone()
    }

    fn holder(&self) -> Option<String> {
        self.spec()?.holder_identity
    }

    fn steal(&self, thief: &str) {
        let mut state = self.0.lock().unwrap();
        let now = Timestamp::now();
        let lease = match state.lease.clone() {
            Some(lease) => record::taken(&lease, thief, DURATION, now),
            None => record::first("drover", thief, DURATION, now),
        };
        state.store(lease);
    }

    fn delete(&self) {
        self.0.lock().unwrap().lease = None;
    }

    async fn answer(self, request: Request<Body>) -> Result<Response<Body>, Infallible> {
        let (head, body) = request.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        let answer = self.0.lock().unwrap().answers.pop_front().unwrap_or(Answer::Good);
        if let Answer::Late(time) = answer {
            tokio::time::sleep(time).await;
        }
        let (code, text) = match answer {
            Answer::Never => std::future::pending().await,
            Answer::Broken => failure(500, "InternalError"),
            Answer::Good | Answer::DoneButUnsaid | Answer::Late(_) => {
                self.0.lock().unwrap().handle(&head.method, &body)
            }
        };
        if matches!(answer, Answer::DoneButUnsaid) {
            std::future::pending::<()>().await;
        }
        let code = StatusCode::from_u16(code).unwrap();
        Ok(Response::builder().status(code).body(Body::from(text.into_bytes())).unwrap())
    }
}

impl State {
    fn handle(&mut self, method: &Method, body: &[u8]) -> (u16, String) {
        let sent = || serde_json::from_slice::<Lease>(body).unwrap();
        match (method, &self.lease) {
            (&Method::GET, Some(lease)) => (200, serde_json::to_string(lease).unwrap()),
            (&Method::GET | &Method::PUT, None) => failure(404, "NotFound"),
            (&Method::POST, Some(_)) => failure(409, "AlreadyExists"),
            (&Method::POST, None) => self.store(sent()),
            (&Method::PUT, Some(lease)) => match sent() {
                new if new.metadata.resource_version == lease.metadata.resource_version => self.store(new),
                _ => failure(409, "Conflict"),
            },
            (method, _) => panic!("{method}"),
        }
    }

    fn store(&mut self, mut lease: Lease) -> (u16, String) {
        if let Some(check) = &mut self.on_write {
            check(&lease);
        }
        self.version += 1;
        lease.metadata.resource_version = Some(self.version.to_string());
        let text = serde_json::to_string(&lease).unwrap();
        self.lease = Some(lease);
        (200, text)
    }
}

fn failure(code: u16, reason: &str) -> (u16, String) {
    let status =
        json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code});
    (code, status.to_string())
}
