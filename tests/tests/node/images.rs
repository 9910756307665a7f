//! The images: the same from the same sources, no trace of this machine in them, and they run as the cluster runs them.

use anyhow::{Context, Result};
use drover_tests::{Cluster, images};
use xtask::platform::Platform;
use xtask::{checkout, images as recipe};

const NAMESPACE: &str = "drover-test-images";

#[test]
fn made_again_they_have_the_same_digests() -> Result<()> {
    let first = images()?;
    let again = tempfile::tempdir()?;
    let second = recipe::make(again.path(), &[Platform::native()?])?;
    for (a, b) in first.iter().zip(&second) {
        assert_eq!(a.digest, b.digest, "{}", a.reference);
        let ([one], [two]) = (a.parts.as_slice(), b.parts.as_slice()) else {
            anyhow::bail!("one platform was asked for")
        };
        assert_eq!(one.written, two.written, "{}", a.reference);
        println!("{}: {:.1} MiB compressed", a.reference, one.written.compressed as f64 / f64::from(1 << 20));
        serde_json::from_slice::<serde_json::Value>(&std::fs::read(&two.sbom)?)
            .with_context(|| format!("{} is no JSON", two.sbom.display()))?;
    }
    assert!(first[0].parts[0].written.compressed <= recipe::BUILDER_LIMIT);
    Ok(())
}

#[test]
fn the_programs_do_not_say_where_they_were_compiled() -> Result<()> {
    images()?;
    let here = checkout();
    let programs = here.join("target/static").join(Platform::native()?.target()).join("release");
    for name in ["drover-builder", "drover-operator"] {
        let bytes = std::fs::read(programs.join(name)).with_context(|| format!("could not read {name}"))?;
        for path in [&here, &std::env::home_dir().context("no home")?.join(".cargo")] {
            let path = path.as_os_str().as_encoded_bytes();
            let found = bytes.windows(path.len()).position(|window| window == path);
            let around = found.map(|at| String::from_utf8_lossy(&bytes[at..bytes.len().min(at + 120)]));
            assert_eq!(around, None, "{name}");
        }
    }
    Ok(())
}

#[test]
fn both_run_under_the_pod_security_of_their_namespaces() -> Result<()> {
    let cluster = Cluster::up()?;
    for image in images()? {
        cluster.load(&image.file)?;
    }
    cluster.kubectl(&["delete", "namespace", NAMESPACE, "--ignore-not-found", "--wait"])?;
    cluster.apply(&format!(
        "{{apiVersion: v1, kind: Namespace, metadata: {{name: {NAMESPACE}, labels: {{pod-security.kubernetes.io/enforce: restricted}}}}}}"
    ))?;
    // ssh says its version only where the loader finds every library, and starts only as a user that it knows.
    cluster.apply(&pod("ssh", recipe::OPERATOR, r#"[/usr/bin/ssh, -V]"#))?;
    cluster.apply(&pod("operator", recipe::OPERATOR, r#"[/bin/drover-operator, --version]"#))?;
    cluster.apply(&pod("builder", recipe::BUILDER, r#"[/bin/drover-builder, --version]"#))?;
    cluster.apply(&pod("shell", recipe::BUILDER, r#"[/bin/busybox, sh, -c, "echo a shell"]"#))?;
    for (name, expected) in [
        ("ssh", "OpenSSH_"),
        ("operator", "drover-operator "),
        ("builder", "drover-builder "),
        ("shell", "a shell"),
    ] {
        let phase = "jsonpath={.status.phase}=Succeeded";
        let waited = cluster.kubectl(&[
            "wait",
            "-n",
            NAMESPACE,
            &format!("pod/{name}"),
            "--for",
            phase,
            "--timeout=60s",
        ]);
        let log = cluster.kubectl(&["logs", "-n", NAMESPACE, name])?;
        waited.with_context(|| format!("{name} said {log:?}"))?;
        assert!(log.starts_with(expected), "{name} said {log:?}");
    }
    cluster.kubectl(&["delete", "namespace", NAMESPACE, "--wait"])?;
    Ok(())
}

fn pod(name: &str, image: &str, command: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {NAMESPACE}}}
spec:
  restartPolicy: Never
  hostUsers: false
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 0
  containers:
  - name: {name}
    image: {image}
    imagePullPolicy: Never
    command: {command}
    securityContext:
      allowPrivilegeEscalation: false
      runAsNonRoot: true
      runAsUser: 65532
      capabilities: {{drop: [ALL]}}
      seccompProfile: {{type: RuntimeDefault}}
"
    )
}
