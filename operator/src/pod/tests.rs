use drover_nix::{DerivationOutput, OutputName};

use super::*;

fn settings() -> Settings {
    Settings {
        namespace: "drover".into(),
        builder_namespace: "drover-builders".into(),
        builder_image: "drover/builder:1".into(),
        builder_pull_policy: "IfNotPresent".into(),
        builder_pull_secrets: vec![],
        max_sessions: 1024,
        pod_deadline_seconds: 86_400,
        work_dir: "/tmp".into(),
        concurrency: 4,
        timeouts: Default::default(),
        scope: Default::default(),
    }
}

fn request() -> BuildRequest {
    let mut request = BuildRequest::new("hello.world", Default::default());
    request.metadata.namespace = Some("team".into());
    request.metadata.uid = Some("0f8fad5b-d9cb-469f-a165-70867728950e".into());
    request
}

fn class(yaml: &str) -> BuilderClassSpec {
    serde_yaml::from_str(&format!("systems: [x86_64-linux]\n{yaml}")).unwrap()
}

fn pod(request: &BuildRequest, class: &BuilderClassSpec, features: &[&str]) -> Value {
    pod_with(request, class, features, None)
}

fn pod_with(
    request: &BuildRequest,
    class: &BuilderClassSpec,
    features: &[&str],
    memory: Option<&Quantity>,
) -> Value {
    pod_of(request, class, features, memory, &derivation())
}

/// With a path that follows from the rest.
fn derivation() -> BasicDerivation {
    derivation_for("x86_64-linux")
}

fn derivation_for(system: &str) -> BasicDerivation {
    let mut drv = BasicDerivation {
        name: "hello".into(),
        outputs: [(OutputName::out(), DerivationOutput::Deferred)].into(),
        input_srcs: [].into(),
        system: system.into(),
        builder: "/bin/sh".into(),
        args: vec![],
        env: [("out".into(), "".into())].into(),
    };
    modulo::fill_output_paths(&StoreDir::default(), &mut drv).unwrap();
    drv
}

fn pod_of(
    request: &BuildRequest,
    class: &BuilderClassSpec,
    features: &[&str],
    memory: Option<&Quantity>,
    derivation: &BasicDerivation,
) -> Value {
    let plan = PodPlan {
        request,
        class,
        class_name: "c",
        attempt: 2,
        memory,
        system: std::str::from_utf8(&derivation.system).unwrap(),
        features: &features.iter().map(|f| (*f).to_owned()).collect(),
        fetches: features.contains(&"fetches"),
        derivation,
        authorized_key: "ssh-ed25519 AAAA",
        settings: &settings(),
    };
    serde_json::to_value(plan.build().unwrap()).unwrap()
}

#[test]
fn names_are_host_names_and_tell_attempts_apart() {
    let uid = "0f8fad5b-d9cb-469f-a165-70867728950e";
    assert_eq!(name("hello.world", uid, 2), "hello-world-0f8fad5b-2");
    let long = name(&format!("{}-{}", "a".repeat(39), "b".repeat(200)), uid, u32::MAX);
    assert_eq!(long, format!("{}-0f8fad5b-4294967295", "a".repeat(39)));
    assert!(long.len() <= 63);
}

#[test]
fn a_pod_that_baseline_admits_and_nobody_evicts() {
    let pod = pod(&request(), &class(""), &[]);
    let spec = &pod["spec"];
    assert_eq!(spec["hostUsers"], false);
    assert_eq!(spec["automountServiceAccountToken"], false);
    assert_eq!(spec["enableServiceLinks"], false);
    assert_eq!(spec["restartPolicy"], "Never");
    assert_eq!(spec["activeDeadlineSeconds"], 86_400);
    assert_eq!(spec["nodeSelector"]["kubernetes.io/arch"], "amd64");
    assert_eq!(spec["containers"][0]["terminationMessagePolicy"], "FallbackToLogsOnError");
    let context = &spec["containers"][0]["securityContext"];
    assert_eq!(context["procMount"], "Unmasked");
    assert_eq!(context["allowPrivilegeEscalation"], false);
    assert!(context["capabilities"].is_null() && context["seccompProfile"].is_null());
    for (name, amount) in DEFAULT_REQUESTS {
        assert_eq!(spec["containers"][0]["resources"]["requests"][name], amount);
    }
    let metadata = &pod["metadata"];
    assert_eq!(metadata["namespace"], "drover-builders");
    assert_eq!(metadata["labels"][ATTEMPT_LABEL], "2");
    assert_eq!(metadata["labels"][UID_LABEL], "0f8fad5b-d9cb-469f-a165-70867728950e");
    assert_eq!(metadata["annotations"]["cluster-autoscaler.kubernetes.io/safe-to-evict"], "false");
    assert!(metadata["ownerReferences"].is_null(), "nothing is owned across namespaces");
    let args = spec["containers"][0]["args"].as_array().unwrap();
    assert_eq!(args[4], "ssh-ed25519 AAAA");
}

