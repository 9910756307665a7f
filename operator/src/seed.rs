//! Where the operator's seed is kept: a file, or a Secret in the operator's own namespace that it makes at its first
//! start. Without the same seed after a restart it could not open the builders that it left running.

use std::collections::BTreeMap;
use std::path::Path;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};

use crate::error::Error;
use crate::keys::Seed;
use crate::operator::call;
use crate::settings::FIELD_MANAGER;

/// The Secret's entry.
const KEY: &str = "seed";

pub fn from_file(path: &Path) -> Result<Seed, Error> {
    let fail = |source| Error::File { act: "read the seed from", path: path.to_owned(), source };
    Seed::from_bytes(&std::fs::read(path).map_err(fail)?)
}

/// Reads the Secret, or makes it. Two operators that start at once get the same one.
pub async fn from_secret(client: &Client, namespace: &str, name: &str) -> Result<Seed, Error> {
    let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
    if let Some(secret) = call("read the operator's seed", api.get_opt(name)).await? {
        return of(secret, name);
    }
    let secret = Secret {
        metadata: ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() },
        data: Some(BTreeMap::from([(KEY.to_owned(), ByteString(Seed::generate()?.bytes().to_vec()))])),
        immutable: Some(true),
        type_: Some("Opaque".into()),
        ..Secret::default()
    };
    let params = PostParams { field_manager: Some(FIELD_MANAGER.into()), ..PostParams::default() };
    match call("keep the operator's seed", api.create(&params, &secret)).await {
        Ok(secret) => of(secret, name),
        Err(Error::Kube { source, .. }) if matches!(source.as_ref(), kube::Error::Api(s) if s.is_already_exists()) => {
            of(call("read the operator's seed", api.get(name)).await?, name)
        }
        Err(error) => Err(error),
    }
}

fn of(secret: Secret, name: &str) -> Result<Seed, Error> {
    let bytes = secret.data.and_then(|mut data| data.remove(KEY));
    let bytes =
        bytes.ok_or_else(|| Error::Secret { name: name.into(), why: format!("it has no entry {KEY}") })?;
    Seed::from_bytes(&bytes.0)
}
