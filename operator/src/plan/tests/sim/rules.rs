//! What must hold at every write of a status, and at the end (DESIGN.md: S2, S3, S9, S10, S12).

use std::collections::BTreeSet;

use drover_api::BuildRequestStatus;
use drover_api::conditions::verdict;

use super::{Input, Sim};
use crate::plan::{Requeue, plan};
use crate::world::{Resolution, World};

impl Sim {
    pub(super) fn write(&mut self, status: &BuildRequestStatus, world: &World) {
        let old = self.request.status.clone().unwrap_or_default();
        assert_eq!(verdict(&old.conditions), None, "a verdict is the last word");
        let now_said = verdict(&status.conditions);
        if now_said != Some(true)
            && (now_said == Some(false) || attempts_ended(status) > attempts_ended(&old))
        {
            assert!(world.live, "a failure is said from a live world only: {:?}", status.failure);
        }
        assert_eq!(now_said == Some(true), !status.outputs.is_empty(), "outputs are there if it succeeded");
        assert_eq!(now_said == Some(false), status.failure.is_some());
        assert!(status.outputs.is_empty() || self.env.outputs, "outputs are recorded after they were stored");
        self.check_attempts(&old, status);
        if self.open().is_none() {
            self.check_words(status);
        }
        for condition in &status.conditions {
            self.reasons.insert(condition.reason.clone());
        }
        self.reasons.extend(status.attempts.iter().filter_map(|attempt| attempt.reason.clone()));
        self.verdicts.extend(now_said);
        self.before = (self.request.clone(), self.pods.clone());
        self.writes += 1;
        self.change();
        self.request.status = Some(status.clone());
        if now_said.is_some() || attempts_ended(status) > attempts_ended(&old) {
            (self.asked, self.granted) = (None, None);
        }
    }

    /// History only grows, by one attempt at a time that had leave, within the budgets.
    fn check_attempts(&self, old: &BuildRequestStatus, new: &BuildRequestStatus) {
        for (before, after) in old.attempts.iter().zip(&new.attempts) {
            if before.end_time.is_some() {
                assert_eq!((before.number, &before.reason), (after.number, &after.reason));
            }
        }
        assert!(new.attempts.iter().enumerate().all(|(index, one)| one.number as usize == index + 1));
        let open = new.attempts.iter().filter(|attempt| attempt.end_time.is_none()).count();
        assert!(open <= usize::from(verdict(&new.conditions).is_none()), "{open} attempts are open");
        match new.attempts.len() - old.attempts.len() {
            0 => {}
            1 => {
                assert_eq!(self.granted, Some(new.attempts.len() as u32), "nothing begins without leave");
                assert_ne!(self.request.spec.suspend, Some(true), "nothing begins that is suspended");
            }
            more => panic!("{more} attempts at once"),
        }
        let budget = self.request.spec.retries;
        let failed = new
            .attempts
            .iter()
            .filter(|one| one.end_time.is_some() && verdict(&new.conditions) != Some(true));
        let (machine, build): (Vec<_>, Vec<_>) = failed.partition(|attempt| attempt.infrastructure);
        assert!(machine.len() <= budget.infrastructure as usize + 1, "{machine:#?}");
        assert!(build.len() <= budget.build as usize + 1, "{build:#?}");
        let raised: BTreeSet<_> =
            new.attempts.iter().filter_map(|one| one.memory.as_ref().map(|m| &m.0)).collect();
        assert!(raised.len() <= 1, "memory is raised once: {raised:?}");
    }

    /// Verdicts about others are true. Once an attempt has begun, it is the builder who says why it failed.
    fn check_words(&self, status: &BuildRequestStatus) {
        let said = status.failure.as_ref().map(|failure| failure.reason.as_str());
        let is_true = match said {
            Some("InputMissing") => {
                (self.read_live && matches!(self.resolution, Resolution::Absent { .. }))
                    || (!self.env.has_unread && matches!(self.env.input, Input::Orphan | Input::Lost))
            }
            Some("PathNotProven") => self.read_live && matches!(self.resolution, Resolution::Refused { .. }),
            Some("DependencyFailed") => self.env.input == Input::Failed,
            Some("DependencyCycle") => self.env.has_cycle,
            Some("Cancelled") => self.request.spec.cancel == Some(true),
            _ => true,
        };
        assert!(is_true, "{said:?} after {:?}", self.trail);
    }

    pub(in crate::plan::tests) fn check_settled(&self) {
        assert!(self.is_settled(), "nothing is left behind");
        assert_eq!(self.verdicts.len(), 1, "a verdict is spoken once");
        assert!(self.status().attempts.iter().all(|attempt| attempt.end_time.is_some()));
        for live in [false, true] {
            let again = plan(&self.world(live), self.now);
            assert_eq!((again.status, again.actions), (None, vec![]), "a settled request is left alone");
            assert!(matches!(again.requeue, Requeue::After(_)), "{:?}", again.requeue);
        }
    }
}

fn attempts_ended(status: &BuildRequestStatus) -> usize {
    status.attempts.iter().filter(|attempt| attempt.end_time.is_some()).count()
}
