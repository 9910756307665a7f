//! Secrets that classes refer to, read from the operator's own namespace each time that they are used, so that a change counts
//! from the next build on. Nothing of them is kept in any other place than the session that needs it.

use std::collections::BTreeMap;

use drover_api::{ClassCache, SecretKeyRef};
use drover_cache::Credentials;
use drover_cache::Secret as Hidden;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::Api;

use crate::error::Error;
use crate::observe::may_be_a_name;
use crate::operator::{Operator, call};

type Entries = BTreeMap<String, ByteString>;

/// The text of the class's secret key.
pub async fn signing_key(operator: &Operator, cache: &ClassCache) -> Result<Option<String>, Error> {
    let Some(reference) = &cache.signing_key_secret_ref else { return Ok(None) };
    let entries = read(operator, "read the class's signing key", reference).await?;
    let key = reference.key.as_deref().unwrap_or("key");
    let text = text(&entries, key).and_then(|text| text.ok_or_else(|| format!("it has no entry {key}")));
    Ok(Some(text.map_err(fail(reference))?.trim().to_owned()))
}

/// What each of the caches wants to see, in their order.
pub async fn credentials(operator: &Operator, caches: &[ClassCache]) -> Result<Vec<Credentials>, Error> {
    let mut found = Vec::with_capacity(caches.len());
    for cache in caches {
        found.push(match &cache.credentials_secret_ref {
            None => Credentials::None,
            Some(reference) => {
                let entries = read(operator, "read a cache's credentials", reference).await?;
                of_entries(&entries, reference.key.as_deref()).map_err(fail(reference))?
            }
        });
    }
    Ok(found)
}

async fn read(operator: &Operator, act: &'static str, reference: &SecretKeyRef) -> Result<Entries, Error> {
    let namespace = &operator.settings.namespace;
    // It would become part of an address.
    if !may_be_a_name(&reference.name) {
        return Err(fail(reference)("no Secret can have that name".into()));
    }
    let api: Api<Secret> = Api::namespaced(operator.client.clone(), namespace);
    let secret = match call(act, api.get_opt(&reference.name)).await {
        Err(Error::Kube { source, .. }) if is_forbidden(&source) => {
            return Err(fail(reference)(source.to_string()));
        }
        answer => answer?,
    };
    let secret = secret.ok_or_else(|| fail(reference)(format!("it is not in namespace {namespace}")))?;
    Ok(secret.data.unwrap_or_default())
}

/// For somebody to mend, as a Secret that is missing is.
fn is_forbidden(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.is_forbidden())
}

fn fail(reference: &SecretKeyRef) -> impl FnOnce(String) -> Error {
    let name = reference.name.clone();
    move |why| Error::Secret { name, why }
}

/// Credentials by the names of the entries. Says what is wrong with the Secret, or with how it is referred to.
fn of_entries(entries: &Entries, key: Option<&str>) -> Result<Credentials, String> {
    let entry = |name: &str| text(entries, name);
    let needed = |name: &str| entry(name)?.ok_or_else(|| format!("it has no entry {name}"));
    if let Some(key) = key {
        return Err(format!(
            "credentialsSecretRef names its entry {key}, but what they are called says what they are"
        ));
    }
    let kinds = ["username", "token", "netrc", "accessKeyId"].map(|name| entries.contains_key(name));
    match kinds {
        [true, false, false, false] => {
            Ok(Credentials::Basic { user: needed("username")?, password: Hidden::new(needed("password")?) })
        }
        [false, true, false, false] => Ok(Credentials::Bearer(Hidden::new(needed("token")?))),
        [false, false, true, false] => Ok(Credentials::Netrc(Hidden::new(needed("netrc")?))),
        [false, false, false, true] => Ok(Credentials::Aws {
            access_key_id: needed("accessKeyId")?,
            secret_access_key: Hidden::new(needed("secretAccessKey")?),
            session_token: entry("sessionToken")?.map(Hidden::new),
        }),
        _ => Err("it should have either the entries username and password, or token, or netrc, or accessKeyId and \
                  secretAccessKey"
            .into()),
    }
}

/// An entry without the line's end with which files end that Secrets are made from.
fn text(entries: &Entries, name: &str) -> Result<Option<String>, String> {
    let Some(bytes) = entries.get(name) else { return Ok(None) };
    let text = std::str::from_utf8(&bytes.0).map_err(|_| format!("its entry {name} is not text"))?;
    Ok(Some(text.trim_end_matches(['\n', '\r']).to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn credentials(entries: &[(&str, &str)], key: Option<&str>) -> Result<Credentials, String> {
        let bytes = |text: &str| ByteString(text.as_bytes().to_vec());
        of_entries(&entries.iter().map(|(name, text)| ((*name).to_owned(), bytes(text))).collect(), key)
    }

    #[test]
    fn entries_say_what_they_are() {
        let hidden = Hidden::new;
        for (entries, expected) in [
            (
                &[("username", "me"), ("password", " p w\n")][..],
                Credentials::Basic { user: "me".into(), password: hidden(" p w") },
            ),
            (&[("token", "t\r\n")], Credentials::Bearer(hidden("t"))),
            (&[("netrc", "machine a login b")], Credentials::Netrc(hidden("machine a login b"))),
            (
                &[("accessKeyId", "id"), ("secretAccessKey", "key")],
                Credentials::Aws {
                    access_key_id: "id".into(),
                    secret_access_key: hidden("key"),
                    session_token: None,
                },
            ),
        ] {
            assert_eq!(credentials(entries, None).unwrap(), expected);
        }
    }

    #[test]
    fn what_is_wrong_is_said_without_the_secret() {
        for (entries, key, says) in [
            (&[][..], None, "should have either"),
            (&[("token", "hush"), ("netrc", "hush")], None, "should have either"),
            (&[("username", "hush")], None, "no entry password"),
            (&[("accessKeyId", "hush")], None, "no entry secretAccessKey"),
            (&[("token", "hush")], Some("other"), "names its entry other"),
        ] {
            let error = credentials(entries, key).unwrap_err();
            assert!(error.contains(says) && !error.contains("hush"), "{error}");
        }
        let entries = [("token".to_owned(), ByteString(vec![0xff]))].into();
        assert!(of_entries(&entries, None).unwrap_err().contains("not text"));
    }
}
