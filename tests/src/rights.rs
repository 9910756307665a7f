//! What RBAC grants a ServiceAccount, what an audit log shows that it used, and what the list in `tests/permissions.yaml` says
//! of both. Pure; who renders the chart and reads the log is somebody else.

use std::collections::BTreeSet;
use std::fmt;

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize as _;
use serde_json::Value;
use xtask::audit::Entry;
use xtask::permissions::{Permission, Scope};

/// One verb on one resource, as a rule of RBAC grants it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Grant {
    pub group: String,
    /// With the subresource: `pods/log`.
    pub resource: String,
    pub verb: String,
    /// None: in all namespaces, and for what is in none.
    pub namespace: Option<String>,
    /// None: all objects.
    pub name: Option<String>,
}

/// One verb on one resource, as a client used it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Use {
    pub group: String,
    pub resource: String,
    pub verb: String,
    /// Empty: over all namespaces, or of what is in none.
    pub namespace: String,
    /// Empty where nothing is named, as in lists.
    pub name: String,
}

/// Where things are, for the list that says it in words.
#[derive(Clone, Debug)]
pub struct Places<'a> {
    /// Namespaces that are watched; empty: all.
    pub watched: &'a [&'a str],
    pub builders: &'a str,
    pub own: &'a str,
}

impl fmt::Display for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dot = if self.group.is_empty() { "" } else { "." };
        write!(f, "{} {}{dot}{}", self.verb, self.resource, self.group)?;
        match &self.namespace {
            Some(namespace) => write!(f, " in {namespace}")?,
            None => write!(f, " everywhere")?,
        }
        self.name.iter().try_for_each(|name| write!(f, ", {name} only"))
    }
}

impl Grant {
    /// Whether a use is allowed by it (Kubernetes: pkg/apis/rbac/v1/evaluation_helpers.go). Creations have no name when they
    /// are authorized, though the log has it from the body.
    pub fn allows(&self, one: &Use) -> bool {
        let nameless = one.verb == "create";
        (&self.group, &self.resource, &self.verb) == (&one.group, &one.resource, &one.verb)
            && self.namespace.as_ref().is_none_or(|namespace| *namespace == one.namespace)
            && self.name.as_ref().is_none_or(|name| !nameless && *name == one.name)
    }
}

/// What the objects of a rendered chart grant this ServiceAccount. Fails for a rule with a wildcard, and for anything that
/// cannot be understood: a grant that is overlooked is worse than none.
pub fn granted(rendered: &str, namespace: &str, account: &str) -> Result<BTreeSet<Grant>> {
    let mut objects = Vec::new();
    for document in serde_yaml::Deserializer::from_str(rendered) {
        objects.push(Value::deserialize(document).context("the chart renders YAML")?);
    }
    let mut grants = BTreeSet::new();
    for binding in objects.iter().filter(|object| word(&object["kind"]).ends_with("RoleBinding")) {
        let is_ours = |subject: &Value| {
            subject["kind"] == "ServiceAccount"
                && subject["namespace"] == namespace
                && subject["name"] == account
        };
        let subjects = list(&binding["subjects"]);
        if !subjects.iter().any(is_ours) {
            continue;
        }
        let place = (binding["kind"] == "RoleBinding").then(|| word(&binding["metadata"]["namespace"]));
        let (kind, name) = (&binding["roleRef"]["kind"], &binding["roleRef"]["name"]);
        let role = objects.iter().find(|object| {
            object["kind"] == *kind
                && object["metadata"]["name"] == *name
                && (kind == "ClusterRole"
                    || object["metadata"]["namespace"] == binding["metadata"]["namespace"])
        });
        let role = role.with_context(|| format!("{kind} {name} is bound and not there"))?;
        for rule in list(&role["rules"]) {
            read_rule(&rule, place.as_deref(), &mut grants)?;
        }
    }
    Ok(grants)
}