#[test]
fn the_template_is_merged_but_cannot_take_over() {
    let class = class(
        "placement: RequestNamespace
template:
  metadata: {labels: {team: x, drover.build/attempt: '7'}}
  spec:
    restartPolicy: Always
    automountServiceAccountToken: true
    priorityClassName: builds
    containers:
    - name: builder
      args: [evil]
      env: [{name: A, value: b}]
      volumeMounts: [{name: big, mountPath: /nix}]
    - {name: side, image: s}
    volumes: [{name: big, emptyDir: {sizeLimit: 1Gi}}]
",
    );
    let pod = pod(&request(), &class, &[]);
    assert_eq!(pod["metadata"]["labels"]["team"], "x");
    assert_eq!(pod["metadata"]["labels"][ATTEMPT_LABEL], "2");
    assert_eq!(pod["metadata"]["namespace"], "team");
    assert_eq!(pod["metadata"]["ownerReferences"][0]["kind"], "BuildRequest");
    let spec = &pod["spec"];
    assert_eq!(
        (&spec["restartPolicy"], &spec["automountServiceAccountToken"]),
        (&"Never".into(), &false.into())
    );
    assert_eq!(spec["priorityClassName"], "builds");
    assert_eq!(spec["volumes"].as_array().unwrap().len(), 3);
    let builder = &spec["containers"][0];
    assert_eq!(builder["args"][0], "listen");
    assert_eq!(builder["image"], "drover/builder:1");
    assert_eq!(builder["volumeMounts"][0]["name"], "big");
    assert_eq!(builder["volumeMounts"].as_array().unwrap().len(), 2);
    assert_eq!(spec["containers"][1]["name"], "side");
}

#[test]
fn a_pod_goes_where_its_system_runs() {
    let class = class("template: {spec: {nodeSelector: {kubernetes.io/arch: s390x, disk: fast}}}");
    for (system, arch) in [
        ("x86_64-linux", "amd64"),
        ("i686-linux", "amd64"),
        ("x86_64-v3-linux", "amd64"),
        ("aarch64-linux", "arm64"),
        // Of these nobody says where they run but the class.
        ("mips64el-linux", "s390x"),
    ] {
        let pod = pod_of(&request(), &class, &[], None, &derivation_for(system));
        assert_eq!(
            pod["spec"]["nodeSelector"],
            json!({"kubernetes.io/arch": arch, "disk": "fast"}),
            "{system}"
        );
    }
}

#[test]
fn the_floor_of_the_sandbox_is_the_builders() {
    for (spec, rung, added) in [
        ("", "nested", Value::Null),
        ("sandbox: Nested", "nested", Value::Null),
        ("sandbox: NestedAdmin", "nested-admin", json!(["SYS_ADMIN"])),
        ("sandbox: Pod", "pod", Value::Null),
    ] {
        // What a template says of arguments is not heard.
        let template = "template: {spec: {containers: [{name: builder, args: [--sandbox, pod]}]}}";
        let pod = pod(&request(), &class(&format!("{spec}\n{template}")), &[]);
        assert_eq!(pod["spec"]["hostUsers"], false);
        let builder = &pod["spec"]["containers"][0];
        let args = builder["args"].as_array().unwrap();
        let at = args.iter().position(|arg| arg == "--sandbox").unwrap();
        assert_eq!(args[at + 1], rung);
        let context = &builder["securityContext"];
        assert_eq!(context["capabilities"]["add"], added, "{spec}");
        assert_eq!(
            (&context["procMount"], &context["allowPrivilegeEscalation"]),
            (&"Unmasked".into(), &false.into())
        );
        assert!(context["seccompProfile"].is_null() && context["privileged"].is_null());
    }
}

