//! `drover-operator check`: what the chart has run beside the operator, from the same image. `definitions` waits until the API
//! server serves Drover's kinds, so that objects of them can be made; `build` is what `helm test` runs: it has one derivation
//! built that nobody has built before, and says how that goes. It knows of Drover what any user does: the API.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use clap::{Args, Parser};
use drover_api::{BuildRequest, Phase};
use kube::api::{DeleteParams, PostParams};
use kube::{Api, Client, ResourceExt as _};
use ring::rand::SecureRandom as _;
use serde_json::json;

use crate::error::Error;

/// Between two looks.
const LOOK: Duration = Duration::from_millis(500);
/// What a request of a check that is cut off may stay, in seconds.
const LEFT_OVER_SECONDS: u32 = 600;
/// The API server's path of Drover's kinds, and what it serves there.
const GROUP_VERSION: &str = "drover.build/v1alpha1";
const KINDS: [&str; 2] = ["buildrequests", "builderclasses"];

/// Checks something of an installation, says how it goes on standard output, and ends with 0 if it is well
#[derive(Parser)]
#[command(name = "drover-operator check")]
pub enum Check {
    /// Waits until the API server serves BuildRequest and BuilderClass
    Definitions {
        /// Seconds after which it is given up
        #[arg(long, default_value_t = 60)]
        timeout_seconds: u64,
    },
    /// Has one small derivation built, which needs no input, and deletes its request
    Build(Build),
}

/// What is built, and where.
#[derive(Args)]
pub struct Build {
    /// Namespace of the request. Default: that of this pod
    #[arg(long)]
    namespace: Option<String>,
    /// Its class. Default: the default class
    #[arg(long)]
    class: Option<String>,
    /// The system that it is built for; the class has to have it
    #[arg(long, default_value = "x86_64-linux")]
    system: String,
    /// Seconds after which it is given up; a node that has to be made for it is in it
    #[arg(long, default_value_t = 600)]
    timeout_seconds: u64,
}

impl Check {
    /// What the command line asks for, if it is a check: its first word is `check`. A mistake in the rest ends the process.
    pub fn asked() -> Option<Self> {
        let mut arguments = std::env::args_os().skip(1);
        arguments.next().filter(|first| first == "check")?;
        Some(Self::parse_from(std::iter::once("drover-operator check".into()).chain(arguments)))
    }

    /// Does it. `config` says where the API server is, and who asks.
    pub async fn run(self, config: kube::Config) -> Result<(), Error> {
        let namespace = config.default_namespace.clone();
        let client = Client::try_from(config).map_err(Error::kube("make a client"))?;
        match self {
            Self::Definitions { timeout_seconds } => definitions(&client, timeout_seconds).await,
            Self::Build(build) => build.run(client, &namespace).await,
        }
    }
}

async fn definitions(client: &Client, seconds: u64) -> Result<(), Error> {
    let start = Instant::now();
    loop {
        let why = match client.list_api_group_resources(GROUP_VERSION).await {
            Ok(list) => {
                let served: BTreeSet<_> = list.resources.iter().map(|kind| kind.name.as_str()).collect();
                match KINDS.iter().find(|kind| !served.contains(**kind)) {
                    None => {
                        println!("the API server serves {}", KINDS.join(" and "));
                        return Ok(());
                    }
                    Some(missing) => format!("it serves no {missing} in {GROUP_VERSION}"),
                }
            }
            Err(error) => format!("it does not say what it serves in {GROUP_VERSION}: {error}"),
        };
        if start.elapsed() > Duration::from_secs(seconds) {
            let why = format!("the API server: {why}, after {seconds} s; are the definitions installed?");
            return Err(Error::Check { why });
        }
        tokio::time::sleep(LOOK).await;
    }
}

impl Build {
    async fn run(self, client: Client, own_namespace: &str) -> Result<(), Error> {
        let namespace = self.namespace.as_deref().unwrap_or(own_namespace);
        let requests: Api<BuildRequest> = Api::namespaced(client, namespace);
        let request = self.request()?;
        let created = requests.create(&PostParams::default(), &request).await;
        let name = created.map_err(Error::kube("create a BuildRequest"))?.name_any();
        println!("{namespace}/{name}: created");
        let ended = self.watch(&requests, namespace, &name).await;
        // Its time to live does it otherwise.
        if let Err(error) = requests.delete(&name, &DeleteParams::default()).await {
            println!("{namespace}/{name}: not deleted: {error}");
        }
        ended
    }

