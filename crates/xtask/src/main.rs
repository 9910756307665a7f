//! `cargo xtask`: the command line of [`xtask`].

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use xtask::cluster::Cluster;
use xtask::layers::{self, Layer, Tally};
use xtask::parts::rootfs::Nix;
use xtask::platform::Platform;
use xtask::{bench, chart, crds, dashboard, development, docs, fuzz, images, mutants, parts, root, run};

/// What people who work on Drover run.
#[derive(Parser)]
#[command(name = "cargo xtask", disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    act: Act,
}

#[derive(Subcommand)]
enum Act {
    /// Runs the tests: all, or one layer (unit, peers, fuzz, mutants, control-plane, node)
    Test { layer: Option<Layer> },
    /// Runs the fuzz targets, or one of them, and keeps every input that breaks one
    Fuzz {
        target: Option<String>,
        /// For each target
        #[arg(long, default_value_t = 60)]
        seconds: u64,
    },
    /// Takes away the guards that tests/mutants lists, one at a time, and sees the test fail that is named for each
    Mutants {
        /// Only those whose names contain this, that guard it, or whose tests are in the package of this name
        name: Option<String>,
    },
    /// Writes crds/ from the code
    Crds {
        /// Only fails where the files are not what the code generates
        #[arg(long)]
        check: bool,
    },
    /// Writes what the chart makes of tests/golden/chart/*.values.yaml, and the table in its README
    Chart {
        /// Only fails where they are not what the chart gives
        #[arg(long)]
        check: bool,
    },
    /// Writes the pages of docs/ that are made from the code
    Docs {
        /// Only fails where they are not what the code says
        #[arg(long)]
        check: bool,
    },
    /// Draws the Grafana dashboard, over samples that were made up, into the file OUT (docs/images/dashboard.svg)
    Dashboard { out: PathBuf },
    /// The main job from nothing: installs Drover on a real one-node cluster and builds real derivations there
    Demo,
    /// Fetches and builds what tests need, and prints where it is
    Parts,
    /// Makes the two OCI images, drover-builder.tar and drover-operator.tar, in the directory OUT
    Images {
        out: PathBuf,
        /// What for: linux/amd64, linux/arm64, or both with a comma in between. This machine's platform, if absent
        #[arg(long, value_delimiter = ',')]
        platform: Vec<Platform>,
    },
    /// Measures Drover beside the programs that people use today
    #[command(subcommand)]
    Bench(BenchAct),
    /// A real one-node Kubernetes cluster, in namespaces of its own
    #[command(subcommand)]
    Cluster(ClusterAct),
    /// Runs a program of a real Nix (2.8, 2.26 or 2.34), with this directory and /tmp
    Peer {
        version: Nix,
        #[arg(trailing_var_arg = true, required = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
}

#[derive(Subcommand)]
enum BenchAct {
    /// The serve protocol on pipes: `drover-builder serve` beside `nix-store --serve` of real Nix 2.34
    Serve {
        #[arg(long, default_value_t = 5)]
        rounds: usize,
        /// A case, or how its name begins: large, files, paths, query, query-lock, builds-1, builds-4, memory
        #[arg(long, value_name = "NAME")]
        only: Vec<String>,
        /// Where the stores are made [default: a tmpfs]
        #[arg(long)]
        dir: Option<PathBuf>,
        /// The drover-builder to measure [default: a release build of this checkout]
        #[arg(long)]
        builder: Option<PathBuf>,
    },
    /// One builder behind its own SSH server and behind OpenSSH's sshd
    Ssh {
        #[arg(long, default_value_t = 5)]
        rounds: usize,
        /// Where the stores are made [default: a tmpfs]
        #[arg(long)]
        dir: Option<PathBuf>,
        /// The drover-builder to measure [default: a release build of this checkout]
        #[arg(long)]
        builder: Option<PathBuf>,
        /// The round-trip time of the cases that have one, in milliseconds
        #[arg(long, default_value_t = 50)]
        round_trip: u64,
    },
}

#[derive(Subcommand)]
enum ClusterAct {
    /// Starts the cluster, unless it runs already, and waits until its node is Ready
    Up,
    /// Ends the cluster; leaves nothing
    Down,
    /// Says whether it runs, and where its files are
    Status,
    /// Brings the images of a tar file onto the node
    Load {
        #[arg(required = true)]
        images: Vec<PathBuf>,
    },
    /// kubectl as the cluster's administrator
    #[command(disable_help_flag = true)]
    Kubectl(Rest),
    /// Helm as the cluster's administrator
    #[command(disable_help_flag = true)]
    Helm(Rest),
    /// Runs a program of this machine in the cluster's network, with its KUBECONFIG
    #[command(disable_help_flag = true)]
    Exec(Rest),
    /// Runs a program of the node's, for instance `ctr -n k8s.io image ls`
    #[command(disable_help_flag = true)]
    Node(Rest),
}

#[derive(clap::Args)]
struct Rest {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    words: Vec<String>,
}

fn main() -> ExitCode {
    match act(Arguments::parse().act) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn act(act: Act) -> Result<ExitCode> {
    match act {
        Act::Test { layer } => test(layer),
        Act::Fuzz { target, seconds } => Ok(sum(fuzz::run(target.as_deref(), seconds)?)),
        Act::Mutants { name } => Ok(sum(mutants::run(name.as_deref(), 1)?)),
        Act::Crds { check } => if check { crds::check() } else { crds::write() }.map(|()| ExitCode::SUCCESS),
        Act::Chart { check } => {
            if check { chart::check() } else { chart::write() }.map(|()| ExitCode::SUCCESS)
        }
        Act::Docs { check } => if check { docs::check() } else { docs::write() }.map(|()| ExitCode::SUCCESS),
        Act::Dashboard { out } => dashboard::draw(&out).map(|()| ExitCode::SUCCESS),
        Act::Demo => demo(),
        Act::Parts => print_parts(),
        Act::Images { out, platform } => images(&out, platform),
        Act::Bench(act) => benchmark(act),
        Act::Cluster(act) => cluster(act),
        Act::Peer { version, command } => peer(version, &command),
    }
}

fn test(layer: Option<Layer>) -> Result<ExitCode> {
    Ok(sum(layers::test(layer.as_ref().map_or(&Layer::ALL, std::slice::from_ref))))
}

fn sum(total: Tally) -> ExitCode {
    println!("{} passed, {} failed", total.passed, total.failed);
    if total.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// It lives with the fixtures that it shares with tests, which this crate cannot depend on.
fn demo() -> Result<ExitCode> {
    run::run(&mut Command::new(development::compile()?.join("demo"))).map(|()| ExitCode::SUCCESS)
}

fn print_parts() -> Result<ExitCode> {
    for nix in Nix::ALL {
        println!("nix {:<6}  {}", nix.version(), parts::rootfs::nix(nix)?.display());
    }
    println!("nginx       {}", parts::rootfs::nginx()?.display());
    println!("ssh         {}", parts::rootfs::ssh(Platform::native()?)?.display());
    println!("sshd        {}", parts::rootfs::sshd()?.display());
    println!("passt       {}", parts::rootfs::passt()?.display());
    println!("tcc         {}", parts::rootfs::tcc()?.display());
    println!("prometheus  {}", parts::rootfs::prometheus()?.display());
    println!("node        {}", parts::rootfs::node()?.display());
    println!("kubernetes  {}", parts::go::kubernetes()?.display());
    println!("helm        {}", parts::go::helm()?.display());
    println!("kubeconform {}", parts::go::kubeconform()?.display());
    println!("versitygw   {}", parts::go::versitygw()?.display());
    Ok(ExitCode::SUCCESS)
}

fn images(out: &Path, mut platforms: Vec<Platform>) -> Result<ExitCode> {
    if platforms.is_empty() {
        platforms.push(Platform::native()?);
    }
    for image in images::make(out, &platforms)? {
        println!("{}  {}  {}", image.reference, image.digest, image.file.display());
        for part in &image.parts {
            let megabytes = part.written.compressed as f64 / (1 << 20) as f64;
            println!("  {}  {}  {megabytes:.1} MiB compressed", part.platform, part.written.digest);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn benchmark(act: BenchAct) -> Result<ExitCode> {
    match act {
        BenchAct::Serve { rounds, only, dir, builder } => {
            let builder = builder.map_or_else(bench::release_builder, Ok)?;
            let sizes = bench::data::Sizes::default();
            bench::serve::run(&bench::serve::Options { rounds, only, dir, sizes, builder })?;
        }
        BenchAct::Ssh { rounds, dir, builder, round_trip } => {
            let builder = builder.map_or_else(bench::release_builder, Ok)?;
            let sizes = bench::data::Sizes::default();
            let round_trip = std::time::Duration::from_millis(round_trip);
            bench::ssh::run(&bench::ssh::Options { rounds, dir, sizes, builder, round_trip })?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn cluster(act: ClusterAct) -> Result<ExitCode> {
    let cluster = Cluster::find()?;
    match act {
        ClusterAct::Up => {
            let cluster = Cluster::up()?;
            println!("The node is Ready. Network namespace: {}", cluster.netns().display());
        }
        ClusterAct::Down => cluster.down()?,
        ClusterAct::Status => {
            println!("running     {}", cluster.is_running());
            println!("netns       {}", cluster.netns().display());
            println!("kubeconfig  {}", cluster.kubeconfig().display());
            println!("logs        {}", cluster.logs().display());
        }
        ClusterAct::Load { images } => images.iter().try_for_each(|image| cluster.load(image))?,
        ClusterAct::Kubectl(rest) => return exec(cluster.kubectl_command()?.args(rest.words)),
        ClusterAct::Helm(rest) => return exec(cluster.helm_command()?.args(rest.words)),
        ClusterAct::Exec(Rest { words }) => {
            let [program, args @ ..] = words.as_slice() else { bail!("exec what? Name a program") };
            return exec(cluster.netns_command(program).args(args));
        }
        ClusterAct::Node(Rest { words }) => {
            let [program, args @ ..] = words.as_slice() else {
                bail!("run what on the node? Name a program")
            };
            return exec(cluster.node_command(program)?.args(args));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Becomes the program: its exit code and its signals are this one's.
fn exec(command: &mut Command) -> Result<ExitCode> {
    Err(command.exec()).with_context(|| format!("could not start {}", run::describe(command)))
}

fn peer(version: Nix, command: &[String]) -> Result<ExitCode> {
    let here: PathBuf = std::env::current_dir()?;
    let mut root = root::Root::new(parts::rootfs::nix(version)?).bind("/tmp", "/tmp");
    if !here.starts_with("/tmp") && here != Path::new("/") {
        root = root.bind(&here, &here);
    }
    exec(root.cwd(&here).command(&command[0])?.args(&command[1..]))
}