fn read_rule(rule: &Value, namespace: Option<&str>, grants: &mut BTreeSet<Grant>) -> Result<()> {
    let words = |field: &str| list(&rule[field]).iter().map(word).collect::<Vec<_>>();
    let (groups, resources, verbs) = (words("apiGroups"), words("resources"), words("verbs"));
    if groups.is_empty() || resources.is_empty() || verbs.is_empty() {
        bail!("a rule that says nothing of groups, resources or verbs: {rule}");
    }
    let everything = |words: &[String]| words.iter().any(|word| word.contains('*'));
    ensure!(!everything(&groups) && !everything(&resources) && !everything(&verbs), "a wildcard: {rule}");
    let names = words("resourceNames");
    let names: Vec<Option<String>> =
        if names.is_empty() { vec![None] } else { names.into_iter().map(Some).collect() };
    for group in &groups {
        for resource in &resources {
            for verb in &verbs {
                grants.extend(names.iter().map(|name| Grant {
                    group: group.clone(),
                    resource: resource.clone(),
                    verb: verb.clone(),
                    namespace: namespace.map(str::to_owned),
                    name: name.clone(),
                }));
            }
        }
    }
    Ok(())
}

/// What a user asked for, one of each. What was forbidden is in it.
pub fn used<'a>(entries: impl IntoIterator<Item = &'a Entry>) -> BTreeSet<Use> {
    let uses = entries.into_iter().map(|entry| Use {
        group: entry.group.clone(),
        resource: match entry.subresource.as_str() {
            "" => entry.resource.clone(),
            subresource => format!("{}/{subresource}", entry.resource),
        },
        verb: entry.verb.clone(),
        namespace: entry.namespace.clone(),
        name: entry.name.clone(),
    });
    uses.collect()
}

/// What the list says is granted in such an installation. `is_set` says of a value of the chart whether it is on.
pub fn listed(
    permissions: &[Permission],
    places: &Places<'_>,
    is_set: impl Fn(&str) -> bool,
) -> BTreeSet<Grant> {
    let mut grants = BTreeSet::new();
    for one in permissions.iter().filter(|one| one.when.as_ref().is_none_or(|value| is_set(value))) {
        grants.extend(places.of(one.scope).into_iter().map(|namespace| grant(one, namespace)));
    }
    grants
}

fn grant(one: &Permission, namespace: Option<&str>) -> Grant {
    let (group, resource, subresource) = one.parts();
    let slash = if subresource.is_empty() { "" } else { "/" };
    Grant {
        group: group.to_owned(),
        resource: format!("{resource}{slash}{subresource}"),
        verb: one.verb.clone(),
        namespace: namespace.map(str::to_owned),
        name: one.name.clone(),
    }
}

impl<'a> Places<'a> {
    /// The namespaces of a scope; None among them: all.
    fn of(&self, scope: Scope) -> Vec<Option<&'a str>> {
        match scope {
            Scope::Requests if self.watched.is_empty() => vec![None],
            Scope::Requests => self.watched.iter().copied().map(Some).collect(),
            Scope::Cluster if self.watched.is_empty() => vec![None],
            Scope::Cluster => vec![],
            Scope::Builders => vec![Some(self.builders)],
            Scope::Own => vec![Some(self.own)],
        }
    }
}

/// Whether these uses show that the right is needed as it is: taken where it holds, and, if it holds in all namespaces, over
/// all of them or in more than one.
pub fn is_needed(grant: &Grant, uses: &BTreeSet<Use>) -> bool {
    let taken: BTreeSet<&str> =
        uses.iter().filter(|one| grant.allows(one)).map(|one| one.namespace.as_str()).collect();
    match grant.namespace {
        Some(_) => !taken.is_empty(),
        None => taken.contains("") || taken.len() > 1,
    }
}

/// Fails with what only one side has.
pub fn ensure_same(
    one: &BTreeSet<Grant>,
    other: &BTreeSet<Grant>,
    [of_one, of_other]: [&str; 2],
) -> Result<()> {
    let only = |this: &BTreeSet<Grant>, that: &BTreeSet<Grant>| {
        this.difference(that).map(ToString::to_string).collect::<Vec<_>>().join("; ")
    };
    let (of_first, of_second) = (only(one, other), only(other, one));
    ensure!(
        of_first.is_empty() && of_second.is_empty(),
        "{of_one}, and not {of_other}: {of_first}\n{of_other}, and not {of_one}: {of_second}"
    );
    Ok(())
}

