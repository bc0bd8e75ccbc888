//! A layer on its way into the store: from a registry or a file, hashed and unpacked at the same time.

use std::collections::BTreeSet;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::ready;
use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use tokio::sync::oneshot;

use crate::Images;
use crate::config::Limits;
use crate::digest::{Digest, Hasher};
use crate::error::Error;
use crate::flights::Joined;
use crate::load::files::{Place, Reading};
use crate::progress::{Event, Progress};
use crate::registry::{BlobReader, Registry};
use crate::spec::Descriptor;
use crate::store::layers::Layer;
use crate::unpack::Unpack;

/// As long as the kernel lets written bytes lie in memory by default (`vm.dirty_expire_centisecs`).
const WRITE_OUT_AFTER: Duration = Duration::from_secs(30);

/// A layer that an image needs.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    pub(crate) descriptor: Descriptor,
    pub(crate) diff_id: Digest,
    pub(crate) origin: Origin,
}

/// Where a layer's bytes come from.
#[derive(Debug, Clone)]
pub(crate) enum Origin {
    Registry(Arc<Registry>),
    File(Place),
}

impl Origin {
    fn open<'a>(&'a self, descriptor: &'a Descriptor) -> Reader<'a> {
        match self {
            Self::Registry(registry) => {
                Reader::Blob(registry.blob(&descriptor.digest, descriptor.size, &descriptor.urls))
            }
            Self::File(place) => Reader::File(place.read()),
        }
    }

    /// For messages, and to tell one origin from another.
    fn name(&self) -> String {
        match self {
            Self::Registry(registry) => registry.reference().host().to_owned(),
            Self::File(place) => place.name(),
        }
    }
}

enum Reader<'a> {
    Blob(BlobReader<'a>),
    File(Reading),
}

impl Reader<'_> {
    async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        match self {
            Self::Blob(blob) => blob.next().await,
            Self::File(file) => file.next().await,
        }
    }
}

/// What the layers of an image have taken so far. Each has kept to its own budget; there are many of them.
#[derive(Debug, Clone, Copy, Default)]
struct Spent {
    compressed: u64,
    bytes: u64,
    inodes: u64,
}

impl Spent {
    fn and(self, more: Self) -> Self {
        Self {
            compressed: self.compressed.saturating_add(more.compressed),
            bytes: self.bytes.saturating_add(more.bytes),
            inodes: self.inodes.saturating_add(more.inodes),
        }
    }

    /// An image may take what one layer may.
    fn within(self, limits: &Limits) -> Result<Self, Error> {
        let Self { compressed, bytes, inodes } = self;
        let reason = if inodes > limits.entries_max {
            format!("take {inodes} inodes, more than {}", limits.entries_max)
        } else if bytes > limits.bytes_max {
            format!("take {bytes} bytes on disk, more than {}", limits.bytes_max)
        } else if bytes > limits.ratio_free_bytes && bytes > compressed.saturating_mul(limits.ratio_max) {
            format!(
                "take {bytes} bytes on disk, more than {} times the {compressed} that they come as",
                limits.ratio_max
            )
        } else {
            return Ok(self);
        };
        Err(Error::TooLarge { reason })
    }
}

impl Images {
    /// Sees to it that all of `layers` are in the store.
    pub(crate) async fn fetch_layers(
        self: &Arc<Self>,
        mut layers: Vec<Wanted>,
        progress: &dyn Progress,
    ) -> Result<(), Error> {
        // One image may name a layer twice; it is fetched once.
        let mut seen = BTreeSet::new();
        layers.retain(|layer| seen.insert(layer.descriptor.digest.clone()));
        let fetches: Vec<_> = layers.iter().map(|layer| self.fetch_counted(layer, progress)).collect();
        let fetched = stream::iter(fetches).buffer_unordered(self.config.parallel_layers.max(1));
        let limits = &self.config.limits;
        fetched.try_fold(Spent::default(), |spent, layer| ready(spent.and(layer).within(limits))).await.map(drop)
    }

    async fn fetch_counted(self: &Arc<Self>, wanted: &Wanted, progress: &dyn Progress) -> Result<Spent, Error> {
        let layer = self.fetch_layer(wanted, progress).await?;
        Ok(Spent { compressed: wanted.descriptor.size, bytes: layer.bytes, inodes: layer.inodes })
    }

