//! A client that goes away: after every byte of every command, in the middle of every answer, and during builds. The
//! builder ends within a second, and nothing is left of what was not complete.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use drover_nix::{Derivation, DerivationOutput, StoreDir, StorePath};

use super::arena::{Arena, Builder, Outcome};
use super::bytes::*;

/// How long a builder may take to be gone, but for the odd one on a busy machine.
const PROMPT: Duration = Duration::from_secs(1);

/// A store with something to ask for: a path, one that refers to it, a `.drv` whose build never ends by itself.
struct World {
    arena: Arena,
    there: StorePath,
    user: StorePath,
    drv: StorePath,
    /// Part of the command line of every process of a build.
    mark: String,
}

impl World {
    fn new(number: u32) -> Result<Self> {
        let arena = Arena::new()?;
        let (there, user) = (path("there"), path("user"));
        arena.add(&there, &file_nar(b"there"), &[])?;
        arena.add(&user, &file_nar(b"user"), &[&there])?;
        let mark = format!("mark-{}-{number}", std::process::id());
        let (drv, text) = endless_drv(&mark)?;
        arena.add(&drv, &file_nar(&text), &[])?;
        Ok(Self { arena, there, user, drv, mark })
    }

    /// Each command with a request that is as short as one can be that does something.
    fn requests(&self) -> Vec<(&'static str, Vec<u8>)> {
        let (there, user) = (full(&self.there), full(&self.user));
        let (new, other) = (path("new"), path("other"));
        let add = Add { references: vec![there.clone().into()], ..Add::new(&new, file_nar(b"contents")) };
        let stream = export_stream(&[
            (
                &new,
                [s("nix-archive-1"), directory(&[(b"a", file(b"1")), (b"b", symlink("a"))])].concat(),
                vec![],
            ),
            (&other, file_nar(b"other"), vec![full(&new), there.clone()]),
        ]);
        let build_paths = [u(6), l(&[full(&self.drv)]), u(0).repeat(6)].concat();
        vec![
            ("QueryValidPaths", [u(1), u(1), u(1), l(&[&there, &full(&new)])].concat()),
            ("QueryPathInfos", [u(2), l(&[&there, &user])].concat()),
            ("DumpStorePath", [u(3), s(&there)].concat()),
            ("ImportPaths", [u(4), stream].concat()),
            ("ExportPaths", [u(5), u(0), l(&[&user, &there])].concat()),
            ("BuildPaths", build_paths),
            ("QueryClosure", [u(7), u(1), l(&[&user])].concat()),
            ("BuildDerivation", Build::new("made", &endless(&self.mark)).bytes()),
            ("AddToStoreNar", add.bytes()),
        ]
    }

    /// Nothing is left but what was there and what is complete; then that goes too.
    fn check(&self) -> Result<()> {
        let mut new = self.arena.check_clean()?;
        for old in [&self.there, &self.user, &self.drv] {
            ensure!(new.remove(old), "{old} is gone");
        }
        // Referrers first.
        for name in ["made", "other", "new"] {
            let path = path(name);
            if new.remove(&path) {
                self.arena.store.delete_path(&path)?;
            }
        }
        ensure!(new.is_empty(), "nobody sent {new:?}");
        Ok(())
    }

    /// No process of a build is left.
    fn check_processes(&self) -> Result<()> {
        for entry in std::fs::read_dir("/proc")? {
            let line = std::fs::read(entry?.path().join("cmdline")).unwrap_or_default();
            let found = line.windows(self.mark.len()).any(|part| part == self.mark.as_bytes());
            ensure!(!found, "a build goes on: {}", String::from_utf8_lossy(&line));
        }
        Ok(())
    }
}

/// A script that says that it runs, and does so for ever.
fn endless(mark: &str) -> String {
    format!("echo {mark}; while :; do :; done")
}

fn endless_drv(mark: &str) -> Result<(StorePath, Vec<u8>)> {
    let dir = StoreDir::default();
    let mut basic = drover_nix::BasicDerivation {
        name: "endless".into(),
        outputs: [("out".parse()?, DerivationOutput::Deferred)].into(),
        input_srcs: [].into(),
        system: "x86_64-linux".into(),
        builder: "/bin/sh".into(),
        args: vec!["-c".into(), endless(mark).into()],
        env: [("out".into(), "".into())].into(),
    };
    drover_nix::derivation::modulo::fill_output_paths(&dir, &mut basic)?;
    let drv = Derivation { basic, input_drvs: [].into() };
    let text = drover_nix::derivation::aterm::print(&dir, &drv)?;
    Ok((drover_nix::derivation::modulo::drv_path(&dir, &drv)?, text))
}

