//! Rules for what makes pods: Deployments, ReplicaSets, DaemonSets, StatefulSets, Jobs.

use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, ReplicaSet, StatefulSet};
use k8s_openapi::api::batch::v1::{Job, JobSpec};
use k8s_openapi::api::core::v1::PodTemplateSpec;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::pod::check_pod_spec;
use super::{Errors, NameRule, Validate, check_labels_and_annotations, check_metadata};
use crate::controllers::selector;
use crate::manifests::path::FieldPath;

fn spec() -> FieldPath {
    FieldPath::root().field("spec")
}

fn check_template(template: &PodTemplateSpec, restart_policies: &[&str], path: &FieldPath, errors: &mut Errors) {
    if let Some(metadata) = &template.metadata {
        check_labels_and_annotations(metadata, &path.field("metadata"), errors);
    }
    let Some(pod) = &template.spec else { return errors.required(&path.field("spec"), "") };
    let before = errors.0.len();
    check_pod_spec(pod, &path.field("spec"), errors);
    if errors.0.len() == before {
        errors.one_of(&path.field("spec.restartPolicy"), pod.restart_policy.as_deref(), restart_policies);
    }
}

fn check_selector(selector: &LabelSelector, template: Option<&PodTemplateSpec>, errors: &mut Errors) {
    let path = spec().field("selector");
    if selector::is_empty(selector) {
        return errors.required(&path, "");
    }
    for (index, requirement) in selector.match_expressions.iter().flatten().enumerate() {
        let path = path.field("matchExpressions").index(index);
        const OPERATORS: [&str; 4] = ["DoesNotExist", "Exists", "In", "NotIn"];
        errors.one_of(&path.field("operator"), Some(&requirement.operator), &OPERATORS);
    }
    let labels = template.and_then(|template| template.metadata.as_ref()).and_then(|metadata| metadata.labels.as_ref());
    if !selector::matches(selector, labels) {
        let path = spec().field("template.metadata.labels");
        errors.invalid(&path, labels.unwrap_or(&Default::default()), "`selector` does not match template `labels`");
    }
}

fn check_selector_unchanged(new: &LabelSelector, old: &LabelSelector, errors: &mut Errors) {
    if new != old {
        errors.invalid(&spec().field("selector"), new.match_labels.clone().unwrap_or_default(), "field is immutable");
    }
}

fn count_or_percent(value: Option<&IntOrString>, path: &FieldPath, errors: &mut Errors) -> bool {
    match value {
        Some(IntOrString::Int(number)) => {
            errors.not_negative(path, Some((*number).into()));
            *number == 0
        }
        Some(IntOrString::String(text)) => {
            let percent = text.strip_suffix('%').and_then(|digits| digits.parse::<u32>().ok());
            if percent.is_none() {
                errors.invalid(path, text, "a valid percent string must be a numeric string followed by an ending '%' (e.g. '1%',  or '93%', regex used for validation is '[0-9]+%')");
            }
            percent == Some(0)
        }
        None => true,
    }
}

impl Validate for Deployment {
    fn validate(&self, errors: &mut Errors) {
        check_metadata(&self.metadata, NameRule::Subdomain, errors);
        errors.not_negative(&spec().field("replicas"), self.spec.replicas.map(i64::from));
        errors.not_negative(&spec().field("minReadySeconds"), self.spec.min_ready_seconds.map(i64::from));
        errors.not_negative(&spec().field("revisionHistoryLimit"), self.spec.revision_history_limit.map(i64::from));
        check_selector(&self.spec.selector, Some(&self.spec.template), errors);
        check_template(&self.spec.template, &["Always"], &spec().field("template"), errors);
        let Some(strategy) = &self.spec.strategy else { return };
        let path = spec().field("strategy");
        errors.one_of(&path.field("type"), strategy.type_.as_deref(), &["Recreate", "RollingUpdate"]);
        let Some(rolling) = &strategy.rolling_update else { return };
        let path = path.field("rollingUpdate");
        if strategy.type_.as_deref() == Some("Recreate") {
            return errors.forbidden(&path, "may not be specified when strategy `type` is 'Recreate'");
        }
        let no_surge = count_or_percent(rolling.max_surge.as_ref(), &path.field("maxSurge"), errors);
        let no_loss = count_or_percent(rolling.max_unavailable.as_ref(), &path.field("maxUnavailable"), errors);
        if no_surge && no_loss {
            errors.invalid(&path.field("maxUnavailable"), 0, "may not be 0 when `maxSurge` is 0");
        }
    }

