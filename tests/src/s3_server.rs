//! A real S3 service on loopback: versitygw over a directory, which checks every signature and keeps a log.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tempfile::TempDir;
use xtask::parts::go;
use xtask::run;

const START_LIMIT: Duration = Duration::from_secs(20);

/// A running versitygw; it ends, and all that it has is gone, when this is dropped.
pub struct S3Server {
    child: Child,
    dir: TempDir,
    endpoint: String,
}

impl S3Server {
    /// The only account.
    pub const ACCESS_KEY_ID: &str = "DROVERTESTKEY";
    pub const SECRET_ACCESS_KEY: &str = "drover-test-secret";
    /// Not the default's, so that it has to be said.
    pub const REGION: &str = "eu-test-1";

    pub fn start() -> Result<Self> {
        let program = go::versitygw()?;
        let dir = TempDir::with_prefix("drover-s3-")?;
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        for name in ["data", "meta"] {
            fs::create_dir(dir.path().join(name))?;
        }
        let output = File::create(dir.path().join("output"))?;
        let mut command = Command::new(program);
        command.env("ROOT_ACCESS_KEY", Self::ACCESS_KEY_ID).env("ROOT_SECRET_KEY", Self::SECRET_ACCESS_KEY);
        command.args(["--port", &address.to_string(), "--region", Self::REGION, "--keep-alive", "--quiet"]);
        command.arg("--access-log").arg(dir.path().join("access.log"));
        // Beside the files: not every file system has extended attributes.
        command.arg("posix").arg("--sidecar").arg(dir.path().join("meta")).arg(dir.path().join("data"));
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let child = command.spawn().context("could not start versitygw")?;
        let mut this = Self { child, dir, endpoint: format!("http://{address}") };
        run::wait_for("versitygw to listen", START_LIMIT, || {
            if let Some(status) = this.child.try_wait()? {
                let said = fs::read_to_string(this.dir.path().join("output"))?;
                bail!("versitygw ended with {status}: {said}");
            }
            Ok(TcpStream::connect(address).is_ok())
        })?;
        Ok(this)
    }

    /// `http://ADDRESS:PORT`.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Makes a bucket and returns the URL of a cache in it, as Nix writes it.
    pub fn bucket(&self, name: &str) -> Result<String> {
        fs::create_dir(self.dir.path().join("data").join(name))?;
        Ok(format!("s3://{name}?endpoint={}&region={}", self.endpoint, Self::REGION))
    }

    /// Lets everybody, known or not, do this with the objects of a bucket: `s3:GetObject`, for instance.
    pub fn allow(&self, bucket: &str, actions: &[&str]) -> Result<()> {
        let dir = self.dir.path().join("meta").join(bucket).join("meta");
        fs::create_dir_all(&dir)?;
        let policy = serde_json::json!({
            "Version": "2012-10-17",
            "Statement": [{
                "Effect": "Allow",
                "Principal": "*",
                "Action": actions,
                "Resource": [format!("arn:aws:s3:::{bucket}"), format!("arn:aws:s3:::{bucket}/*")],
            }],
        });
        Ok(fs::write(dir.join("policy"), policy.to_string())?)
    }

    /// The file that an object is kept in.
    pub fn object(&self, bucket: &str, name: &str) -> PathBuf {
        self.dir.path().join("data").join(bucket).join(name)
    }

    /// How many uploads in parts were begun and neither completed nor aborted.
    pub fn unfinished(&self, bucket: &str) -> Result<usize> {
        // A directory for each object, and in it one for each upload.
        let dir = self.object(bucket, ".sgwtmp/multipart");
        let objects = match fs::read_dir(&dir) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(0),
            objects => objects?,
        };
        objects.map(|object| Ok(fs::read_dir(object?.path())?.count())).sum()
    }

    /// Every request since the start, in the order in which they ended: what was asked for (`PutObject`), the object's
    /// name, and the status.
    pub fn requests(&self) -> Result<Vec<(String, String, u16)>> {
        let log = fs::read_to_string(self.dir.path().join("access.log"))?;
        let lines = log.lines().filter(|line| line.contains(" s3_"));
        lines
            .map(|line| {
                let (_, rest) = line.split_once(" s3_").context("it was there")?;
                let mut words = rest.split(' ');
                let mut next = || words.next().with_context(|| format!("versitygw logged {line:?}"));
                let (action, name, _target) = (next()?.to_owned(), next()?.to_owned(), next()?);
                Ok((action, name, next()?.parse().context("a status")?))
            })
            .collect()
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