/// Two of these at a time, each with a world of its own; every item goes to one of them.
fn share<T: Sync>(items: &[T], act: impl Fn(&World, &T) -> Result<Duration> + Sync) -> Result<()> {
    const WORKERS: u32 = 2;
    let mut took: Vec<Duration> = std::thread::scope(|scope| -> Result<_> {
        let start = |worker: u32| {
            let act = &act;
            scope.spawn(move || -> Result<Vec<Duration>> {
                let world = World::new(worker)?;
                let mine = items.iter().skip(worker as usize).step_by(WORKERS as usize);
                let took = mine.map(|item| act(&world, item)).collect::<Result<Vec<_>>>()?;
                world.check_processes()?;
                world.arena.verify()?;
                Ok(took)
            })
        };
        let workers: Vec<_> = (0..WORKERS).map(start).collect();
        let took = workers.into_iter().map(|worker| worker.join().expect("it does not panic"));
        Ok(took.collect::<Result<Vec<_>>>()?.concat())
    })?;
    took.sort_unstable();
    let slow = took[took.len() * 98 / 100];
    ensure!(slow < PROMPT, "of {} ends the slowest but two in a hundred took {slow:?}", took.len());
    Ok(())
}

#[test]
fn after_every_byte_of_every_command() -> Result<()> {
    let names = World::new(9)?.requests();
    let mut cuts: Vec<(usize, usize)> = Vec::new();
    for (command, (_, request)) in names.iter().enumerate() {
        cuts.extend((0..=request.len()).map(|length| (command, length)));
    }
    ensure!(cuts.len() > 2000, "only {} cuts", cuts.len());
    share(&cuts, |world, (command, length)| {
        let (name, request) = &world.requests()[*command];
        let outcome = world.arena.run(&session(&[request[..*length].to_vec()]))?;
        let what = || format!("{name} after {length} of {} bytes", request.len());
        let complete = *length == request.len();
        if *length == 0 || complete && !name.starts_with("Build") {
            outcome.expect_clean().with_context(what)?;
            ensure!(outcome.stdout.len() > 16 || !complete, "{}: no answer", what());
        } else if complete {
            build_was_ended(&outcome).with_context(what)?;
        } else {
            outcome.expect_refusal().with_context(what)?;
        }
        world.check().with_context(what)?;
        Ok(outcome.took)
    })
}

#[test]
fn inside_the_greeting() -> Result<()> {
    let cuts: Vec<usize> = (0..16).collect();
    share(&cuts, |world, length| {
        let outcome = world.arena.run(&hello()[..*length])?;
        outcome.expect_refusal().with_context(|| format!("after {length} bytes"))?;
        ensure!(outcome.stdout.is_empty(), "it speaks before it was spoken to");
        world.check()?;
        Ok(outcome.took)
    })
}

#[test]
fn with_nobody_to_take_the_answer() -> Result<()> {
    let commands: Vec<usize> = (0..9).collect();
    share(&commands, |world, command| {
        let (name, request) = &world.requests()[*command];
        if name.starts_with("Build") {
            return Ok(Duration::ZERO); // that one has a test below: it gets no answer anyway
        }
        let (reader, writer) = std::io::pipe()?;
        let mut command = world.arena.command();
        let stdin = std::process::Stdio::piped();
        let child = command.stdin(stdin).stdout(writer.try_clone()?).stderr(std::process::Stdio::piped());
        let mut builder = Builder::from(child.spawn()?);
        drop(command); // it has a copy of the writing end
        drop(reader);
        // Another thread that starts a program just now may have a copy of the reading end, until that runs.
        let mut readers = [rustix::event::PollFd::new(&writer, rustix::event::PollFlags::empty())];
        rustix::event::poll(&mut readers, None)?;
        drop(writer);
        builder.send(&hello())?;
        let outcome = builder.finish(request)?;
        outcome.expect_refusal().with_context(|| name.to_string())?;
        world.check()?;
        Ok(outcome.took)
    })
}

#[test]
fn in_the_middle_of_an_answer() -> Result<()> {
    /// More than any pipe holds, even after the last place where it is cut.
    const SIZE: usize = 3 << 20;
    // Every place in the first tokens, and some where buffers and pipes end.
    let mut cuts: Vec<usize> = (0..200).collect();
    for edge in [64 << 10, 128 << 10, 256 << 10, 1 << 20] {
        cuts.extend(edge - 9..edge + 9);
    }
    let cuts: Vec<(bool, usize)> =
        [false, true].into_iter().flat_map(|e| cuts.iter().map(move |c| (e, *c))).collect();
    share(&cuts, |world, (export, length)| {
        let big = path("made");
        if !world.arena.store.is_valid(&big)? {
            world.arena.add(&big, &file_nar(&vec![7; SIZE]), &[])?;
        }
        let request =
            if *export { [u(5), u(0), l(&[full(&big)])].concat() } else { [u(3), s(full(&big))].concat() };
        let mut builder = world.arena.start()?;
        builder.send(&session(&[request]))?;
        builder.receive(16 + length)?;
        builder.close_stdout();
        let outcome = builder.finish(&[])?;
        outcome.expect_refusal().with_context(|| format!("{export} after {length} bytes"))?;
        world.arena.check_clean()?;
        Ok(outcome.took)
    })
}

