//! The chart's NetworkPolicy, as a real API server has it: who reaches builders and what they reach.

use std::net::IpAddr;

use anyhow::{Context as _, Result, ensure};
use drover_tests::ControlPlane;
use serde_json::{Value, json};
use xtask::parts::go;
use xtask::run;

/// One end of a connection.
#[derive(Clone, Copy, Debug)]
enum Peer {
    /// Namespace, and the label that counts.
    Pod(&'static str, (&'static str, &'static str)),
    Address(&'static str),
}

const OPERATOR: Peer = Peer::Pod("drover-system", ("app.kubernetes.io/component", "operator"));
const NAMES: Peer = Peer::Pod("kube-system", ("k8s-app", "kube-dns"));

#[test]
fn builders_are_cut_off() -> Result<()> {
    let plane = ControlPlane::start()?;
    let policies = install(&plane, &[])?;
    let (allowed, denied) = ("allowed", "denied");

    // In: the operator to the SSH port, and nobody else.
    ensure!(admits(&policies, denied, "ingress", OPERATOR, ("TCP", 2222))?);
    ensure!(!admits(&policies, denied, "ingress", OPERATOR, ("TCP", 80))?);
    for other in [
        Peer::Pod("team", ("app.kubernetes.io/component", "operator")),
        Peer::Pod("drover-system", ("app.kubernetes.io/component", "other")),
        Peer::Pod("drover-builders", ("drover.build/egress", allowed)),
        Peer::Address("203.0.113.9"),
    ] {
        ensure!(!admits(&policies, allowed, "ingress", other, ("TCP", 2222))?, "{other:?}");
    }

    // Out: names and public addresses, for those that may.
    for (peer, port) in [
        (NAMES, ("UDP", 53)),
        (NAMES, ("TCP", 53)),
        (Peer::Address("203.0.113.9"), ("TCP", 443)),
        (Peer::Address("2001:db8::1"), ("TCP", 443)),
    ] {
        ensure!(admits(&policies, allowed, "egress", peer, port)?, "{peer:?}");
        ensure!(!admits(&policies, denied, "egress", peer, port)?, "{peer:?}");
    }
    // Metadata services, the API server, nodes, services and pods: for nobody.
    for address in [
        "169.254.169.254",
        "fd00:ec2::254",
        "fe80::1",
        "10.96.0.1",
        "172.18.0.2",
        "192.168.1.1",
        "100.64.0.1",
    ] {
        ensure!(!admits(&policies, allowed, "egress", Peer::Address(address), ("TCP", 443))?, "{address}");
    }
    for pod in [OPERATOR, Peer::Pod("kube-system", ("k8s-app", "other"))] {
        ensure!(!admits(&policies, allowed, "egress", pod, ("TCP", 443))?, "{pod:?}");
    }
    ensure!(!admits(&policies, allowed, "egress", NAMES, ("TCP", 443))?);

    // What an administrator says of an API server with a public address, and of a mirror inside.
    let values = json!({"builder": {"networkPolicy": {
        "apiServer": ["203.0.113.7/32", "2001:db8::7/128"],
        "allow": [{"to": [{"ipBlock": {"cidr": "10.1.2.3/32"}}], "ports": [{"protocol": "TCP", "port": 80}]}],
    }}});
    let policies = install(&plane, &["--set-json", &format!("builder={}", values["builder"])])?;
    for (address, port, expected) in [
        ("203.0.113.7", 443, false),
        ("2001:db8::7", 443, false),
        ("203.0.113.8", 443, true),
        ("10.1.2.3", 80, true),
        ("10.1.2.3", 443, false),
        ("10.1.2.4", 80, false),
        ("169.254.169.254", 80, false),
    ] {
        let admitted = admits(&policies, allowed, "egress", Peer::Address(address), ("TCP", port))?;
        ensure!(admitted == expected, "{address}:{port}");
    }
    // Caches alone: public ones by HTTP and HTTPS, or what an administrator says instead.
    let caches = ["denied", allowed];
    let reaches =
        |policies: &[Value], peer, port| admits_pod(policies, caches, "egress", peer, ("TCP", port));
    for (address, port, expected) in [
        ("203.0.113.8", 443, true),
        ("203.0.113.8", 80, true),
        ("2001:db8::1", 443, true),
        ("203.0.113.8", 22, false),
        ("203.0.113.7", 443, false),
        ("10.1.2.3", 80, false),
        ("169.254.169.254", 80, false),
    ] {
        ensure!(reaches(&policies, Peer::Address(address), port)? == expected, "{address}:{port}");
    }
    ensure!(admits_pod(&policies, caches, "egress", NAMES, ("UDP", 53))?);
    let values = json!({"networkPolicy": {
        "caches": [{"to": [{"ipBlock": {"cidr": "10.1.2.3/32"}}], "ports": [{"protocol": "TCP", "port": 80}]}],
    }});
    let policies = install(&plane, &["--set-json", &format!("builder={values}")])?;
    for (address, port, expected) in
        [("10.1.2.3", 80, true), ("10.1.2.4", 80, false), ("203.0.113.8", 443, false)]
    {
        ensure!(reaches(&policies, Peer::Address(address), port)? == expected, "{address}:{port}");
    }
    let policies = install(&plane, &["--set-json", r#"builder={"networkPolicy": {"caches": []}}"#])?;
    ensure!(!reaches(&policies, Peer::Address("203.0.113.8"), 443)?, "none is none");

    let without = ["--set", "builder.networkPolicy.create=false", "--set", "networkPolicy.create=false"];
    let without = template(&without)?;
    ensure!(!without.contains("NetworkPolicy"), "it can be left out");
    Ok(())
}

/// What administrators add to what the chart makes: it is where it belongs, and an API server takes the whole.
#[test]
fn additions_arrive() -> Result<()> {
    let plane = ControlPlane::start()?;
    let values = json!({
        "commonLabels": {"team": "builds"},
        "serviceAccount": {"create": false, "name": "mine"},
        "extraArgs": ["--concurrency=3"],
        "extraEnv": [{"name": "SSL_CERT_FILE", "value": "/certs/ca.pem"}],
        "extraVolumes": [{"name": "certs", "configMap": {"name": "ca"}}],
        "extraVolumeMounts": [{"name": "certs", "mountPath": "/certs"}],
        "topologySpreadConstraints": [{
            "maxSkew": 2, "topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": {"app.kubernetes.io/name": "drover"}},
        }],
        "extraObjects": [
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "{{ .Release.Name }}-more"}},
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: as-text}",
        ],
    });
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), values.to_string())?;
    let text = template(&["--values", &file.path().display().to_string()])?;
    let objects: Vec<Value> = serde_yaml::Deserializer::from_str(&text)
        .map(|object| Ok(serde::Deserialize::deserialize(object)?))
        .collect::<Result<_>>()?;
    let of = |kind: &str| objects.iter().filter(|object| object["kind"] == kind).collect::<Vec<_>>();
    ensure!(of("ServiceAccount").is_empty());
    ensure!(of("ClusterRoleBinding").iter().all(|binding| binding["subjects"][0]["name"] == "mine"));
    let added: Vec<_> = of("ConfigMap").iter().map(|object| object["metadata"]["name"].clone()).collect();
    ensure!(added == ["drover-more", "as-text"] || added == ["as-text", "drover-more"], "{added:?}");
    let made = objects.iter().filter(|object| object["kind"] != "ConfigMap");
    for object in made {
        ensure!(object["metadata"]["labels"]["team"] == "builds", "{object}");
    }
    let pod = &of("Deployment").first().context("a Deployment")?["spec"]["template"]["spec"];
    let container = &pod["containers"][0];
    ensure!(pod["serviceAccountName"] == "mine");
    ensure!(container["args"] == values["extraArgs"]);
    let contains = |list: &Value, item: &Value| list.as_array().is_some_and(|list| list.contains(item));
    ensure!(contains(&container["env"], &values["extraEnv"][0]));
    ensure!(contains(&container["volumeMounts"], &values["extraVolumeMounts"][0]));
    ensure!(contains(&pod["volumes"], &values["extraVolumes"][0]));
    ensure!(pod["topologySpreadConstraints"] == values["topologySpreadConstraints"]);
    let budget = of("PodDisruptionBudget").first().context("a PodDisruptionBudget")?["spec"].clone();
    ensure!(budget["selector"]["matchLabels"] == of("Deployment")[0]["spec"]["selector"]["matchLabels"]);

    plane.apply("{apiVersion: v1, kind: Namespace, metadata: {name: drover-system}}")?;
    plane.apply(&template(&["--show-only", "templates/namespace.yaml"])?)?;
    plane.apply(&text)?;
    let alone = template(&["--set", "rbac.create=false", "--set", "replicas=1"])?;
    ensure!(!alone.contains("kind: Role") && !alone.contains("PodDisruptionBudget"));
    Ok(())
}

