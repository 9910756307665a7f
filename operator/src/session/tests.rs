//! Sessions over pipes, with a builder in memory at their far ends that is slow, silent or gone.

use std::io::{self, PipeReader, PipeWriter, Read as _, Write};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use drover_api::{BuildRequest, ClassCache, Reason, Trust};
use drover_nix::{
    BasicDerivation, ContentAddress, DerivationOutput, Hash, Method, OutputName, Sha256, StoreDir,
};
use drover_serve::testing::{MemoryStore, file_nar};
use drover_serve::{BuildOptions, BuildResult, BuildStatus};
use futures::channel::mpsc::unbounded;
use jiff::Timestamp;
use kube::runtime::reflector::ObjectRef;
use rustix::event::{PollFd, PollFlags, poll};
use tokio::sync::watch;
use tracing::Instrument as _;

use super::job::JobPlan;
use super::pipe::Pipes;
use super::{Progress, Talk, talk};
use crate::clock::Clock;
use crate::log::{of_request, testing::Lines};
use crate::trace::session::Recorder;
use crate::trace::{Context, Sink, Span, Tracer};
use crate::world::{SessionEnd, Stage};

/// Where it counts, the clock moves as the test has it move: a busy machine makes nothing slow.
const STALL: Duration = Duration::from_millis(400);
const LONG: Duration = Duration::from_secs(60);

/// As many as the watch over a session looks in a period.
const STEPS: u32 = 20;

const CONTENTS: &[u8] = &[b'x'; 20_000];

/// The builder's ends.
struct Far {
    stdin: PipeReader,
    stdout: PipeWriter,
    stderr: PipeWriter,
}

/// A session under way.
struct Session {
    end: tokio::task::JoinHandle<SessionEnd>,
    progress: Arc<Progress>,
    stop: watch::Sender<bool>,
    dir: tempfile::TempDir,
    heard: Arc<Heard>,
}

/// Names of the spans of a session, and what failed of them.
#[derive(Default)]
struct Heard(Mutex<Vec<(&'static str, Option<&'static str>)>>);

impl Sink for Heard {
    fn take(&self, span: Span) {
        self.0.lock().unwrap().push((span.name, span.error));
    }
}

/// A fixed-output derivation without inputs.
fn derivation() -> BasicDerivation {
    let address = ContentAddress { method: Method::Nar, hash: Hash::from(Sha256::of(&file_nar(CONTENTS))) };
    BasicDerivation {
        name: "x".into(),
        outputs: [(OutputName::out(), DerivationOutput::CaFixed(address))].into(),
        input_srcs: [].into(),
        system: "x86_64-linux".into(),
        builder: "/bin/sh".into(),
        args: Vec::new(),
        env: [].into(),
    }
}

fn begin(stall: Duration) -> (Session, Far) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("cache")).unwrap();
    let derivation = derivation();
    let job = JobPlan {
        drv_path: drover_session::drv_path_of(&StoreDir::default(), &derivation).unwrap(),
        derivation,
        options: BuildOptions::default(),
        caches: vec![ClassCache {
            url: format!("file://{}", dir.path().join("cache").display()),
            push: true,
            ..ClassCache::default()
        }],
        credentials: Vec::new(),
        signing_key: None,
        trust: Trust::Verified,
        max_output_bytes: None,
        spool_dir: dir.path().to_owned(),
    };
    let ((far_stdin, stdin), (stdout, far_stdout)) = (io::pipe().unwrap(), io::pipe().unwrap());
    let (stderr, far_stderr) = io::pipe().unwrap();
    let pipes = Pipes::new(stdin, stdout, stderr).unwrap();
    let request = ObjectRef::new("x").within("team");
    let heard = Arc::new(Heard::default());
    let recorder =
        Recorder::new(Context::of(&BuildRequest::new("x", Default::default())), 1, "pod", Timestamp::now());
    let progress = Progress::new(request, 1, "pod".into(), unbounded().0, Clock::system());
    let progress = Arc::new(progress.traced(Tracer::new(heard.clone()), recorder));
    let (stop, stopped) = watch::channel(false);
    let said = Talk {
        job,
        caches: Arc::default(),
        work_dir: dir.path().to_owned(),
        stall,
        reached_after: Duration::ZERO,
        kept: Arc::default(),
    };
    let end = tokio::spawn(talk(said, pipes, progress.clone(), stopped).in_current_span());
    (
        Session { end, progress, stop, dir, heard },
        Far { stdin: far_stdin, stdout: far_stdout, stderr: far_stderr },
    )
}

