//! The commands that talk to a cluster. They are thin: a request says by itself where it stands, so they read it, wait
//! for it or change one field of it.

mod describe;
mod logs;
mod submit;

use std::collections::BTreeMap;
use std::future::Future;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use drover_api::{BuildRequest, Reason, conditions};
use drover_nix::StoreDir;
use futures::TryStreamExt as _;
use kube::api::{Patch, PatchParams};
use kube::config::KubeConfigOptions;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, Config, ResourceExt as _};
use serde_json::json;

use crate::args;
use crate::exit::{self, Fault, Outcome};
use crate::manifest::Manifest;
use crate::order::{self, Item, Named};
use crate::output;

/// Who changed a field, as the API server remembers it.
const FIELD_MANAGER: &str = "drover";

pub(crate) fn submit(args: &args::Submit) -> Outcome {
    // Order and content are checked here, before anything is sent: all or nothing is friendlier than half.
    let mut queue = order::Queue::load(&args.files, &StoreDir::default(), Named::Sent { all: args.by_path })?;
    if args.wait {
        return run(async { submit::in_order(&Cluster::connect(&args.target).await?, &mut queue).await });
    }
    for index in (0..queue.items.len()).filter(|index| !queue.items[*index].is_named).collect::<Vec<_>>() {
        // A cluster builds what it gets at once: what is to be resolved later cannot be sent.
        let resolved = queue.resolve(index);
        resolved.context("only with --wait it can be sent when these are built").map_err(Fault::Input)?;
    }
    run(async {
        let cluster = Cluster::connect(&args.target).await?;
        for item in &queue.items {
            cluster.submit(item).await?;
        }
        Ok(exit::DONE)
    })
}

pub(crate) fn wait(args: &args::Wait) -> Outcome {
    run(async {
        let cluster = Cluster::connect(&args.target).await?;
        let Some(seconds) = args.timeout else {
            return cluster.wait(&args.names).await;
        };
        match tokio::time::timeout(Duration::from_secs(seconds), cluster.wait(&args.names)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Fault::Infrastructure(anyhow!("not all have ended after {seconds} seconds"))),
        }
    })
}

pub(crate) fn logs(args: &args::Logs) -> Outcome {
    run(async {
        let cluster = Cluster::connect(&args.named.target).await?;
        logs::print(&cluster, &args.named.name, args.follow).await
    })
}

pub(crate) fn describe(args: &args::Named) -> Outcome {
    run(async {
        let cluster = Cluster::connect(&args.target).await?;
        let request = cluster.get(&args.name).await?;
        output::print_text(&describe::text(&request))?;
        Ok(exit::DONE)
    })
}

pub(crate) fn cancel(args: &args::Cancel) -> Outcome {
    run(async {
        let cluster = Cluster::connect(&args.target).await?;
        for name in &args.names {
            let patch = Patch::Merge(json!({ "spec": { "cancel": true } }));
            let params = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..Default::default() };
            let sent = cluster.requests.patch(name, &params, &patch).await;
            sent.with_context(|| format!("cannot cancel {name}")).map_err(refused)?;
            output::print_text(&format!("buildrequest.drover.build/{name} cancelled\n"))?;
        }
        Ok(exit::DONE)
    })
}

pub(crate) fn get_output(args: &args::GetOutput) -> Outcome {
    run(async {
        let cluster = Cluster::connect(&args.named.target).await?;
        let request = cluster.get(&args.named.name).await?;
        let outputs = outputs(&request, args.output.as_deref())?;
        let is_one = args.output.is_some() || outputs.len() == 1;
        let line = |(name, path): (&String, &String)| {
            if is_one { format!("{path}\n") } else { format!("{name} {path}\n") }
        };
        output::print_text(&outputs.iter().map(line).collect::<String>())?;
        Ok(exit::DONE)
    })
}

/// A namespace of a cluster.
struct Cluster {
    client: Client,
    requests: Api<BuildRequest>,
}

impl Cluster {
    /// With the kubeconfig, or as the pod that this runs in.
    async fn connect(target: &args::Target) -> Result<Self, Fault> {
        let options = KubeConfigOptions { context: target.context.clone(), ..Default::default() };
        let config = match (&options.context, Config::from_kubeconfig(&options).await) {
            (_, Ok(config)) => config,
            (Some(context), Err(error)) => {
                return Err(Fault::Input(anyhow::Error::new(error).context(format!("--context {context}"))));
            }
            (None, Err(_)) => Config::infer()
                .await
                .context("there is no usable kubeconfig")
                .map_err(Fault::Infrastructure)?,
        };
        let namespace = target.namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
        let client =
            Client::try_from(config).context("cannot reach the cluster").map_err(Fault::Infrastructure)?;
        Ok(Self { requests: Api::namespaced(client.clone(), &namespace), client })
    }

    async fn get(&self, name: &str) -> Result<BuildRequest, Fault> {
        self.requests
            .get(name)
            .await
            .with_context(|| format!("cannot read BuildRequest {name}"))
            .map_err(refused)
    }

