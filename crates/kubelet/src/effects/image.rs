//! Seeing that an image is on the node.

use std::time::Instant;

use cri::v1;
use k8s_openapi::api::core::v1::{Container, Volume};
use pod::Change;

use super::Job;
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
        match (present, wanted.policy) {
            (Some(found), "IfNotPresent" | "Never") => {
                let message = format!("Container image \"{image}\" already present on machine");
                self.context.normal(&self.pod, "Pulled", message, wanted.container);
                Ok(found)
            }
            (None, "Never") => Err(Failed {
                reason: "ErrImageNeverPull",
                message: format!("Container image \"{image}\" is not present with pull policy of Never"),
            }),
            _ => self.pull(wanted).await,
        }
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
        let failed = |message: String| Failed {
            reason: "ErrImagePull",
            message: format!("Failed to pull image \"{image}\": {message}"),
        };
        // The pod's Secrets may be what the registry wants.
        self.look_up().await.map_err(failed)?;
        let known = self.context.parts.keychain.credentials(&self.pod, image).await;
        // Anonymous where there are none; else the first that the registry takes.
        let tries: Vec<Option<v1::AuthConfig>> =
            if known.is_empty() { vec![None] } else { known.into_iter().map(Some).collect() };
        let mut cause = String::new();
        let _turn = match &self.context.pulls {
            // It is never closed.
            Some(pulls) => pulls.acquire().await.ok(),
            None => None,
        };
        for auth in tries {
            let request =
                v1::PullImageRequest { image: Some(spec(image)), auth, sandbox_config: self.sandbox_config(0).ok() };
            match self.context.parts.images.pull_image(request).await {
                Ok(_) => {
                    let found = self.find(image).await?.ok_or_else(|| failed("it was removed meanwhile".to_owned()))?;
                    let message = format!(
                        "Successfully pulled image \"{image}\" in {:.3}s. Image size: {} bytes.",
                        begun.elapsed().as_secs_f64(),
                        found.size
                    );
                    self.context.normal(&self.pod, "Pulled", message, wanted.container);
                    return Ok(found);
                }
                Err(error) => cause = error.to_string(),
            }
        }
        Err(failed(cause))
    }
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
