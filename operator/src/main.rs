//! `drover-operator`: flags and environment in, a running operator out. Everything else is in the library.

use std::io::IsTerminal as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Parser, ValueEnum};
use drover_operator::check::Check;
use drover_operator::health::Health;
use drover_operator::http::Pages;
use drover_operator::lease::{Election, Timing};
use drover_operator::metrics::Metrics;
use drover_operator::process::{Process, SeedSource, Stop};
use drover_operator::scope::Scope;
use drover_operator::session::Ssh;
use drover_operator::settings::{Settings, Timeouts};
use drover_operator::trace::export::{Export, LAST_SPANS};
use drover_operator::trace::{self, Tracer};
use drover_operator::{class_file, http, init, log};
use ring::rand::SecureRandom as _;
use tracing::subscriber::set_global_default;
use tracing_subscriber::EnvFilter;

/// Builds Nix derivations in ephemeral pods.
#[derive(Parser)]
#[command(name = "drover-operator", version)]
#[command(after_help = "`drover-operator check` is what the chart runs beside the operator; see its --help.")]
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

    /// Namespace whose requests are taken; can be repeated. Without any, requests of all namespaces are
    #[arg(long, env = "DROVER_WATCH_NAMESPACES", value_delimiter = ',')]
    watch_namespaces: Vec<String>,

    /// File with the classes that there are (BuilderClass, YAML), instead of those of the cluster
    #[arg(long, env = "DROVER_CLASS_FILE")]
    class_file: Option<PathBuf>,

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

    /// Builds whose sessions can run at the same time; each takes two threads, a process and some 2 MiB of memory. Further ones
    /// wait for their turn, with their builders
    #[arg(long, env = "DROVER_MAX_SESSIONS", default_value_t = 1024)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..))]
    max_sessions: u16,

    #[command(flatten)]
    lease: LeaseFlags,

    #[command(flatten)]
    timeouts: TimeoutFlags,

    /// What is logged: a level, or directives such as `info,drover_operator=debug`
    #[arg(long, env = "DROVER_LOG", default_value = "info")]
    log: String,

    /// How it is logged
    #[arg(long, env = "DROVER_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Leadership")]
struct LeaseFlags {
    /// Whether the operator works only while it holds a Lease, so that there can be others. `false` is for one that is alone
    #[arg(long, env = "DROVER_LEADER_ELECT", default_value_t = true, action = clap::ArgAction::Set)]
    leader_elect: bool,

    /// Name of the Lease, in the operator's namespace
    #[arg(long, env = "DROVER_LEASE_NAME", default_value = "drover-operator")]
    lease_name: String,

    /// What the Lease calls this process, with something random behind it. Default: the machine's name, which in a pod is its
    #[arg(long, env = "DROVER_POD_NAME")]
    pod_name: Option<String>,

    /// Seconds after which another operator takes a Lease that is not renewed
    #[arg(long, env = "DROVER_LEASE_DURATION_SECONDS", default_value_t = 15)]
    lease_duration_seconds: u32,

    /// Seconds after which a leader that cannot renew it writes no more and ends
    #[arg(long, env = "DROVER_LEASE_RENEW_DEADLINE_SECONDS", default_value_t = 10)]
    lease_renew_deadline_seconds: u32,

    /// Seconds between two renewals
    #[arg(long, env = "DROVER_LEASE_RETRY_PERIOD_SECONDS", default_value_t = 2)]
    lease_retry_period_seconds: u32,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Timeouts")]
struct TimeoutFlags {
    /// Seconds in which a builder's pod has to find a node; a cluster that grows takes its time
    #[arg(long, env = "DROVER_SCHEDULING_TIMEOUT_SECONDS", default_value_t = seconds(|t| t.scheduling))]
    scheduling_timeout_seconds: u32,

    /// Seconds in which a builder whose pod has a node has to answer; pulling its image is in it
    #[arg(long, env = "DROVER_START_TIMEOUT_SECONDS", default_value_t = seconds(|t| t.start))]
    start_timeout_seconds: u32,

    /// Seconds without a byte moved after which copying is given up
    #[arg(long, env = "DROVER_STALL_TIMEOUT_SECONDS", default_value_t = seconds(|t| t.stall))]
    stall_timeout_seconds: u32,

    /// Seconds after a request's creation in which an input may turn up that no cache has and no request builds
    #[arg(long, env = "DROVER_INPUT_GRACE_SECONDS", default_value_t = seconds(|t| t.input_grace))]
    input_grace_seconds: u32,

