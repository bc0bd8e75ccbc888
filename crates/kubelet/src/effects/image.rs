//! Seeing that an image is on the node.

use std::time::Instant;

use cluster::{Key, Store};
use cri::v1;
use k8s_openapi::api::core::v1::{Container, Pod, Volume};
use k8s_openapi::jiff::Timestamp;
use pod::Change;

use super::Job;
use crate::context::Credential;
use crate::pulled::Access;
use crate::volumes::PodVolumes;

/// Why an image could not be had: the waiting reason and the cause.
struct Failed {
    reason: &'static str,
    message: String,
}

/// What is asked for.
struct Wanted<'a> {
    image: &'a str,
    policy: &'a str,
    /// For events: the container, if it is for one.
    container: Option<&'a str>,
}

impl Job {
    pub(super) async fn ensure_image(&self, name: &str) {
        let Some((_, container)) = pod::spec::container(&self.pod, name) else { return };
        let image = container.image.as_deref().unwrap_or_default();
        let wanted = Wanted { image, policy: policy(&container), container: Some(name) };
        match self.ensure(&wanted).await {
            Ok(found) => self.change(Change::ImageReady {
                container: name.to_owned(),
                image: found.id.clone(),
                image_id: found.repo_digests.first().cloned().unwrap_or(found.id),
            }),
            Err(Failed { reason, message }) => {
                self.change(Change::ImageFailed { container: name.to_owned(), reason: reason.to_owned(), message });
            }
        }
    }

    /// Images that are mounted as volumes.
    pub(super) async fn image_volumes(&self, volumes: &mut PodVolumes) -> Result<(), String> {
        let all: &[Volume] = pod::spec::of(&self.pod).volumes.as_deref().unwrap_or_default();
        for volume in all {
            let Some(source) = &volume.image else { continue };
            let image = source.reference.as_deref().unwrap_or_default();
            let policy = source.pull_policy.as_deref().unwrap_or_else(|| default_policy(image));
            let found =
                self.ensure(&Wanted { image, policy, container: None }).await.map_err(|failed| failed.message)?;
            volumes.set_image(&volume.name, &found.id);
        }
        Ok(())
    }

    async fn ensure(&self, wanted: &Wanted<'_>) -> Result<v1::Image, Failed> {
        let image = wanted.image;
        let present = self.find(image).await?;
        if let (Some(found), "IfNotPresent" | "Never") = (present, wanted.policy)
            && self.may_use(image, &found.id).await?
        {
            let message =
                format!("Container image \"{image}\" already present on machine and can be accessed by the pod");
            self.context.normal(&self.pod, "Pulled", message, wanted.container);
            return Ok(found);
        }
        // One that the pod may not have is not there for it: it does not learn what others have pulled.
        if wanted.policy == "Never" {
            let message = format!("Container image \"{image}\" is not present with pull policy of Never");
            return Err(Failed { reason: "ErrImageNeverPull", message });
        }
        self.pull(wanted).await
    }

    /// Whether an image that is there is for this pod without asking the registry.
    async fn may_use(&self, image: &str, id: &str) -> Result<bool, Failed> {
        let pulled = &self.context.pulled;
        match pulled.access(image, id) {
            Access::Everyone => Ok(true),
            Access::Nobody => Ok(false),
            Access::Holders => Ok(pulled.is_opened_by(image, id, &self.credentials(image).await?)),
        }
    }

    /// What the pod has for an image. Its Secrets have to be known for that.
    async fn credentials(&self, image: &str) -> Result<Vec<Credential>, Failed> {
        self.look_up().await.map_err(|cause| not_pulled(image, &cause))?;
        Ok(self.context.parts.keychain.credentials(&self.pod, image).await)
    }

    async fn find(&self, image: &str) -> Result<Option<v1::Image>, Failed> {
        let request = v1::ImageStatusRequest { image: Some(spec(image)), verbose: false };
        match self.context.parts.images.image_status(request).await {
            Ok(answer) => Ok(answer.image),
            Err(cri::Error::InvalidArgument(message)) => Err(Failed {
                reason: "InvalidImageName",
                message: format!("Failed to apply default image tag \"{image}\": {message}"),
            }),
            Err(error) => Err(Failed { reason: "ImageInspectError", message: error.to_string() }),
        }
    }

