//! Proofs from the closures of `.drv` files in caches over HTTP: once, quickly, and whatever a cache says.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use drover_cache::{Cache, CacheOptions, Guarded, Memory};
use drover_nix::derivation::modulo::{self, InputHash};
use drover_nix::{BasicDerivation, Derivation, DerivationOutput, OutputName, StoreDir, StorePath};
use drover_serve::BuildOptions;
use drover_session::{Failure, Job, Proofs, Reason, Trust, all_outputs_in_cache};

use super::server::{Server, nar_name};

/// Derivations that are made here, with what others need to know of them.
#[derive(Default)]
struct Made(BTreeMap<StorePath, (Derivation, InputHash)>);

impl Made {
    /// A derivation with its right path, on top of these.
    fn make(&mut self, name: &str, inputs: &[&StorePath]) -> Result<StorePath> {
        let (dir, out) = (StoreDir::default(), OutputName::out());
        let basic = BasicDerivation {
            name: name.into(),
            outputs: [(out.clone(), DerivationOutput::Deferred)].into(),
            input_srcs: BTreeSet::new(),
            system: "x86_64-linux".into(),
            builder: "/bin/sh".into(),
            args: vec!["-c".into(), "echo > $out".into()],
            env: [("out".into(), "".into())].into(),
        };
        let input_drvs = inputs.iter().map(|path| ((*path).clone(), [out.clone()].into())).collect();
        let mut drv = Derivation { basic, input_drvs };
        let mut input = |path: &StorePath| Ok(self.0[path].1.clone());
        let path = modulo::output_paths(&dir, &drv, &mut input)?.context("known")?[&out].clone();
        drv.basic.env.insert("out".into(), dir.full(&path).into());
        drv.basic.outputs.insert(out, DerivationOutput::InputAddressed(path));
        let hash = modulo::input_hash(&dir, &drv, &mut input)?;
        let drv_path = modulo::drv_path(&dir, &drv)?;
        self.0.insert(drv_path.clone(), (drv, hash));
        Ok(drv_path)
    }

    fn chain(&mut self, name: &str, length: usize) -> Result<Vec<StorePath>> {
        let mut chain = vec![self.make(name, &[])?];
        for _ in 1..length {
            let below = chain.last().cloned().context("it has begun")?;
            chain.push(self.make(name, &[&below])?);
        }
        Ok(chain)
    }

    /// A cache that has all of them.
    fn serve(&self) -> Result<Server> {
        let server = Server::start()?;
        for (drv, _) in self.0.values() {
            server.add(drv)?;
        }
        Ok(server)
    }

    fn resolved(&self, path: &StorePath) -> Result<BasicDerivation> {
        let dir = StoreDir::default();
        let of = |input: &StorePath, output: &OutputName| {
            self.0[input].0.basic.output_paths(&dir).ok()?.remove(output)?
        };
        Ok(self.0[path].0.resolve(&dir, of)?)
    }

    /// What the operator does before it does anything: a look-up of outputs for a request that has to be proven.
    fn request(
        &self,
        proofs: &Arc<Proofs>,
        caches: &[Arc<dyn Cache>],
        path: &StorePath,
    ) -> Result<Result<(), Failure>> {
        let job = Job {
            dir: StoreDir::default(),
            drv_path: path.clone(),
            derivation: self.resolved(path)?,
            options: BuildOptions::default(),
            caches: caches.to_vec(),
            push: None,
            signing_key: None,
            trust: Trust::Verified,
            proven: Arc::clone(proofs),
            kept: Default::default(),
            max_output_bytes: None,
            spool_dir: "/tmp".into(),
        };
        Ok(all_outputs_in_cache(&job).map(|found| assert!(found.is_none())))
    }
}

fn open(server: &Server) -> Result<Arc<dyn Cache>> {
    let cache = drover_cache::open(&server.url, &CacheOptions::default())?;
    Ok(Arc::new(Guarded::new(cache, Memory::default())))
}

fn refused(result: Result<(), Failure>, says: &str) -> Result<()> {
    let failure = result.err().context("it was believed")?;
    ensure!(failure.reason == Reason::PathNotProven && !failure.infrastructure, "{failure}");
    ensure!(failure.message.contains(says), "{failure}");
    Ok(())
}

/// Requests for narinfo files, NARs, and outputs (of which none is there).
fn reads(server: &Server) -> (usize, usize) {
    let mut state = server.lock();
    let nars = state.counted(".nar");
    let narinfos = state.counted(".narinfo");
    state.requests.clear();
    (narinfos, nars)
}

#[test]
fn a_chain_of_five_thousand_is_proven_once_and_in_seconds() -> Result<()> {
    const LENGTH: usize = 5000;
    let mut made = Made::default();
    let chain = made.chain("link", LENGTH)?;
    let (top, below) = (&chain[LENGTH - 1], &chain[LENGTH - 2]);
    let server = made.serve()?;
    server.lock().delay = Duration::from_millis(1);
    let (proofs, caches) = (Arc::default(), [open(&server)?]);
    let begin = Instant::now();
    made.request(&proofs, &caches, below)?.map_err(anyhow::Error::new)?;
    let took = begin.elapsed();
    ensure!(took < Duration::from_secs(60), "{took:?}");
    // Beside the files its output was looked for.
    assert_eq!(reads(&server), (LENGTH - 1 + 1, LENGTH - 1));
    // The same again, and the next one, which is one file more.
    made.request(&proofs, &caches, below)?.map_err(anyhow::Error::new)?;
    assert_eq!(reads(&server).1, 0);
    made.request(&proofs, &caches, top)?.map_err(anyhow::Error::new)?;
    assert_eq!(reads(&server), (1 + 1, 1));
    Ok(())
}

