//! Removal of images from another runtime, by the thresholds of `KubeletConfiguration`.
//!
//! CRI does not tell when an image was used last. As upstream's kubelet does, it is noted here whenever somebody looks.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use cri::{ImageService, RuntimeService, v1};
use tokio::sync::watch;

use crate::configuration::ImageGc;
use crate::context::chain;
use crate::disk::Disk;
use crate::node::eviction::Reclaim;
use crate::node::news::News;

/// As often as upstream's kubelet looks.
const PERIOD: Duration = Duration::from_secs(300);

/// The images of another runtime.
#[derive(Clone)]
pub struct Images {
    runtime: Arc<dyn RuntimeService>,
    images: Arc<dyn ImageService>,
}

/// What a round of collection came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Freed {
    /// Images that were removed.
    pub images: usize,
    /// Their sizes together.
    pub bytes: u64,
    /// What should have gone, too, and could not.
    pub missing_bytes: u64,
}

/// Why images stay on a disk that fills.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageTrouble {
    /// How much there was to remove, and how much of it could be; without them, nothing could be found out.
    bytes: Option<(u64, u64)>,
    /// In one sentence.
    message: String,
    /// The round before has failed, too.
    is_repeated: bool,
}

impl ImageTrouble {
    /// Upstream's events.
    pub fn news(&self) -> Vec<News> {
        let short = self.bytes.map(|(wanted, found)| {
            let message = format!(
                "Failed to garbage collect required amount of images. Attempted to free {wanted} bytes, but only found {found} \
                 bytes eligible to free."
            );
            News::warning("FreeDiskSpaceFailed", message)
        });
        let failed = self.is_repeated.then(|| News::warning("ImageGCFailed", self.message.clone()));
        short.into_iter().chain(failed).collect()
    }
}

/// Tells what collections come to. A disk that stays full is logged once, and not with each round.
#[derive(Debug)]
pub struct Shortage {
    is_told: bool,
    has_failed: bool,
    trouble: watch::Sender<Option<ImageTrouble>>,
}

impl Shortage {
    /// Who hears `trouble` is told of every round that failed.
    pub fn new(trouble: watch::Sender<Option<ImageTrouble>>) -> Self {
        Self { is_told: false, has_failed: false, trouble }
    }

    /// A round could not even begin.
    pub fn fail(&mut self, error: &(dyn std::error::Error + 'static)) {
        tracing::warn!(error, "images cannot be collected");
        self.note(None, chain(error));
    }

    fn note(&mut self, bytes: Option<(u64, u64)>, message: String) {
        let is_repeated = std::mem::replace(&mut self.has_failed, true);
        self.trouble.send_replace(Some(ImageTrouble { bytes, message, is_repeated }));
    }

    /// Takes note of a round, and logs what is new of it.
    pub fn tell(&mut self, freed: Freed) {
        let Freed { images, bytes, missing_bytes } = freed;
        if missing_bytes > 0 {
            let message = format!("{missing_bytes} bytes of images should go and are in use, pinned or new");
            self.note(Some((bytes + missing_bytes, bytes)), message);
        } else {
            self.has_failed = false;
        }
        if images > 0 {
            tracing::warn!(images, bytes, "the disk is filling; images that nobody uses were removed");
        }
        if self.is_news(freed) {
            tracing::warn!(
                missing_bytes,
                "the disk is filling, and every image on it is in use, pinned or new: make room on it, or have a larger one"
            );
        }
    }

    /// Whether the disk has become too full since the last round.
    fn is_news(&mut self, freed: Freed) -> bool {
        let is_short = freed.missing_bytes > 0;
        let was_told = std::mem::replace(&mut self.is_told, is_short);
        is_short && !was_told
    }
}

/// When an image was seen first, and in use last; by its id.
type Seen = HashMap<String, Times>;

#[derive(Debug, Clone, Copy)]
struct Times {
    first: Instant,
    used: Instant,
}

impl Images {
    /// Those of a runtime.
    pub fn new(runtime: Arc<dyn RuntimeService>, images: Arc<dyn ImageService>) -> Self {
        Self { runtime, images }
    }

    pub(super) async fn keep(self, policy: ImageGc, mut shortage: Shortage) {
        let mut seen = Seen::new();
        loop {
            match self.collect(&policy, &mut seen).await {
                Ok(freed) => shortage.tell(freed),
                Err(error) => shortage.fail(&error),
            }
            tokio::time::sleep(PERIOD).await;
        }
    }