    /// Seconds that a build goes on without an operator
    #[arg(long, env = "DROVER_LINGER_SECONDS", default_value_t = seconds(|t| t.linger))]
    linger_seconds: u32,
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

fn main() -> anyhow::Result<ExitCode> {
    if let Some(check) = Check::asked() {
        return run_check(check);
    }
    let flags = Flags::parse();
    if init::is_needed() {
        return init::run();
    }
    start_log(&flags)?;
    provide_tls()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .max_blocking_threads(usize::from(flags.max_sessions) + 64)
        .build()
        .context("cannot start the async runtime")?;
    let metrics = Arc::new(Metrics::new());
    let traces = trace::settings::Settings::read(|name| std::env::var(name).ok())?;
    let instance = flags.lease.pod_name.clone().unwrap_or_else(machine);
    let export = Export::start(traces.as_ref(), &instance, metrics.trace_spans_dropped.clone())?;
    let result = runtime.block_on(run(flags, metrics, export.tracer()));
    // Sessions that still run block threads that nothing can end; the builders go on without us.
    runtime.shutdown_background();
    export.close(LAST_SPANS);
    result.map(|()| ExitCode::SUCCESS)
}

/// The only provider in the tree; without this, the first connection would panic if there were another.
fn provide_tls() -> anyhow::Result<()> {
    rustls::crypto::ring::default_provider()
        .install_default()
        .map_err(|_| anyhow::anyhow!("another TLS provider was installed first"))
}

/// `check`, which has arguments of its own.
fn run_check(check: Check) -> anyhow::Result<ExitCode> {
    if init::is_needed() {
        return init::run();
    }
    provide_tls()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let config = kube::Config::infer().await.context("cannot find an API server to talk to")?;
        check.run(config).await?;
        Ok(ExitCode::SUCCESS)
    })
}

fn start_log(flags: &Flags) -> anyhow::Result<()> {
    let filter =
        EnvFilter::try_new(&flags.log).with_context(|| format!("--log {:?} makes no sense", flags.log))?;
    let (writer, is_coloured) = (std::io::stderr, std::io::stderr().is_terminal());
    match flags.log_format {
        LogFormat::Text => set_global_default(log::text(filter, writer, is_coloured)),
        LogFormat::Json => set_global_default(log::json(filter, writer)),
    }
    .context("cannot start the log")?;
    log::note_panics();
    Ok(())
}

async fn run(flags: Flags, metrics: Arc<Metrics>, tracer: Tracer) -> anyhow::Result<()> {
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        namespace = flags.namespace,
        builder_namespace = flags.builder_namespace,
        builder_image = flags.builder_image,
        concurrency = flags.concurrency,
        max_sessions = flags.max_sessions,
        leader_elect = flags.lease.leader_elect,
        "drover-operator starts"
    );
    let config = kube::Config::infer().await.context("cannot find an API server to talk to")?;
    let name = flags.lease.pod_name.clone().unwrap_or_else(machine);
    let health = Arc::new(Health::new());
    let process = Process {
        config,
        election: flags.lease.election(&flags.namespace, &name)?,
        name,
        seed: match flags.seed_file {
            Some(path) => SeedSource::File(path),
            None => SeedSource::Secret(flags.seed_secret),
        },
        settings: Settings {
            namespace: flags.namespace,
            builder_namespace: flags.builder_namespace,
            builder_image: flags.builder_image,
            builder_pull_policy: flags.builder_pull_policy,
            builder_pull_secrets: flags.builder_pull_secrets,
            max_sessions: flags.max_sessions,
            pod_deadline_seconds: flags.pod_deadline_seconds,
            work_dir: flags.work_dir,
            concurrency: flags.concurrency,
            timeouts: flags.timeouts.into(),
            scope: Scope {
                namespaces: flags.watch_namespaces,
                classes: flags.class_file.as_deref().map(class_file::read).transpose()?,
            },
        },
        metrics: metrics.clone(),
        health: health.clone(),
        conversation: Arc::new(Ssh),
        tracer,
    };
    let stop = Stop::on_signals()?;
    http::serve(flags.listen, Pages { metrics, health })?;
    Ok(process.run(stop).await?)
}

impl LeaseFlags {
    fn election(&self, namespace: &str, name: &str) -> anyhow::Result<Option<Election>> {
        if !self.leader_elect {
            return Ok(None);
        }
        let mut random = [0; 8];
        ring::rand::SystemRandom::new()
            .fill(&mut random)
            .map_err(|_| anyhow::anyhow!("the system gave no random bytes"))?;
        let seconds = |seconds: u32| Duration::from_secs(seconds.into());
        Ok(Some(Election {
            namespace: namespace.to_owned(),
            name: self.lease_name.clone(),
            // A container that is started again in the same pod is another one.
            identity: format!("{name}_{:016x}", u64::from_le_bytes(random)),
            timing: Timing::new(
                seconds(self.lease_duration_seconds),
                seconds(self.lease_renew_deadline_seconds),
                seconds(self.lease_retry_period_seconds),
            )?,
        }))
    }
}

impl From<TimeoutFlags> for Timeouts {
    fn from(flags: TimeoutFlags) -> Self {
        let seconds = |seconds: u32| Duration::from_secs(seconds.into());
        Self {
            scheduling: seconds(flags.scheduling_timeout_seconds),
            start: seconds(flags.start_timeout_seconds),
            stall: seconds(flags.stall_timeout_seconds),
            input_grace: seconds(flags.input_grace_seconds),
            linger: seconds(flags.linger_seconds),
        }
    }
}

/// The default of a timeout.
fn seconds(of: impl Fn(&Timeouts) -> Duration) -> u32 {
    u32::try_from(of(&Timeouts::default()).as_secs()).unwrap_or(u32::MAX)
}

fn machine() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}