    /// Sees to it that a layer is in the store: it may be there, on its way for another pull, or ours to fetch.
    async fn fetch_layer(self: &Arc<Self>, wanted: &Wanted, progress: &dyn Progress) -> Result<Layer, Error> {
        let Wanted { descriptor, diff_id, .. } = wanted;
        let layer = &descriptor.digest;
        let flight = (wanted.origin.name(), layer.clone());
        loop {
            if let Some(known) = self.store.layer(layer) {
                check_diff_id(layer, &known, diff_id)?;
                progress.event(Event::LayerExists { layer });
                return Ok(known);
            }
            let job = {
                let (images, wanted) = (Arc::clone(self), wanted.clone());
                move |report| async move { images.take_in(&wanted, report).await }
            };
            let (role, outcome) = self
                .flights
                .join(&flight, job, |done_bytes| {
                    progress.event(Event::Layer { layer, done_bytes, size_bytes: descriptor.size })
                })
                .await;
            match (role, outcome) {
                (_, Ok(known)) => {
                    check_diff_id(layer, &known, diff_id)?;
                    progress.event(Event::LayerDone { layer });
                    return Ok(known);
                }
                // Another pull's credentials or mirrors are not ours: try with our own.
                (Joined::Passenger, Err(_)) => {}
                (Joined::Pilot, Err(error)) => return Err(error),
            }
        }
    }

    /// Network or file → hash → pipe → the confined child, which inflates and writes. Nothing counts until all digests agree.
    async fn take_in(self: &Arc<Self>, wanted: &Wanted, report: impl Fn(u64)) -> Result<Layer, Error> {
        let Wanted { descriptor, origin, .. } = wanted;
        let digest = &descriptor.digest;
        let staging = self.store.stage()?;
        let mut unpack = Unpack::start(digest, self.store.layer_target(&staging)?, &self.config.limits)?;
        let mut hasher = Hasher::new(digest.algorithm());
        let mut reader = origin.open(descriptor);
        let mut done = 0;
        while let Some(bytes) = reader.next().await? {
            hasher.update(&bytes);
            if unpack.feed(&bytes).await.is_err() {
                break;
            }
            done += bytes.len() as u64;
            report(done);
        }
        let complete = done == descriptor.size;
        let outcome = unpack.finish().await;
        let actual = hasher.finish();
        // Wrong bytes explain whatever the child thinks of them.
        if complete && actual != *digest {
            return Err(Error::DigestMismatch {
                object: "layer",
                source_name: origin.name(),
                expected: digest.clone(),
                actual,
            });
        }
        let tree = outcome?;
        if !complete {
            // Only a child that was taken over is content without having seen everything.
            let reason = format!("the confined process wanted only {done} of {} bytes", descriptor.size);
            return Err(Error::Worker { layer: digest.clone(), reason });
        }
        let digest = digest.clone();
        self.blocking(move |images| images.store.add_layer(&digest, staging, &tree)).await
    }

    /// Some time after a pull layers are written to disk; nobody waits for it. Pulls that follow one another share one
    /// write, by which time the kernel has done most of it: a sync at once would hold up all who use the disk.
    pub(crate) fn write_out_later(self: &Arc<Self>) {
        let hurried = {
            let mut hurry = self.hurry_write_out();
            if hurry.is_some() {
                return;
            }
            let (sender, receiver) = oneshot::channel();
            *hurry = Some(sender);
            receiver
        };
        let images = Arc::downgrade(self);
        self.background.spawn(async move {
            // Over in time or in a hurry: the same happens next.
            let _ = tokio::time::timeout(WRITE_OUT_AFTER, hurried).await;
            let Some(images) = images.upgrade() else { return };
            images.hurry_write_out().take();
            let written = tokio::task::spawn_blocking(move || images.store.write_out()).await;
            if let Ok(Err(error)) = written {
                tracing::warn!(error = %crate::error::chain(&error), "cannot write layers out; they will be fetched again after a power failure");
            }
        });
    }

    /// What ends the wait of [`Images::write_out_later`], if one waits: dropping it.
    pub(crate) fn hurry_write_out(&self) -> MutexGuard<'_, Option<oneshot::Sender<()>>> {
        self.hurry_write_out.lock().expect("no panic while it is held")
    }
}

fn check_diff_id(layer: &Digest, known: &Layer, expected: &Digest) -> Result<(), Error> {
    if known.diff_id == *expected {
        return Ok(());
    }
    Err(Error::DigestMismatch {
        object: "uncompressed layer",
        source_name: format!("layer {layer}"),
        expected: expected.clone(),
        actual: known.diff_id.clone(),
    })
}