    async fn pull(&self, wanted: &Wanted<'_>) -> Result<v1::Image, Failed> {
        let (image, begun) = (wanted.image, Instant::now());
        self.context.normal(&self.pod, "Pulling", format!("Pulling image \"{image}\""), wanted.container);
        let known = self.credentials(image).await?;
        let missing = missing_secrets(self.context.parts.source.store(), &self.pod);
        if !missing.is_empty() {
            let message = format!(
                "Unable to retrieve some image pull secrets ({}); attempting to pull the image may not succeed.",
                missing.join(", ")
            );
            self.context.warning(&self.pod, "FailedToRetrieveImagePullSecret", message, None);
        }
        // Anonymous where there are none; else the first that the registry takes.
        let tries: Vec<Option<Credential>> =
            if known.is_empty() { vec![None] } else { known.into_iter().map(Some).collect() };
        let mut cause = String::new();
        let _turn = match &self.context.pulls {
            // It is never closed.
            Some(pulls) => pulls.acquire().await.ok(),
            None => None,
        };
        let pulling = self.context.pulled.begin(image).map_err(|error| not_pulled(image, &error.to_string()))?;
        for credential in tries {
            let auth = credential.as_ref().map(|credential| credential.auth.clone());
            let request =
                v1::PullImageRequest { image: Some(spec(image)), auth, sandbox_config: self.sandbox_config(0).ok() };
            match self.context.parts.images.pull_image(request).await {
                Ok(_) => {
                    let found = self.find(image).await?.ok_or_else(|| not_pulled(image, "it was removed meanwhile"))?;
                    if pulling.succeeded(&found.id, credential.as_ref()) {
                        self.forget_removed_images().await;
                    }
                    let message = format!(
                        "Successfully pulled image \"{image}\" in {:.3}s. Image size: {} bytes.",
                        begun.elapsed().as_secs_f64(),
                        found.size
                    );
                    self.context.normal(&self.pod, "Pulled", message, wanted.container);
                    self.context.parts.metrics.pulled(found.size, begun.elapsed());
                    return Ok(found);
                }
                Err(error) => cause = error.to_string(),
            }
        }
        pulling.failed();
        Err(not_pulled(image, &cause))
    }

    /// What is known of images that have been removed goes when one comes.
    async fn forget_removed_images(&self) {
        let listed = Timestamp::now();
        if let Ok(answer) = self.context.parts.images.list_images(v1::ListImagesRequest::default()).await {
            self.context.pulled.keep(&answer.images.into_iter().map(|image| image.id).collect(), listed);
        }
    }
}

fn not_pulled(image: &str, cause: &str) -> Failed {
    Failed { reason: "ErrImagePull", message: format!("Failed to pull image \"{image}\": {cause}") }
}

/// The pod's `imagePullSecrets` that are not there.
fn missing_secrets(store: &Store, pod: &Pod) -> Vec<String> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    let named = pod::spec::of(pod).image_pull_secrets.iter().flatten().map(|secret| secret.name.clone());
    named.filter(|name| store.secrets().get(&Key::new(namespace, name)).is_none()).collect()
}

/// Its policy; without one that of the API's defaults.
fn policy(container: &Container) -> &str {
    let image = container.image.as_deref().unwrap_or_default();
    container.image_pull_policy.as_deref().unwrap_or_else(|| default_policy(image))
}

/// `Always` for the tag `latest`, given or not.
fn default_policy(image: &str) -> &'static str {
    let name = image.rsplit('/').next().unwrap_or(image);
    let is_latest = !image.contains('@') && name.split_once(':').is_none_or(|(_, tag)| tag == "latest");
    if is_latest { "Always" } else { "IfNotPresent" }
}

fn spec(image: &str) -> v1::ImageSpec {
    v1::ImageSpec { image: image.to_owned(), user_specified_image: image.to_owned(), ..v1::ImageSpec::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_latest_is_always_pulled() {
        assert_eq!(default_policy("registry:5000/app"), "Always");
        assert_eq!(default_policy("app:latest"), "Always");
        assert_eq!(default_policy("app:1"), "IfNotPresent");
        assert_eq!(default_policy("app@sha256:00"), "IfNotPresent");
    }
}