    /// Until it has ended, saying each reason as it comes.
    async fn watch(&self, requests: &Api<BuildRequest>, namespace: &str, name: &str) -> Result<(), Error> {
        let start = Instant::now();
        let mut said = String::new();
        loop {
            match requests.get(name).await {
                Ok(request) => {
                    let now = situation(&request);
                    if now != said {
                        println!("{namespace}/{name}: {now}");
                        said = now;
                    }
                    match request.status.and_then(|status| status.phase) {
                        Some(Phase::Succeeded) => return Ok(()),
                        Some(Phase::Failed) => return Err(Error::Check { why: said }),
                        _ => {}
                    }
                }
                Err(kube::Error::Api(status)) if status.code < 500 && status.code != 429 => {
                    return Err(Error::kube("read the BuildRequest")(kube::Error::Api(status)));
                }
                // An API server that is away comes back.
                Err(error) => println!("{namespace}/{name}: {error}"),
            }
            if start.elapsed() > Duration::from_secs(self.timeout_seconds) {
                let why =
                    format!("not built within {} s; the last that was said: {said}", self.timeout_seconds);
                return Err(Error::Check { why });
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// A derivation that no cache has: it writes something random into its output.
    fn request(&self) -> Result<BuildRequest, Error> {
        let mut random = [0; 16];
        let no_bytes = |_| Error::Check { why: "the system gave no random bytes".into() };
        ring::rand::SystemRandom::new().fill(&mut random).map_err(no_bytes)?;
        let nonce = format!("{:032x}", u128::from_le_bytes(random));
        let mut request = json!({
            "apiVersion": GROUP_VERSION,
            "kind": "BuildRequest",
            "metadata": {"generateName": "drover-check-"},
            "spec": {
                "timeoutSeconds": self.timeout_seconds.max(1),
                "ttlSecondsAfterSucceeded": LEFT_OVER_SECONDS,
                "ttlSecondsAfterFailed": LEFT_OVER_SECONDS,
                "derivation": {
                    "name": "drover-check",
                    "system": self.system,
                    "builder": "/bin/sh",
                    "args": ["-c", "echo \"$nonce\" > \"$out\""],
                    "env": {"nonce": nonce},
                    "outputs": {"out": {}},
                },
            },
        });
        if let Some(class) = &self.class {
            request["spec"]["class"] = class.as_str().into();
        }
        serde_json::from_value(request).map_err(|error| Error::Check { why: error.to_string() })
    }
}

/// Where a request stands, in a line.
fn situation(request: &BuildRequest) -> String {
    let Some(status) = &request.status else { return "nobody has looked at it".into() };
    let Some(succeeded) = status.conditions.iter().find(|condition| condition.type_ == "Succeeded") else {
        return "no operator has looked at it".into();
    };
    let outputs: Vec<_> = status.outputs.values().map(|output| output.path.as_str()).collect();
    let tail = status.failure.iter().flat_map(|failure| &failure.log_tail);
    let lines: String = tail.map(|line| format!("\n  {line}")).collect();
    format!("{}: {} {}{lines}", succeeded.reason, succeeded.message, outputs.join(" ")).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_checks_ask_for_the_same() {
        let parse = |words: &[&str]| match Check::try_parse_from([&["check"], words].concat()).unwrap() {
            Check::Build(build) => build.request().unwrap(),
            Check::Definitions { .. } => panic!("not a build"),
        };
        let [one, two] = [(); 2].map(|()| parse(&["build", "--class", "fast", "--system", "aarch64-linux"]));
        assert_ne!(one.spec.derivation, two.spec.derivation);
        assert_eq!(one.spec.class.as_deref(), Some("fast"));
        assert_eq!(one.spec.derivation.unwrap().system, "aarch64-linux");
        assert_eq!(parse(&["build"]).spec.class, None);
    }

    #[test]
    fn a_failure_is_told_with_the_end_of_its_log() {
        let mut request = parse_request();
        assert_eq!(situation(&request), "nobody has looked at it");
        request.status = serde_json::from_value(json!({
            "conditions": [{"type": "Succeeded", "status": "False", "reason": "BuildFailed", "message": "exit code 7",
                "lastTransitionTime": "2026-01-01T00:00:00Z"}],
            "failure": {"reason": "BuildFailed", "message": "exit code 7", "logTail": ["one", "two"]},
        }))
        .unwrap();
        assert_eq!(situation(&request), "BuildFailed: exit code 7 \n  one\n  two");
    }

    fn parse_request() -> BuildRequest {
        let build = Build { namespace: None, class: None, system: "x".into(), timeout_seconds: 1 };
        build.request().unwrap()
    }
}
