//! `cargo xtask bench ssh`: one builder behind two SSH servers, its own and OpenSSH's sshd, for OpenSSH's client.
//!
//! Each case is measured as people have it, with the client's own choice of a cipher, and with AES-128-GCM on both sides;
//! then at a round-trip time of 50 ms. Below the table stands what OpenSSH's client used of the processor: where that is
//! near the seconds above, the client is the limit and no server can do better.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::client::Manner;
use super::data::{self, Object, Sizes};
use super::ssh_servers::{Desk, Server, Session};
use super::stats::{Row, Series, Side, table};
use super::{Scratch, delay, remove};

/// What is measured, and how often.
#[derive(Clone, Debug)]
pub struct Options {
    pub rounds: usize,
    /// Where the stores are; None for a tmpfs.
    pub dir: Option<PathBuf>,
    pub sizes: Sizes,
    /// The `drover-builder` to measure.
    pub builder: PathBuf,
    /// The round-trip time of the cases that have one.
    pub round_trip: Duration,
}

/// Connections for each round's time to the first byte.
const CONNECTIONS: usize = 5;
/// Over a distance, bytes take so much longer that fewer of them do.
const FAR_SHARE: usize = 4;

/// How a case reaches the servers.
#[derive(Clone, Copy)]
struct Route {
    name: &'static str,
    options: &'static [&'static str],
    far: bool,
    /// Times as fast as sshd: import, export.
    reach: Option<(f64, f64)>,
}

const ROUTES: [Route; 3] = [
    Route { name: "near", options: &[], far: false, reach: Some((1.2, 2.0)) },
    Route {
        name: "near, AES",
        options: &["-c", "aes128-gcm@openssh.com"],
        far: false,
        reach: Some((1.2, 2.0)),
    },
    Route { name: "far", options: &[], far: true, reach: None },
];

/// The same work through both servers.
#[derive(Debug)]
pub struct Measured {
    pub row: Row,
    /// Processor time of OpenSSH's client: sshd's, ours.
    pub client: [Series; 2],
}

/// Runs the cases and prints the table.
pub fn run(options: &Options) -> Result<()> {
    let measured = measure(options)?;
    let rows: Vec<Row> = measured.iter().map(|measured| measured.row.clone()).collect();
    print!("{}", table("sshd", &rows));
    for Measured { row, client: [theirs, ours] } in &measured {
        println!("{:<26} CPU seconds of the client: {:.2} / {:.2}", row.name, theirs.median(), ours.median());
    }
    let far = options.round_trip.as_millis();
    println!("far: a round-trip time of {far} ms; first byte: to be within 0.060 s when near");
    Ok(())
}

/// Runs the cases.
pub fn measure(options: &Options) -> Result<Vec<Measured>> {
    ensure!(options.rounds > 0, "at least one round is needed");
    let scratch = Scratch::new(options.dir.as_deref())?;
    let desk = Desk::new(scratch.path(), &options.builder)?;
    let near = data::large(&options.sizes)?;
    let (count, bytes) = options.sizes.large;
    let far = data::large(&Sizes { large: (count, bytes / FAR_SHARE), ..options.sizes.clone() })?;
    let mut measured = Vec::new();
    for route in ROUTES {
        eprintln!("bench: {}", route.name);
        measured.extend(measure_route(options, &desk, route, if route.far { &far } else { &near })?);
    }
    Ok(measured)
}

fn measure_route(options: &Options, desk: &Desk, route: Route, objects: &[Object]) -> Result<Vec<Measured>> {
    let mut first = Measured::new("first byte", route, None);
    let mut import = Measured::new("import", route, route.reach.map(|(import, _)| import));
    let mut export = Measured::new("export", route, route.reach.map(|(_, export)| export));
    for round in 0..options.rounds {
        for turn in 0..2 {
            let ours = (round + turn) % 2 == 1;
            let server = if ours { desk.drover()? } else { desk.sshd()? };
            let port = if route.far { delay::start(server.port, options.round_trip)? } else { server.port };
            let connect = || desk.connect(port, route.options);
            // The first session makes the store, which nobody measures.
            connect()?.end()?;
            for _ in 0..CONNECTIONS {
                first.timed(ours, &server, || Ok((connect()?, 0.0)))?.end()?;
            }
            let session = connect()?;
            let session = import
                .timed(ours, &server, || session.act(|client| client.import(objects, Manner::InFlight)))?;
            let session = export
                .timed(ours, &server, || session.act(|client| client.export(objects, Manner::InFlight)))?;
            session.end()?;
            drop(server);
            remove(&desk.store())?;
        }
    }
    Ok(vec![first, import, export])
}

impl Measured {
    fn new(what: &str, route: Route, reach: Option<f64>) -> Self {
        let name = format!("{what}, {}", route.name);
        let row = Row { name, theirs: Side::default(), ours: Side::default(), reach };
        Self { row, client: Default::default() }
    }

    /// Does something with a session, whose client had used so much of the processor before.
    fn timed(
        &mut self,
        ours: bool,
        server: &Server,
        act: impl FnOnce() -> Result<(Session, f64)>,
    ) -> Result<Session> {
        let before = server.cpu()?;
        let begin = Instant::now();
        let (session, client_before) = act()?;
        let seconds = begin.elapsed().as_secs_f64();
        let side = if ours { &mut self.row.ours } else { &mut self.row.theirs };
        side.seconds.0.push(seconds);
        side.cpu.0.push(server.cpu()? - before);
        self.client[usize::from(ours)].0.push(session.client_cpu()? - client_before);
        Ok(session)
    }
}
