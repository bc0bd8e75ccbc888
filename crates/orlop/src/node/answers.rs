//! What the running node answers to the local command line.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use futures_util::stream::{self, BoxStream, StreamExt as _};
use http::{Request, Response};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use image::{Digest, Event, Images, Progress, Reference};
use sys::cgroup::Stats;
use tokio::sync::mpsc;

use super::agent::Agent;
use super::api::Body;
use crate::cli::images::{ImageRow, PullLine};
use crate::cli::top::Usage;
use crate::cli::why::{Step, Wait, Why};

/// The time over which `top` measures CPU use.
const MEASURED: Duration = Duration::from_secs(1);

/// A container that `top` shows, with where its figures come from.
struct Measured {
    usage: Usage,
    group: sys::cgroup::Cgroup,
    before: Stats,
}

impl Agent {
    /// Gives pods the statuses that the kubelet sees: newer than the store's while an API server is away.
    pub(super) fn show_newest(&self, pods: &mut [serde_json::Value]) {
        let mut seen: HashMap<String, _> = self
            .kubelet
            .pods()
            .into_iter()
            .filter_map(|(pod, status)| Some((pod.metadata.uid.clone()?, status?)))
            .collect();
        for pod in pods {
            let status = pod["metadata"]["uid"].as_str().and_then(|uid| seen.remove(uid));
            if let Some(status) = status.and_then(|status| serde_json::to_value(&*status).ok()) {
                pod["status"] = status;
            }
        }
    }

    /// What containers use, measured over about one second.
    pub(super) async fn top(&self) -> anyhow::Result<Vec<Usage>> {
        let measured = self.containers();
        let begin = Instant::now();
        // Not a wait for something to happen: the interval is what is measured.
        tokio::time::sleep(MEASURED).await;
        let elapsed = begin.elapsed();
        Ok(measured.into_iter().map(|one| one.after(elapsed)).collect())
    }

    /// What a pod waits for.
    pub(super) async fn why(&self, namespace: &str, pod: &str) -> anyhow::Result<Why> {
        let key = cluster::Key::new(namespace, pod);
        let pod = self.store().pods().get(&key).with_context(|| format!("no pod {key}"))?;
        let explained = self.kubelet.explain(pod.metadata.uid.as_deref().unwrap_or_default());
        let explained = explained.context("the kubelet has not seen the pod yet")?;
        let waiting = explained.waiting.map(|(step, cause, ms)| Wait { step, cause, for_ms: whole(ms) });
        let steps = explained.steps.into_iter().map(|step| Step {
            name: step.name,
            begin_ms: step.begin_ms,
            length_ms: step.length_ms,
        });
        Ok(Why { waiting, steps: steps.collect() })
    }

    /// What a packet to a Service meets, in words; none if the proxy knows no such Service.
    pub(super) async fn explain_service(&self, namespace: &str, service: &str) -> anyhow::Result<Option<String>> {
        let questions = self.proxy_questions();
        let questions = questions.context("Services are left to a kube-proxy here (--proxy-kubeconfig)")?;
        Ok(questions.explain(namespace, service).await.map(|explained| explained.to_string()))
    }

    /// All images.
    pub(super) async fn images(&self) -> anyhow::Result<Vec<ImageRow>> {
        let row = |image: cri::v1::Image| ImageRow {
            id: image.id,
            tags: image.repo_tags,
            digests: image.repo_digests,
            size_bytes: image.size,
            pinned: image.pinned,
        };
        let listed = self.base.image_service.list_images(cri::v1::ListImagesRequest::default()).await?;
        Ok(listed.images.into_iter().map(row).collect())
    }

    /// Pulls an image; the stream ends with `Done` or `Failed`.
    pub(super) fn pull(&self, image: String) -> anyhow::Result<BoxStream<'static, PullLine>> {
        let images = self.base.own()?.images.clone();
        let (sender, lines) = mpsc::channel(16);
        // A client that went away lets it come to its end, as other pulls may share its layers.
        self.base.tasks.begin(pull(images, self.base.credentials.clone(), image, sender));
        Ok(stream::unfold(lines, |mut lines| async { lines.recv().await.map(|line| (line, lines)) }).boxed())
    }

    /// Loads images from a path of this machine; returns their names.
    pub(super) async fn load(&self, path: &str) -> anyhow::Result<Vec<String>> {
        let loaded = self.base.own()?.images.load(Path::new(path), &image::Silent).await?;
        self.kubelet.images_loaded();
        Ok(loaded.iter().map(|image| name_of(image)).collect())
    }

    /// Removes an image; returns the names that are gone.
    pub(super) async fn remove_image(&self, image: &str) -> anyhow::Result<Vec<String>> {
        let images = &self.base.own()?.images;
        let found = images.get(image).with_context(|| format!("no image {image:?}; `orlop images` lists them"))?;
        let users = self.users_of(&found.id).await?;
        anyhow::ensure!(users.is_empty(), "image {image:?} is in use by {}; end them first", users.join(", "));
        let mut names = found.repo_tags.clone();
        names.push(found.id.to_string());
        match image.parse::<Reference>() {
            Ok(reference) if found.repo_tags.len() > 1 && found.repo_tags.contains(&reference.to_string()) => {
                images.untag(&reference).await?;
                Ok(vec![reference.to_string()])
            }
            _ => images.remove(image).await.map(|_| names).map_err(Into::into),
        }
    }

    /// The kubelet's own API.
    pub(super) async fn answer_kubelet(&self, request: Request<Incoming>) -> Response<Body> {
        self.kubelet_api.handle(request).await.map(|body| body.boxed_unsync())
    }

    /// Every container that runs, with a first reading.
    fn containers(&self) -> Vec<Measured> {
        let mut found = Vec::new();
        for (pod, _) in self.kubelet.pods() {
            let uid = pod.metadata.uid.as_deref().unwrap_or_default();
            for (_, name) in pod::spec::names(&pod) {
                let Some(id) = self.kubelet.container_id(uid, name) else { continue };
                let group = self.groups.pod(&pod).child(id);
                if !group.exists() {
                    continue;
                }
                let text = |value: &Option<String>| value.clone().unwrap_or_default();
                let usage = Usage {
                    namespace: text(&pod.metadata.namespace),
                    pod: text(&pod.metadata.name),
                    container: name.to_owned(),
                    ..Usage::default()
                };
                found.push(Measured { usage, before: group.stats(), group });
            }
        }
        found.sort_by(|a, b| {
            let key =
                |one: &Measured| (one.usage.namespace.clone(), one.usage.pod.clone(), one.usage.container.clone());
            key(a).cmp(&key(b))
        });
        found
    }

    /// The pods that run a container of this image.
    async fn users_of(&self, image: &Digest) -> anyhow::Result<Vec<String>> {
        let listed = self.base.runtime.list_containers(cri::v1::ListContainersRequest::default()).await?;
        let id = image.to_string();
        let users = listed.containers.iter().filter(|container| container.image_ref == id || container.image_id == id);
        let mut names: Vec<String> = users
            .map(|container| container.labels.get("io.kubernetes.pod.name").unwrap_or(&container.id).clone())
            .collect();
        names.sort();
        names.dedup();
        Ok(names)
    }
}