impl Far {
    /// Waits until nobody can read the log any more.
    fn log_is_let_go(&self) {
        // Of a pipe that is written to, an error says that it has no reader; it need not be asked for (poll(2)).
        let mut polled = [PollFd::new(&self.stderr, PollFlags::empty())];
        let limit = rustix::event::Timespec::try_from(LONG).unwrap();
        assert_eq!(poll(&mut polled, Some(&limit)), Ok(1), "the log's thread has no end");
    }

    /// Serves a builder that does `build` and then has what it was asked for. Ends when the session's side has.
    fn serve(
        self,
        output: impl Write + Send + 'static,
        mut build: impl FnMut(&mut PipeWriter) + Send + 'static,
    ) -> JoinHandle<()> {
        let Self { stdin, stdout, mut stderr } = self;
        drop(stdout);
        let mut store = MemoryStore::default();
        store.builder = Some(Box::new(move |store, _, derivation, _| {
            build(&mut stderr);
            let paths = derivation.output_paths(&StoreDir::default()).unwrap();
            let path = paths.into_values().next().unwrap().unwrap();
            let mut info = store.insert(path, &[], file_nar(CONTENTS));
            let DerivationOutput::CaFixed(address) = &derivation.outputs[&OutputName::out()] else {
                panic!()
            };
            info.ca = Some(address.clone());
            BuildResult::new(BuildStatus::Built)
        }));
        thread::spawn(move || {
            let _gone = drover_serve::serve(stdin, output, &mut store, &StoreDir::default(), true);
        })
    }
}

impl Session {
    async fn end(self) -> (SessionEnd, tempfile::TempDir) {
        (tokio::time::timeout(LONG, self.end).await.expect("a session that has no end").unwrap(), self.dir)
    }

    async fn reaches(&self, stage: Stage) {
        // By the machine's clock: the runtime's may stand still.
        let begun = Instant::now();
        while self.progress.view().stage < stage {
            assert!(begun.elapsed() < LONG, "never came to {stage:?}");
            tokio::task::yield_now().await;
        }
    }

    /// Lets so much time go by, in small steps.
    async fn pass(&self, time: Duration) {
        for _ in 0..=STEPS {
            tokio::time::advance(time / STEPS).await;
        }
    }
}

fn failed(end: &SessionEnd) -> (Reason, bool, &str) {
    let SessionEnd::Failed { reason, message, infrastructure } = end else { panic!("{end:?}") };
    (*reason, *infrastructure, message)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_goes_through_with_its_log() {
    let (session, far) = begin(LONG);
    let stdout = far.stdout.try_clone().unwrap();
    let builder = far.serve(stdout, |log| log.write_all(b"one\ntwo\n").unwrap());
    let (end, dir) = session.end().await;
    let SessionEnd::Finished { outputs, .. } = end else { panic!("{end:?}") };
    assert_eq!(outputs["out"].nar_hash, Sha256::of(&file_nar(CONTENTS)).to_string());
    builder.join().unwrap();
    let logs: Vec<_> =
        std::fs::read_dir(dir.path().join("cache/log")).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(logs.len(), 1);
    assert_eq!(std::fs::read(&logs[0]).unwrap(), b"one\ntwo\n");
}

/// Each phase as it ends, and what is open with the session.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_says_its_phases() {
    let (session, far) = begin(LONG);
    let stdout = far.stdout.try_clone().unwrap();
    let builder = far.serve(stdout, |_| {});
    let (heard, progress) = (session.heard.clone(), session.progress.clone());
    let (end, _dir) = session.end().await;
    progress.end(end, false);
    builder.join().unwrap();
    let names = ["connect", "lock", "build", "collect", "push", "session"];
    assert_eq!(*heard.0.lock().unwrap(), names.map(|name| (name, None)));

    let (session, far) = begin(LONG);
    let stdout = far.stdout.try_clone().unwrap();
    let builder = far.serve(stdout, |_| std::panic::resume_unwind(Box::new("gone")));
    let (heard, progress) = (session.heard.clone(), session.progress.clone());
    let (end, _dir) = session.end().await;
    progress.end(end, false);
    assert!(builder.join().is_err());
    let lost = Some("ConnectionLost");
    assert_eq!(
        *heard.0.lock().unwrap(),
        [("connect", None), ("lock", None), ("build", lost), ("session", lost)]
    );
}