#[test]
fn what_lies_side_by_side_is_read_side_by_side() -> Result<()> {
    let mut made = Made::default();
    let leaves: Vec<_> = (0..200).map(|i| made.make(&format!("leaf-{i}"), &[])).collect::<Result<_>>()?;
    let top = made.make("top", &leaves.iter().collect::<Vec<_>>())?;
    let server = made.serve()?;
    server.lock().delay = Duration::from_millis(5);
    made.request(&Arc::default(), &[open(&server)?], &top)?.map_err(anyhow::Error::new)?;
    ensure!(server.lock().most_at_once >= 8, "{}", server.lock().most_at_once);
    assert_eq!(reads(&server), (201 + 1, 201));
    Ok(())
}

#[test]
fn proofs_at_the_same_time_read_no_file_twice_and_do_not_wait_for_others() -> Result<()> {
    let mut made = Made::default();
    let chain = made.chain("link", 200)?;
    let tops = ["a", "b", "c"].map(|name| made.make(name, &[&chain[199]]));
    let tops: Vec<_> = tops.into_iter().collect::<Result<_>>()?;
    let apart = made.chain("apart", 3)?;
    let server = made.serve()?;
    let (proofs, caches) = (Arc::<Proofs>::default(), [open(&server)?]);
    server.hold(Some(nar_name(&chain[100])));
    thread::scope(|scope| -> Result<()> {
        let threads: Vec<_> = [&tops[0], &tops[0], &tops[1], &tops[2]]
            .into_iter()
            .map(|top| scope.spawn(|| made.request(&proofs, &caches, top)))
            .collect();
        server.wait_for_request(&nar_name(&chain[100]));
        // They all hang on that file, and this does not.
        made.request(&proofs, &caches, &apart[2])?.map_err(anyhow::Error::new)?;
        server.hold(None);
        for thread in threads {
            thread.join().expect("it does not panic")?.map_err(anyhow::Error::new)?;
        }
        Ok(())
    })?;
    let requests = std::mem::take(&mut server.lock().requests);
    let twice: Vec<_> =
        requests.iter().filter(|(name, count)| name.ends_with(".nar") && **count > 1).collect();
    ensure!(twice.is_empty(), "{twice:?}");
    assert_eq!(requests.keys().filter(|name| name.ends_with(".nar")).count(), made.0.len());
    Ok(())
}

#[test]
fn a_cache_that_is_wrong_is_set_aside_and_another_is_asked() -> Result<()> {
    let mut made = Made::default();
    let chain = made.chain("link", 10)?;
    let (wrong, right) = (made.serve()?, made.serve()?);
    // In itself the archive is what the narinfo file says; only its name shows that it is another one's.
    let (stranger, _) = &made.0[&chain[2]];
    wrong.add_as(&chain[5], stranger, [chain[4].clone()].into())?;
    let cache = || {
        Ok::<_, anyhow::Error>(Guarded::new(
            drover_cache::open(&wrong.url, &CacheOptions::default())?,
            Memory::default(),
        ))
    };
    let guarded = Arc::new(cache()?);
    let alone: [Arc<dyn Cache>; 1] = [guarded.clone()];
    let says = format!("{} is not what its name says", chain[5]);
    refused(made.request(&Arc::default(), &alone, &chain[9])?, &says)?;
    ensure!(guarded.counts().wrong == 1);
    // Nothing that it said is believed by the next one either, which asks another cache.
    let both: [Arc<dyn Cache>; 2] = [Arc::new(cache()?), open(&right)?];
    made.request(&Arc::default(), &both, &chain[9])?.map_err(anyhow::Error::new)?;
    assert_eq!(right.lock().requests.keys().filter(|name| name.ends_with(".nar")).count(), 1);
    Ok(())
}

#[test]
fn a_file_that_is_missing_is_named() -> Result<()> {
    let mut made = Made::default();
    let chain = made.chain("link", 10)?;
    let server = made.serve()?;
    server.remove(&chain[5]);
    refused(
        made.request(&Arc::default(), &[open(&server)?], &chain[9])?,
        &format!("no cache has {}", chain[5]),
    )
}

/// What a cache says of references only decides what is read first.
#[test]
fn references_that_a_cache_says_prove_nothing() -> Result<()> {
    let mut made = Made::default();
    let chain = made.chain("link", 20)?;
    let stray = Made::default().make("stray", &[])?;
    let server = made.serve()?;
    for (path, (drv, _)) in &made.0 {
        // None at all, or nothing but one that is nowhere, or a circle.
        let said = match path {
            path if *path == chain[7] => [stray.clone()].into(),
            path if *path == chain[8] => [chain[9].clone()].into(),
            path if *path == chain[9] => [chain[8].clone()].into(),
            _ => BTreeSet::new(),
        };
        server.add_as(path, drv, said)?;
    }
    made.request(&Arc::default(), &[open(&server)?], &chain[19])?.map_err(anyhow::Error::new)
}
