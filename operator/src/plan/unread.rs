//! A request that is nothing but a `drvPath`, until that was read: what it waits for, and for how long. Pure.
//!
//! A `.drv` that no cache has is waited for as an input is: whoever applies requests and copies files at once may not be done.
//! A cache that cannot be asked is asked again, as long as it takes, since without it nothing is known that a verdict could
//! be made of; an attempt that runs already is not given up for that.

use std::time::Duration;

use drover_api::conditions::{self, Status};
use drover_api::{DerivationStatus, MAX_OUTPUTS, Phase, Reason, Trust};
use drover_nix::{StoreDir, StorePath};
use jiff::Timestamp;

use super::begin::{age, look};
use super::{Action, IDLE, Plan, Requeue, clean_up, end, go_on, hold_back};
use crate::status::Draft;
use crate::world::{Class, Resolution, World};

/// What was found is said in the status: columns show it, and an operator that starts anew knows by it who makes what.
pub(super) fn note(world: &World, draft: &mut Draft) {
    let Resolution::Found(found) = &world.resolution else { return };
    let (derivation, dir) = (&found.derivation, StoreDir::default());
    if world.request.spec.derivation.is_some() || derivation.outputs.len() > MAX_OUTPUTS {
        return;
    }
    // Paths that make no sense are said by those who need them.
    let known = derivation.output_paths(&dir).unwrap_or_default().into_iter();
    let outputs = known.filter_map(|(name, path)| Some((name.to_string(), dir.full(&path?)))).collect();
    draft.status.derivation = Some(DerivationStatus { system: derivation.system.to_string(), outputs });
}

/// The derivation is not known: has it read, or waits, or ends the request.
pub(super) fn wait(world: &World, mut draft: Draft, now: Timestamp) -> Plan {
    let open = draft.open_attempt().map(|attempt| attempt.number);
    let mut actions = match open {
        Some(_) => clean_up(world, open),
        None => hold_back(world),
    };
    let (message, within) = match &world.resolution {
        Resolution::Absent { path } => {
            let (reason, message) = absent(world, path);
            let left = world.timeouts.input_grace.saturating_sub(age(world, now));
            if open.is_none() && left.is_zero() && world.request.spec.suspend != Some(true) {
                draft.fail(reason, &message, &[]);
                return end(world, draft, now);
            }
            (message, if left.is_zero() { Duration::MAX } else { left })
        }
        Resolution::Unreadable { why } => {
            (format!("spec.drvPath cannot be read from the class's caches: {why}"), Duration::MAX)
        }
        Resolution::Unknown | Resolution::Refused { .. } | Resolution::Found(_) => {
            actions.push(Action::ReadDerivation);
            let requeue = if world.live { Requeue::Live } else { Requeue::Now };
            return Plan { status: None, actions, requeue };
        }
    };
    actions.push(Action::ForgetLookUp);
    if open.is_none() && world.request.spec.suspend == Some(true) {
        draft.progress(Phase::Pending, Reason::Suspended, "spec.suspend is true");
        return go_on(draft, actions, IDLE);
    }
    let phase = if open.is_some() { Phase::Running } else { Phase::Pending };
    draft.progress(phase, Reason::WaitingForInput, &message);
    if !conditions::is_true(&draft.status.conditions, conditions::ACCEPTED) {
        draft.phase(conditions::ACCEPTED, Status::Unknown, Reason::WaitingForInput, &message);
    }
    go_on(draft, actions, look(world, now).min(within))
}

/// Why a `.drv` that is not there ends the request, once it has been waited for, and the message.
fn absent(world: &World, path: &StorePath) -> (Reason, String) {
    let dir = StoreDir::default();
    let given = world.request.spec.drv_path.as_deref().unwrap_or_default();
    let full = dir.full(path);
    if full == given {
        let message = format!(
            "{full} is in none of the class's caches: copy it there with the .drv files below it (nix copy --derivation), \
             or give spec.derivation as well"
        );
        return (Reason::InputMissing, message);
    }
    let is_proof = matches!(&world.class, Class::Found { spec, .. } if spec.trust == Trust::Verified);
    let message = format!(
        "{full}, an input of {given}, is in none of the class's caches: copy it there with the .drv files below it (nix \
         copy --derivation)"
    );
    (if is_proof { Reason::PathNotProven } else { Reason::InputMissing }, message)
}
