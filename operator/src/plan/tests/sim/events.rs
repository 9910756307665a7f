//! What happens outside of the operator.

use drover_api::{Reason, Timings, Transfer};
use jiff::{SignedDuration, Timestamp};

use super::{Env, Event, Input, STEP, Same, Sim, Step, outputs};
use crate::world::{PodEnd, PodView, SessionEnd, Stage};

impl Sim {
    /// Whether anything comes of it.
    pub(in crate::plan::tests) fn happen(&mut self, event: Event) -> bool {
        self.trail.push(Step::Happened(event));
        match event {
            Event::Wait => self.now = self.now.saturating_add(SignedDuration::from_secs(STEP)).unwrap(),
            Event::Schedule => {
                let now = self.now;
                let mut any = false;
                for pod in self.pods.iter_mut().filter(|pod| pod.node.is_none()) {
                    (pod.node, pod.scheduled, pod.unschedulable) = (Some("node".into()), Some(now), None);
                    any = true;
                }
                return any;
            }
            Event::Advance => return self.advance(),
            Event::Ends(reason) => return self.end_session(reason),
            Event::PodEnds(reason, exit_code) => return self.end_pods(reason, exit_code, None),
            Event::ContainerEnds => return self.end_pods("Error", Some(143), Some(self.now)),
            Event::Drain => {
                let message = Some(("EvictionByEvictionAPI".to_owned(), "drained".to_owned()));
                let mut any = false;
                for pod in self.pods.iter_mut().filter(|pod| !pod.deleting) {
                    (pod.deleting, pod.disruption) = (true, message.clone());
                    any = true;
                }
                return any;
            }
            Event::PodGone => {
                let any = !self.pods.is_empty();
                self.pods.clear();
                self.end_session(Reason::ConnectionLost);
                return any;
            }
            Event::ImageFails => {
                let can =
                    |pod: &&mut PodView| pod.node.is_some() && pod.waiting.is_none() && pod.ended.is_none();
                let starts = self.session.as_ref().is_none_or(|session| session.stage == Stage::Connecting);
                let Some(pod) = self.pods.iter_mut().filter(can).find(|_| starts) else { return false };
                pod.waiting = Some(("ErrImagePull".into(), "not found".into()));
            }
            Event::Crash => self.crash(),
            Event::Env(env) => {
                if self.env == env || (self.env.outputs && !env.outputs) {
                    return false;
                }
                self.env = env;
                self.promote();
            }
            Event::Cancel if self.request.spec.cancel.replace(true).is_some() => return false,
            Event::Suspend(on) if self.request.spec.suspend.replace(on) == Some(on) => return false,
            Event::Cancel | Event::Suspend(_) => self.change(),
        }
        true
    }

    fn advance(&mut self) -> bool {
        let is_running = |uid: &str| {
            let pod = self.pods.iter().find(|pod| pod.uid == uid);
            pod.is_some_and(|pod| pod.ended.is_none() && pod.waiting.is_none())
        };
        let Some(session) = &self.session else { return false };
        if session.end.is_some() || !is_running(&session.pod_uid) {
            return false;
        }
        let next = self.stages.iter().find(|stage| **stage > session.stage).copied();
        let (now, session) = (self.now, self.session.as_mut().expect("it was there"));
        match next {
            Some(next) => session.stage = next,
            None => {
                self.env.outputs = true;
                session.end = Some(SessionEnd::Finished {
                    outputs: outputs(),
                    transfer: Transfer::default(),
                    timings: Timings::default(),
                });
                session.end_time = Some(now);
            }
        }
        true
    }

    fn end_session(&mut self, reason: Reason) -> bool {
        let Some(session) = self.session.as_mut().filter(|session| session.end.is_none()) else {
            return false;
        };
        session.log_tail = vec!["error: no".into()];
        let (message, infrastructure) = (format!("it ended by {reason}"), reason.is_infrastructure());
        (session.end, session.end_time) =
            (Some(SessionEnd::Failed { reason, message, infrastructure }), Some(self.now));
        true
    }

    fn end_pods(&mut self, reason: &str, exit_code: Option<i32>, only_container: Option<Timestamp>) -> bool {
        let end = PodEnd {
            reason: reason.into(),
            message: String::new(),
            exit_code,
            last_line: Some("no sandbox here".into()),
            only_container_since: only_container,
        };
        // What its container alone has said may be said better.
        let may = |pod: &PodView| {
            pod.ended
                .as_ref()
                .is_none_or(|ended| ended.only_container_since.is_some() && only_container.is_none())
        };
        let mut any = false;
        for pod in self.pods.iter_mut().filter(|pod| may(pod)) {
            pod.ended = Some(end.clone());
            any = true;
        }
        if any {
            self.end_session(Reason::ConnectionLost);
        }
        any
    }

    /// A step in which all goes well: whatever others do wrong ends, a node is found, a session gets on, time passes.
    pub(in crate::plan::tests) fn go_well(&mut self) {
        self.request.spec.suspend = None;
        let outputs = self.env.outputs;
        // Nothing in a circle comes to an end by itself.
        let comes = self.env.input == Input::Going && !self.env.has_cycle;
        let input = if comes { Input::Cached } else { self.env.input };
        let same = if self.env.same == Same::Running { Same::None } else { self.env.same };
        let has_cycle = self.env.has_cycle;
        self.happen(Event::Env(Env { outputs, input, same, has_cycle, ..Env::GOOD }));
        self.pods.retain(|pod| !pod.deleting);
        self.happen(Event::Schedule);
        for pod in &mut self.pods {
            pod.waiting = None;
        }
        self.happen(Event::Advance);
        self.happen(Event::Wait);
        self.pass(usize::MAX);
    }

    /// Lets everything go well from here until the request is settled.
    pub(in crate::plan::tests) fn settle(&mut self) {
        for _ in 0..500 {
            if self.is_settled() {
                return self.check_settled();
            }
            self.go_well();
        }
        panic!("no end in sight: {:#?}", self.request.status);
    }
}
