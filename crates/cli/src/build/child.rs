//! The builder as a child process: the protocol on its pipes, the log on its standard error.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead as _, BufReader, BufWriter, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use drover_api::LOG_TAIL_LINES;

use super::console::Console;

/// Longest line that is kept whole in the tail, and that is handled at once.
const MAX_LINE: u64 = 16 << 10;
/// How long a builder may take to go after its connection was closed.
const GRACE: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(20);

/// What the line begins with that `--say-sandbox` puts before the log.
const SANDBOX_PREFIX: &[u8] = b"sandbox: ";

pub(super) struct Child {
    child: std::process::Child,
    log: Option<JoinHandle<std::io::Result<Said>>>,
    log_file: PathBuf,
}

/// What came on standard error.
struct Said {
    tail: Vec<String>,
    sandbox: Option<String>,
}

/// What is left of a builder.
pub(super) struct End {
    /// The sandbox that builds had, if the builder found one.
    pub(super) sandbox: Option<String>,
    /// The last lines of the log.
    pub(super) tail: Vec<String>,
    pub(super) log_file: PathBuf,
    /// How it ended, if not well.
    pub(super) trouble: Option<ExitStatus>,
}

impl Child {
    /// Starts `program` on the store in `store`. Its log goes to the console, and to a file in `scratch`.
    pub(super) fn start(program: &Path, store: &Path, scratch: &Path, console: Console) -> Result<Self> {
        let log_file = scratch.join("log");
        let file =
            File::create(&log_file).with_context(|| format!("cannot create {}", log_file.display()))?;
        let mut child = Command::new(program)
            .args(["serve", "--write", "--say-sandbox", "--store"])
            .arg(store)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start the builder {}", program.display()))?;
        let stderr = child.stderr.take().context("the builder has no standard error")?;
        let log = std::thread::Builder::new()
            .name("log".into())
            .spawn(move || follow(BufReader::new(stderr), BufWriter::new(file), &console))
            .context("cannot start a thread for the log")?;
        Ok(Self { child, log: Some(log), log_file })
    }

    /// Its standard output and input. To be asked for once.
    pub(super) fn pipes(&mut self) -> (Pipe<ChildStdout>, Pipe<ChildStdin>) {
        (Pipe(self.child.stdout.take()), Pipe(self.child.stdin.take()))
    }

    /// Waits until the builder and its log have ended; both pipes must be closed.
    pub(super) fn finish(mut self) -> Result<End> {
        let deadline = Instant::now() + GRACE;
        let status = loop {
            match self.child.try_wait().context("cannot wait for the builder")? {
                Some(status) => break status,
                None if Instant::now() < deadline => std::thread::sleep(POLL),
                None => {
                    self.child.kill().context("cannot stop the builder")?;
                    break self.child.wait().context("cannot wait for the builder")?;
                }
            }
        };
        let Said { tail, sandbox } = match self.log.take().map(JoinHandle::join) {
            Some(Ok(said)) => said.with_context(|| format!("cannot write {}", self.log_file.display()))?,
            _ => return Err(anyhow!("the thread that reads the log is gone")),
        };
        let trouble = (!status.success()).then_some(status);
        Ok(End { sandbox, tail, log_file: std::mem::take(&mut self.log_file), trouble })
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // Where `finish` was not reached: nobody is left who could use the builder.
        if self.log.is_some() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// One end of a pipe. Without one, it is at its end, as if the other side had closed it.
pub(super) struct Pipe<T>(Option<T>);

impl<T: std::io::Read> std::io::Read for Pipe<T> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.0.as_mut().map_or(Ok(0), |pipe| pipe.read(buffer))
    }
}

impl<T: std::io::Write> std::io::Write for Pipe<T> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.as_mut().map_or_else(|| Err(std::io::ErrorKind::BrokenPipe.into()), |pipe| pipe.write(bytes))
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.as_mut().map_or(Ok(()), std::io::Write::flush)
    }
}

/// Copies the log to the console and the file until it ends, and gives back its last lines. A full disk must not stop
/// the builder, so it is reported at the end only.
fn follow(
    mut log: BufReader<impl std::io::Read>,
    mut file: BufWriter<File>,
    console: &Console,
) -> std::io::Result<Said> {
    let mut tail = VecDeque::with_capacity(LOG_TAIL_LINES);
    let mut kept = Ok(());
    let mut line = Vec::new();
    let sandbox = first_line(&mut log)?;
    loop {
        line.clear();
        if log.by_ref().take(MAX_LINE).read_until(b'\n', &mut line)? == 0 {
            break;
        }
        if kept.is_ok() {
            kept = file.write_all(&line);
        }
        if !line.ends_with(b"\n") {
            line.push(b'\n');
        }
        console.log(&line);
        if tail.len() == LOG_TAIL_LINES {
            tail.pop_front();
        }
        tail.push_back(String::from_utf8_lossy(&line).trim_end().to_owned());
    }
    kept.and_then(|()| file.flush())?;
    Ok(Said { tail: tail.into(), sandbox })
}

/// The line before the log, which is no part of it. What begins in another way is left where it is.
fn first_line(log: &mut BufReader<impl std::io::Read>) -> std::io::Result<Option<String>> {
    if !log.fill_buf()?.starts_with(SANDBOX_PREFIX) {
        return Ok(None);
    }
    let mut line = Vec::new();
    log.take(MAX_LINE).read_until(b'\n', &mut line)?;
    Ok(Some(String::from_utf8_lossy(&line[SANDBOX_PREFIX.len()..]).trim_end().to_owned()))
}