#[test]
fn features_bring_their_scheduling() {
    let class = class(
        "features: [kvm]
featureScheduling:
  kvm: {nodeSelector: {kvm: 'yes'}, tolerations: [{key: kvm}], resources: {devices/kvm: '1'}}
resources: {default: {requests: {cpu: '4'}, limits: {memory: 8Gi}}}
",
    );
    let with = pod(&request(), &class, &["kvm"]);
    assert_eq!(with["spec"]["nodeSelector"]["kvm"], "yes");
    assert_eq!(with["spec"]["tolerations"][0]["key"], "kvm");
    let resources = &with["spec"]["containers"][0]["resources"];
    assert_eq!(resources["requests"]["devices/kvm"], "1");
    assert_eq!(resources["limits"]["devices/kvm"], "1");
    assert_eq!(resources["requests"]["cpu"], "4");
    assert!(resources["requests"]["memory"].is_null(), "the limit is the request");
    let without = pod(&request(), &class, &[]);
    assert!(without["spec"]["nodeSelector"]["kvm"].is_null());
    // Whatever the request needs, the builder offers what the class says.
    let args = &without["spec"]["containers"][0]["args"];
    assert_eq!((&args[7], &args[8]), (&"--system-features".into(), &"ca-derivations,kvm".into()));
}

/// Whoever names no limit has that of the class's maximum, not none.
#[test]
fn the_maximum_bounds_those_who_name_no_limit() {
    let resources_of = |maximum: &str, default: &str, wanted: Option<&str>| {
        let class = class(&format!("resources: {{maximum: {maximum}, default: {default}}}"));
        let mut request = request();
        request.spec.resources = wanted.map(|wanted| serde_yaml::from_str(wanted).unwrap());
        pod(&request, &class, &[])["spec"]["containers"][0]["resources"].clone()
    };
    let maximum = "{cpu: '4', memory: 8Gi, example.org/device: '2'}";
    let bounded = resources_of(maximum, "{limits: {memory: 1Gi}}", Some("{requests: {cpu: '1'}}"));
    assert_eq!(bounded["limits"], json!({"cpu": "4", "memory": "8Gi"}), "a device is not given unasked");
    assert_eq!(bounded["requests"], json!({"cpu": "1", "memory": "256Mi", "ephemeral-storage": "1Gi"}));
    assert_eq!(resources_of(maximum, "{}", None)["limits"], json!({"cpu": "4", "memory": "8Gi"}));
    let named = resources_of(maximum, "{}", Some("{limits: {cpu: '2', memory: 2Gi}}"));
    assert_eq!(named["limits"], json!({"cpu": "2", "memory": "2Gi"}));
    // Less than what is asked for by default.
    let little = resources_of("{memory: 64Mi}", "{}", None);
    assert_eq!((&little["limits"]["memory"], &little["requests"]["memory"]), (&"64Mi".into(), &Value::Null));
}

