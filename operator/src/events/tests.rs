//! Statuses as plans write them, and what is said of them.

use drover_api::conditions::Status;
use drover_api::{BuildRequest, Phase};
use jiff::Timestamp;

use super::*;
use crate::status::Draft;
use crate::world::PodView;

/// A request, and all that was said of it.
struct Life {
    request: BuildRequest,
    said: Vec<Event>,
}

impl Life {
    fn new() -> Self {
        Self { request: BuildRequest::new("hello", Default::default()), said: vec![] }
    }

    /// Writes a status. What is said of it is said once: the same again is no transition.
    fn write(&mut self, change: impl FnOnce(&mut Draft)) -> &mut Self {
        let mut draft = Draft::new(&self.request, Timestamp::UNIX_EPOCH);
        change(&mut draft);
        let Some(status) = draft.finish() else { return self };
        self.said.extend(transitions(self.request.status.as_ref(), &status));
        assert_eq!(transitions(Some(&status), &status), []);
        self.request.status = Some(status);
        self
    }

    fn begin(&mut self, number: u32) -> &mut Self {
        self.write(|draft| {
            draft.status.class = Some("small".into());
            draft.status.drv_path = Some("/nix/store/x-hello.drv".into());
            draft.phase(conditions::ACCEPTED, Status::True, Reason::Accepted, "");
            draft.begin_attempt(number, None);
            draft.progress(Phase::Running, Reason::Accepted, "");
        });
        self.write(|draft| {
            draft.pod(&pod(number));
            draft.phase(conditions::SCHEDULED, Status::True, Reason::Scheduled, "on node n1");
            draft.progress(Phase::Running, Reason::StartingBuilder, "");
        })
    }

    fn build(&mut self) -> &mut Self {
        self.write(|draft| {
            draft.phase(conditions::BUILDER_READY, Status::True, Reason::BuilderReady, "");
            draft.progress(Phase::Running, Reason::CopyingInputs, "");
        });
        self.write(|draft| {
            draft.phase(conditions::INPUTS_COPIED, Status::True, Reason::InputsCopied, "");
            draft.progress(Phase::Running, Reason::Building, "");
        })
    }

    fn lines(&self) -> Vec<String> {
        let line = |event: &Event| {
            let kind = if event.word.is_warning() { "Warning" } else { "Normal" };
            format!("{kind} {}: {}", event.word.as_str(), event.note)
        };
        self.said.iter().map(line).collect()
    }

    fn words(&self) -> Vec<&'static str> {
        self.said.iter().map(|event| event.word.as_str()).collect()
    }
}

fn pod(attempt: u32) -> PodView {
    PodView {
        name: format!("hello-{attempt}"),
        namespace: "drover-builders".into(),
        uid: "u".into(),
        attempt,
        created: Timestamp::UNIX_EPOCH,
        deleting: false,
        node: Some("n1".into()),
        scheduled: None,
        deadline: None,
        unschedulable: None,
        waiting: None,
        ended: None,
        disruption: None,
        image: None,
    }
}

const BEGIN: [&str; 6] = [
    "Normal Accepted: BuilderClass small builds /nix/store/x-hello.drv",
    "Normal PodCreated: attempt 1 has pod hello-1",
    "Normal Scheduled: on node n1",
    "Normal BuilderReady: the builder answered",
    "Normal InputsCopied: every input is in the builder's store",
    "Normal BuildStarted: building /nix/store/x-hello.drv",
];

#[test]
fn a_build_that_succeeds() {
    let mut life = Life::new();
    life.begin(1).build().write(|draft| {
        draft.phase(conditions::BUILT, Status::True, Reason::Built, "");
        draft.progress(Phase::Running, Reason::CollectingOutputs, "");
    });
    life.write(|draft| draft.succeed(Reason::Built, Default::default()));
    assert_eq!(life.lines()[..6], BEGIN);
    assert_eq!(life.lines()[6..], ["Normal Succeeded: Built: 0 outputs are in the cache"]);
    assert!(life.said[1..].iter().all(|event| {
        event
            .pod
            .as_ref()
            .is_some_and(|(namespace, name)| namespace == "drover-builders" && name == "hello-1")
    }));
}

#[test]
fn a_build_that_fails_says_it_once_and_is_followed_by_nothing() {
    let mut life = Life::new();
    life.begin(1).build().write(|draft| draft.fail(Reason::BuildFailed, "exit code 7", &[]));
    assert_eq!(life.lines()[..6], BEGIN);
    assert_eq!(life.lines()[6..], ["Warning Failed: BuildFailed: exit code 7"]);
    // A verdict that is stated again, of a newer spec.
    life.request.metadata.generation = Some(2);
    let again = Draft::new(&life.request, Timestamp::UNIX_EPOCH).restate().unwrap();
    assert_eq!(transitions(life.request.status.as_ref(), &again), []);
}

#[test]
fn the_next_attempt_says_everything_anew() {
    let mut life = Life::new();
    life.begin(1).build().write(|draft| {
        draft.end_attempt(Reason::Evicted, "the node is full", true);
        draft.progress(Phase::Pending, Reason::Retrying, "attempt 1 failed: Evicted");
    });
    let first = life.said.len();
    assert_eq!(life.lines()[first - 1], "Warning Retrying: attempt 1 failed: Evicted");
    life.begin(2).build();
    assert_eq!(
        life.words()[first..],
        ["PodCreated", "Scheduled", "BuilderReady", "InputsCopied", "BuildStarted"]
    );
    assert!(life.said[first..].iter().all(|event| event.pod.as_ref().is_none_or(|pod| pod.1 == "hello-2")));
}

#[test]
fn a_connection_that_broke_and_was_made_again() {
    let mut life = Life::new();
    life.begin(1).build();
    let so_far = life.said.len();
    life.write(|draft| {
        draft.phase(conditions::BUILDER_READY, Status::Unknown, Reason::ConnectionLost, "it broke");
        draft.progress(Phase::Running, Reason::Connecting, "another one begins");
    });
    life.build();
    assert_eq!(
        life.lines()[so_far..],
        ["Warning ConnectionLost: it broke", "Normal BuilderReady: the builder answered"]
    );
}

/// Of what is waited for, the word counts: a message that changes with each look says nothing new.
#[test]
fn waiting_is_said_once_for_each_reason() {
    let mut life = Life::new();
    let mut wait = |reason, message: &str| {
        life.write(|draft| draft.progress(Phase::Pending, reason, message));
    };
    wait(Reason::WaitingForClass, "none");
    wait(Reason::WaitingForInput, "a");
    wait(Reason::WaitingForInput, "b");
    wait(Reason::WaitingForConcurrency, "2 of 2");
    wait(Reason::Suspended, "");
    assert_eq!(life.words(), ["WaitingForClass", "WaitingForInput", "WaitingForConcurrency", "Suspended"]);
    life.write(|draft| draft.fail(Reason::Cancelled, "spec.cancel was set", &[]));
    assert_eq!(life.lines().last().unwrap(), "Normal Cancelled: spec.cancel was set");
}

/// Whatever a request may wait for has a word here.
#[test]
fn every_wait_has_its_word() {
    for reason in Reason::ALL {
        let word = reason.as_str();
        let waits_for = word.starts_with("WaitingFor") || matches!(word, "Suspended" | "ImagePull");
        assert_eq!(waits(*reason).map(Word::as_str), waits_for.then_some(word));
    }
    assert_eq!(markdown_table().lines().count(), Word::ALL.len() + 2);
}
