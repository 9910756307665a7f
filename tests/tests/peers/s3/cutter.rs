//! A connection that breaks where it is told to, between a client and a server on loopback.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result};

/// What breaks off a request or its answer, so many times.
pub(super) struct Cut {
    /// Something in the head of the request that it hits.
    pub(super) when: &'static str,
    /// Bytes of the request, or of its answer, that still pass.
    pub(super) after: u64,
    pub(super) answer: bool,
    pub(super) times: u32,
}

pub(super) struct Cutter {
    /// `http://ADDRESS:PORT`.
    pub(super) endpoint: String,
    cuts: Arc<Mutex<Vec<Cut>>>,
}

impl Cutter {
    pub(super) fn start(server: &str) -> Result<Self> {
        let server: SocketAddr = server.strip_prefix("http://").context("an endpoint")?.parse()?;
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let endpoint = format!("http://{}", listener.local_addr()?);
        let cuts = Arc::<Mutex<Vec<Cut>>>::default();
        let shared = Arc::clone(&cuts);
        // Ends with the process: nothing waits for it.
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let shared = Arc::clone(&shared);
                std::thread::spawn(move || relay(&client, server, &shared));
            }
        });
        Ok(Self { endpoint, cuts })
    }

    pub(super) fn cut(&self, cut: Cut) {
        self.cuts.lock().expect("nobody panics with it").push(cut);
    }

    /// Cuts that have not happened, or not often enough.
    pub(super) fn left(&self) -> u32 {
        self.cuts.lock().expect("nobody panics with it").iter().map(|cut| cut.times).sum()
    }
}

/// One connection, until either side ends it or it is cut.
fn relay(client: &TcpStream, server: SocketAddr, cuts: &Mutex<Vec<Cut>>) {
    let Ok(server) = TcpStream::connect(server) else { return };
    let answer_ends = Mutex::new(None);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let limit = || *answer_ends.lock().expect("nobody panics with it");
            pass(&server, client, |_| limit());
        });
        pass(client, &server, |bytes| {
            let mut cuts = cuts.lock().expect("nobody panics with it");
            let hit = |cut: &&mut Cut| cut.times > 0 && has(bytes, cut.when);
            let cut = cuts.iter_mut().find(hit)?;
            cut.times -= 1;
            if cut.answer {
                *answer_ends.lock().expect("nobody panics with it") = Some(cut.after);
                return None;
            }
            Some(cut.after)
        });
    });
}

/// Copies until the end, or until so many bytes have passed since `limit` first said how many may.
fn pass(mut from: &TcpStream, mut to: &TcpStream, mut limit: impl FnMut(&[u8]) -> Option<u64>) {
    let (mut buffer, mut left) = (vec![0; 64 << 10], None);
    while let Ok(count) = from.read(&mut buffer) {
        if left.is_none() {
            left = limit(&buffer[..count]);
        }
        let may = left.map_or(count, |left| count.min(usize::try_from(left).unwrap_or(usize::MAX)));
        if count == 0 || to.write_all(&buffer[..may]).is_err() || may < count {
            break;
        }
        left = left.map(|left| left - may as u64);
    }
    // Whoever is at the other end, or waits in the other direction, hears of it.
    for stream in [from, to] {
        let _ = stream.shutdown(Shutdown::Both);
    }
}

fn has(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}
