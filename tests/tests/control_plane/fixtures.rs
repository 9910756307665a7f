//! The fixture is a real API server: it has namespaces, knows users apart, and is gone when it is dropped.

use std::time::Duration;

use anyhow::Result;
use drover_tests::ControlPlane;
use xtask::run;

#[test]
fn a_control_plane_of_its_own_serves_and_ends() -> Result<()> {
    let plane = ControlPlane::start()?;
    let namespaces = plane.kubectl(&["get", "namespaces", "-o", "name"])?;
    assert!(namespaces.lines().any(|name| name == "namespace/default"), "{namespaces}");

    let nobody = plane.kubeconfig_for("nobody", &[])?;
    let refused = run::output(plane.kubectl_command().env("KUBECONFIG", nobody).args(["get", "pods"]))?;
    assert!(String::from_utf8_lossy(&refused.stderr).contains("forbidden"), "{refused:?}");

    let server = plane.server().trim_start_matches("https://").to_owned();
    drop(plane);
    assert!(std::net::TcpStream::connect(server).is_err(), "something still listens");
    Ok(())
}

#[test]
fn its_programs_stop_end_and_come_back() -> Result<()> {
    let plane = ControlPlane::start()?;
    let answers = || {
        let mut get = plane.kubectl_command();
        Ok::<bool, anyhow::Error>(
            run::output(get.args(["get", "namespaces", "--request-timeout=2s"]))?.status.success(),
        )
    };
    let writes = |name: &str| {
        let mut create = plane.kubectl_command();
        let args = ["create", "configmap", name, "--request-timeout=2s"];
        Ok::<bool, anyhow::Error>(run::output(create.args(args))?.status.success())
    };
    assert!(answers()? && writes("before")?);

    let paused = plane.pause_apiserver()?;
    assert!(!answers()?, "it was stopped");
    drop(paused);
    run::wait_for("an answer", Duration::from_secs(30), answers)?;

    let paused = plane.pause_etcd()?;
    assert!(!writes("meanwhile")?, "there is nowhere to write to");
    drop(paused);
    run::wait_for("a write", Duration::from_secs(30), || writes("after"))?;

    plane.kill_apiserver();
    assert!(!answers()?, "it was killed");
    plane.restart_apiserver()?;
    plane.kubectl(&["get", "configmap", "before"])?;

    // The log has what both of them did, and who asked for it.
    let audit = plane.audit()?;
    let created = |name: &str| {
        audit
            .iter()
            .any(|e| e.act() == "create configmaps" && e.name == name && e.user == "admin" && e.is_done())
    };
    assert!(created("before") && created("after") && !created("never"));
    assert!(audit.iter().any(|entry| entry.act() == "get configmaps" && entry.name == "before"));
    Ok(())
}
