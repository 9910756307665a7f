//! A real HTTP server in front of a directory, as Nix's own HTTP binary caches are: nginx, GET and PUT.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tempfile::TempDir;
use xtask::cluster::{Cluster, NODE_ADDRESS};
use xtask::parts::rootfs;
use xtask::root::Root;
use xtask::run;

const START_LIMIT: Duration = Duration::from_secs(20);

/// A running nginx; it ends when this is dropped. The directory stays.
pub struct HttpCache {
    child: Child,
    state: TempDir,
    dir: PathBuf,
    url: String,
    port: u16,
}

impl HttpCache {
    /// Serves `dir` on a free port of loopback.
    pub fn start(dir: &Path) -> Result<Self> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        Self::start_at(dir, "127.0.0.1", port, None)
    }

    /// The same by HTTPS with HTTP/2, with a certificate of its own.
    pub fn start_tls(dir: &Path) -> Result<Self> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let state = TempDir::with_prefix("drover-nginx-")?;
        let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()])?;
        fs::write(state.path().join("cert.pem"), made.cert.pem())?;
        fs::write(state.path().join("key.pem"), made.signing_key.serialize_pem())?;
        Self::start_with(state, dir, "127.0.0.1", port, None)
    }

    /// Ends the server in the middle of whatever it does, and starts it again in the same place.
    pub fn restart(self) -> Result<Self> {
        let (state, port, dir) = (TempDir::with_prefix("drover-nginx-")?, self.port, self.dir.clone());
        for name in ["cert.pem", "key.pem", "access.log"] {
            let file = self.state.path().join(name);
            if file.exists() {
                fs::copy(file, state.path().join(name))?;
            }
        }
        drop(self);
        Self::start_with(state, &dir, "127.0.0.1", port, None)
    }

    /// What a client has to trust.
    pub fn certificate(&self) -> PathBuf {
        self.state.path().join("cert.pem")
    }

    /// The connections on which anything was asked, and how: `HTTP/1.1`, `HTTP/2.0`.
    pub fn connections(&self) -> Result<BTreeSet<(u64, String)>> {
        let log = fs::read_to_string(self.state.path().join("access.log"))?;
        let connection = |line: &str| -> Result<(u64, String)> {
            let mut words = line.rsplit(' ');
            let mut next = || words.next().with_context(|| format!("nginx logged {line:?}"));
            Ok((next()?.parse().context("a connection's number")?, next()?.to_owned()))
        };
        log.lines().map(connection).collect()
    }

    /// Serves `dir` inside the cluster's network, where pods and the operator reach it by [`url`](Self::url).
    pub fn start_in(cluster: &Cluster, dir: &Path, port: u16) -> Result<Self> {
        Self::start_at(dir, NODE_ADDRESS, port, Some(cluster))
    }

    /// `http://ADDRESS:PORT`, without a slash at the end.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// What is served.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Every request since the start, in the order in which they ended: method, path, status code, bytes of the request's body.
    pub fn requests(&self) -> Result<Vec<(String, String, u16, u64)>> {
        let log = fs::read_to_string(self.state.path().join("access.log"))?;
        log.lines()
            .map(|line| {
                let mut words = line.split(' ');
                let mut next = || words.next().with_context(|| format!("nginx logged {line:?}"));
                let (method, path) = (next()?.to_owned(), next()?.to_owned());
                let status = next()?.parse().context("a status code")?;
                let body = next()?.parse().unwrap_or(0); // "-" without a body
                Ok((method, path, status, body))
            })
            .collect()
    }

    fn start_at(dir: &Path, address: &str, port: u16, cluster: Option<&Cluster>) -> Result<Self> {
        Self::start_with(TempDir::with_prefix("drover-nginx-")?, dir, address, port, cluster)
    }

    fn start_with(
        state: TempDir,
        dir: &Path,
        address: &str,
        port: u16,
        cluster: Option<&Cluster>,
    ) -> Result<Self> {
        let tls = state.path().join("cert.pem").exists();
        fs::write(state.path().join("nginx.conf"), configuration(address, port, tls))?;
        fs::create_dir_all(dir.join(".nginx"))?;
        let mut root =
            Root::new(rootfs::nginx()?).bind(dir, "/srv").bind(state.path(), "/state").own_processes();
        if let Some(cluster) = cluster {
            root = root.netns(cluster.netns());
        }
        let log = File::create(state.path().join("error.log"))?;
        let mut nginx = root.command("nginx")?;
        nginx.args(["-c", "/state/nginx.conf", "-e", "stderr"]);
        nginx.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = nginx.spawn().context("could not start nginx")?;
        let url = format!("http{}://{address}:{port}", if tls { "s" } else { "" });
        let mut this = Self { child, state, dir: dir.to_owned(), url, port };
        // nginx writes its process id when it listens.
        run::wait_for("nginx to listen", START_LIMIT, || {
            if let Some(status) = this.child.try_wait()? {
                let said = fs::read_to_string(this.state.path().join("error.log"))?;
                bail!("nginx ended with {status}: {said}");
            }
            Ok(fs::read_to_string(this.state.path().join("pid")).is_ok_and(|pid| pid.ends_with('\n')))
        })?;
        Ok(this)
    }
}

impl Drop for HttpCache {
    fn drop(&mut self) {
        // The child is the parent of nginx's process namespace, which ends with it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn configuration(address: &str, port: u16, tls: bool) -> String {
    let secure = "ssl;
    http2 on;
    ssl_certificate /state/cert.pem;
    ssl_certificate_key /state/key.pem";
    let secure = if tls { secure } else { "" };
    format!(
        "daemon off;
master_process off;
pid /state/pid;
events {{}}
http {{
  log_format request '$request_method $uri $status $content_length $server_protocol $connection';
  access_log /state/access.log request;
  server {{
    listen {address}:{port} {secure};
    root /srv;
    client_max_body_size 0;
    # On the same file system as the cache, so that an upload appears whole or not at all.
    client_body_temp_path /srv/.nginx;
    location / {{
      dav_methods PUT;
      create_full_put_path on;
      dav_access user:rw group:r all:r;
    }}
    location /.nginx/ {{ deny all; }}
  }}
}}
"
    )
}
