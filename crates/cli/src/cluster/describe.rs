//! `drover describe`: a request's story as text. Pure.

use std::fmt::Write as _;

use drover_api::{BuildRequest, Timings, format_duration};
use kube::ResourceExt as _;

/// Where the request stands, what was tried, how long it took, what came out.
pub(super) fn text(request: &BuildRequest) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = write(request, &mut text);
    text
}

fn write(request: &BuildRequest, text: &mut String) -> std::fmt::Result {
    writeln!(text, "Name:       {}", request.name_any())?;
    if let Some(namespace) = request.namespace() {
        writeln!(text, "Namespace:  {namespace}")?;
    }
    if let Some(derivation) = &request.spec.derivation {
        writeln!(text, "Derivation: {} for {}", derivation.name, derivation.system)?;
    }
    // The API server itself gives every request a status that says nothing.
    let Some(status) = request.status.as_ref().filter(|status| !status.conditions.is_empty()) else {
        return writeln!(text, "The operator has not looked at it yet.");
    };
    if let (Some(derivation), Some(drv_path)) = (&status.derivation, &request.spec.drv_path) {
        writeln!(text, "Derivation: {drv_path} for {}", derivation.system)?;
        if status.outputs.is_empty() {
            for (name, path) in &derivation.outputs {
                writeln!(text, "To make:    {name}  {path}")?;
            }
        }
    }
    for (label, value) in [
        ("Class:      ", &status.class),
        ("Drv:        ", &status.drv_path),
        ("Duration:   ", &status.duration),
    ] {
        if let Some(value) = value {
            writeln!(text, "{label}{value}")?;
        }
    }
    writeln!(text, "Conditions:")?;
    for condition in &status.conditions {
        let at = &condition.last_transition_time.0;
        let (name, is, why) = (&condition.type_, &condition.status, &condition.reason);
        writeln!(text, "  {at:.0}  {name:<17} {is:<8} {why}  {}", condition.message.trim_end())?;
    }
    if !status.attempts.is_empty() {
        writeln!(text, "Attempts:")?;
        for attempt in &status.attempts {
            let or_dash = |field: &Option<String>| field.clone().unwrap_or_else(|| "-".into());
            let (pod, node, reason) =
                (or_dash(&attempt.pod), or_dash(&attempt.node), or_dash(&attempt.reason));
            let message = attempt.message.as_deref().unwrap_or_default();
            writeln!(text, "  {}  pod {pod}  node {node}  {reason}  {message}", attempt.number)?;
        }
    }
    if let Some(timings) = &status.timings {
        writeln!(text, "Timings:    {}", phases(timings))?;
    }
    if let Some(transfer) = &status.transfer {
        let (total, present, sent) = (transfer.paths_total, transfer.paths_present, transfer.paths_sent);
        let (fetched, bytes_fetched) = (transfer.paths_fetched, transfer.bytes_fetched);
        let (bytes_sent, bytes_received) = (transfer.bytes_sent, transfer.bytes_received);
        writeln!(
            text,
            "Inputs:     {total} paths, {present} there, {fetched} fetched by the builder ({bytes_fetched} bytes), \
             {sent} sent ({bytes_sent} bytes)"
        )?;
        writeln!(text, "Received:   {bytes_received} bytes")?;
    }
    if !status.outputs.is_empty() {
        writeln!(text, "Outputs:")?;
        for (name, output) in &status.outputs {
            writeln!(text, "  {name}  {}  {}  {} bytes", output.path, output.nar_hash, output.nar_size)?;
        }
    }
    if let Some(failure) = &status.failure {
        writeln!(text, "Failure:    {}: {}", failure.reason, failure.message)?;
        for line in &failure.log_tail {
            writeln!(text, "  > {line}")?;
        }
    }
    Ok(())
}

fn phases(timings: &Timings) -> String {
    let phases = [
        ("queued", timings.queued_millis),
        ("pod start", timings.pod_start_millis),
        ("connect", timings.connect_millis),
        ("copy in", timings.copy_in_millis),
        ("build", timings.build_millis),
        ("collect", timings.collect_millis),
    ];
    let known = phases.iter().filter_map(|(name, millis)| Some((name, (*millis)?)));
    let texts = known.map(|(name, millis)| {
        format!("{name} {}", format_duration(std::time::Duration::from_millis(millis)))
    });
    texts.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use drover_api::{BuildRequestSpec, BuildRequestStatus, FailureStatus, Reason, conditions};

    use super::*;

    #[test]
    fn a_failure_is_told_with_its_log() {
        let mut request = BuildRequest::new("x", BuildRequestSpec::default());
        assert!(text(&request).contains("has not looked"));
        // The API server's own default.
        request.status = Some(BuildRequestStatus { observed_generation: Some(-1), ..Default::default() });
        assert!(text(&request).contains("has not looked"));
        let mut conditions = vec![];
        let now = k8s_openapi::jiff::Timestamp::UNIX_EPOCH;
        conditions::set_summary(
            &mut conditions,
            Some(false),
            Reason::BuildFailed,
            "exit code 1",
            Some(1),
            now,
        );
        request.status = Some(BuildRequestStatus {
            conditions,
            timings: Some(Timings {
                build_millis: Some(1500),
                connect_millis: Some(3),
                ..Default::default()
            }),
            failure: Some(FailureStatus {
                reason: "BuildFailed".into(),
                message: "exit code 1".into(),
                log_tail: vec!["no such file".into()],
            }),
            ..Default::default()
        });
        let text = text(&request);
        assert!(text.contains("Timings:    connect 3ms, build 1s\n"), "{text}");
        assert!(text.ends_with("Failure:    BuildFailed: exit code 1\n  > no such file\n"), "{text}");
    }
}
