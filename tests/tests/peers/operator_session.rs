//! The operator's own session with a real builder over real OpenSSH, whose connection is cut. The next
//! session with the same builder ends what the first began: nothing is built twice, and nothing is lost.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use drover_api::{ClassCache, Reason, Trust};
use drover_nix::{
    BasicDerivation, DerivationOutput, HashAlgo, Method, OutputName, Sha256, StoreDir, StorePath, nar,
};
use drover_operator::clock::Clock;
use drover_operator::keys::{ClientKey, Seed};
use drover_operator::session::host_key::HostKey;
use drover_operator::session::job::{Caches, JobPlan};
use drover_operator::session::meter::Meter;
use drover_operator::session::ssh::{Connection, Target};
use drover_operator::session::{Progress, Talk, talk};
use drover_operator::world::{SessionEnd, Stage};
use drover_serve::BuildOptions;
use drover_session::Kept;
use kube::runtime::reflector::ObjectRef;
use tempfile::TempDir;
use tokio::sync::watch;

use crate::ssh_fixture::{Keys, Listener, PATIENCE};

/// Waits for a file beside it, without a program: the sandbox has a shell and nothing else.
const WAIT: &str = "while [ ! -e go ]; do :; done";

/// How much of an output has come before its connection is cut: more than what may be lost with it.
const PART: u64 = 8 << 20;

/// The class's secret key. The pair is that of RFC 8032, 7.1, test 1.
const SIGNING_KEY: &str =
    "cache-1:nWGxne/9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2DXWpgBgrEKt9VL/tPJZAc6DuFy89qmIyWvAhpo9wdRGg==";

/// A builder, a cache, and what an operator has.
struct World {
    listener: Listener,
    /// As the keeper of sessions hands it on from one to the next.
    kept: Arc<Kept>,
    dir: TempDir,
    seed: Seed,
    client_key: ClientKey,
}

/// A session under way.
struct Session {
    end: tokio::task::JoinHandle<SessionEnd>,
    progress: Arc<Progress>,
    /// Bytes that moved.
    meter: Meter,
    _stop: watch::Sender<bool>,
}

impl World {
    fn new() -> Result<Self> {
        // Sockets lie below it, whose paths are short.
        let dir = TempDir::with_prefix_in("dos-", "/tmp")?;
        ["cache/nar", "work"]
            .map(|name| std::fs::create_dir_all(dir.path().join(name)))
            .into_iter()
            .collect::<Result<(), _>>()?;
        let seed = Seed::generate()?;
        let client_key = seed.client_key("uid", 1)?;
        let keys = Keys::new()?;
        let busybox = ["/usr/bin/busybox", "/bin/busybox"].into_iter().find(|path| Path::new(path).exists());
        let busybox = busybox.context("busybox not found: apt-get install busybox-static")?;
        let options = ["--linger", "1000", "--sandbox-shell", busybox];
        let listener = Listener::start(keys, &[&client_key.public_line()], &options)?;
        Ok(Self { listener, kept: Arc::default(), dir, seed, client_key })
    }

    /// A file that the cache is said to have, and what has to lie at `nar/input.nar` in it.
    fn input(&self, contents: &[u8]) -> Result<(StorePath, Vec<u8>)> {
        let mut archive = nar::Writer::new(Vec::new());
        archive.file(false, contents.len() as u64, contents)?;
        let nar = archive.finish()?;
        let input: StorePath = "i00sflxqsj37lfmf95m8mn0grv615hpj-input".parse()?;
        let narinfo = format!(
            "StorePath: /nix/store/{input}\nURL: nar/input.nar\nCompression: none\nNarHash: {}\nNarSize: {}\nReferences: \n",
            Sha256::of(&nar),
            nar.len()
        );
        let cache = self.dir.path().join("cache");
        std::fs::write(cache.join("nix-cache-info"), "StoreDir: /nix/store\n")?;
        std::fs::write(cache.join(format!("{}.narinfo", input.hash_part())), narinfo)?;
        Ok((input, nar))
    }

    fn work(&self) -> PathBuf {
        self.dir.path().join("work")
    }

