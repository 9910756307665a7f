//! `tests/permissions.yaml`: what the operator may do, why, and which test takes the right. Reads it, and makes a page of it.
//!
//! Whether the chart grants exactly this, and whether all of it is used, is not looked at here: `drover_tests::rights` does.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

/// The list, from the checkout.
const LIST: &str = "tests/permissions.yaml";

/// One right.
#[derive(Deserialize, Clone, Debug)]
#[serde(deny_unknown_fields)]
pub struct Permission {
    /// `RESOURCE[.GROUP][/SUBRESOURCE]`, see [`Permission::parts`].
    pub resource: String,
    pub verb: String,
    pub scope: Scope,
    /// The only object that it is for; None: all.
    pub name: Option<String>,
    /// The value of the chart that it depends on; None: it is always granted.
    pub when: Option<String>,
    /// The part of the scenario in `control_plane::rights` that takes it.
    pub used: String,
    /// Completes "the operator needs it …".
    pub why: String,
}

/// Where a right holds.
#[derive(Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// In all namespaces, or in those that are watched.
    Requests,
    /// For kinds that are in no namespace.
    Cluster,
    Builders,
    Own,
}

impl Permission {
    /// Group (empty for the core's), resource, subresource (or empty).
    pub fn parts(&self) -> (&str, &str, &str) {
        let (resource, subresource) = self.resource.split_once('/').unwrap_or((&self.resource, ""));
        let (resource, group) = resource.split_once('.').unwrap_or((resource, ""));
        (group, resource, subresource)
    }
}

impl Scope {
    fn words(self) -> &'static str {
        match self {
            Self::Requests => "namespaces of requests",
            Self::Cluster => "cluster",
            Self::Builders => "builders' namespace",
            Self::Own => "operator's namespace",
        }
    }
}

/// The list as it is in this checkout. Fails if a right is in it twice.
pub fn list(checkout: &Path) -> Result<Vec<Permission>> {
    let path = checkout.join(LIST);
    let text = fs::read_to_string(&path).with_context(|| format!("could not read {}", path.display()))?;
    let list: Vec<Permission> =
        serde_yaml::from_str(&text).with_context(|| format!("{LIST} is no list of permissions"))?;
    for (index, one) in list.iter().enumerate() {
        let same = |other: &Permission| {
            (&other.resource, &other.verb, other.scope, &other.when)
                == (&one.resource, &one.verb, one.scope, &one.when)
        };
        if list[..index].iter().any(same) {
            bail!("{LIST}: {} {} is there twice", one.verb, one.resource);
        }
    }
    Ok(list)
}

/// The table of docs/permissions.md.
pub fn table(checkout: &Path) -> Result<String> {
    let mut text = String::from("| resource | verb | where | for what | test |\n|---|---|---|---|---|\n");
    for one in list(checkout)? {
        let mut place = one.scope.words().to_owned();
        if let Some(name) = &one.name {
            place.push_str(&format!(", `{name}` only"));
        }
        if let Some(when) = &one.when {
            place.push_str(&format!("; with `{when}`"));
        }
        text.push_str(&format!(
            "| `{}` | {} | {place} | {} | {} |\n",
            one.resource, one.verb, one.why, one.used
        ));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_read_and_every_right_has_a_line() {
        let checkout = crate::checkout();
        let list = list(&checkout).unwrap();
        let table = table(&checkout).unwrap();
        assert_eq!(table.lines().count(), list.len() + 2);
        let lease = list.iter().find(|one| one.resource.starts_with("leases")).unwrap();
        assert_eq!(lease.parts(), ("coordination.k8s.io", "leases", ""));
        let status = list.iter().find(|one| one.resource.ends_with("/status")).unwrap();
        assert_eq!(status.parts(), ("drover.build", "buildrequests", "status"));
    }

    #[test]
    fn a_right_that_is_there_twice_is_found() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("tests")).unwrap();
        let one = "- {resource: pods, verb: get, scope: builders, used: a, why: b}\n";
        fs::write(dir.path().join(LIST), one).unwrap();
        assert_eq!(list(dir.path()).unwrap().len(), 1);
        fs::write(dir.path().join(LIST), one.repeat(2)).unwrap();
        assert!(list(dir.path()).unwrap_err().to_string().contains("get pods is there twice"));
    }
}
