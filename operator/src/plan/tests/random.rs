//! Long random lives in which everything goes wrong together: what the exhaustive scenarios leave out for their size.

use proptest::prelude::*;

use super::sim::*;
use super::*;

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => Just(Event::Schedule),
        10 => Just(Event::Advance),
        4 => Just(Event::Wait),
        1 => reason().prop_map(Event::Ends),
        1 => Just(Event::Ends(Reason::ConnectionLost)),
        1 => Just(Event::PodEnds("Evicted", None)),
        1 => Just(Event::PodEnds("OOMKilled", Some(137))),
        1 => Just(Event::ContainerEnds),
        1 => Just(Event::Drain),
        1 => Just(Event::PodGone),
        1 => Just(Event::ImageFails),
        1 => Just(Event::Crash),
        1 => any::<bool>().prop_map(Event::Suspend),
        2 => env().prop_map(Event::Env),
    ]
}

/// What a session can end by.
fn reason() -> impl Strategy<Value = Reason> {
    let ends = Reason::ALL.iter().copied();
    let ends =
        ends.filter(|reason| matches!(reason.kind(), ReasonKind::Failure | ReasonKind::Infrastructure));
    prop::sample::select(ends.collect::<Vec<_>>())
}

fn env() -> impl Strategy<Value = Env> {
    let input = prop::sample::select(vec![Input::Cached, Input::Cached, Input::Going]);
    let same = prop::sample::select(vec![Same::None, Same::None, Same::Running]);
    let admission = prop::sample::select(vec![Admission::Open, Admission::Open, Admission::Quota]);
    (input, same, admission, any::<bool>(), any::<bool>()).prop_map(
        |(input, same, admission, has_room, has_class)| Env {
            input,
            same,
            admission,
            has_room,
            has_class,
            ..Env::GOOD
        },
    )
}

proptest! {
    /// Whatever happens, wherever a pass is cut off and whatever the watches show, every request comes to exactly one end.
    #[test]
    fn every_request_ends_once(
        events in prop::collection::vec((event(), 0usize..6, prop::bool::weighted(0.1)), 0..120),
        infrastructure in 0u32..5,
        build in 0u32..3,
    ) {
        let mut spec = spec();
        (spec.retries.infrastructure, spec.retries.build) = (infrastructure, build);
        let mut sim = Sim::new(spec, class());
        for (event, cut, is_stale) in events {
            sim.happen(event);
            // Most passes are whole; cuts at 4 and beyond hardly ever bite.
            if is_stale {
                sim.stale_pass(cut + 1);
            } else {
                sim.pass(cut + 1);
            }
        }
        sim.settle();
    }

    /// A plan that is made twice of the same world is the same plan: nothing is random.
    #[test]
    fn plans_are_deterministic(events in prop::collection::vec(event(), 0..30)) {
        let mut sim = Sim::new(spec(), class());
        for event in events {
            sim.happen(event);
            prop_assert_eq!(plan(&sim.world(false), sim.now), plan(&sim.world(false), sim.now));
            sim.pass(usize::MAX);
        }
    }
}