fn template(options: &[&str]) -> Result<String> {
    run::stdout(
        std::process::Command::new(go::helm()?)
            .args(["template", "drover", "--no-hooks", "--namespace", "drover-system"])
            .arg(xtask::checkout().join("charts/drover"))
            .args(options),
    )
}

/// Applies what the chart says of networks, and reads back what the server made of it.
fn install(plane: &ControlPlane, options: &[&str]) -> Result<Vec<Value>> {
    let only = ["--show-only", "templates/namespace.yaml", "--show-only", "templates/networkpolicy.yaml"];
    plane.apply(&template(&[&only, options].concat())?)?;
    let list = plane.kubectl(&["get", "networkpolicies", "--namespace", "drover-builders", "-o", "json"])?;
    let list: Value = serde_json::from_str(&list)?;
    Ok(list["items"].as_array().context("a list")?.clone())
}

/// Whether a builder whose egress label is `label`, and that fetches from no cache, may have a connection (Kubernetes:
/// networking.k8s.io/v1): no policy that selects it forbids what it does not list, and any that lists it is enough.
fn admits(policies: &[Value], label: &str, direction: &str, peer: Peer, port: (&str, u16)) -> Result<bool> {
    admits_pod(policies, [label, "denied"], direction, peer, port)
}

/// The same of a builder with these labels for egress and for caches.
fn admits_pod(
    policies: &[Value],
    [egress, caches]: [&str; 2],
    direction: &str,
    peer: Peer,
    port: (&str, u16),
) -> Result<bool> {
    let (kind, field) = if direction == "ingress" { ("Ingress", "from") } else { ("Egress", "to") };
    let of_pod = |policy: &&Value| {
        let selector = &policy["spec"]["podSelector"];
        let selected = selects(selector, ("drover.build/egress", egress))
            && selects(selector, ("drover.build/caches", caches));
        selected && policy["spec"]["policyTypes"].as_array().is_some_and(|kinds| kinds.contains(&kind.into()))
    };
    let selecting: Vec<_> = policies.iter().filter(of_pod).collect();
    ensure!(!selecting.is_empty(), "no policy has an opinion, so that everything is allowed");
    let rules = selecting.iter().filter_map(|policy| policy["spec"][direction].as_array()).flatten();
    for rule in rules {
        let right_port = rule["ports"].as_array().is_none_or(|ports| {
            ports.iter().any(|allowed| allowed["protocol"] == port.0 && allowed["port"] == port.1)
        });
        let peers = rule[field].as_array().context("every rule says to whom")?;
        if right_port
            && peers.iter().map(|allowed| matches(allowed, peer)).collect::<Result<Vec<_>>>()?.contains(&true)
        {
            return Ok(true);
        }
    }
    Ok(false)
}