    /// Removes every image that no container uses, but for pinned ones.
    async fn remove_unused(&self) -> Result<Freed, cri::Error> {
        let unused = self.unused().await?;
        Ok(self.remove_all(&unused).await)
    }

    /// Removes as many of them as it can: one that the runtime holds on to is told, and holds up no other.
    async fn remove_all(&self, images: &[v1::Image]) -> Freed {
        let mut freed = Freed::default();
        for image in images {
            match self.remove(image).await {
                Ok(()) => {
                    freed.images += 1;
                    freed.bytes += image.size;
                }
                Err(error) => tracing::warn!(image = image.id, %error, "an image that nobody uses cannot be removed"),
            }
        }
        freed
    }

    async fn remove(&self, image: &v1::Image) -> Result<(), cri::Error> {
        tracing::info!(image = image.id, tags = ?image.repo_tags, bytes = image.size, "removing an image that nobody uses");
        let spec = v1::ImageSpec { image: image.id.clone(), ..v1::ImageSpec::default() };
        self.images.remove_image(v1::RemoveImageRequest { image: Some(spec) }).await.map(drop)
    }

    /// Those that no container uses and that are not pinned.
    async fn unused(&self) -> Result<Vec<v1::Image>, cri::Error> {
        // Images first: a container that is made meanwhile has its image in the second list.
        let mut images = self.images.list_images(v1::ListImagesRequest::default()).await?.images;
        let containers = self.runtime.list_containers(v1::ListContainersRequest::default()).await?.containers;
        let named = containers.into_iter().flat_map(|one| [one.image_id, one.image_ref]);
        let used: HashSet<String> = named.filter(|name| !name.is_empty()).collect();
        let is_used = |image: &v1::Image| {
            let mut names = image.repo_tags.iter().chain(&image.repo_digests).chain([&image.id]);
            names.any(|name| used.contains(name))
        };
        images.retain(|image| !image.pinned && !is_used(image));
        Ok(images)
    }

    /// Removes what is too old, and what fills the disk.
    async fn collect(&self, policy: &ImageGc, seen: &mut Seen) -> Result<Freed, cri::Error> {
        let unused = self.unused().await?;
        let all = self.images.list_images(v1::ListImagesRequest::default()).await?.images;
        note(seen, &all, &unused, Instant::now());
        let needed = match self.places().await?.iter().filter_map(|place| Disk::of(Path::new(place))).next() {
            Some(disk) => surplus(disk, policy),
            None => 0,
        };
        let chosen = choose(unused, seen, policy, needed, Instant::now());
        let freed = self.remove_all(&chosen).await;
        Ok(Freed { missing_bytes: needed.saturating_sub(freed.bytes), ..freed })
    }

