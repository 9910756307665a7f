//! A binary cache over HTTP that counts, delays and holds back what it is asked for.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use anyhow::Result;
use drover_nix::derivation::{aterm, modulo};
use drover_nix::narinfo::Compression;
use drover_nix::{ContentAddress, Derivation, Method, NarInfo, PathInfo, Sha256, StoreDir, StorePath, nar};

/// Ends with the process: nothing waits for it.
#[derive(Clone)]
pub(super) struct Server {
    pub(super) url: String,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
pub(super) struct State {
    files: BTreeMap<String, Vec<u8>>,
    /// Each request waits for so long, as if it came from far away.
    pub(super) delay: Duration,
    /// Is not answered before it is taken out of here.
    held: Option<String>,
    /// How often what was asked for.
    pub(super) requests: BTreeMap<String, usize>,
    in_flight: usize,
    /// Most requests that were in flight at a time.
    pub(super) most_at_once: usize,
}

impl State {
    /// Requests for names that end like this, and forgets all that were counted.
    pub(super) fn counted(&mut self, suffix: &str) -> usize {
        self.requests.iter().filter(|(name, _)| name.ends_with(suffix)).map(|(_, count)| count).sum()
    }
}

impl Server {
    pub(super) fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let url = format!("http://{}", listener.local_addr()?);
        let this = Self { url, shared: Arc::default() };
        this.lock().files.insert("nix-cache-info".into(), b"StoreDir: /nix/store\n".to_vec());
        let shared = Arc::clone(&this.shared);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = Arc::clone(&shared);
                thread::spawn(move || answer(&shared, &stream));
            }
        });
        Ok(this)
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().expect("nobody panics with it")
    }

    /// Holds the file back, or what is held if this is None no longer.
    pub(super) fn hold(&self, name: Option<String>) {
        self.lock().held = name;
        self.shared.changed.notify_all();
    }

    /// Waits until somebody asks for this.
    pub(super) fn wait_for_request(&self, name: &str) {
        let mut state = self.lock();
        while !state.requests.contains_key(name) {
            state = self.shared.changed.wait(state).expect("nobody panics with it");
        }
    }

    /// Adds a `.drv` file as Nix copies it.
    pub(super) fn add(&self, drv: &Derivation) -> Result<StorePath> {
        let path = modulo::drv_path(&StoreDir::default(), drv)?;
        let references = drv.basic.input_srcs.iter().chain(drv.input_drvs.keys()).cloned().collect();
        self.add_as(&path, drv, references)?;
        Ok(path)
    }

    /// Adds a `.drv` file in the place of another, and says this of what it refers to.
    pub(super) fn add_as(
        &self,
        path: &StorePath,
        drv: &Derivation,
        references: BTreeSet<StorePath>,
    ) -> Result<()> {
        let text = aterm::print(&StoreDir::default(), drv)?;
        let mut writer = nar::Writer::new(Vec::new());
        writer.file_bytes(false, &text)?;
        let nar = writer.finish()?;
        let narinfo = NarInfo {
            info: PathInfo {
                path: path.clone(),
                nar_hash: Sha256::of(&nar),
                nar_size: nar.len() as u64,
                references,
                deriver: None,
                signatures: Vec::new(),
                ca: Some(ContentAddress { method: Method::Text, hash: Sha256::of(&text).into() }),
            },
            url: nar_name(path),
            compression: Compression::None,
            file_hash: None,
            file_size: None,
        };
        let mut state = self.lock();
        state
            .files
            .insert(format!("{}.narinfo", path.hash_part()), narinfo.print(&StoreDir::default()).into());
        state.files.insert(nar_name(path), nar);
        Ok(())
    }

    pub(super) fn remove(&self, path: &StorePath) {
        self.lock().files.remove(&format!("{}.narinfo", path.hash_part()));
    }
}

pub(super) fn nar_name(path: &StorePath) -> String {
    format!("nar/{path}.nar")
}

fn answer(shared: &Shared, stream: &TcpStream) -> Option<()> {
    let lock = || shared.state.lock().expect("nobody panics with it");
    let mut input = BufReader::new(stream);
    stream.set_nodelay(true).ok()?;
    loop {
        let mut first = String::new();
        input.read_line(&mut first).ok().filter(|read| *read > 0)?;
        let name = first.split(' ').nth(1)?.trim_start_matches('/').to_owned();
        loop {
            let mut line = String::new();
            input.read_line(&mut line).ok()?;
            if line.trim_end().is_empty() {
                break;
            }
        }
        let mut state = lock();
        *state.requests.entry(name.clone()).or_default() += 1;
        state.in_flight += 1;
        state.most_at_once = state.most_at_once.max(state.in_flight);
        shared.changed.notify_all();
        let delay = state.delay;
        drop(state);
        if !delay.is_zero() {
            thread::sleep(delay);
        }
        let mut state = lock();
        while state.held.as_ref() == Some(&name) {
            state = shared.changed.wait(state).expect("nobody panics with it");
        }
        state.in_flight -= 1;
        let (status, body) = match state.files.get(&name) {
            Some(body) => ("200 OK", body.clone()),
            None => ("404 Not Found", Vec::new()),
        };
        drop(state);
        let mut answer = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n", body.len()).into_bytes();
        answer.extend_from_slice(&body);
        let mut output = stream;
        output.write_all(&answer).ok()?;
    }
}
