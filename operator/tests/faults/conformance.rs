//! What an API server does, as far as the operator rests on it: one script, and what comes of it.
//!
//! It is run against the double here and against a real API server by the `control-plane` layer (`double.rs`), so that
//! the double cannot be kinder than the real one. Nothing else runs there: no scheduler, no kubelet.

use std::time::Duration;

use drover_api::{BuildRequest, BuildRequestStatus};
use futures::TryStreamExt as _;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::serde::de::DeserializeOwned;
use kube::api::{
    DeleteParams, ListParams, Patch, PatchParams, PostParams, Preconditions, WatchEvent, WatchParams,
};
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};

/// A namespace that is there and has nothing in it.
pub(crate) const NAMESPACE: &str = "conformance";

/// What comes of each step.
pub(crate) const EXPECTED: &str = "\
a request is made: generation 1, seen -1
a status in it is not taken: true
made again: 409 AlreadyExists
made with a version: 500 
made where no namespace is: 404 NotFound
one that is not there: 404 NotFound
only its metadata: true
a status is applied: generation 1, another version true
the same again: another version false
fields that are left out go: true
from an old version: 409 Conflict
under another uid: taken
for one that is not there: 404 NotFound
without saying who: 422 Invalid
the spec is changed: generation 2, status true
deleted under another uid: 409 Conflict
deleted: Status
deleted again: 404 NotFound
status of one that is gone: 404 NotFound
a watch from the first version: MODIFIED MODIFIED MODIFIED MODIFIED DELETED, in order true
pods of a label: 1 of 2
a pod without a node is deleted: object, left false
a pod with a node is deleted: object, left true, due true
deleted again: another version false
deleted at once: left false
a watch of the pod without a node: ADDED MODIFIED DELETED
a watch of the pod with a node: ADDED MODIFIED MODIFIED DELETED
a watch that begins with a list: ADDED BOOKMARK true
a lease is replaced: another version true
from an old version: 409 Conflict
";

/// Which generation its status is about, if it says no more than that; 0 if it says more, or nothing.
fn seen(request: &BuildRequest) -> i64 {
    let status = request.status.clone().unwrap_or_default();
    let seen = status.observed_generation.unwrap_or(0);
    let bare = BuildRequestStatus { observed_generation: status.observed_generation, ..Default::default() };
    if status == bare { seen } else { 0 }
}

