//! `builtin:fetchurl`: one file, or one NAR to be unpacked, from a URL (Nix: builtins/fetchurl.cc).
//!
//! Whether it is what was wanted is found out where all fixed outputs are checked, not here.

use std::cell::Cell;
use std::fs::{self, File, Permissions};
use std::io::{self, Read};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use reqwest::Url;

use super::http::{Body, Failed, Http, shown};
use super::{Job, compression};

/// Nix: `download-attempts`.
const ATTEMPTS: u32 = 5;
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// How often a transfer says how far it is, which also shows that it is not silent.
const PROGRESS: Duration = Duration::from_secs(10);

pub(super) fn run(job: &Job) -> Result<()> {
    let out = job.out()?;
    if !job.may_fetch {
        bail!("only fixed-output and impure derivations may fetch: give it an outputHash");
    }
    let fetch = Fetch {
        http: Http::new(job)?,
        out,
        unpack: job.flag("unpack"),
        is_xz: job.text("url")?.ends_with(".xz"),
        executable: job.flag("executable"),
    };
    for mirror in job.mirrors.iter().filter(|_| job.mirrored.is_some()) {
        let name = job.mirrored.as_deref().unwrap_or_default();
        let url = format!("{}/{name}", mirror.trim_end_matches('/'));
        match fetch.url(&url) {
            Ok(()) => return Ok(()),
            Err(error) => eprintln!("not from a mirror: {}", crate::error::one_line(&error)),
        }
    }
    fetch.url(job.text("url")?)
}

struct Fetch<'a> {
    http: Http,
    out: &'a Path,
    unpack: bool,
    /// By the name of what was asked for, wherever it comes from.
    is_xz: bool,
    executable: bool,
}

impl Fetch<'_> {
    /// Fetches, with as many attempts as it takes.
    fn url(&self, url: &str) -> Result<()> {
        let url = Url::parse(url).with_context(|| format!("'{url}' is no URL"))?;
        let mut pause = FIRST_PAUSE;
        let mut attempt = 1;
        let error = loop {
            let Err(Failed { error, again }) = self.once(&url) else { return Ok(()) };
            // What there is of it would be in the way.
            let _absent = drover_store::fs::delete(self.out);
            match again {
                Some(least) if attempt < ATTEMPTS => {
                    let pause = least.max(pause);
                    let why = crate::error::one_line(&error);
                    eprintln!("'{}': {why}; trying again in {} ms", shown(&url), pause.as_millis());
                    thread::sleep(pause);
                }
                Some(_) => break error.context(format!("gave up after {ATTEMPTS} attempts")),
                None => break error,
            }
            (attempt, pause) = (attempt + 1, pause * 2);
        };
        Err(error.context(format!("cannot fetch '{}'", shown(&url))))
    }

    fn once(&self, url: &Url) -> Result<(), Failed> {
        match url.scheme() {
            "http" | "https" => {
                let response = self.http.get(url)?;
                let size = response.content_length();
                let broke = Cell::new(false);
                let body = Progress::new(Body::new(response, &broke), url, size);
                self.store(body).map_err(|error| {
                    let error = error.context("the transfer broke off");
                    if broke.get() { Failed::passing(error) } else { Failed::forever(error) }
                })
            }
            "file" => {
                let opened = url.to_file_path().map_err(|()| anyhow!("it names another machine"));
                let opened = opened.and_then(|path| Ok(File::open(path)?));
                opened.and_then(|file| self.store(file)).map_err(Failed::forever)
            }
            other => {
                let error = anyhow!("{other} URLs are not supported: http, https and file are");
                Err(Failed::forever(error))
            }
        }
    }

    /// Puts what is read where the output belongs.
    fn store(&self, mut input: impl Read) -> Result<()> {
        if self.unpack {
            let mut nar = if self.is_xz { compression::xz(input)? } else { Box::new(input) };
            drover_store::fs::restore(&mut nar, self.out)
                .map_err(|error| anyhow::Error::from(error).context("cannot unpack it as a NAR"))?;
        } else {
            let mut file = File::options().write(true).create_new(true).mode(0o644).open(self.out)?;
            io::copy(&mut input, &mut file)
                .with_context(|| format!("cannot store it as {}", self.out.display()))?;
        }
        if self.executable {
            fs::set_permissions(self.out, Permissions::from_mode(0o755))
                .with_context(|| format!("cannot make {} executable", self.out.display()))?;
        }
        Ok(())
    }
}

/// Says now and then how much has passed through.
struct Progress<'a, R> {
    inner: R,
    url: &'a Url,
    size: Option<u64>,
    done: u64,
    said: Instant,
}

impl<'a, R> Progress<'a, R> {
    fn new(inner: R, url: &'a Url, size: Option<u64>) -> Self {
        Self { inner, url, size, done: 0, said: Instant::now() }
    }
}

impl<R: Read> Read for Progress<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.done += count as u64;
        if self.said.elapsed() >= PROGRESS {
            self.said = Instant::now();
            let of = self.size.map(|size| format!(" of {size}")).unwrap_or_default();
            eprintln!("'{}': {}{of} bytes", shown(self.url), self.done);
        }
        Ok(count)
    }
}
