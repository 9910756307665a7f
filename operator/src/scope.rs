//! How far the operator reaches: whose requests it takes, and where it reads its classes. Plain data and questions about it.
//!
//! An operator that watches some namespaces needs no rights beyond these and its own: it reads nothing of the cluster as a
//! whole, classes and labels of namespaces included.

use drover_api::BuilderClass;

/// The whole cluster by default.
#[derive(Clone, Debug, Default)]
pub struct Scope {
    /// Namespaces whose requests it takes. Empty: all.
    pub namespaces: Vec<String>,
    /// The classes that there are. None: those that the cluster has.
    pub classes: Option<Vec<BuilderClass>>,
}

impl Scope {
    /// Whether requests of this namespace are its business. Of others it may not even ask whether they exist.
    pub fn has(&self, namespace: &str) -> bool {
        self.is_cluster() || self.namespaces.iter().any(|one| one == namespace)
    }

    pub fn is_cluster(&self) -> bool {
        self.namespaces.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_are_not_its_business() {
        assert!(Scope::default().has("anywhere"));
        let some = Scope { namespaces: vec!["a".into(), "b".into()], classes: None };
        assert!(some.has("a") && some.has("b") && !some.has("ab") && !some.has(""));
    }
}