#[test]
fn who_may_open_connections() {
    // A pod that fetches and one that does not, under each mode.
    for (mode, [fetching, pure], told) in [
        ("None", ["denied", "denied"], true),
        ("FixedOutput", ["allowed", "denied"], false),
        ("All", ["allowed", "allowed"], false),
    ] {
        let class = class(&format!("egress: {{mode: {mode}}}"));
        for (features, expected) in [(&["fetches"][..], fetching), (&[], pure)] {
            let pod = pod(&request(), &class, features);
            assert_eq!(pod["metadata"]["labels"][EGRESS_LABEL], expected, "{mode}");
            let args = pod["spec"]["containers"][0]["args"].to_string();
            assert_eq!(args.contains(r#""--network","none""#), told, "{mode}: {args}");
        }
    }
    let default = pod(&request(), &class(""), &[]);
    assert_eq!(default["metadata"]["labels"][EGRESS_LABEL], "denied");
    let template = class("template: {metadata: {labels: {drover.build/egress: allowed}}}");
    assert_eq!(pod(&request(), &template, &[])["metadata"]["labels"][EGRESS_LABEL], "denied");
}

#[test]
fn who_fetches_from_caches() {
    // A pod that fetches and one that does not, by mode and sandbox.
    for (egress, sandbox, [fetching, pure]) in [
        ("None", "Nested", [false, false]),
        ("FixedOutput", "Nested", [true, true]),
        ("All", "Nested", [true, true]),
        ("FixedOutput", "NestedAdmin", [true, true]),
        // Its builds have the pod's own network.
        ("None", "Pod", [false, false]),
        ("FixedOutput", "Pod", [true, false]),
        ("All", "Pod", [true, true]),
    ] {
        let class = class(&format!(
            "egress: {{mode: {egress}}}\nsandbox: {sandbox}\ncaches: [{{url: 'https://cache.example.org'}}]"
        ));
        for (features, expected) in [(&["fetches"][..], fetching), (&[], pure)] {
            let pod = pod(&request(), &class, features);
            let label = if expected { "allowed" } else { "denied" };
            assert_eq!(pod["metadata"]["labels"][CACHES_LABEL], label, "{egress} {sandbox}");
            let args = pod["spec"]["containers"][0]["args"].to_string();
            let told = args.contains(r#""--substituters","https://cache.example.org?trusted=true""#);
            assert_eq!(told, expected, "{egress} {sandbox}: {args}");
        }
    }
    let template = class("template: {metadata: {labels: {drover.build/caches: allowed}}}");
    assert_eq!(pod(&request(), &template, &[])["metadata"]["labels"][CACHES_LABEL], "denied");
}

#[test]
fn a_lost_node_is_not_waited_for_unless_the_class_says_so() {
    let tolerations = |spec: &str| pod(&request(), &class(spec), &[])["spec"]["tolerations"].clone();
    let ours = |key: &str| json!({"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": LOST_NODE_SECONDS});
    let [not_ready, unreachable] = LOST_NODE_TAINTS.map(ours);
    assert_eq!(tolerations(""), json!([not_ready, unreachable]));
    let with =
        |toleration: &str| tolerations(&format!("template: {{spec: {{tolerations: [{toleration}]}}}}"));
    // One of its own for one of them.
    let of_class = with("{key: node.kubernetes.io/unreachable, operator: Exists, tolerationSeconds: 600}");
    assert_eq!(of_class.as_array().unwrap().len(), 2);
    assert_eq!((&of_class[0]["tolerationSeconds"], &of_class[1]), (&600.into(), &not_ready));
    assert_eq!(with("{operator: Exists}").as_array().unwrap().len(), 1, "that is for every taint");
    for other in [
        "{key: team, operator: Exists}",
        "{key: node.kubernetes.io/unreachable, operator: Exists, effect: NoSchedule}",
        "{key: node.kubernetes.io/unreachable, value: x}",
    ] {
        assert_eq!(with(other).as_array().unwrap()[1..], [not_ready.clone(), unreachable.clone()], "{other}");
    }
}

#[test]
fn an_attempt_can_have_more_memory() {
    let more = Quantity("3Gi".into());
    for (spec, limits, requests) in [
        ("", Value::Null, "3Gi".into()),
        ("resources: {default: {limits: {memory: 1Gi}}}", "3Gi".into(), Value::Null),
        (
            "resources: {default: {limits: {memory: 2Gi}, requests: {memory: 1Gi}}}",
            "3Gi".into(),
            "1Gi".into(),
        ),
        // What the template says counts in the end, and so it is what grows.
        (
            "template: {spec: {containers: [{name: builder, resources: {limits: {memory: 2Gi}}}]}}",
            "3Gi".into(),
            DEFAULT_REQUESTS[1].1.into(),
        ),
    ] {
        let pod = pod_with(&request(), &class(spec), &[], Some(&more));
        let resources = &pod["spec"]["containers"][0]["resources"];
        assert_eq!((&resources["limits"]["memory"], &resources["requests"]["memory"]), (&limits, &requests));
    }
}

#[test]
fn a_builder_waits_for_an_operator_that_is_away() {
    let pod = pod(&request(), &class(""), &[]);
    let args = pod["spec"]["containers"][0]["args"].to_string();
    assert!(args.contains(r#""--linger","3600""#), "{args}");
}

#[test]
fn the_deadline_leaves_time_to_copy() {
    let mut request = request();
    request.spec.timeout_seconds = Some(60);
    let pod = pod(&request, &class(""), &[]);
    assert_eq!(pod["spec"]["activeDeadlineSeconds"], 60 + COPY_SECONDS);
}

#[test]
fn the_builder_looks_at_trust_again() {
    let dir = StoreDir::default();
    let words = |trust: &str, derivation: &BasicDerivation| -> Vec<String> {
        let pod = pod_of(&request(), &class(trust), &[], None, derivation);
        let args = pod["spec"]["containers"][0]["args"].as_array().unwrap();
        let words = args.iter().map(|word| word.as_str().unwrap().to_owned());
        words.skip_while(|word| word != "--trust").take(6).collect()
    };
    let own = |derivation: &BasicDerivation| dir.full(&modulo::basic_drv_path(&dir, derivation).unwrap());
    let alone = derivation();
    let of_alone = own(&alone);
    assert_eq!(words("", &alone), ["--trust", "verified", "--only-derivation", &of_alone]);
    assert_eq!(words("trust: Claimed", &alone), ["--trust", "claimed", "--only-derivation", &of_alone]);
    // Proven from its closure, if at all: by the session.
    let mut below = derivation();
    below.args.push("changed".into());
    let of_below = own(&below);
    let proven = ["--trust", "verified", "--only-derivation", &of_below, "--proven-derivation", &of_below];
    assert_eq!(words("trust: Verified", &below), proven);
    assert_eq!(words("trust: Claimed", &below)[..4], ["--trust", "claimed", "--only-derivation", &of_below]);
}
