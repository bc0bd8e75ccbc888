//! Which AppArmor profile a pod asks for: in fields, or in annotations, which pods of files have that were written before
//! there were fields. Pure.

use k8s_openapi::api::core::v1::{AppArmorProfile, Pod, SecurityContext};
use pod::spec;

/// Annotations that name the profile of a container, whose name follows.
const ANNOTATION: &str = "container.apparmor.security.beta.kubernetes.io/";
const UNCONFINED: &str = "unconfined";
const LOCALHOST: &str = "localhost/";

/// The profile of the container `name`: its own, then the annotation's, then the pod's. An annotation that names no profile
/// is none.
pub(crate) fn profile(pod: &Pod, name: &str, own: Option<&SecurityContext>) -> Option<AppArmorProfile> {
    let own = own.and_then(|context| context.app_armor_profile.clone());
    let of_pod = || spec::of(pod).security_context.as_ref()?.app_armor_profile.clone();
    own.or_else(|| annotated(pod, name)).or_else(of_pod)
}

fn annotated(pod: &Pod, name: &str) -> Option<AppArmorProfile> {
    let value = pod.metadata.annotations.as_ref()?.get(&format!("{ANNOTATION}{name}"))?;
    let profile = |type_: &str, localhost_profile| AppArmorProfile { type_: type_.to_owned(), localhost_profile };
    match value.as_str() {
        "runtime/default" => Some(profile("RuntimeDefault", None)),
        UNCONFINED => Some(profile("Unconfined", None)),
        value => Some(profile("Localhost", Some(value.strip_prefix(LOCALHOST)?.to_owned()))),
    }
}

/// Why a pod cannot be confined as it asks; `enabled` says whether the kernel confines by AppArmor.
pub(crate) fn check(pod: &Pod, enabled: bool) -> Result<(), &'static str> {
    if !is_required(pod) {
        return Ok(());
    }
    if !enabled {
        return Err("AppArmor is not enabled on the host");
    }
    let nameless = |(name, own): (&str, Option<&SecurityContext>)| {
        let profile = profile(pod, name, own);
        profile
            .filter(|profile| profile.type_ == "Localhost")
            .is_some_and(|profile| profile.localhost_profile.is_none_or(|name| name.trim().is_empty()))
    };
    if containers(pod).any(nameless) { Err("invalid empty AppArmor profile name: \"\"") } else { Ok(()) }
}

/// Whether something in the pod asks for a profile.
fn is_required(pod: &Pod) -> bool {
    let confines = |profile: Option<&AppArmorProfile>| profile.is_some_and(|profile| profile.type_ != "Unconfined");
    let of_pod = spec::of(pod).security_context.as_ref();
    let annotations = pod.metadata.annotations.iter().flatten();
    confines(of_pod.and_then(|context| context.app_armor_profile.as_ref()))
        || containers(pod).any(|(_, own)| confines(own.and_then(|context| context.app_armor_profile.as_ref())))
        || annotations.into_iter().any(|(key, value)| key.starts_with(ANNOTATION) && value != UNCONFINED)
}

/// All containers by name, those that look into the pod, too.
fn containers(pod: &Pod) -> impl Iterator<Item = (&str, Option<&SecurityContext>)> {
    let own = spec::containers(pod).map(|(_, one)| (one.name.as_str(), one.security_context.as_ref()));
    own.chain(spec::ephemeral(pod).map(|one| (one.name.as_str(), one.security_context.as_ref())))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(whole: Value, own: Value, annotation: Option<&str>) -> Pod {
        let annotations: Value = annotation.map(|value| json!({format!("{ANNOTATION}c"): value})).unwrap_or(json!({}));
        serde_json::from_value(json!({
            "metadata": {"name": "p", "annotations": annotations},
            "spec": {"securityContext": whole, "containers": [{"name": "c", "securityContext": own}]},
        }))
        .unwrap()
    }

    fn typed(type_: &str, name: Option<&str>) -> Value {
        json!({"appArmorProfile": {"type": type_, "localhostProfile": name}})
    }

    #[test]
    fn the_nearest_profile_counts() {
        let chosen = |whole: Value, own: Value, annotation: Option<&str>| {
            let pod = pod(whole, own, annotation);
            let container = spec::containers(&pod).next().unwrap().1;
            let found = profile(&pod, "c", container.security_context.as_ref())?;
            Some(format!("{} {}", found.type_, found.localhost_profile.unwrap_or_default()))
        };
        let (default, mine) = (typed("RuntimeDefault", None), typed("Localhost", Some("mine")));
        assert_eq!(chosen(json!({}), json!({}), None), None);
        assert_eq!(chosen(default.clone(), mine.clone(), Some("unconfined")).unwrap(), "Localhost mine");
        assert_eq!(chosen(default.clone(), json!({}), Some("localhost/a/b")).unwrap(), "Localhost a/b");
        assert_eq!(chosen(default.clone(), json!({}), Some("runtime/default")).unwrap(), "RuntimeDefault ");
        assert_eq!(chosen(default, json!({}), Some("nonsense")).unwrap(), "RuntimeDefault ");
        assert_eq!(chosen(json!({}), json!({}), Some("unconfined")).unwrap(), "Unconfined ");
    }

    #[test]
    fn a_profile_needs_a_kernel_and_a_name() {
        let (unconfined, default) = (typed("Unconfined", None), typed("RuntimeDefault", None));
        for (whole, own, annotation, without, with) in [
            (json!({}), json!({}), None, true, true),
            (unconfined.clone(), unconfined, Some("unconfined"), true, true),
            (default.clone(), json!({}), None, false, true),
            (json!({}), default, None, false, true),
            (json!({}), json!({}), Some("runtime/default"), false, true),
            (json!({}), json!({}), Some("localhost/"), false, false),
            (json!({}), typed("Localhost", Some(" ")), None, false, false),
        ] {
            let pod = pod(whole, own, annotation);
            assert_eq!(check(&pod, false).is_ok(), without, "{pod:?}");
            assert_eq!(check(&pod, true).is_ok(), with, "{pod:?}");
        }
    }
}