/// On its blocking thread as well.
#[tokio::test]
async fn what_a_session_logs_names_its_request() {
    let lines = Lines::default();
    let _captured = lines.capture();
    let (session, far) = of_request("team", "x", "u-1", Some(2)).in_scope(|| begin(LONG));
    let stdout = far.stdout.try_clone().unwrap();
    let builder = far.serve(stdout, |_| {});
    session.end().await;
    builder.join().unwrap();
    let parsed = lines.parsed();
    assert!(parsed.iter().any(|line| line["message"] == "session"), "{parsed:#?}");
    for line in parsed {
        assert_eq!([&line["namespace"], &line["request"], &line["uid"]], ["team", "x", "u-1"], "{line}");
        assert_eq!(line["attempt"], 2, "{line}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_builder_that_says_nothing_is_given_up() {
    let (session, mut far) = begin(STALL);
    session.pass(STALL / 2).await;
    assert!(!session.end.is_finished());
    session.pass(STALL).await;
    let (end, _dir) = session.end().await;
    let (reason, infrastructure, message) = failed(&end);
    assert_eq!((reason, infrastructure), (Reason::InfrastructureFailure, true));
    assert!(message.starts_with("greeting the builder: less than 1024 bytes"), "{message}");
    // The session's threads let go of its ends, each when it comes to run: the one that copies, and the log's.
    far.stdin.read_to_end(&mut Vec::new()).unwrap();
    far.log_is_let_go();
    assert_eq!(far.stderr.write(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
}

/// Of what is long, gives its reader a byte for each word that it gets.
struct Trickle(PipeWriter, mpsc::Receiver<()>);

impl Write for Trickle {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() < CONTENTS.len() / 10 {
            return self.0.write(bytes);
        }
        self.1.recv().map_err(io::Error::other)?;
        self.0.write(&bytes[..1])
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test(start_paused = true)]
async fn a_builder_that_trickles_is_given_up() {
    let (session, far) = begin(STALL);
    let (byte, bytes) = mpsc::channel();
    let stdout = Trickle(far.stdout.try_clone().unwrap(), bytes);
    let builder = far.serve(stdout, |_| {});
    session.reaches(Stage::Collecting).await;
    for _ in 0..3 * STEPS {
        // Refused once the builder has lost its client.
        let _ = byte.send(());
        tokio::time::advance(STALL / STEPS).await;
    }
    let (end, _dir) = session.end().await;
    let (reason, _, message) = failed(&end);
    assert_eq!(reason, Reason::InfrastructureFailure);
    assert!(message.starts_with("collecting outputs: less than"), "{message}");
    drop(byte);
    builder.join().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_build_may_be_silent() {
    let (session, far) = begin(STALL);
    let stdout = far.stdout.try_clone().unwrap();
    let (go, gone) = mpsc::channel::<()>();
    let builder = far.serve(stdout, move |_| gone.recv().unwrap());
    session.reaches(Stage::Building).await;
    session.pass(3 * STALL).await;
    assert!(!session.end.is_finished());
    go.send(()).unwrap();
    let (end, _dir) = session.end().await;
    assert!(matches!(end, SessionEnd::Finished { .. }), "{end:?}");
    builder.join().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn told_to_stop_it_leaves_nothing_behind() {
    let (session, far) = begin(LONG);
    let stdout = far.stdout.try_clone().unwrap();
    let (go, gone) = mpsc::channel::<()>();
    let builder = far.serve(stdout, move |_| gone.recv().unwrap_or(()));
    session.reaches(Stage::Building).await;
    session.stop.send(true).unwrap();
    let progress = session.progress.clone();
    let (end, dir) = session.end().await;
    assert_eq!(failed(&end).0, Reason::InfrastructureFailure);
    // The builder is still busy. The session's thread does not wait for it: it has let go of all that it held.
    let left = async {
        while Arc::strong_count(&progress) > 1 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LONG, left).await.unwrap();
    drop(go);
    builder.join().unwrap();
    assert!(!dir.path().join("cache/log").exists(), "another session has more of the log");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_builder_that_goes_is_a_lost_connection() {
    let (session, far) = begin(LONG);
    let stdout = far.stdout.try_clone().unwrap();
    let builder = far.serve(stdout, |_| std::panic::resume_unwind(Box::new("gone")));
    let (end, _dir) = session.end().await;
    assert_eq!((failed(&end).0, failed(&end).1), (Reason::ConnectionLost, true));
    assert!(builder.join().is_err());
}
