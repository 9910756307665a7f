//! Ten thousand requests: nothing may cost more for each the more there are.

use std::collections::BTreeSet;
use std::time::Instant;

use drover_api::BuildRequest;

use super::{Both, ONE, request};
use crate::world::Slot;

/// Thousands of requests in a row, each of which needs the one before, applied in either order and built; and thousands that
/// need the same. What this guards against takes a hundred times longer.
#[test]
fn ten_thousand_requests() {
    const COUNT: usize = 10_000;
    let begun = Instant::now();
    let name = |n: usize| format!("b{n}");
    let in_a_row = |n: usize| match n {
        0 => request("a", "r0", "b0", &[]),
        n => request("a", &format!("r{n}"), &name(n), &[&name(n - 1)]),
    };
    let requests: Vec<BuildRequest> = (0..COUNT).map(in_a_row).collect();
    let made = begun.elapsed();
    let begun = Instant::now();
    for reverse in [false, true] {
        let mut both = Both::default();
        let mut order: Vec<usize> = (0..COUNT).collect();
        if reverse {
            order.reverse();
        }
        for n in order {
            both.apply(requests[n].clone());
            if n > 0 {
                let input = requests[n].spec.derivation.as_ref().unwrap().input_srcs[0].clone();
                both.index.waits(&format!("a/r{n}"), &BTreeSet::from([input]));
            }
            assert!(both.news().len() <= 1, "more than one was told of r{n}");
        }
        for n in 0..COUNT {
            let uid = format!("a/r{n}");
            let others = both.index.others(&uid, Some("c"));
            assert!(others.cycle.is_empty());
            assert_eq!(both.ask(&uid, ONE), Slot::Granted);
            both.begin(&uid);
            both.settle(&uid, None);
            let told: Vec<String> = both.news().into_iter().map(|(uid, _)| uid).collect();
            let next = (n + 1 < COUNT).then(|| format!("a/r{}", n + 1));
            assert_eq!(told, Vec::from_iter(next), "an end concerns who waits for it and nobody else");
        }
    }
    // All of them ask at once, from a hundred namespaces, for one place.
    let mut both = Both::default();
    for (n, request) in requests.iter().enumerate() {
        let uid = format!("n{}/r{n}", n % 100);
        let mut request = request.clone();
        request.metadata.namespace = Some(format!("n{}", n % 100));
        request.metadata.uid = Some(uid.clone());
        both.apply(request);
        both.ask(&uid, ONE);
    }
    for _ in 0..COUNT {
        let news = both.news();
        assert!(news.len() <= 1);
        let uid = news.first().map_or_else(|| "n0/r0".to_owned(), |(uid, _)| uid.clone());
        both.begin(&uid);
        both.settle(&uid, None);
    }
    assert!(both.news().is_empty());
    let took = begun.elapsed();
    eprintln!("10,000 requests: making them {made:?}, three lives of them {took:?}");
    assert!(took.as_secs() < 60, "{took:?}");
}