fn word(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn list(value: &Value) -> Vec<Value> {
    value.as_array().cloned().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHART: &str = "
kind: ClusterRole
metadata: {name: all}
rules: [{apiGroups: [''], resources: [pods, pods/log], verbs: [get]}]
---
kind: ClusterRoleBinding
metadata: {name: all}
roleRef: {kind: ClusterRole, name: all}
subjects: [{kind: ServiceAccount, name: ours, namespace: system}]
---
kind: Role
metadata: {name: some, namespace: a}
rules: [{apiGroups: [g], resources: [things], resourceNames: [one], verbs: [update]}]
---
kind: RoleBinding
metadata: {name: some, namespace: a}
roleRef: {kind: Role, name: some}
subjects: [{kind: ServiceAccount, name: ours, namespace: system}]
---
kind: RoleBinding
metadata: {name: theirs, namespace: a}
roleRef: {kind: Role, name: some}
subjects: [{kind: ServiceAccount, name: theirs, namespace: system}]
";

    #[test]
    fn grants_come_from_what_is_bound() {
        let grants = granted(CHART, "system", "ours").unwrap();
        let words: Vec<String> = grants.iter().map(ToString::to_string).collect();
        assert_eq!(
            words,
            ["get pods everywhere", "get pods/log everywhere", "update things.g in a, one only"]
        );
        assert_eq!(granted(CHART, "system", "theirs").unwrap().len(), 1);
        assert!(granted(CHART, "other", "ours").unwrap().is_empty());
    }

    #[test]
    fn what_cannot_be_understood_is_refused() {
        for (from, to) in [("verbs: [get]", "verbs: ['*']"), ("kind: ClusterRole\nmeta", "kind: Other\nmeta")]
        {
            let chart = CHART.replace(from, to);
            assert_ne!(chart, CHART);
            assert!(granted(&chart, "system", "ours").is_err(), "{to}");
        }
        assert!(granted(&CHART.replace("verbs: [update]", "verb: [update]"), "system", "ours").is_err());
    }

    #[test]
    fn a_use_is_allowed_where_the_grant_holds() {
        let one = |verb: &str, namespace: &str, name: &str| Use {
            group: "g".into(),
            resource: "things".into(),
            verb: verb.into(),
            namespace: namespace.into(),
            name: name.into(),
        };
        let grant = |verb: &str, namespace: Option<&str>, name: Option<&str>| Grant {
            group: "g".into(),
            resource: "things".into(),
            verb: verb.into(),
            namespace: namespace.map(str::to_owned),
            name: name.map(str::to_owned),
        };
        assert!(grant("get", None, None).allows(&one("get", "a", "x")));
        assert!(grant("get", Some("a"), Some("x")).allows(&one("get", "a", "x")));
        assert!(!grant("get", Some("a"), None).allows(&one("get", "", "")));
        assert!(!grant("get", Some("a"), None).allows(&one("get", "b", "x")));
        assert!(!grant("get", Some("a"), Some("x")).allows(&one("get", "a", "y")));
        assert!(!grant("create", Some("a"), Some("x")).allows(&one("create", "a", "x")));

        // Everywhere is too much for one namespace.
        let uses = |namespaces: &[&str]| namespaces.iter().map(|at| one("get", at, "x")).collect();
        assert!(!is_needed(&grant("get", None, None), &uses(&["a"])));
        assert!(is_needed(&grant("get", None, None), &uses(&["a", "b"])));
        assert!(is_needed(&grant("get", None, None), &uses(&[""])));
        assert!(is_needed(&grant("get", Some("a"), None), &uses(&["a"])));
        assert!(!is_needed(&grant("get", Some("a"), None), &uses(&["b"])));
    }
}