/// Runs it; the namespace must be new.
pub(crate) async fn script(client: Client) -> String {
    let mut said = String::new();
    let mut say = |what: &str, came: String| said += &format!("{what}: {came}\n");
    let requests: Api<BuildRequest> = Api::namespaced(client.clone(), NAMESPACE);
    let pods: Api<Pod> = Api::namespaced(client.clone(), NAMESPACE);
    let post = PostParams::default();

    let made = requests.create(&post, &request("a", json!({}))).await.expect("a new request");
    say(
        "a request is made",
        format!("generation {}, seen {}", made.metadata.generation.unwrap_or(0), seen(&made)),
    );
    let with_status =
        requests.create(&post, &request("b", json!({"phase": "Failed"}))).await.expect("a new request");
    say("a status in it is not taken", (seen(&with_status) == -1).to_string());
    say("made again", refusal(requests.create(&post, &request("a", json!({}))).await));
    let mut versioned = request("c", json!({}));
    versioned.metadata.resource_version = made.resource_version();
    say("made with a version", refusal(requests.create(&post, &versioned).await));
    let nowhere: Api<BuildRequest> = Api::namespaced(client.clone(), "no-such-namespace");
    say("made where no namespace is", refusal(nowhere.create(&post, &request("a", json!({}))).await));
    say("one that is not there", refusal(requests.get("absent").await));
    let metadata = requests.get_metadata("a").await.expect("it is there");
    say("only its metadata", (metadata.metadata.uid == made.metadata.uid).to_string());

    let apply = PatchParams::apply("conformance").force();
    let status = |request: &BuildRequest, status: Value| {
        Patch::Apply(json!({
            "apiVersion": drover_api::API_VERSION,
            "kind": "BuildRequest",
            "metadata": {
                "name": request.name_any(), "uid": request.uid(), "resourceVersion": request.resource_version(),
            },
            "status": status,
        }))
    };
    let first = json!({"phase": "Pending", "attempt": 1});
    let applied = requests.patch_status("a", &apply, &status(&made, first.clone())).await.expect("a status");
    let generation = applied.metadata.generation.unwrap_or(0);
    let moved =
        |before: &BuildRequest, after: &BuildRequest| before.resource_version() != after.resource_version();
    say(
        "a status is applied",
        format!("generation {generation}, another version {}", moved(&made, &applied)),
    );
    let again = requests.patch_status("a", &apply, &status(&applied, first.clone())).await.expect("a status");
    say("the same again", format!("another version {}", moved(&applied, &again)));
    let less = requests.patch_status("a", &apply, &status(&again, json!({"phase": "Pending"}))).await;
    let less = less.expect("a status");
    let gone = less.status.as_ref().is_some_and(|status| status.attempt.is_none());
    say("fields that are left out go", gone.to_string());
    say(
        "from an old version",
        refusal(requests.patch_status("a", &apply, &status(&made, first.clone())).await),
    );
    let mut other = less.clone();
    other.metadata.uid = with_status.uid();
    say(
        "under another uid",
        refusal(requests.patch_status("a", &apply, &status(&other, first.clone())).await),
    );
    let mut absent = less.clone();
    absent.metadata.name = Some("absent".into());
    say(
        "for one that is not there",
        refusal(requests.patch_status("absent", &apply, &status(&absent, first.clone())).await),
    );
    let nobody = PatchParams { field_manager: None, ..apply.clone() };
    say(
        "without saying who",
        refusal(requests.patch_status("a", &nobody, &status(&less, first.clone())).await),
    );
    let cancel = Patch::Merge(json!({"spec": {"cancel": true}}));
    let changed = requests.patch("a", &PatchParams::default(), &cancel).await.expect("a change of the spec");
    let generation = changed.metadata.generation.unwrap_or(0);
    say("the spec is changed", format!("generation {generation}, status {}", changed.status.is_some()));

    say("deleted under another uid", refusal(requests.delete("a", &under(with_status.uid())).await));
    let deleted = requests.delete("a", &under(made.uid())).await.expect("a deletion");
    say("deleted", if deleted.is_right() { "Status".into() } else { "object".into() });
    say("deleted again", refusal(requests.delete("a", &under(made.uid())).await));
    say(
        "status of one that is gone",
        refusal(requests.patch_status("a", &apply, &status(&less, first)).await),
    );
    let since = made.resource_version().unwrap_or_default();
    let (kinds, versions) =
        watched(&requests, &WatchParams::default().fields("metadata.name=a"), &since, 5).await;
    let in_order = versions.windows(2).all(|pair| pair[0] < pair[1]);
    say("a watch from the first version", format!("{}, in order {in_order}", kinds.join(" ")));

    let since = pods
        .list(&ListParams::default())
        .await
        .expect("a list")
        .metadata
        .resource_version
        .unwrap_or_default();
    pods.create(&post, &pod("waits", None)).await.expect("a pod");
    pods.create(&post, &pod("runs", Some("n1"))).await.expect("a pod");
    let all = pods.list(&ListParams::default()).await.expect("a list").items.len();
    let labelled = ListParams::default().labels("of=waits");
    say("pods of a label", format!("{} of {all}", pods.list(&labelled).await.expect("a list").items.len()));
    let kind = |is_status: bool| if is_status { "Status" } else { "object" };
    let deleted = pods.delete("waits", &DeleteParams::default()).await.expect("a deletion");
    let left = pods.get_opt("waits").await.expect("an answer").is_some();
    say("a pod without a node is deleted", format!("{}, left {left}", kind(deleted.is_right())));
    let deleted = pods.delete("runs", &DeleteParams::default()).await.expect("a deletion");
    let left = pods.get_opt("runs").await.expect("an answer");
    let due = left.as_ref().is_some_and(|pod| pod.metadata.deletion_timestamp.is_some());
    say(
        "a pod with a node is deleted",
        format!("{}, left {}, due {due}", kind(deleted.is_right()), left.is_some()),
    );
    pods.delete("runs", &DeleteParams::default()).await.expect("a deletion");
    let after = pods.get_opt("runs").await.expect("an answer");
    let version = |pod: &Option<Pod>| pod.as_ref().and_then(|pod| pod.resource_version());
    say("deleted again", format!("another version {}", version(&left) != version(&after)));
    let at_once = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
    pods.delete("runs", &at_once).await.expect("a deletion");
    say("deleted at once", format!("left {}", pods.get_opt("runs").await.expect("an answer").is_some()));
    for (label, of, count) in [("waits", "without", 3), ("runs", "with", 4)] {
        let params = WatchParams::default().labels(&format!("of={label}"));
        let (kinds, _) = watched(&pods, &params, &since, count).await;
        say(&format!("a watch of the pod {of} a node"), kinds.join(" "));
    }

    let initial = WatchParams::default().initial_events();
    let (kinds, _) = watched(&requests, &initial, "0", 2).await;
    say("a watch that begins with a list", kinds.join(" "));

    let leases: Api<Lease> = Api::namespaced(client, NAMESPACE);
    let lease: Lease = from(json!({"metadata": {"name": "l"}, "spec": {"holderIdentity": "a"}}));
    let lease = leases.create(&post, &lease).await.expect("a lease");
    let mut next = lease.clone();
    next.spec.get_or_insert_default().holder_identity = Some("b".into());
    let replaced = leases.replace("l", &post, &next).await.expect("a lease");
    say(
        "a lease is replaced",
        format!("another version {}", replaced.resource_version() != lease.resource_version()),
    );
    say("from an old version", refusal(leases.replace("l", &post, &next).await));
    said
}

