//! The index by itself: single stories, random lives of many requests, and very many.

mod random;
mod scale;
mod stories;

use std::collections::BTreeMap;

use drover_api::{
    Attempt, BuildRequest, BuildRequestStatus, Concurrency, DerivationSpec, FailureStatus, OutputSpec,
    Reason, conditions,
};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

use super::entry::Fixed;
use super::index::{Index, News};
use crate::world::{OtherState, Slot};

const NO_LIMIT: Concurrency = Concurrency { total: None, per_namespace: None };
const ONE: Concurrency = Concurrency { total: Some(1), per_namespace: None };

/// The API server's side: requests as they are, each with its version.
#[derive(Default)]
struct Server {
    requests: BTreeMap<String, BuildRequest>,
    version: u64,
}

fn time(second: i64) -> Timestamp {
    Timestamp::UNIX_EPOCH + SignedDuration::from_secs(second)
}

/// A request for `build`, whose output's path follows from that name alone. Its uid is `namespace/name`.
fn request(namespace: &str, name: &str, build: &str, inputs: &[&str]) -> BuildRequest {
    let hash = drover_nix::Sha256::of(build.as_bytes());
    let derivation = DerivationSpec {
        name: build.into(),
        system: "x86_64-linux".into(),
        builder: "/bin/sh".into(),
        input_srcs: inputs.iter().map(|build| path(build)).collect(),
        outputs: BTreeMap::from([(
            "out".into(),
            OutputSpec {
                hash: Some(hash.to_string()),
                hash_algo: Some("sha256".into()),
                method: Some("nar".into()),
                path: None,
            },
        )]),
        ..Default::default()
    };
    let spec = drover_api::BuildRequestSpec { derivation: Some(derivation), ..Default::default() };
    let mut request = BuildRequest::new(name, spec);
    request.metadata.namespace = Some(namespace.into());
    request.metadata.uid = Some(format!("{namespace}/{name}"));
    request.metadata.creation_timestamp = Some(Time(time(100)));
    request
}

/// The output of that build.
fn path(build: &str) -> String {
    Fixed::of(&request("any", "any", build, &[])).outputs[0].to_string()
}

impl Server {
    /// Stores what `change` makes of the request, as a new version.
    fn put(&mut self, mut request: BuildRequest) -> BuildRequest {
        self.version += 1;
        request.metadata.resource_version = Some(self.version.to_string());
        self.requests.insert(request.metadata.uid.clone().unwrap(), request.clone());
        request
    }

    fn change(&mut self, uid: &str, change: impl FnOnce(&mut BuildRequest)) -> BuildRequest {
        let mut request = self.requests[uid].clone();
        change(&mut request);
        self.put(request)
    }

    fn begin(&mut self, uid: &str) -> BuildRequest {
        self.change(uid, |request| {
            let status = request.status.get_or_insert_with(BuildRequestStatus::default);
            let number = status.attempt.unwrap_or(0) + 1;
            (status.attempt, status.class) = (Some(number), Some("c".into()));
            status.attempts.push(Attempt { number, ..Default::default() });
        })
    }

    fn end_attempt(&mut self, uid: &str) -> BuildRequest {
        self.change(uid, |request| {
            let last = request.status.as_mut().unwrap().attempts.last_mut().unwrap();
            last.end_time = Some(Time(time(200)));
        })
    }

    /// Settles it: None is success.
    fn settle(&mut self, uid: &str, failure: Option<Reason>, second: i64) -> BuildRequest {
        self.change(uid, |request| {
            let status = request.status.get_or_insert_with(BuildRequestStatus::default);
            status.class = Some("c".into());
            if let Some(last) = status.attempts.last_mut() {
                last.end_time = Some(Time(time(second)));
            }
            status.completion_time = Some(Time(time(second)));
            status.conditions = vec![Condition {
                type_: conditions::SUCCEEDED.into(),
                status: if failure.is_none() { "True" } else { "False" }.into(),
                reason: "x".into(),
                message: String::new(),
                last_transition_time: Time(time(second)),
                observed_generation: None,
            }];
            status.failure = failure.map(|reason| FailureStatus {
                reason: reason.to_string(),
                message: "it said so".into(),
                log_tail: vec![],
            });
        })
    }
}

/// An index and the server that it watches.
#[derive(Default)]
struct Both {
    server: Server,
    index: Index,
}

impl Both {
    fn apply(&mut self, request: BuildRequest) {
        let request = self.server.put(request);
        self.index.seen(&request);
    }

    fn ask(&mut self, uid: &str, concurrency: Concurrency) -> Slot {
        let attempts = self.server.requests[uid].status.as_ref().and_then(|status| status.attempt);
        self.index.ask(uid, attempts.unwrap_or(0) + 1, "c", concurrency)
    }

    fn begin(&mut self, uid: &str) {
        self.index.seen(&self.server.begin(uid));
    }

    fn settle(&mut self, uid: &str, failure: Option<Reason>) {
        self.index.seen(&self.server.settle(uid, failure, 300));
    }

    /// A request that has begun.
    fn running(&mut self, request: BuildRequest) {
        let uid = request.metadata.uid.clone().unwrap();
        self.apply(request);
        assert_eq!(self.ask(&uid, NO_LIMIT), Slot::Granted);
        self.begin(&uid);
    }

    fn looks(&mut self, uid: &str, absent: &[&str]) {
        self.index.waits(uid, &absent.iter().map(|build| path(build)).collect());
    }

    /// Who is to be looked at, and whether caches are to be asked again.
    fn news(&mut self) -> Vec<(String, News)> {
        self.index.take_news().into_iter().map(|(uid, _, news)| (uid.to_string(), news)).collect()
    }

    fn state_of_input(&self, uid: &str, build: &str) -> Option<(String, OtherState)> {
        let others = self.index.others(uid, Some("c"));
        others.producers.get(&path(build)).map(|other| (other.request.clone(), other.state.clone()))
    }
}

fn look_up(uids: &[&str]) -> Vec<(String, News)> {
    uids.iter().map(|uid| ((*uid).to_owned(), News::LookUp)).collect()
}