    async fn session(&self, drv: &BasicDerivation) -> Result<Session> {
        let known = std::fs::read_to_string(self.listener.keys().path("known_hosts"))?;
        let (_, key) = known.split_once(' ').context("no key")?;
        let target = Target {
            address: [127, 0, 0, 1].into(),
            port: self.listener.port(),
            alias: "drover-uid-1",
            host_key: &HostKey::parse_line(&format!("host-key: {key}"))?,
            client_key: &self.client_key,
        };
        let (connection, pipes) = Connection::open(&target, &self.work()).await?;
        let said = Talk {
            job: JobPlan {
                drv_path: drover_session::drv_path_of(&StoreDir::default(), drv)?,
                derivation: drv.clone(),
                options: BuildOptions::default(),
                caches: vec![ClassCache {
                    url: format!("file://{}", self.dir.path().join("cache").display()),
                    push: true,
                    ..ClassCache::default()
                }],
                credentials: Vec::new(),
                signing_key: Some(SIGNING_KEY.into()),
                trust: Trust::Verified,
                max_output_bytes: None,
                spool_dir: self.work(),
            },
            caches: Arc::new(Caches::default()),
            work_dir: self.work(),
            stall: PATIENCE,
            reached_after: Duration::ZERO,
            kept: self.kept.clone(),
        };
        let (trigger, _triggered) = futures::channel::mpsc::unbounded();
        let request = ObjectRef::new("x").within("team");
        let progress = Arc::new(Progress::new(request, 1, "pod".into(), trigger, Clock::system()));
        let (stop, stopped) = watch::channel(false);
        let meter = pipes.meter.clone();
        let held = talk(said, pipes, progress.clone(), stopped);
        let end = tokio::spawn(async move {
            let end = held.await;
            connection.close().await;
            end
        });
        Ok(Session { end, progress, meter, _stop: stop })
    }

    /// Kills what holds the connections of this world on the client's side. How many that was.
    fn cut(&self) -> Result<usize> {
        let holders = self.holders()?;
        for pid in &holders {
            rustix::process::kill_process(*pid, rustix::process::Signal::KILL)?;
        }
        Ok(holders.len())
    }

    fn holders(&self) -> Result<Vec<rustix::process::Pid>> {
        let work = self.work().display().to_string();
        let mut holders = Vec::new();
        for entry in std::fs::read_dir("/proc")?.filter_map(Result::ok) {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line);
            if line.starts_with("ssh") && line.contains(&work) {
                holders.push(rustix::process::Pid::from_raw(pid).context("no process")?);
            }
        }
        Ok(holders)
    }

    /// Lets the build that waits go on.
    fn let_go(&self) -> Result<()> {
        let mut tops = std::fs::read_dir(self.listener.store().join("nix/var/nix/builds"))?;
        let top = tops.next().context("nothing is being built")??;
        Ok(std::fs::write(top.path().join("build/go"), "")?)
    }

    /// The one log in the cache.
    fn log(&self, drv: &BasicDerivation) -> Result<String> {
        let path = drover_session::drv_path_of(&StoreDir::default(), drv)?;
        Ok(std::fs::read_to_string(self.dir.path().join("cache/log").join(path.as_str()))?)
    }

    /// How often the build began, by the builder's own log.
    fn begun(&self) -> usize {
        self.listener.log_text().matches("first\n").count()
    }
}

impl Session {
    async fn reaches(&self, stage: Stage) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.progress.view().stage < stage {
            ensure!(Instant::now() < deadline && !self.end.is_finished(), "it never came to {stage:?}");
            tokio::task::yield_now().await;
        }
        Ok(())
    }

    async fn end(self) -> Result<SessionEnd> {
        Ok(tokio::time::timeout(2 * PATIENCE, self.end).await.context("the session does not end")??)
    }

    /// Ends as a connection that broke.
    async fn ends_lost(self) -> Result<()> {
        match self.end().await? {
            SessionEnd::Failed { reason: Reason::ConnectionLost, infrastructure: true, .. } => Ok(()),
            other => bail!("{other:?}"),
        }
    }

    async fn finishes(self) -> Result<()> {
        match self.end().await? {
            SessionEnd::Finished { .. } => Ok(()),
            other => bail!("{other:?}"),
        }
    }
}

