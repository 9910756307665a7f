//! The page against the table.

use std::collections::BTreeSet;

use super::*;

#[test]
fn what_is_registered_is_the_table_and_the_table_is_registered() {
    let page = Metrics::new().render();
    let types: BTreeSet<(String, String)> = page
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE "))
        .filter_map(|line| line.split_once(' '))
        .map(|(name, kind)| (name.to_owned(), kind.to_owned()))
        .collect();
    let base = |spec: &&Spec| {
        let name = spec.full_name();
        let name =
            name.strip_suffix("_total").or_else(|| name.strip_suffix("_info")).unwrap_or(&name).to_owned();
        (name, spec.kind.as_str().to_owned())
    };
    assert_eq!(types, table::ALL.iter().map(base).collect());
    assert_eq!(types.len(), page.lines().filter(|line| line.starts_with("# HELP ")).count());
    assert!(page.ends_with("# EOF\n"));
}

#[test]
fn every_series_is_one_of_the_tables() {
    let metrics = Metrics::new();
    metrics.asked("get", Some(404), Duration::from_millis(3));
    metrics.record(&[Observation::AttemptEnded { fault: "infrastructure", reason: "InputHashMismatch" }]);
    let page = metrics.render();
    for line in page.lines().filter(|line| !line.starts_with('#')) {
        let (series, _) = line.rsplit_once(' ').unwrap();
        let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
        let spec = table::ALL.iter().find(|spec| {
            let full = spec.full_name();
            name == full
                || ["_bucket", "_sum", "_count"].iter().any(|end| name.strip_suffix(end) == Some(&full))
        });
        let spec = spec.unwrap_or_else(|| panic!("{name} is not in the table"));
        for label in labels.trim_end_matches('}').split(',').filter(|label| !label.is_empty()) {
            let (key, value) = label.split_once('=').unwrap();
            let value = value.trim_matches('"');
            let is_bucket = key == "le" && matches!(spec.kind, Kind::Histogram(_));
            assert!(is_bucket || spec.values(key).contains(&value), "{line}");
        }
    }
    assert!(
        page.contains("drover_attempts_total{fault=\"infrastructure\",reason=\"InputHashMismatch\"} 1\n")
    );
}

#[test]
fn counters_are_there_before_anything_happens() {
    let page = Metrics::new().render();
    for series in [
        "drover_builds_total{result=\"succeeded\",reason=\"Built\"} 0",
        "drover_retries_total{budget=\"infrastructure\",reason=\"Evicted\"} 0",
        "drover_reconcile_errors_total{kind=\"conflict\"} 0",
        "drover_watch_errors_total{watch=\"pods\"} 0",
        "drover_reconcile_duration_seconds_count 0",
        "drover_leader 0",
        "drover_ready 0",
    ] {
        assert!(page.contains(&format!("\n{series}\n")), "{series}\n{page}");
    }
    assert!(page.contains("drover_build_info{version=\""), "{page}");
}

#[test]
fn what_there_is_now_is_counted_anew_each_time() {
    let metrics = Metrics::new();
    let census = |waiting: i64, asked: u64| Census {
        requests: [("WaitingForNode", waiting)].into(),
        oldest_seconds: [("WaitingForNode", 77)].into(),
        builders: [("running", 3)].into(),
        orphans: 1,
        caches: drover_cache::Counts { recalled: 1, asked, wrong: 2 },
        cache_errors: 4,
    };
    metrics.count_with(Some(Box::new(move || census(5, 10))));
    let page = metrics.render();
    for line in [
        "drover_requests{reason=\"WaitingForNode\"} 5",
        "drover_requests{reason=\"Building\"} 0",
        "drover_oldest_waiting_seconds{reason=\"WaitingForNode\"} 77",
        "drover_builders{state=\"running\"} 3",
        "drover_builders_orphaned 1",
        "drover_cache_questions_total{answered_by=\"cache\"} 10",
        "drover_cache_paths_wrong_total 2",
        "drover_cache_errors_total 4",
    ] {
        assert!(page.contains(&format!("\n{line}\n")), "{line}\n{page}");
    }
    // Counters never go back, even where the one that is asked has forgotten.
    metrics.count_with(Some(Box::new(move || census(0, 3))));
    let page = metrics.render();
    assert!(page.contains("drover_requests{reason=\"WaitingForNode\"} 0\n"), "{page}");
    assert!(page.contains("drover_cache_questions_total{answered_by=\"cache\"} 10\n"), "{page}");
    metrics.count_with(None);
    assert!(metrics.render().contains("drover_builders{state=\"running\"} 0\n"));
}