    /// Creates the request of an item, says so on a line, and gives the request's name.
    async fn submit(&self, item: &Item) -> Result<String, Fault> {
        let request = named(&item.manifest, item.name())?;
        let name = request.name_any();
        let params = PatchParams::apply(FIELD_MANAGER).force();
        let sent = self.requests.patch(&name, &params, &Patch::Apply(&request)).await;
        sent.with_context(|| format!("cannot create {name} ({})", item.manifest.file())).map_err(refused)?;
        output::print_text(&format!("buildrequest.drover.build/{name}\n"))?;
        Ok(name)
    }

    /// Waits until all have ended and says how, each on a line.
    async fn wait(&self, names: &[String]) -> Outcome {
        let mut code = exit::DONE;
        for name in names {
            code = code.max(self.wait_for_one(name).await?);
        }
        Ok(code)
    }

    /// Waits until it has ended, says how on a line, and gives the exit code for it.
    async fn wait_for_one(&self, name: &str) -> Outcome {
        let reason = self.wait_for(name).await?;
        output::print_text(&format!("{name} {reason}\n"))?;
        Ok(match Reason::parse(&reason) {
            Some(reason) if reason.is_infrastructure() => exit::INFRASTRUCTURE,
            Some(Reason::Built | Reason::AlreadyBuilt) => exit::DONE,
            _ => exit::BUILD_FAILED,
        })
    }

    /// The reason with which a request ends.
    async fn wait_for(&self, name: &str) -> Result<String, Fault> {
        // One that is not there is a mistake, not something to wait for.
        self.get(name).await?;
        let config = watcher::Config::default().fields(&format!("metadata.name={name}"));
        let mut events = std::pin::pin!(watcher(self.requests.clone(), config).default_backoff());
        loop {
            match events.try_next().await {
                Ok(Some(watcher::Event::Apply(request) | watcher::Event::InitApply(request))) => {
                    if let Some(reason) = ended(&request) {
                        return Ok(reason);
                    }
                }
                Ok(Some(watcher::Event::Delete(_))) => {
                    return Err(Fault::Infrastructure(anyhow!("{name} was deleted before it ended")));
                }
                Ok(Some(watcher::Event::Init | watcher::Event::InitDone)) => {}
                Ok(None) => return Err(Fault::Infrastructure(anyhow!("the API server ended the watch"))),
                // The stream tries again by itself, later each time.
                Err(error) => eprintln!("warning: {error}"),
            }
        }
    }
}

/// The reason of a request that has ended.
fn ended(request: &BuildRequest) -> Option<String> {
    let conditions = &request.status.as_ref()?.conditions;
    conditions::verdict(conditions)?;
    conditions::find(conditions, conditions::SUCCEEDED).map(|condition| condition.reason.clone())
}

fn outputs(request: &BuildRequest, only: Option<&str>) -> Result<BTreeMap<String, String>, Fault> {
    let name = request.name_any();
    let outputs = request.status.as_ref().map(|status| &status.outputs).filter(|outputs| !outputs.is_empty());
    let Some(outputs) = outputs else {
        let reason = ended(request).unwrap_or_else(|| "it has not ended".into());
        return Err(Fault::Input(anyhow!("{name} has no outputs: {reason}")));
    };
    let paths: BTreeMap<_, _> = outputs
        .iter()
        .filter(|(output, _)| only.is_none_or(|only| only == *output))
        .map(|(output, status)| (output.clone(), status.path.clone()))
        .collect();
    if paths.is_empty() {
        let known: Vec<&str> = outputs.keys().map(String::as_str).collect();
        let only = only.unwrap_or_default();
        return Err(Fault::Input(anyhow!("{name} has no output {only}; it has {}", known.join(", "))));
    }
    Ok(paths)
}

/// What is sent: what was read, under a name, without a status.
fn named(manifest: &Manifest, fallback: &str) -> Result<BuildRequest, Fault> {
    let mut request = manifest.request.clone();
    request.status = None;
    if request.metadata.generate_name.is_some() {
        let error = drover_api::FieldError::new(
            "metadata.generateName",
            "a request is applied by its name, so that doing it twice does it once; give metadata.name",
        );
        return Err(manifest.fault(&error));
    }
    request.metadata.name.get_or_insert_with(|| fallback.to_owned());
    Ok(request)
}

/// An API server that says no means the input; one that cannot be asked is infrastructure.
fn refused(error: anyhow::Error) -> Fault {
    let is_answer = error.chain().filter_map(|cause| cause.downcast_ref::<kube::Error>()).any(|error| {
        matches!(error, kube::Error::Api(status) if (400..500).contains(&status.code) && status.code != 429)
    });
    if is_answer { Fault::Input(error) } else { Fault::Infrastructure(error) }
}

/// These commands do one thing after another: one thread is enough.
fn run(work: impl Future<Output = Outcome>) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.context("cannot start the runtime").map_err(Fault::Infrastructure)?.block_on(work)
}