fn request(name: &str, status: Value) -> BuildRequest {
    let mut request = json!({
        "apiVersion": drover_api::API_VERSION,
        "kind": "BuildRequest",
        "metadata": {"name": name},
        "spec": {"derivation": {"name": name, "system": "x86_64-linux", "builder": "/bin/sh", "outputs": {"out": {}}}},
    });
    if status != json!({}) {
        request["status"] = status;
    }
    from(request)
}

fn pod(name: &str, node: Option<&str>) -> Pod {
    let container = json!({"name": "builder", "image": "i"});
    let mut pod = json!({
        "metadata": {"name": name, "labels": {"of": name}},
        "spec": {"containers": [container], "terminationGracePeriodSeconds": 10, "automountServiceAccountToken": false},
    });
    if let Some(node) = node {
        pod["spec"]["nodeName"] = node.into();
    }
    from(pod)
}

fn from<T: DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).expect("an object of its type")
}

fn under(uid: Option<String>) -> DeleteParams {
    let preconditions = Some(Preconditions { uid, resource_version: None });
    DeleteParams { preconditions, ..DeleteParams::default() }
}

fn refusal<T>(result: Result<T, kube::Error>) -> String {
    match result {
        Ok(_) => "taken".into(),
        Err(kube::Error::Api(status)) => format!("{} {}", status.code, status.reason),
        Err(error) => panic!("no answer: {error}"),
    }
}

/// Kinds and versions of the first events.
async fn watched<K>(api: &Api<K>, params: &WatchParams, since: &str, count: usize) -> (Vec<String>, Vec<u64>)
where
    K: kube::Resource + Clone + DeserializeOwned + std::fmt::Debug,
{
    let stream = api.watch(params, since).await.expect("a watch");
    let mut stream = std::pin::pin!(stream);
    let (mut kinds, mut versions) = (vec![], vec![]);
    while kinds.len() < count {
        let next = tokio::time::timeout(Duration::from_secs(20), stream.try_next()).await;
        let Some(event) = next.expect("an event in time").expect("an event") else { break };
        let of = |object: &K| object.meta().resource_version.clone().unwrap_or_default();
        let (kind, version) = match &event {
            WatchEvent::Added(object) => ("ADDED".to_owned(), of(object)),
            WatchEvent::Modified(object) => ("MODIFIED".to_owned(), of(object)),
            WatchEvent::Deleted(object) => ("DELETED".to_owned(), of(object)),
            WatchEvent::Bookmark(bookmark) => {
                let ends = bookmark.metadata.annotations.contains_key("k8s.io/initial-events-end");
                (format!("BOOKMARK {ends}"), bookmark.metadata.resource_version.clone())
            }
            WatchEvent::Error(status) => (format!("ERROR {}", status.code), String::new()),
        };
        kinds.push(kind);
        versions.push(version.parse().unwrap_or(0));
    }
    (kinds, versions)
}
