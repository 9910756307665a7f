//! What the queue keeps of a request: little, since there may be thousands. Pure.

use std::sync::Arc;

use drover_api::convert::{self, Target};
use drover_api::{BuildRequest, BuildRequestSpec, Reason, Resources, conditions};
use drover_nix::{BasicDerivation, StoreDir};
use jiff::Timestamp;
use kube::{Resource as _, ResourceExt as _};

use crate::world::OtherState;

/// Most bytes of a failure's message that are kept for those who share its verdict or depend on it.
const MAX_MESSAGE: usize = 512;

/// What never changes of a request.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Fixed {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    pub created: Timestamp,
    /// What is built: the path that the derivation's file would have. None if it makes no sense, which a plan says, or has
    /// not been read.
    pub build: Option<Arc<str>>,
    pub limits: Limits,
    /// Full paths, those that are known before the build.
    pub outputs: Vec<Arc<str>>,
    /// Direct inputs, full paths.
    pub inputs: Vec<Arc<str>>,
    /// Nobody knows what it makes: it only names a derivation that has not been read.
    pub is_unread: bool,
}

/// Limits that a build may break: a verdict holds for another request only where they are equal.
#[derive(Clone, PartialEq, Debug, Default)]
pub(super) struct Limits {
    timeout_seconds: Option<u32>,
    max_silent_seconds: Option<u32>,
    max_log_bytes: Option<u64>,
    max_output_bytes: Option<u64>,
    retries: u32,
    builders: Option<u32>,
    resources: Option<Box<Resources>>,
}

/// What changes.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Now {
    /// As the API server counts them; None where it is no number.
    pub version: Option<u64>,
    pub priority: i32,
    /// Suspended or cancelled: it begins nothing.
    pub is_held: bool,
    /// It waits for its class, or for the file of its derivation: it may never be read.
    pub is_stuck: bool,
    /// The class that it got, or names.
    pub class: Option<Arc<str>>,
    pub state: State,
}

#[derive(Clone, PartialEq, Debug)]
pub(super) enum State {
    /// No attempt is open; this was the last one, 0 if there was none.
    Between(u32),
    Open(u32),
    Settled(End),
}

#[derive(Clone, PartialEq, Debug)]
pub(super) struct End {
    /// Never `Going`.
    pub state: OtherState,
    pub at: Option<Timestamp>,
}

impl Fixed {
    pub(super) fn of(request: &BuildRequest) -> Self {
        let dir = StoreDir::default();
        let mut fixed = Self {
            namespace: request.namespace().unwrap_or_default().into(),
            name: request.name_any().into(),
            created: request.creation_timestamp().map(|time| time.0).unwrap_or_default(),
            build: None,
            limits: Limits::of(&request.spec),
            outputs: vec![],
            inputs: vec![],
            is_unread: false,
        };
        match convert::target(&request.spec, &dir) {
            Ok(Target::Derivation(derivation)) => fixed.learn(&derivation),
            // An operator has said before what it makes. What it needs is known when it is read again.
            Ok(Target::DrvPath(_)) => {
                match request.status.as_ref().and_then(|status| status.derivation.as_ref()) {
                    Some(known) => {
                        fixed.outputs = known.outputs.values().map(|path| path.as_str().into()).collect();
                    }
                    None => fixed.is_unread = true,
                }
            }
            Err(_) => {}
        }
        fixed
    }

    /// Takes in what is built.
    pub(super) fn learn(&mut self, derivation: &BasicDerivation) {
        let dir = StoreDir::default();
        let full = |path| Arc::from(dir.full(path));
        let known = derivation.output_paths(&dir).ok();
        let build = drover_session::drv_path_of(&dir, derivation).ok();
        self.build = build.as_ref().map(full);
        self.outputs = known.iter().flatten().filter_map(|(_, path)| path.as_ref().map(full)).collect();
        self.inputs = derivation.input_srcs.iter().map(full).collect();
        self.is_unread = false;
    }
}

impl Limits {
    fn of(spec: &BuildRequestSpec) -> Self {
        Self {
            timeout_seconds: spec.timeout_seconds,
            max_silent_seconds: spec.max_silent_seconds,
            max_log_bytes: spec.max_log_bytes,
            max_output_bytes: spec.max_output_bytes,
            retries: spec.retries.build,
            builders: spec.verify.map(|verify| verify.builders),
            resources: spec.resources.clone().map(Box::new),
        }
    }
}

impl Now {
    pub(super) fn of(request: &BuildRequest) -> Self {
        let (spec, status) = (&request.spec, request.status.as_ref());
        let class = status.and_then(|status| status.class.as_deref()).or(spec.class.as_deref());
        let accepted = status.and_then(|status| conditions::find(&status.conditions, conditions::ACCEPTED));
        Self {
            version: request.meta().resource_version.as_deref().and_then(|version| version.parse().ok()),
            priority: spec.priority.unwrap_or(0),
            is_held: spec.suspend == Some(true) || spec.cancel == Some(true),
            is_stuck: accepted.is_some_and(|accepted| accepted.status != conditions::Status::True.as_str()),
            class: class.map(Arc::from),
            state: State::of(request),
        }
    }
}

impl State {
    fn of(request: &BuildRequest) -> Self {
        let Some(status) = &request.status else { return Self::Between(0) };
        let at = status.completion_time.as_ref().map(|time| time.0);
        match conditions::verdict(&status.conditions) {
            Some(true) => Self::Settled(End { state: OtherState::Succeeded, at }),
            Some(false) => {
                let failure = status.failure.clone().unwrap_or_default();
                let reason = Reason::parse(&failure.reason).unwrap_or(Reason::InfrastructureFailure);
                let state = OtherState::Failed { reason, message: shorten(failure.message) };
                Self::Settled(End { state, at })
            }
            None => match status.attempts.last() {
                Some(last) if last.end_time.is_none() => Self::Open(last.number),
                Some(last) => Self::Between(last.number),
                None => Self::Between(status.attempt.unwrap_or(0)),
            },
        }
    }
}

/// Whether another build of the same derivation, with the same limits, would end like this.
pub(super) fn is_of_the_build(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::BuildFailed
            | Reason::TimedOut
            | Reason::MaxSilentExceeded
            | Reason::LogLimitExceeded
            | Reason::OutputSizeLimitExceeded
            | Reason::OutputHashMismatch
            | Reason::OutputRejected
            | Reason::NotDeterministic
    )
}

fn shorten(mut message: String) -> String {
    if message.len() > MAX_MESSAGE {
        let end = (0..=MAX_MESSAGE).rev().find(|end| message.is_char_boundary(*end)).unwrap_or(0);
        message.truncate(end);
        message.push('…');
    }
    message.shrink_to_fit();
    message
}