#[test]
fn in_the_middle_of_a_large_archive() -> Result<()> {
    let nar = file_nar(&vec![7; 300_000]);
    let request = Add::new(&path("new"), nar).bytes();
    let tree = [
        s("nix-archive-1"),
        directory(&[(b"a", directory(&[(b"b", file(&vec![7; 100_000]))])), (b"c", file(&vec![8; 100_000]))]),
    ]
    .concat();
    let second = Add::new(&path("new"), tree).bytes();
    let cuts: Vec<(usize, usize)> = [request.len(), second.len()]
        .into_iter()
        .enumerate()
        .flat_map(|(which, length)| (300..length).step_by(4999).map(move |cut| (which, cut)))
        .collect();
    share(&cuts, |world, (which, length)| {
        // A path before it, sent without waiting, is complete and stays.
        let before = Add::new(&path("other"), file_nar(b"other")).bytes();
        let request = &[&request, &second][*which][..*length];
        let outcome = world.arena.run(&session(&[before, request.to_vec()]))?;
        outcome.expect_refusal()?;
        ensure!(world.arena.store.is_valid(&path("other"))?, "what was complete is lost");
        ensure!(!world.arena.store.is_valid(&path("new"))?);
        world.check()?;
        Ok(outcome.took)
    })
}

#[test]
fn with_several_additions_in_flight() -> Result<()> {
    // As our client sends them: without waiting, so that the builder may take them together.
    let paths = ["other", "new", "made"].map(path);
    let requests: Vec<Vec<u8>> = (0..paths.len())
        .map(|number| {
            let nar = file_nar(format!("contents {number}").as_bytes());
            // The last one refers to the first, so that it is deleted before it.
            let references = if number == 2 { vec![full(&paths[1]).into()] } else { Vec::new() };
            Add { references, ..Add::new(&paths[number], nar) }.bytes()
        })
        .collect();
    let length: usize = requests.iter().map(Vec::len).sum();
    let cuts: Vec<usize> = (1..length).step_by(3).collect();
    share(&cuts, |world, length| {
        let outcome = world.arena.run(&session(&[requests.concat()[..*length].to_vec()]))?;
        let what = || format!("after {length} bytes: {outcome:?}");
        let ends = requests.iter().scan(0, |end, request| {
            *end += request.len();
            Some(*end)
        });
        let complete = ends.clone().filter(|end| end <= length).count();
        if ends.into_iter().any(|end| end == *length) {
            outcome.expect_clean().with_context(what)?;
        } else {
            outcome.expect_refusal().with_context(what)?;
        }
        // What was complete was added. Its answer may be lost with the client, but none was given too many.
        let valid = |path: &&StorePath| world.arena.store.is_valid(path).is_ok_and(|valid| valid);
        ensure!(paths.iter().filter(valid).count() == complete, "{}", what());
        let answers = outcome.stdout.get(16..).with_context(what)?;
        ensure!(u(1).repeat(complete).starts_with(answers), "{}", what());
        ensure!(answers.len() == 8 * complete || !outcome.status.success(), "{}", what());
        world.check().with_context(what)?;
        Ok(outcome.took)
    })
}

#[test]
fn while_a_build_runs() -> Result<()> {
    let ways: Vec<(usize, bool)> = [(5, false), (7, false), (5, true), (7, true)].repeat(3);
    share(&ways, |world, (command, both)| {
        let (name, request) = &world.requests()[*command];
        let mut builder = world.arena.start()?;
        builder.send(&session(std::slice::from_ref(request)))?;
        builder.wait_for_log(&world.mark)?;
        if *both {
            builder.close_stdout();
        }
        let outcome = builder.finish(&[])?;
        build_was_ended(&outcome).with_context(|| name.to_string())?;
        world.check_processes()?;
        world.check()?;
        Ok(outcome.took)
    })
}

#[test]
fn at_any_time_of_a_build() -> Result<()> {
    // From before the sandbox is there to after the output is registered: where exactly, the machine decides.
    let delays: Vec<u32> = (0..120).collect();
    share(&delays, |world, delay| {
        let mut builder = world.arena.start()?;
        builder.send(&hello())?;
        builder.receive(16)?;
        builder.send(&Build::new("made", "echo > $out").bytes())?;
        let start = Instant::now();
        while start.elapsed() < Duration::from_micros(500) * *delay {
            std::hint::spin_loop();
        }
        let outcome = builder.finish(&[])?;
        // Either it was done, and then it is valid, or there is nothing of it.
        let answered = outcome.stdout.len() > 8 && outcome.stdout[..8] == u(0);
        ensure!(!answered || world.arena.store.is_valid(&path("made"))?, "{outcome:?}");
        world.check().with_context(|| format!("{outcome:?}"))?;
        Ok(outcome.took)
    })
}

/// Exit code 1; the last line says why, and what else there is was the log.
fn build_was_ended(outcome: &Outcome) -> Result<()> {
    ensure!(outcome.status.code() == Some(1), "{:?}: {}", outcome.status, outcome.stderr);
    let last = outcome.stderr.lines().last().unwrap_or_default();
    ensure!(last.starts_with("drover-builder: ") && last.contains("cancelled"), "{:?}", outcome.stderr);
    ensure!(outcome.stdout.len() <= 16, "an answer to nobody");
    Ok(())
}