impl Measured {
    /// The figures, `elapsed` after the first reading.
    fn after(self, elapsed: Duration) -> Usage {
        let now = self.group.stats();
        let used_ns = now.cpu.usage_ns.saturating_sub(self.before.cpu.usage_ns);
        let periods = now.cpu.periods.saturating_sub(self.before.cpu.periods);
        let throttled = now.cpu.throttled_periods.saturating_sub(self.before.cpu.throttled_periods);
        #[expect(clippy::cast_precision_loss, reason = "a share in percent")]
        let throttled_percent = if periods == 0 { 0.0 } else { 100.0 * throttled as f64 / periods as f64 };
        #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
        let cpu_milli = whole(used_ns as f64 / 1e6 / elapsed.as_secs_f64());
        Usage {
            cpu_milli,
            cpu_limit_milli: now.cpu.limit_milli,
            throttled_percent,
            throttled_ms: now.cpu.throttled_ns / 1_000_000,
            memory_bytes: now.memory.working_set_bytes,
            memory_limit_bytes: now.memory.limit_bytes,
            oom_kills: now.memory.oom_kills,
            processes: now.pids.count,
            ..self.usage
        }
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "never negative, saturates")]
fn whole(value: f64) -> u64 {
    value.round().max(0.0) as u64
}

/// Its first tag, or its id.
fn name_of(image: &image::Image) -> String {
    image.repo_tags.first().cloned().unwrap_or_else(|| image.id.to_string())
}

/// Pulls with the first credentials that the registry takes, and tells how it goes.
async fn pull(
    images: Arc<Images>,
    credentials: Arc<image::credentials::Credentials>,
    image: String,
    lines: mpsc::Sender<PullLine>,
) {
    let line = match pulled(&images, &credentials, &image, &lines).await {
        Ok(image) => PullLine::Done { id: image.id.to_string() },
        Err(error) => PullLine::Failed { message: format!("{error:#}") },
    };
    let _ = lines.send(line).await; // The client may have gone.
}

async fn pulled(
    images: &Arc<Images>,
    credentials: &image::credentials::Credentials,
    image: &str,
    lines: &mpsc::Sender<PullLine>,
) -> anyhow::Result<Arc<image::Image>> {
    let reference: Reference = image.parse()?;
    let known = credentials.lookup(&reference, &[], None).await;
    let mut tries = known.into_iter().map(|found| Some(found.auth)).collect::<Vec<_>>();
    if tries.is_empty() {
        tries.push(None);
    }
    let meter = Meter { lines: lines.clone(), layers: Mutex::default() };
    let mut refused = None;
    for auth in tries {
        match images.pull(&reference, auth, &meter).await {
            Ok(image) => return Ok(image),
            Err(error) => refused = Some(error),
        }
    }
    Err(refused.context("there was nothing to try")?.into())
}

/// Adds up the layers of a pull.
struct Meter {
    lines: mpsc::Sender<PullLine>,
    /// Bytes that have come and total bytes of the layers under way, by digest. Short sections only.
    layers: Mutex<(HashMap<String, u64>, u64)>,
}

impl Progress for Meter {
    fn event(&self, event: Event<'_>) {
        let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Resolved { size_bytes, .. } => layers.1 = size_bytes,
            Event::Layer { layer, done_bytes, .. } => {
                layers.0.insert(layer.to_string(), done_bytes);
            }
            Event::LayerExists { .. } | Event::LayerDone { .. } => return,
        }
        let line = PullLine::Progress { done_bytes: layers.0.values().sum(), total_bytes: layers.1 };
        // A full channel: the client gets the next one, with newer figures.
        let _ = self.lines.try_send(line);
    }
}
