//! What this crate's unit tests share: archives, and an HTTP server that fails as it is told.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use drover_nix::{PathInfo, Sha256, StoreDir, StorePath, nar};

use crate::{NarSpool, SpooledNar};

pub(crate) fn store_path(name: &str) -> StorePath {
    StoreDir::default().make_path("test", Sha256::of(name.as_bytes()), name).unwrap()
}

pub(crate) fn nar_of_file(contents: &[u8]) -> Vec<u8> {
    let mut writer = nar::Writer::new(Vec::new());
    writer.file_bytes(false, contents).unwrap();
    writer.finish().unwrap()
}

pub(crate) fn info_of(name: &str, nar: &[u8]) -> PathInfo {
    PathInfo {
        path: store_path(name),
        nar_hash: Sha256::of(nar),
        nar_size: nar.len() as u64,
        references: BTreeSet::new(),
        deriver: None,
        signatures: Vec::new(),
        ca: None,
    }
}

pub(crate) fn spool(nar: &[u8]) -> SpooledNar {
    let mut spool = NarSpool::new(&std::env::temp_dir(), []).unwrap();
    spool.write_all(nar).unwrap();
    spool.finish().unwrap()
}

/// One thing that goes wrong, with the next request that it fits.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    /// This answer instead, to any request.
    Status(u16),
    /// The connection closes before any answer.
    Hangup,
    /// A body breaks off after so many bytes.
    Truncate(usize),
    /// A body is longer by so many bytes than its header says.
    Understate(usize),
    /// A body stands still after so many bytes, until the client goes away.
    Stall(usize),
}

/// A server of named files on the loopback interface. Takes PUT; knows ranges.
pub(crate) struct Server {
    pub(crate) url: String,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) files: BTreeMap<String, Vec<u8>>,
    /// Headers that go with a file.
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) faults: VecDeque<Fault>,
    /// Method, path and `Range` of each request so far.
    pub(crate) requests: Vec<String>,
    pub(crate) ranges: bool,
    /// Whatever part is asked for, it is the whole that comes, as a part.
    pub(crate) whole_part: bool,
    /// Status and `Location` of what is elsewhere, by path, or by method and path.
    pub(crate) redirects: BTreeMap<String, (u16, String)>,
    /// The `Authorization` that everybody must show.
    pub(crate) wanted: Option<String>,
    /// `Authorization` of each request so far.
    pub(crate) shown: Vec<Option<String>>,
    /// Connections so far.
    pub(crate) connections: usize,
}

impl Server {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(Mutex::new(State { ranges: true, ..State::default() }));
        let shared = state.clone();
        // Ends with the process: nothing waits for it.
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = shared.clone();
                shared.lock().unwrap().connections += 1;
                thread::spawn(move || while serve(&stream, &shared).is_some() {});
            }
        });
        Self { url, state }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(crate) fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.lock().requests)
    }
}

/// One request. None when the connection is at its end.
fn serve(stream: &TcpStream, state: &Mutex<State>) -> Option<()> {
    let mut input = BufReader::new(stream);
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if input.read_line(&mut line).ok()? == 0 {
            return None;
        }
        match line.trim_end() {
            "" => break,
            line => lines.push(line.to_owned()),
        }
    }
    let header = |name: &str| {
        lines.iter().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
        })
    };
    let mut request = lines[0].split(' ');
    let (method, path) = (request.next()?.to_owned(), request.next()?.trim_start_matches('/').to_owned());
    let range = header("range");
    let length = header("content-length").map_or(0, |length| length.parse().unwrap());
    let mut body = vec![0; length];
    input.read_exact(&mut body).ok()?;
    let mut state = state.lock().unwrap();
    state.requests.push(match &range {
        Some(range) => format!("{method} {path} {range}"),
        None => format!("{method} {path}"),
    });
    let shown = header("authorization");
    let refused = state.wanted.is_some() && state.wanted != shown;
    state.shown.push(shown);
    let fits = |fault: &Fault| match fault {
        Fault::Status(_) | Fault::Hangup => true,
        Fault::Truncate(at) | Fault::Stall(at) | Fault::Understate(at) => {
            method == "GET" && state.files.get(&path).is_some_and(|file| file.len() > *at)
        }
    };
    let fault = if state.faults.front().is_some_and(fits) { state.faults.pop_front() } else { None };
    let mut extra = state.headers.get(&path).cloned().unwrap_or_default();
    let unchanged = header("if-range").is_none_or(|version| extra.contains(&version));
    let by_method = format!("{method} {path}");
    let elsewhere = state.redirects.get(&by_method).or_else(|| state.redirects.get(&path)).cloned();
    let (status, content) = match (fault.clone(), method.as_str()) {
        _ if refused => (401, Vec::new()),
        (Some(Fault::Hangup), _) => return None,
        (Some(Fault::Status(status)), _) => (status, Vec::new()),
        _ if elsewhere.is_some() => {
            let (status, location) = elsewhere?;
            extra += &format!("location: {location}\r\n");
            (status, Vec::new())
        }
        (_, "PUT") => {
            state.files.insert(path, body);
            (201, Vec::new())
        }
        _ => match (state.files.get(&path), range.filter(|_| state.ranges && unchanged)) {
            (None, _) => (404, Vec::new()),
            (Some(file), None) => (200, file.clone()),
            (Some(file), Some(range)) => {
                let from: usize = range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()?;
                let from = if state.whole_part { 0 } else { from };
                extra += &format!("content-range: bytes {from}-{}/{}\r\n", file.len() - 1, file.len());
                (206, file[from..].to_vec())
            }
        },
    };
    drop(state);
    let mut output = stream;
    let hidden = if let Some(Fault::Understate(bytes)) = fault { bytes } else { 0 };
    let length = content.len() - hidden;
    let head = format!("HTTP/1.1 {status} X\r\ncontent-length: {length}\r\n{extra}\r\n");
    output.write_all(head.as_bytes()).ok()?;
    if method == "HEAD" {
        return Some(());
    }
    match fault {
        Some(Fault::Truncate(at)) => {
            output.write_all(&content[..at]).ok()?;
            None
        }
        Some(Fault::Stall(at)) => {
            output.write_all(&content[..at]).ok()?;
            // Until the client closes its end.
            let _ = input.read(&mut [0]);
            None
        }
        _ => output.write_all(&content).ok(),
    }
}
