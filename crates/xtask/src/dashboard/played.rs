//! Seven hours of a cluster that never was: a morning with more builds than places, and an hour in which nodes go.
//!
//! The same each time. Names and labels are the operator's; a panel that finds none of them shows nothing, which is an error.

use std::fmt::Write as _;

/// In seconds of Unix: 2026-01-01, 06:00 to 13:00.
pub(super) const START: i64 = 1_767_247_200;
pub(super) const END: i64 = START + 7 * 3600;
const STEP: i64 = 60;

/// OpenMetrics' text, each sample with its time.
pub(super) fn samples() -> String {
    let mut text = String::new();
    let day = |minute: f64| 1.0 + (minute / 420.0 * std::f64::consts::PI).sin() * 3.0;
    let storm = |minute: f64| if (240.0..300.0).contains(&minute) { 1.0 } else { 0.0 };
    let mut counter = |name: &str, labels: &str, a_minute: &dyn Fn(f64) -> f64| {
        let mut sum = 0.0;
        each(|minute, time| {
            sum += a_minute(minute) * (0.7 + 0.6 * noise(name, labels, minute));
            line(&mut text, name, labels, sum, time);
        });
    };
    for (result, reason, share) in
        [("succeeded", "Built", 1.0), ("succeeded", "AlreadyBuilt", 0.6), ("failed", "BuildFailed", 0.08)]
    {
        let labels = format!("result=\"{result}\",reason=\"{reason}\"");
        counter("drover_builds_total", &labels, &|minute| share * day(minute));
    }
    counter("drover_builds_saved_total", "by=\"cache\"", &|minute| 0.5 * day(minute));
    counter("drover_builds_saved_total", "by=\"same_build\"", &|minute| 0.1 * day(minute));
    counter("drover_attempts_total", "fault=\"none\",reason=\"Built\"", &day);
    counter("drover_attempts_total", "fault=\"infrastructure\",reason=\"Evicted\"", &|m| {
        0.01 + 0.4 * storm(m)
    });
    counter("drover_attempts_total", "fault=\"infrastructure\",reason=\"NodeLost\"", &|m| 0.2 * storm(m));
    counter("drover_retries_total", "budget=\"infrastructure\",reason=\"Evicted\"", &|m| {
        0.01 + 0.4 * storm(m)
    });
    counter("drover_reconnects_total", "", &|minute| 0.01 + 0.1 * storm(minute));
    counter("drover_pods_created_total", "", &|minute| day(minute) + storm(minute));
    for (route, megabytes) in [("sent", 40.0), ("fetched", 160.0), ("received", 60.0), ("stored", 20.0)] {
        counter("drover_transfer_bytes_total", &format!("route=\"{route}\""), &|m| megabytes * 1e6 * day(m));
    }
    for (source, paths) in [("present", 20.0), ("fetched", 60.0), ("sent", 8.0)] {
        counter("drover_transfer_paths_total", &format!("source=\"{source}\""), &|minute| {
            paths * day(minute)
        });
    }
    counter("drover_cache_questions_total", "answered_by=\"memory\"", &|minute| 200.0 * day(minute));
    counter("drover_cache_questions_total", "answered_by=\"cache\"", &|minute| 80.0 * day(minute));
    counter("drover_cache_errors_total", "", &|minute| 0.02 * storm(minute));
    counter("drover_cache_paths_wrong_total", "", &|_| 0.0);
    counter("drover_reconcile_errors_total", "kind=\"conflict\"", &|minute| 0.3 * day(minute));
    counter("drover_reconcile_errors_total", "kind=\"api-timeout\"", &storm);
    counter("drover_trace_spans_dropped_total", "", &storm);
    counter("drover_status_writes_total", "", &|minute| 7.0 * day(minute));
    for (verb, code, share) in [
        ("get", "200", 12.0),
        ("patch", "200", 7.0),
        ("create", "201", 1.0),
        ("patch", "409", 0.3),
        ("watch", "200", 0.2),
    ] {
        let labels = format!("verb=\"{verb}\",code=\"{code}\"");
        counter("drover_api_requests_total", &labels, &|minute| share * day(minute));
    }
    counter("drover_watch_errors_total", "watch=\"pods\"", &|minute| 0.02 * storm(minute));
    for (name, labels, median) in [
        ("drover_request_duration_seconds", "result=\"succeeded\"", 90.0),
        ("drover_request_duration_seconds", "result=\"failed\"", 40.0),
        ("drover_queue_wait_seconds", "", 4.0),
        ("drover_pod_start_seconds", "", 3.0),
        ("drover_phase_duration_seconds", "phase=\"start\"", 1.5),
        ("drover_phase_duration_seconds", "phase=\"connect\"", 0.04),
        ("drover_phase_duration_seconds", "phase=\"copy_in\"", 6.0),
        ("drover_phase_duration_seconds", "phase=\"build\"", 60.0),
        ("drover_phase_duration_seconds", "phase=\"collect\"", 4.0),
        ("drover_reconcile_duration_seconds", "", 0.008),
        ("drover_api_request_duration_seconds", "verb=\"get\"", 0.006),
        ("drover_api_request_duration_seconds", "verb=\"patch\"", 0.012),
    ] {
        for bound in [0.1, 0.3, 0.6, 1.0, 2.0, 4.0, 10.0, f64::INFINITY] {
            let le = if bound.is_finite() { (bound * median).to_string() } else { "+Inf".to_owned() };
            let labels = format!("le=\"{le}\"{}{labels}", if labels.is_empty() { "" } else { "," });
            // Of a wide spread, the share that is below the bound; more is slow while there is more to do.
            let below = |minute: f64| 1.0 - (-0.7 * bound * 4.0 / (2.0 + day(minute) / 2.0)).exp();
            let mut sum = 0.0;
            each(|minute, time| {
                sum += 10.0 * day(minute) * below(minute);
                line(&mut text, &format!("{name}_bucket"), &labels, sum, time);
            });
        }
    }
    let mut gauge = |name: &str, labels: &str, value: &dyn Fn(f64) -> f64| {
        each(|minute, time| {
            let value = value(minute) * (0.8 + 0.4 * noise(name, labels, minute));
            line(&mut text, name, labels, value.round(), time);
        });
    };
    for (reason, share) in
        [("Building", 4.0), ("CopyingInputs", 1.0), ("StartingBuilder", 1.0), ("WaitingForConcurrency", 2.0)]
    {
        gauge("drover_requests", &format!("reason=\"{reason}\""), &|minute| share * day(minute));
    }
    gauge("drover_requests", "reason=\"WaitingForNode\"", &|minute| 6.0 * storm(minute));
    gauge("drover_oldest_waiting_seconds", "reason=\"WaitingForConcurrency\"", &|minute| 40.0 * day(minute));
    gauge("drover_oldest_waiting_seconds", "reason=\"WaitingForNode\"", &|minute| 200.0 * storm(minute));
    for (state, share) in [("pending", 0.3), ("starting", 0.8), ("running", 5.0), ("ending", 0.3)] {
        gauge("drover_builders", &format!("state=\"{state}\""), &|minute| share * day(minute));
    }
    gauge("drover_sessions", "", &|minute| 5.0 * day(minute));
    for (name, labels, value) in [
        ("drover_builders_orphaned", "", 0.0),
        ("drover_unreadable_objects", "watch=\"requests\"", 0.0),
        ("drover_leader", "", 1.0),
        ("drover_ready", "", 1.0),
        ("drover_build_info", "version=\"0.1.0\"", 1.0),
    ] {
        each(|_, time| line(&mut text, name, labels, value, time));
    }
    text.push_str("# EOF\n");
    text
}

fn each(mut at: impl FnMut(f64, i64)) {
    for time in (START..=END).step_by(STEP as usize) {
        at((time - START) as f64 / 60.0, time);
    }
}

fn line(text: &mut String, name: &str, labels: &str, value: f64, time: i64) {
    let more = if labels.is_empty() { "" } else { "," };
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "{name}{{namespace=\"drover-system\",pod=\"drover-a\"{more}{labels}}} {value:.3} {time}"
    );
}

/// From 0 to 1, the same each time.
fn noise(name: &str, labels: &str, minute: f64) -> f64 {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    let bytes = name.bytes().chain(labels.bytes()).chain((minute as u32).to_le_bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325, step);
    (hash >> 40) as f64 / f64::from(1u32 << 24)
}
