//! The CustomResourceDefinitions, made from the types and then made fit for an API server.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSON, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use kube::CustomResourceExt as _;
use serde_json::json;

use crate::{BuildRequest, BuilderClass};

/// Both definitions, in the order in which they should be applied. This, not `BuildRequest::crd()`, is what belongs
/// on a cluster.
pub fn crds() -> Vec<CustomResourceDefinition> {
    let mut crds = vec![BuilderClass::crd(), BuildRequest::crd()];
    for version in crds.iter_mut().flat_map(|crd| &mut crd.spec.versions) {
        let Some(root) = version.schema.as_mut().and_then(|schema| schema.open_api_v3_schema.as_mut()) else {
            continue;
        };
        visit(root, &mut make_fit);
        if let Some(template) = property(root, "spec").and_then(|spec| property(spec, "template")) {
            make_partial(template);
        }
        if let Some(status) = property(root, "status") {
            // A request that nobody has looked at is not done: kstatus, and Helm with it, would take an object without any
            // status for one that is.
            status.default = Some(JSON(json!({"observedGeneration": -1})));
        }
    }
    crds
}

/// Null is not a value of any field: without `nullable`, an API server drops nulls before it validates. And it warns
/// about number formats that it does not know.
fn make_fit(schema: &mut JSONSchemaProps) {
    schema.nullable = None;
    if let Some(values) = &mut schema.enum_ {
        values.retain(|value| !value.0.is_null());
    }
    if schema.format.as_deref().is_some_and(|format| format.starts_with("uint")) {
        schema.format = Some("int64".into());
    }
}

/// A pod template that is merged over another one needs no containers. Its descriptions are Kubernetes' own, and as
/// long as all the rest.
fn make_partial(template: &mut JSONSchemaProps) {
    let description = template.description.take();
    visit(template, &mut |schema| schema.description = None);
    template.description = description;
    if let Some(spec) = property(template, "spec") {
        spec.required = None;
    }
}

fn property<'a>(schema: &'a mut JSONSchemaProps, name: &str) -> Option<&'a mut JSONSchemaProps> {
    schema.properties.as_mut()?.get_mut(name)
}

/// Calls `f` on `schema` and all that is below it.
fn visit(schema: &mut JSONSchemaProps, f: &mut dyn FnMut(&mut JSONSchemaProps)) {
    f(schema);
    for below in schema.properties.iter_mut().flatten() {
        visit(below.1, f);
    }
    match &mut schema.items {
        Some(JSONSchemaPropsOrArray::Schema(items)) => visit(items, f),
        Some(JSONSchemaPropsOrArray::Schemas(items)) => items.iter_mut().for_each(|item| visit(item, f)),
        None => {}
    }
    if let Some(JSONSchemaPropsOrBool::Schema(values)) = &mut schema.additional_properties {
        visit(values, f);
    }
    for some in [&mut schema.all_of, &mut schema.any_of, &mut schema.one_of] {
        some.iter_mut().flatten().for_each(|below| visit(below, f));
    }
}