fn matches(allowed: &Value, peer: Peer) -> Result<bool> {
    Ok(match peer {
        Peer::Pod(namespace, label) => {
            // A pod is matched by selectors; an address range is for what is no pod.
            allowed["ipBlock"].is_null()
                && selects(&allowed["namespaceSelector"], ("kubernetes.io/metadata.name", namespace))
                && selects(&allowed["podSelector"], label)
        }
        Peer::Address(address) => {
            let block = &allowed["ipBlock"];
            let address: IpAddr = address.parse()?;
            let range = |value: &Value| contains(value.as_str().unwrap_or_default(), address);
            let excepted =
                block["except"].as_array().into_iter().flatten().map(range).collect::<Result<Vec<_>>>()?;
            !block.is_null() && range(&block["cidr"])? && !excepted.contains(&true)
        }
    })
}

/// Whether a selector has the thing that has this label, among others that are as they should be. Only the value of this
/// label counts.
fn selects(selector: &Value, (name, value): (&str, &str)) -> bool {
    selector["matchLabels"].get(name).is_none_or(|wanted| wanted == value)
}

fn contains(range: &str, address: IpAddr) -> Result<bool> {
    let (network, length) = range.split_once('/').context("a range")?;
    let bits = |address: IpAddr| match address {
        IpAddr::V4(address) => (u128::from(u32::from(address)) << 96, 32),
        IpAddr::V6(address) => (u128::from(address), 128),
    };
    let ((network, family), (address, other), length) =
        (bits(network.parse()?), bits(address), length.parse::<u32>()?);
    let mask = u128::MAX.checked_shl(128 - length).unwrap_or(0);
    Ok(family == other && network & mask == address & mask)
}
