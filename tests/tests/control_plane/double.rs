//! The API server in memory, with which the operator's own tests are made, does what the real one does.

use anyhow::{Result, ensure};
use drover_tests::ControlPlane;

#[path = "../../../operator/tests/faults/conformance.rs"]
mod conformance;

#[test]
fn the_double_is_no_kinder_than_the_real_one() -> Result<()> {
    let plane = ControlPlane::start()?;
    plane.kubectl(&["create", "namespace", conformance::NAMESPACE])?;
    let crds = xtask::checkout().join("crds");
    plane.kubectl(&["apply", "--server-side", "-f", &crds.to_string_lossy()])?;
    plane.wait_established()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let said = runtime.block_on(async {
        let kubeconfig = kube::config::Kubeconfig::read_from(plane.kubeconfig())?;
        let config = kube::Config::from_custom_kubeconfig(kubeconfig, &Default::default()).await?;
        anyhow::Ok(conformance::script(kube::Client::try_from(config)?).await)
    })?;
    ensure!(
        said == conformance::EXPECTED,
        "the real one:\n{said}\nthe script says:\n{}",
        conformance::EXPECTED
    );
    Ok(())
}
