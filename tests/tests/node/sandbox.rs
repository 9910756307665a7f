//! Every rung of the sandbox ladder, on a real node: which one a class's pods stand on, what a build sees there, and what
//! the request says where the rung that the class demands cannot be had.

use anyhow::{Context, Result};
use drover_tests::installation::BUILDERS;
use drover_tests::{Cluster, Installation};
use serde_json::Value;
use xtask::run;

/// What a build says of itself, in shell words alone: its image has no programs but the shell.
const FACTS: &str = r#"
    while read -r name rest; do
        case $name in
            Uid:|Gid:|Groups:|CapInh:|CapPrm:|CapEff:|CapAmb:|NoNewPrivs:|Seccomp:|NSpid:) echo "$name" $rest ;;
        esac
    done < /proc/self/status
    read -r inside outside count < /proc/self/uid_map; echo "uid_map: $inside $outside $count"
    read -r host < /proc/sys/kernel/hostname; echo "host: $host"
    echo "pwd: $PWD $NIX_BUILD_TOP $$"
    set -- /proc/[0-9]*; echo "processes: $#"
    while read -r id parent device root point options rest; do echo "mount: $point"; done < /proc/self/mountinfo
    { while read -r line; do echo "interface: ${line%%:*}"; done; } < /proc/net/dev
"#;

/// Classes beside the default one, by name: what each says of its sandbox, and of its pods.
const CLASSES: [(&str, &str); 5] = [
    (
        "by-admin",
        "sandbox: NestedAdmin, template: {spec: {containers: [{name: builder, securityContext: {seccompProfile: {type: RuntimeDefault}}}]}}",
    ),
    (
        "by-pod",
        "sandbox: Pod, template: {spec: {containers: [{name: builder, securityContext: {procMount: Default, seccompProfile: {type: RuntimeDefault}}}]}}",
    ),
    ("strongest", "sandbox: Pod"),
    (
        "filtered",
        "template: {spec: {containers: [{name: builder, securityContext: {seccompProfile: {type: RuntimeDefault}}}]}}",
    ),
    (
        "masked",
        "sandbox: NestedAdmin, template: {spec: {containers: [{name: builder, securityContext: {procMount: Default}}]}}",
    ),
];

/// What every rung takes from a build.
const WITHOUT_RIGHTS: [&str; 6] = [
    "CapInh: 0000000000000000",
    "CapPrm: 0000000000000000",
    "CapEff: 0000000000000000",
    "CapAmb: 0000000000000000",
    "NoNewPrivs: 1",
    "Seccomp: 2",
];

const NESTED: [&str; 7] = [
    "Uid: 1000 1000 1000 1000",
    "Gid: 100 100 100 100",
    "Groups:",
    "uid_map: 1000 30001 1",
    "host: localhost",
    "pwd: /build /build 1",
    "processes: 1",
];

