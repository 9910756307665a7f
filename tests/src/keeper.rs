//! Keeps the logs of pods that come and go: what their containers wrote is evidence of its own, and the kubelet removes it
//! together with the pod.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};

use crate::Cluster;

/// A log that is there for less than this may be missed. Pods go seconds after their containers.
const INTERVAL: Duration = Duration::from_millis(100);

/// Gives each log of the node's pods a second name, until it is asked to end.
pub struct LogKeeper {
    dir: PathBuf,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl LogKeeper {
    /// `dir` is on the same file system as the cluster's state.
    pub fn start(cluster: &Cluster, dir: &Path) -> Result<Self> {
        let pods = cluster.logs().parent().context("logs lie in a directory")?.join("pods");
        fs::create_dir_all(dir)?;
        let stop = Arc::new(AtomicBool::new(false));
        let (ended, dir) = (stop.clone(), dir.to_owned());
        let into = dir.clone();
        let thread = std::thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                keep(&pods, &into)?;
                std::thread::sleep(INTERVAL);
            }
            keep(&pods, &into)
        });
        Ok(Self { dir, stop, thread: Some(thread) })
    }

    /// Every log since the start, by `NAMESPACE_POD_UID/CONTAINER/RESTARTS`; without the runtime's own words in each line.
    pub fn logs(mut self) -> Result<BTreeMap<String, String>> {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().map_err(|_| anyhow!("the keeper of logs panicked"))??;
        }
        let mut logs = BTreeMap::new();
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().replace('%', "/");
            let text = fs::read(entry.path())?;
            logs.insert(name, plain(&String::from_utf8_lossy(&text)));
        }
        Ok(logs)
    }
}

impl Drop for LogKeeper {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// `pods/POD/CONTAINER/N.log` becomes `into/POD%CONTAINER%N`.
fn keep(pods: &Path, into: &Path) -> Result<()> {
    let entries = |dir: &Path| fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok);
    for pod in entries(pods) {
        for container in entries(&pod.path()) {
            for log in entries(&container.path()) {
                let Some(number) =
                    log.file_name().to_str().and_then(|name| name.strip_suffix(".log").map(str::to_owned))
                else {
                    continue;
                };
                let (pod, container) = (pod.file_name(), container.file_name());
                let name = format!("{}%{}%{number}", pod.to_string_lossy(), container.to_string_lossy());
                match fs::hard_link(log.path(), into.join(name)) {
                    Ok(()) => {}
                    // Kept already, or gone with its pod.
                    Err(error)
                        if matches!(
                            error.kind(),
                            std::io::ErrorKind::AlreadyExists | std::io::ErrorKind::NotFound
                        ) => {}
                    Err(error) => return Err(error).context("could not keep a log"),
                }
            }
        }
    }
    Ok(())
}

/// Each line begins with time, stream and whether it is whole (Kubernetes: the CRI's format of logs).
fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    for line in text.lines() {
        let mut parts = line.splitn(4, ' ').skip(2);
        let (whole, words) = (parts.next().unwrap_or("F"), parts.next().unwrap_or_default());
        plain.push_str(words);
        if whole != "P" {
            plain.push('\n');
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_outlive_their_pods() {
        let dir = tempfile::tempdir().unwrap();
        let (pods, kept) = (dir.path().join("pods"), dir.path().join("kept"));
        let container = pods.join("ns_pod_uid/builder");
        fs::create_dir_all(&container).unwrap();
        fs::create_dir_all(&kept).unwrap();
        fs::write(container.join("0.log"), "T stdout F one two\nT stderr P thr\nT stderr F ee\n").unwrap();
        for _ in 0..2 {
            keep(&pods, &kept).unwrap();
        }
        fs::remove_dir_all(&pods).unwrap();
        keep(&pods, &kept).unwrap();
        let text = fs::read_to_string(kept.join("ns_pod_uid%builder%0")).unwrap();
        assert_eq!(plain(&text), "one two\nthree\n");
    }
}
