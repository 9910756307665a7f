//! A real Prometheus on loopback, and its `promtool`: whether metrics are read, rules fire and queries mean anything is theirs
//! to say. Neither takes root.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::parts::rootfs;
use crate::run;

const READY_LIMIT: Duration = Duration::from_secs(30);
/// For one answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// `promtool`, to be given its arguments.
pub fn promtool() -> Result<Command> {
    Ok(Command::new(rootfs::prometheus()?.join("usr/bin/promtool")))
}

/// A running server. It and its data end with this value.
pub struct Prometheus {
    child: Child,
    address: SocketAddr,
    _dir: TempDir,
}

impl Prometheus {
    /// Starts one that asks `target`, if there is one, for `/metrics` each second. `samples` are what it knows from the start:
    /// OpenMetrics' text, each line with its time.
    pub fn start(target: Option<SocketAddr>, samples: Option<&str>) -> Result<Self> {
        let dir = TempDir::new()?;
        let (config, data, log) =
            (dir.path().join("config.yaml"), dir.path().join("data"), dir.path().join("log"));
        let targets = target.map(|target| format!("'{target}'")).unwrap_or_default();
        fs::write(
            &config,
            format!(
                "global: {{scrape_interval: 1s, scrape_timeout: 1s}}\nscrape_configs:\n- job_name: drover\n  static_configs:\n  \
                 - targets: [{targets}]\n    labels: {{namespace: drover-system, pod: drover-a}}\n"
            ),
        )?;
        if let Some(samples) = samples {
            fill(&data, samples, dir.path())?;
        }
        let out = File::create(&log)?;
        let mut command = Command::new(rootfs::prometheus()?.join("usr/bin/prometheus"));
        command.arg(format!("--config.file={}", config.display()));
        command.arg(format!("--storage.tsdb.path={}", data.display()));
        // What it is filled with may be of any age.
        command.args(["--storage.tsdb.retention.time=100y", "--web.listen-address=127.0.0.1:0"]);
        command.args(["--log.format=json"]);
        command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
        let child =
            command.spawn().with_context(|| format!("could not start {}", run::describe(&command)))?;
        let mut server = Self { child, address: ([127, 0, 0, 1], 0).into(), _dir: dir };
        run::wait_for("Prometheus to be ready", READY_LIMIT, || {
            let said = fs::read_to_string(&log)?;
            if let Some(code) = server.child.try_wait()? {
                bail!("prometheus ended with {code}:\n{said}");
            }
            if let Some(address) = listens_on(&said) {
                server.address = address;
            }
            Ok(said.contains("Server is ready to receive web requests"))
        })?;
        ensure!(server.address.port() != 0, "prometheus does not say where it listens");
        Ok(server)
    }

    /// The series that a query gives now.
    pub fn query(&self, query: &str) -> Result<Vec<Value>> {
        self.series(&format!("/api/v1/query?query={}", escape(query)))
    }

    /// The series that it gives between two times, in seconds of Unix.
    pub fn query_range(&self, query: &str, start: i64, end: i64, step: u32) -> Result<Vec<Value>> {
        let query = escape(query);
        self.series(&format!("/api/v1/query_range?query={query}&start={start}&end={end}&step={step}"))
    }

    /// What the API answers, without its envelope.
    pub fn get(&self, path: &str) -> Result<Value> {
        let mut stream = TcpStream::connect(self.address)?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        // HTTP/1.0: the answer ends with the connection.
        write!(stream, "GET {path} HTTP/1.0\r\nHost: {}\r\n\r\n", self.address)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (_, body) = answer.split_once("\r\n\r\n").context("an HTTP answer has a body")?;
        let mut body: Value = serde_json::from_str(body).with_context(|| format!("{path}: {body}"))?;
        ensure!(body["status"] == "success", "{path}: {body}");
        Ok(body["data"].take())
    }

    fn series(&self, path: &str) -> Result<Vec<Value>> {
        let mut data = self.get(path)?;
        match data["result"].take() {
            Value::Array(series) => Ok(series),
            other => bail!("{path}: no list of series: {other}"),
        }
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        // An error here means that it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn fill(data: &Path, samples: &str, scratch: &Path) -> Result<()> {
    let file = scratch.join("samples");
    fs::write(&file, samples)?;
    run::stdout(promtool()?.args(["tsdb", "create-blocks-from", "openmetrics"]).arg(&file).arg(data))
        .map(drop)
}

/// Where it listens, by its log.
fn listens_on(log: &str) -> Option<SocketAddr> {
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut said = lines.filter(|line| line["msg"] == "Listening on");
    said.find_map(|line| line["address"].as_str()?.parse().ok())
}

/// For a URL's query.
fn escape(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'-' | b'.' => char::from(byte).to_string(),
            other => format!("%{other:02X}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_arrive_whole() {
        assert_eq!(escape("sum(a{b=~\"c|d\"})"), "sum%28a%7Bb%3D~%22c%7Cd%22%7D%29".replace('~', "%7E"));
        let log = "{\"msg\":\"Start\",\"address\":\"127.0.0.1:0\"}\n{\"msg\":\"Listening on\",\"address\":\"127.0.0.1:41\"}\nhalf";
        assert_eq!(listens_on(log), Some(([127, 0, 0, 1], 41).into()));
    }
}