    /// Where the runtime has its images.
    async fn places(&self) -> Result<Vec<String>, cri::Error> {
        let answer = self.images.image_fs_info(v1::ImageFsInfoRequest::default()).await?;
        Ok(answer.image_filesystems.into_iter().filter_map(|one| Some(one.fs_id?.mountpoint)).collect())
    }
}

#[async_trait]
impl Reclaim for Images {
    async fn unused_images(&self) -> Result<(), String> {
        let Freed { images, bytes, .. } = self.remove_unused().await.map_err(|error| error.to_string())?;
        tracing::info!(images, bytes, "removed images that nobody uses");
        Ok(())
    }
}

fn note(seen: &mut Seen, all: &[v1::Image], unused: &[v1::Image], now: Instant) {
    let idle: HashSet<&str> = unused.iter().map(|image| image.id.as_str()).collect();
    seen.retain(|id, _| all.iter().any(|image| image.id == *id));
    for image in all {
        let times = seen.entry(image.id.clone()).or_insert(Times { first: now, used: now });
        if !idle.contains(image.id.as_str()) {
            times.used = now;
        }
    }
}

/// Which of the images that nobody uses go: those past their age, then the longest unused until `needed` bytes are free.
fn choose(mut unused: Vec<v1::Image>, seen: &Seen, policy: &ImageGc, needed: u64, now: Instant) -> Vec<v1::Image> {
    let times = |image: &v1::Image| seen.get(&image.id).copied().unwrap_or(Times { first: now, used: now });
    unused.sort_by_key(|image| (times(image).used, times(image).first));
    let mut free = 0;
    unused.retain(|image| {
        let times = times(image);
        let is_old = policy.maximum_age.is_some_and(|age| now.duration_since(times.used) > age);
        let may_go = now.duration_since(times.first) >= policy.minimum_age;
        let goes = is_old || (free < needed && may_go);
        if goes {
            free += image.size;
        }
        goes
    });
    unused
}

/// What has to go so that the usage falls from above the high threshold to the low one.
fn surplus(disk: Disk, policy: &ImageGc) -> u64 {
    let used = disk.capacity.saturating_sub(disk.available);
    let share = |percent: u8| disk.capacity / 100 * u64::from(percent);
    if policy.high_percent >= 100 || used < share(policy.high_percent) {
        return 0;
    }
    used - share(policy.low_percent)
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: ImageGc =
        ImageGc { high_percent: 85, low_percent: 80, minimum_age: Duration::from_secs(120), maximum_age: None };

    fn image(id: &str) -> v1::Image {
        v1::Image { id: id.to_owned(), size: 10, ..v1::Image::default() }
    }

    fn names(images: &[v1::Image]) -> Vec<&str> {
        images.iter().map(|image| image.id.as_str()).collect()
    }

    #[test]
    fn a_full_disk_is_brought_to_the_low_threshold() {
        let disk = |available| Disk { capacity: 1000, available, ..Disk::default() };
        assert_eq!(surplus(disk(160), &POLICY), 0);
        assert_eq!(surplus(disk(150), &POLICY), 50);
        assert_eq!(surplus(disk(0), &ImageGc { high_percent: 100, ..POLICY }), 0, "100 switches it off");
    }

    #[test]
    fn a_disk_that_stays_full_is_told_once() {
        let mut shortage = Shortage::new(watch::Sender::default());
        let rounds = [0, 5, 5, 0, 5].map(|missing_bytes| Freed { missing_bytes, ..Freed::default() });
        assert_eq!(rounds.map(|freed| shortage.is_news(freed)), [false, true, false, false, true]);
    }

    #[test]
    fn a_round_that_fails_is_an_event() {
        let heard = watch::Sender::default();
        let mut shortage = Shortage::new(heard.clone());
        let mut round = |freed: Option<Freed>| {
            match freed {
                Some(freed) => shortage.tell(freed),
                None => shortage.fail(&std::io::Error::other("no runtime")),
            }
            let news = heard.send_replace(None).iter().flat_map(ImageTrouble::news).collect::<Vec<_>>();
            news.into_iter().map(|one| (one.reason, one.message)).collect::<Vec<_>>()
        };
        assert!(round(None).is_empty(), "the runtime may just be starting");
        assert_eq!(round(None), [("ImageGCFailed", "no runtime".to_owned())]);
        assert!(round(Some(Freed::default())).is_empty());
        let told = round(Some(Freed { images: 1, bytes: 10, missing_bytes: 5 }));
        assert_eq!(told.len(), 1);
        assert_eq!(told[0].0, "FreeDiskSpaceFailed");
        assert!(told[0].1.contains("Attempted to free 15 bytes, but only found 10 bytes"), "{told:?}");
    }

    #[test]
    fn the_longest_unused_go_first() {
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let mut seen = Seen::new();
        let all = ["a", "b", "c"].map(image);
        note(&mut seen, &all, &[image("a")], at(0));
        note(&mut seen, &all, &all, at(100));
        note(&mut seen, &all[1..], &[image("b")], at(200));
        assert_eq!(seen.len(), 2, "what is gone is forgotten");
        note(&mut seen, &all, &all, at(210));
        let chosen = |needed, now| choose(all.to_vec(), &seen, &POLICY, needed, at(now));
        assert_eq!(names(&chosen(0, 1000)), [""; 0]);
        assert_eq!(names(&chosen(11, 1000)), ["b", "c"], "b was used before c, and a has just come");
        assert_eq!(names(&chosen(30, 220)), ["b", "c"], "a is too young");
        let old = ImageGc { maximum_age: Some(Duration::from_secs(500)), ..POLICY };
        assert_eq!(names(&choose(all.to_vec(), &seen, &old, 0, at(510))), ["b"]);
    }
}
