//! Metrics with labels whose values are all known: every series is made at the start, and counting takes no lock.
//!
//! A counter that begins with its first event hides that one from Prometheus' `rate` and `increase`; these begin at 0.

use std::fmt;
use std::sync::Arc;

use prometheus_client::encoding::{EncodeMetric, MetricEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::{MetricType, TypedMetric};

use super::table::{OTHER, Spec};

/// All series of one metric. Clones are one.
#[derive(Clone, Debug)]
pub struct Series<M>(Arc<Inner<M>>);

#[derive(Debug)]
struct Inner<M> {
    all: Vec<One<M>>,
    /// Takes what has no place, which a test of the table's lists keeps from happening.
    lost: M,
}

#[derive(Debug)]
struct One<M> {
    labels: Vec<(&'static str, &'static str)>,
    metric: M,
    /// Not shown while it is 0.
    is_rare: bool,
}

impl<M> Series<M> {
    pub fn new(spec: &Spec, make: impl Fn() -> M) -> Self {
        let one = |values: Vec<&'static str>, is_rare| One {
            labels: spec.labels.iter().copied().zip(values).collect(),
            metric: make(),
            is_rare,
        };
        let often = (spec.series)().into_iter().map(|values| one(values, false));
        let all = often.chain((spec.rare)().into_iter().map(|values| one(values, true))).collect();
        Self(Arc::new(Inner { all, lost: make() }))
    }

    /// The series with these values, in the order of the labels. A last one that no list has is "other".
    pub fn of(&self, values: &[&str]) -> &M {
        let find =
            |last: Option<&str>| {
                self.0.all.iter().find(|one| {
                    let end = values.len().saturating_sub(1);
                    one.labels.len() == values.len()
                        && one.labels.iter().zip(values).enumerate().all(|(at, ((_, has), wanted))| {
                            *has == last.filter(|_| at == end).unwrap_or(wanted)
                        })
                })
            };
        let found = find(None).or_else(|| find(Some(OTHER)));
        debug_assert!(found.is_some(), "no series has the values {values:?}");
        found.map_or(&self.0.lost, |one| &one.metric)
    }

    /// Every series with the value of its only, or first, label.
    pub fn each(&self) -> impl Iterator<Item = (&'static str, &M)> {
        self.0.all.iter().map(|one| (one.labels.first().map_or("", |(_, value)| value), &one.metric))
    }
}

/// Whether nothing was counted.
pub trait IsZero {
    fn is_zero(&self) -> bool;
}

impl IsZero for Counter {
    fn is_zero(&self) -> bool {
        self.get() == 0
    }
}

impl IsZero for Gauge {
    fn is_zero(&self) -> bool {
        self.get() == 0
    }
}

/// It does not say; the table has no rare ones.
impl IsZero for Histogram {
    fn is_zero(&self) -> bool {
        false
    }
}

impl<M: EncodeMetric + TypedMetric + IsZero> EncodeMetric for Series<M> {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        for one in self.0.all.iter().filter(|one| !one.is_rare || !one.metric.is_zero()) {
            one.metric.encode(encoder.encode_family(&one.labels)?)?;
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        M::TYPE
    }
}

#[cfg(test)]
mod tests {
    use super::super::table::{API_REQUESTS, BUILDS};
    use super::*;

    #[test]
    fn values_find_their_series() {
        let builds: Series<Counter> = Series::new(&BUILDS, Counter::default);
        builds.of(&["succeeded", "Built"]).inc();
        assert_eq!(builds.of(&["succeeded", "Built"]).get(), 1);
        assert_eq!(builds.of(&["succeeded", "AlreadyBuilt"]).get(), 0);
        let calls: Series<Counter> = Series::new(&API_REQUESTS, Counter::default);
        calls.of(&["get", "418"]).inc();
        assert_eq!(calls.of(&["get", "other"]).get(), 1);
    }
}