fn derivation(inputs: &[StorePath], script: &str) -> BasicDerivation {
    let placeholder = Sha256::of(b"nix-output:out").to_nix32();
    BasicDerivation {
        name: "x".into(),
        outputs: [(
            OutputName::out(),
            DerivationOutput::CaFloating { method: Method::Nar, algo: HashAlgo::Sha256 },
        )]
        .into(),
        input_srcs: inputs.iter().cloned().collect(),
        system: "x86_64-linux".into(),
        builder: "/bin/sh".into(),
        args: vec!["-c".into(), script.into()],
        env: [("out".into(), format!("/{placeholder}").into())].into(),
    }
}

fn run<F: Future<Output = Result<()>>>(test: F) -> Result<()> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(test)
}

#[test]
fn cut_while_it_builds() -> Result<()> {
    run(async {
        let world = World::new()?;
        let drv = derivation(&[], &format!("echo first; {WAIT}; echo last; echo x > $out"));
        let first = world.session(&drv).await?;
        first.reaches(Stage::Building).await?;
        world.listener.says("first\n")?;
        ensure!(world.cut()? > 0);
        first.ends_lost().await?;
        let second = world.session(&drv).await?;
        second.reaches(Stage::Building).await?;
        world.let_go()?;
        second.finishes().await?;
        ensure!(world.begun() == 1, "it was built again");
        let log = world.log(&drv)?;
        // Who comes back before the builder has noticed is told that somebody else builds it.
        let log: String =
            log.lines().filter(|line| !line.starts_with("drover-builder: ")).collect::<Vec<_>>().join(" ");
        ensure!(log == "first last", "{log:?}");
        Ok(())
    })
}

#[test]
fn cut_while_nobody_comes_back_until_it_has_failed() -> Result<()> {
    run(async {
        let world = World::new()?;
        let drv = derivation(&[], &format!("echo first; {WAIT}; echo last; exit 7"));
        let first = world.session(&drv).await?;
        first.reaches(Stage::Building).await?;
        world.listener.says("first\n")?;
        ensure!(world.cut()? > 0);
        first.ends_lost().await?;
        world.let_go()?;
        world.listener.says("last\n")?;
        let second = world.session(&drv).await?;
        match second.end().await? {
            SessionEnd::Failed { reason: Reason::BuildFailed, infrastructure: false, message } => {
                ensure!(message.contains("exit code 7"), "{message}");
            }
            other => bail!("{other:?}"),
        }
        ensure!(world.begun() == 1, "it was built again");
        Ok(())
    })
}

#[test]
fn cut_while_inputs_are_copied() -> Result<()> {
    run(async {
        let world = World::new()?;
        let (input, nar) = world.input(&vec![b'i'; 1 << 20])?;
        let file = world.dir.path().join("cache/nar/input.nar");
        // Its first half comes; the second waits for us.
        let made = std::process::Command::new("mkfifo").arg(&file).status()?;
        ensure!(made.success());
        let drv = derivation(
            std::slice::from_ref(&input),
            &format!("read line < /nix/store/{input}; echo first; echo $line > $out"),
        );
        let first = world.session(&drv).await?;
        let writer = {
            let (file, half) = (file.clone(), nar[..nar.len() / 2].to_vec());
            tokio::task::spawn_blocking(move || -> std::io::Result<std::fs::File> {
                let mut fifo = std::fs::File::options().write(true).open(file)?;
                std::io::Write::write_all(&mut fifo, &half)?;
                Ok(fifo)
            })
        };
        first.reaches(Stage::CopyingInputs).await?;
        let mut fifo = tokio::time::timeout(PATIENCE, writer).await???;
        ensure!(world.cut()? > 0);
        // The session reads on and finds that nobody takes it, or that there is no more.
        let _gone = std::io::Write::write_all(&mut fifo, &nar[nar.len() / 2..]);
        drop(fifo);
        first.ends_lost().await?;
        std::fs::remove_file(&file)?;
        std::fs::write(&file, &nar)?;
        world.session(&drv).await?.finishes().await?;
        ensure!(world.begun() == 1);
        world.listener.verify()
    })
}