    fn validate_change(&self, old: &Self, errors: &mut Errors) {
        check_selector_unchanged(&self.spec.selector, &old.spec.selector, errors);
    }
}

impl Validate for ReplicaSet {
    fn validate(&self, errors: &mut Errors) {
        check_metadata(&self.metadata, NameRule::Subdomain, errors);
        errors.not_negative(&spec().field("replicas"), self.spec.replicas.map(i64::from));
        check_selector(&self.spec.selector, self.spec.template.as_ref(), errors);
        match &self.spec.template {
            Some(template) => check_template(template, &["Always"], &spec().field("template"), errors),
            None => errors.required(&spec().field("template"), ""),
        }
    }

    fn validate_change(&self, old: &Self, errors: &mut Errors) {
        check_selector_unchanged(&self.spec.selector, &old.spec.selector, errors);
    }
}

impl Validate for DaemonSet {
    fn validate(&self, errors: &mut Errors) {
        check_metadata(&self.metadata, NameRule::Subdomain, errors);
        check_selector(&self.spec.selector, Some(&self.spec.template), errors);
        check_template(&self.spec.template, &["Always"], &spec().field("template"), errors);
        let strategy = self.spec.update_strategy.as_ref().and_then(|strategy| strategy.type_.as_deref());
        errors.one_of(&spec().field("updateStrategy.type"), strategy, &["OnDelete", "RollingUpdate"]);
    }

    fn validate_change(&self, old: &Self, errors: &mut Errors) {
        check_selector_unchanged(&self.spec.selector, &old.spec.selector, errors);
    }
}

impl Validate for StatefulSet {
    fn validate(&self, errors: &mut Errors) {
        check_metadata(&self.metadata, NameRule::Subdomain, errors);
        errors.not_negative(&spec().field("replicas"), self.spec.replicas.map(i64::from));
        check_selector(&self.spec.selector, Some(&self.spec.template), errors);
        let policy = self.spec.pod_management_policy.as_deref();
        errors.one_of(&spec().field("podManagementPolicy"), policy, &["OrderedReady", "Parallel"]);
        let strategy = self.spec.update_strategy.as_ref().and_then(|strategy| strategy.type_.as_deref());
        errors.one_of(&spec().field("updateStrategy.type"), strategy, &["OnDelete", "RollingUpdate"]);
        // Mounts may refer to claim templates, which become volumes of the pods.
        check_template(&with_claims(self), &["Always"], &spec().field("template"), errors);
    }

    fn validate_change(&self, old: &Self, errors: &mut Errors) {
        check_selector_unchanged(&self.spec.selector, &old.spec.selector, errors);
        if self.spec.service_name != old.spec.service_name {
            errors.forbidden(&spec().field("serviceName"), "updates to statefulset spec for fields other than 'replicas', 'ordinals', 'template', 'updateStrategy', 'revisionHistoryLimit', 'persistentVolumeClaimRetentionPolicy' and 'minReadySeconds' are forbidden");
        }
    }
}

fn with_claims(set: &StatefulSet) -> PodTemplateSpec {
    let mut template = set.spec.template.clone();
    let volumes = template.spec.get_or_insert_default().volumes.get_or_insert_default();
    for claim in set.spec.volume_claim_templates.iter().flatten() {
        let name = claim.metadata.name.clone().unwrap_or_default();
        volumes.push(k8s_openapi::api::core::v1::Volume {
            name,
            empty_dir: Some(Default::default()),
            ..Default::default()
        });
    }
    template
}

impl Validate for Job {
    fn validate(&self, errors: &mut Errors) {
        check_metadata(&self.metadata, NameRule::Subdomain, errors);
        if let Some(job) = &self.spec {
            check_job(job, &spec(), errors);
        }
    }

