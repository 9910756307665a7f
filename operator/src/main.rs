//! `drover-operator`: flags and environment in, a running operator out. Everything else is in the library.

use std::io::IsTerminal as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use clap::{Parser, ValueEnum};
use drover_operator::clock::Clock;
use drover_operator::controller::{self, Parts};
use drover_operator::metrics::Metrics;
use drover_operator::session::Ssh;
use drover_operator::settings::{Settings, Timeouts};
use drover_operator::{http, init, seed};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// Builds Nix derivations in ephemeral pods.
#[derive(Parser)]
#[command(name = "drover-operator", version)]
struct Flags {
    /// Namespace of the operator: its seed and the Secrets that classes name are here
    #[arg(long, env = "DROVER_NAMESPACE", default_value = "drover-system")]
    namespace: String,

    /// Namespace of builder pods
    #[arg(long, env = "DROVER_BUILDER_NAMESPACE", default_value = "drover-builders")]
    builder_namespace: String,

    /// Image of the builder
    #[arg(long, env = "DROVER_BUILDER_IMAGE")]
    builder_image: String,

    /// When the kubelet pulls that image
    #[arg(long, env = "DROVER_BUILDER_PULL_POLICY", default_value = "IfNotPresent")]
    #[arg(value_parser = ["Always", "IfNotPresent", "Never"])]
    builder_pull_policy: String,

    /// Name of a Secret in the builders' namespace with which the image is pulled; can be repeated
    #[arg(long = "builder-pull-secret", env = "DROVER_BUILDER_PULL_SECRETS", value_delimiter = ',')]
    builder_pull_secrets: Vec<String>,

    /// Seconds that a builder pod may live if the request has no timeout
    #[arg(long, env = "DROVER_POD_DEADLINE_SECONDS", default_value_t = 86_400)]
    pod_deadline_seconds: u32,

    /// Secret in the operator's namespace that keeps its seed; made at the first start
    #[arg(long, env = "DROVER_SEED_SECRET", default_value = "drover-operator-seed")]
    seed_secret: String,

    /// File with the seed (32 bytes), instead of a Secret
    #[arg(long, env = "DROVER_SEED_FILE", conflicts_with = "seed_secret")]
    seed_file: Option<PathBuf>,

    /// Address for /healthz, /readyz and /metrics
    #[arg(long, env = "DROVER_LISTEN", default_value = "0.0.0.0:8080")]
    listen: SocketAddr,

    /// Directory for archives, logs and connections; short, since sockets lie below it
    #[arg(long, env = "DROVER_WORK_DIR", default_value = "/tmp")]
    work_dir: PathBuf,

    /// Requests that are looked at at the same time
    #[arg(long, env = "DROVER_CONCURRENCY", default_value_t = 16)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..))]
    concurrency: u16,

    /// Builds whose sessions can run at the same time; each takes two threads
    #[arg(long, env = "DROVER_MAX_SESSIONS", default_value_t = 1024)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..))]
    max_sessions: u16,

    /// What is logged: a level, or directives such as `info,drover_operator=debug`
    #[arg(long, env = "DROVER_LOG", default_value = "info")]
    log: String,

    /// How it is logged
    #[arg(long, env = "DROVER_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

fn main() -> anyhow::Result<ExitCode> {
    let flags = Flags::parse();
    if init::is_needed() {
        return init::run();
    }
    start_log(&flags)?;
    // The only provider in the tree; without this, the first connection would panic if there were another.
    rustls::crypto::ring::default_provider()
        .install_default()
        .map_err(|_| anyhow::anyhow!("another TLS provider was installed first"))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .max_blocking_threads(usize::from(flags.max_sessions) + 64)
        .build()
        .context("cannot start the async runtime")?;
    let result = runtime.block_on(run(flags));
    // Sessions that still run block threads that nothing can end; the builders go on without us.
    runtime.shutdown_background();
    result.map(|()| ExitCode::SUCCESS)
}

fn start_log(flags: &Flags) -> anyhow::Result<()> {
    let filter =
        EnvFilter::try_new(&flags.log).with_context(|| format!("--log {:?} makes no sense", flags.log))?;
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    match flags.log_format {
        LogFormat::Text => subscriber.init(),
        LogFormat::Json => subscriber.json().init(),
    }
    Ok(())
}

async fn run(flags: Flags) -> anyhow::Result<()> {
    let client = kube::Client::try_default().await.context("cannot find an API server to talk to")?;
    let seed = match &flags.seed_file {
        Some(path) => seed::from_file(path)?,
        None => seed::from_secret(&client, &flags.namespace, &flags.seed_secret).await?,
    };
    let settings = Settings {
        namespace: flags.namespace,
        builder_namespace: flags.builder_namespace,
        builder_image: flags.builder_image,
        builder_pull_policy: flags.builder_pull_policy,
        builder_pull_secrets: flags.builder_pull_secrets,
        pod_deadline_seconds: flags.pod_deadline_seconds,
        work_dir: flags.work_dir,
        concurrency: flags.concurrency,
        timeouts: Timeouts::default(),
    };
    let metrics = Arc::new(Metrics::new());
    let parts = Parts {
        client,
        settings,
        seed,
        metrics: metrics.clone(),
        clock: Clock::system(),
        conversation: Arc::new(Ssh),
    };
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let shutdown = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("shutting down");
    };
    tokio::select! {
        error = http::serve(flags.listen, metrics) => error.map(|never| match never {}).map_err(Into::into),
        () = controller::run(parts, shutdown) => Ok(()),
    }
}