#[test]
fn each_rung_confines_its_builds() -> Result<()> {
    let scratch = tempfile::Builder::new().prefix("drover-node-").tempdir_in("/tmp")?;
    let drover = Installation::up(scratch.path())?;
    for (name, spec) in CLASSES {
        drover.cluster.apply(&format!(
            "{{apiVersion: drover.build/v1alpha1, kind: BuilderClass, metadata: {{name: {name}}}, spec: {{systems: [x86_64-linux], \
             caches: [{{url: {:?}, push: true}}], {spec}}}}}",
            drover.cache.url()
        ))?;
    }

    // Pod Security `baseline` is enforced where the default class's pods run.
    let namespace: Value =
        serde_json::from_str(&drover.cluster.kubectl(&["get", "namespace", BUILDERS, "-o", "json"])?)?;
    assert_eq!(namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"], "baseline");
    for (request, class) in [("nested", None), ("strongest", Some("strongest"))] {
        let facts = facts(&drover, request, class, "nested")?;
        is_nested(&facts);
    }
    let bare = facts(&drover, "by-pod", Some("by-pod"), "pod")?;
    let expected =
        ["Uid: 30001 30001 30001 30001", "Gid: 30000 30000 30000 30000", "Groups:", "pwd: /build /build"];
    for line in WITHOUT_RIGHTS.iter().chain(&expected) {
        assert!(bare.iter().any(|fact| fact.starts_with(line)), "no {line:?} in {bare:#?}");
    }

    // What cannot be had is said once, with what helps, and no second pod is tried.
    refused(
        &drover,
        "filtered",
        &["must be `nested` or stronger", "user namespaces", "seccompProfile", "sandbox: Pod"],
    )?;

    // SYS_ADMIN is beyond `baseline`: an administrator who wants that rung gives it another namespace, or this label.
    let baseline = Baseline::lifted(&drover.cluster)?;
    is_nested(&facts(&drover, "by-admin", Some("by-admin"), "nested-admin")?);
    refused(
        &drover,
        "masked",
        &["must be `nested-admin` or stronger", "procMount: Unmasked", "`pod` is the strongest"],
    )?;
    drop(baseline);
    let namespace: Value =
        serde_json::from_str(&drover.cluster.kubectl(&["get", "namespace", BUILDERS, "-o", "json"])?)?;
    assert_eq!(namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"], "baseline");
    Ok(())
}

/// Nix's whole sandbox, whatever it stands on.
fn is_nested(facts: &[String]) {
    for line in WITHOUT_RIGHTS.iter().chain(&NESTED) {
        assert!(facts.iter().any(|fact| fact == line), "no {line:?} in {facts:#?}");
    }
    let of = |kind: &str| -> Vec<&str> {
        let mut list: Vec<&str> = facts.iter().filter_map(|fact| fact.strip_prefix(kind)).collect();
        list.sort_unstable();
        list
    };
    let devices = ["full", "null", "pts", "random", "shm", "tty", "urandom", "zero"];
    let mut mounts: Vec<String> = devices.iter().map(|device| format!("/dev/{device}")).collect();
    mounts.extend(["/", "/bin/sh", "/build", "/nix/store", "/proc", "/tmp"].map(str::to_owned));
    mounts.sort_unstable();
    assert_eq!(
        of("mount: ").iter().filter(|mount| **mount != "/dev/kvm").collect::<Vec<_>>(),
        mounts.iter().collect::<Vec<_>>()
    );
    assert_eq!(of("interface: ").last(), Some(&"lo"), "{facts:#?}");
}

/// Builds, and reads what the build wrote out of the cache. The status names the rung.
fn facts(drover: &Installation, name: &str, class: Option<&str>, rung: &str) -> Result<Vec<String>> {
    apply(drover, name, class)?;
    let request = drover.wait(name, "True")?;
    let status = &request["status"];
    assert_eq!(status["builder"]["sandbox"], rung, "{status:#}");
    let path = status["outputs"]["out"]["path"].as_str().context("a path")?;
    let into = drover.store().with_file_name("read").display().to_string();
    let mut copy = drover.nix_command("nix")?;
    run::stdout(copy.args(["copy", "--no-check-sigs", "--from", drover.cache.url(), "--to", &into, path]))?;
    let text = std::fs::read_to_string(format!("{into}{path}"))?;
    Ok(text.lines().map(|line| line.trim_end().to_owned()).collect())
}

/// The request ends at its first attempt, with all of these in its message.
fn refused(drover: &Installation, class: &str, parts: &[&str]) -> Result<()> {
    apply(drover, class, Some(class))?;
    let request = drover.wait(class, "False")?;
    let (status, failure) = (&request["status"], &request["status"]["failure"]);
    assert_eq!(failure["reason"], "Unplaceable", "{status:#}");
    assert_eq!(status["attempts"].as_array().map(Vec::len), Some(1), "{status:#}");
    let message = failure["message"].as_str().unwrap_or_default();
    for part in parts {
        assert!(message.contains(part), "no {part:?} in {message:?}");
    }
    Ok(())
}

fn apply(drover: &Installation, name: &str, class: Option<&str>) -> Result<()> {
    let class = class.map(|class| format!("class: {class}, ")).unwrap_or_default();
    // Each a derivation of its own: outputs of one that is in the cache would be taken from there.
    let script = serde_json::to_string(&format!("{{ {FACTS} }} > $out; echo {name}"))?;
    drover.apply(&format!(
        "{{apiVersion: drover.build/v1alpha1, kind: BuildRequest, metadata: {{name: {name}}}, spec: {{{class}derivation: {{name: \
         facts, system: x86_64-linux, builder: /bin/sh, args: [-ec, {script}], outputs: {{out: {{}}}}}}}}}}"
    ))?;
    Ok(())
}

/// While it lives, pods beyond `baseline` are admitted where builders run.
struct Baseline<'a>(&'a Cluster);

impl<'a> Baseline<'a> {
    fn lifted(cluster: &'a Cluster) -> Result<Self> {
        label(cluster, "privileged")?;
        Ok(Self(cluster))
    }
}

impl Drop for Baseline<'_> {
    fn drop(&mut self) {
        // A later test of this cluster would fail loudly on a label that stayed.
        let _seen_by_the_test = label(self.0, "baseline");
    }
}

fn label(cluster: &Cluster, level: &str) -> Result<()> {
    let label = format!("pod-security.kubernetes.io/enforce={level}");
    cluster.kubectl(&["label", "--overwrite", "namespace", BUILDERS, &label]).map(drop)
}
