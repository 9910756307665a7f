//! The fixture is a real API server: it has namespaces, knows users apart, and is gone when it is dropped.

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