#[test]
fn cut_while_an_output_is_received() -> Result<()> {
    run(async {
        let world = World::new()?;
        // A line that hardly compresses, longer than what is compressed together, and the output is that over and over.
        let mut state = Sha256::of(b"a line");
        let mut line = String::new();
        while line.len() < drover_cache::FRAME * 5 / 4 {
            state = Sha256::of(&state.0);
            line += &state.to_string()[7..];
        }
        let (input, nar) = world.input(format!("{line}\n").as_bytes())?;
        let file = world.dir.path().join("cache/nar/input.nar");
        std::fs::write(&file, nar)?;
        let script = format!(
            "echo first; {WAIT}; read -r x < /nix/store/{input}; \
             for a in 1 2 3 4 5 6; do for b in 1 2 3 4 5; do echo $x; done; done > $out"
        );
        let drv = derivation(&[input], &script);
        let first = world.session(&drv).await?;
        first.reaches(Stage::Building).await?;
        world.listener.says("first\n")?;
        let holders = world.holders()?;
        ensure!(!holders.is_empty());
        let before = first.meter.total();
        world.let_go()?;
        let deadline = Instant::now() + 2 * PATIENCE;
        while first.meter.total() - before < PART {
            ensure!(Instant::now() < deadline && !first.end.is_finished(), "it never came to its output");
            tokio::task::yield_now().await;
        }
        for pid in holders {
            rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
        }
        let meter = first.meter.clone();
        first.ends_lost().await?;
        let received = meter.total() - before;
        ensure!(world.begun() == 1);
        let second = world.session(&drv).await?;
        let meter = second.meter.clone();
        second.finishes().await?;
        // All of it comes once, but for a frame that was on its way. Then what came is read three times: for its form, since
        // it came in parts, for its address, and into the cache, as it came.
        std::fs::remove_file(file)?;
        let files = std::fs::read_dir(world.dir.path().join("cache/nar"))?;
        let sizes: Vec<u64> = files.map(|file| Ok(file?.metadata()?.len())).collect::<Result<_>>()?;
        let [size] = sizes[..] else { bail!("{sizes:?}") };
        ensure!(received < size, "it was all there before the connection broke: {received} of {size} bytes");
        let moved = received + meter.total() - 3 * size;
        ensure!(moved >= size, "{moved} of {size} bytes");
        ensure!(
            moved < size + 2 * drover_cache::FRAME as u64,
            "{moved} of {size} bytes, {received} at first"
        );
        ensure!(world.begun() == 1, "it was built again");
        Ok(())
    })
}

/// What the operator says while this runs, to anybody.
#[derive(Clone, Default)]
struct Said(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Said {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap_or_else(|poison| poison.into_inner()).extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Private keys are where they must be while a session lasts, and nowhere else: not in what is logged, reported or stored.
#[test]
fn no_secret_is_left_anywhere() -> Result<()> {
    let said = Said::default();
    let writer = said.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_writer(move || writer.clone())
        .finish();
    // For all threads of this program: whatever other tests say as well is none of these secrets.
    tracing::subscriber::set_global_default(subscriber)?;
    run(async {
        let world = World::new()?;
        let drv = derivation(&[], "echo first; exit 7");
        let (good, bad) = (derivation(&[], "echo x > $out"), drv);
        let mut seen = Vec::new();
        for drv in [&good, &bad] {
            let session = world.session(drv).await?;
            let progress = session.progress.clone();
            seen.extend(format!("{:?} {:?}", session.end().await?, progress.view()).into_bytes());
        }
        seen.extend(world.listener.log_text().into_bytes());
        seen.extend(said.0.lock().unwrap_or_else(|poison| poison.into_inner()).iter());
        let mut dirs = vec![world.dir.path().to_owned()];
        while let Some(dir) = dirs.pop() {
            for entry in std::fs::read_dir(dir)? {
                let path = entry?.path();
                match path.is_dir() {
                    true => dirs.push(path),
                    false => seen.extend(std::fs::read(path)?),
                }
            }
        }
        let holds = |secret: &[u8]| seen.windows(secret.len()).any(|window| window == secret);
        ensure!(holds(b"exit code 7") && holds(b"cache-1:"), "what is looked through is not there");
        let private = world.client_key.private_file();
        let body: Vec<&str> =
            private.lines().filter(|line| !line.starts_with('-') && line.len() >= 32).collect();
        ensure!(!body.is_empty());
        // The last lines have the private half; the first are the public one's.
        let (_, signing) = SIGNING_KEY.split_once(':').context("no key")?;
        let hex: String = world.seed.bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        for secret in body.into_iter().skip(1).map(str::as_bytes).chain([
            signing.as_bytes(),
            hex.as_bytes(),
            world.seed.bytes(),
        ]) {
            ensure!(!holds(secret), "a secret is where everybody can read it");
        }
        Ok(())
    })
}