    fn validate_change(&self, old: &Self, errors: &mut Errors) {
        let (Some(new), Some(old)) = (&self.spec, &old.spec) else { return };
        if new.template != old.template {
            errors.invalid(&spec().field("template"), "", "field is immutable");
        }
        if new.completions != old.completions {
            errors.invalid(&spec().field("completions"), new.completions, "field is immutable");
        }
    }
}

fn check_job(job: &JobSpec, path: &FieldPath, errors: &mut Errors) {
    let numbers = [
        ("parallelism", job.parallelism),
        ("completions", job.completions),
        ("backoffLimit", job.backoff_limit),
        ("ttlSecondsAfterFinished", job.ttl_seconds_after_finished),
    ];
    for (field, number) in numbers {
        errors.not_negative(&path.field(field), number.map(i64::from));
    }
    errors.not_negative(&path.field("activeDeadlineSeconds"), job.active_deadline_seconds);
    errors.one_of(&path.field("completionMode"), job.completion_mode.as_deref(), &["Indexed", "NonIndexed"]);
    if job.completion_mode.as_deref() == Some("Indexed") && job.completions.is_none() {
        errors.required(&path.field("completions"), "when completion mode is Indexed");
    }
    let policy = job.template.spec.as_ref().and_then(|pod| pod.restart_policy.as_deref());
    if policy == Some("Always") {
        let supported = "supported values: \"OnFailure\", \"Never\"";
        let remedy = Some("write `restartPolicy: Never` or `OnFailure` in the pod template".into());
        let path = path.field("template.spec.restartPolicy");
        errors.push(&path, format!("Required value: valid values: {supported}"), remedy);
    }
    check_template(&job.template, &["Always", "OnFailure", "Never"], &path.field("template"), errors);
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::faults;
    use super::*;

    fn template(labels: serde_json::Value) -> serde_json::Value {
        json!({"metadata": {"labels": labels}, "spec": {"containers": [{"name": "c", "image": "i"}]}})
    }

    fn deployment(spec: serde_json::Value) -> serde_json::Value {
        let mut base = json!({"selector": {"matchLabels": {"a": "b"}}, "template": template(json!({"a": "b"}))});
        base.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
        json!({"metadata": {"name": "d"}, "spec": base})
    }

    #[test]
    fn deployments() {
        assert!(faults::<Deployment>(deployment(json!({}))).is_empty());
        let faults_of = |spec| faults::<Deployment>(deployment(spec));
        assert_eq!(
            faults_of(json!({"template": template(json!({"a": "c"}))})),
            [
                "spec.template.metadata.labels: Invalid value: {\"a\": \"c\"}: `selector` does not match template `labels`"
            ]
        );
        assert_eq!(
            faults_of(json!({"replicas": -1})),
            ["spec.replicas: Invalid value: -1: must be greater than or equal to 0"]
        );
        assert_eq!(
            faults_of(json!({"strategy": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": "0%"}}})),
            ["spec.strategy.rollingUpdate.maxUnavailable: Invalid value: 0: may not be 0 when `maxSurge` is 0"]
        );
        assert_eq!(
            faults::<Deployment>(json!({"metadata": {"name": "d"}, "spec": {"template": template(json!({}))}})),
            ["spec.selector: Required value"]
        );
    }

    #[test]
    fn a_selector_must_not_change() {
        let old: Deployment = serde_json::from_value(deployment(json!({}))).unwrap();
        let new: Deployment =
            serde_json::from_value(deployment(json!({"selector": {"matchLabels": {"x": "y"}}}))).unwrap();
        let mut errors = Errors::default();
        new.validate_change(&old, &mut errors);
        assert_eq!(errors.into_vec()[0].message, "Invalid value: {\"x\": \"y\"}: field is immutable");
    }

    #[test]
    fn a_job_ends() {
        let job = json!({"metadata": {"name": "j"}, "spec": {"template": template(json!({}))}});
        assert_eq!(
            faults::<Job>(job),
            [
                "spec.template.spec.restartPolicy: Required value: valid values: supported values: \"OnFailure\", \"Never\""
            ]
        );
    }
}
