//! The images that the suites pull (critest, Kubernetes' e2e), built offline under their real names: from Debian's packages
//! and from published Go modules, none from a registry.
//!
//! What they contain is what the suites use, not what the originals contain. Each tag is an image of its own, as the suites
//! tell images apart by their ids.

mod recipes;

use std::net::SocketAddr;
use std::path::Path;

use anyhow::Context as _;
use serde_json::json;

use crate::image::{Builder, Layout};
use crate::registry::{self, Registry};
use crate::{cache, host};

use recipes::Content;

/// A name, its tags, and what is in it.
#[derive(Debug, Clone, Copy)]
pub struct Image {
    registry: &'static str,
    repository: &'static str,
    tags: &'static [&'static str],
    /// Whether all tags are names of one image.
    one: bool,
    content: Content,
}

/// Bumped when a recipe changes, so that caches are made anew.
const RECIPE: &str = "2";

/// Enough for most tests: shells, web servers, the server of Kubernetes' tests, and the process of sandboxes.
pub const BASIC: &[Image] = &[BUSYBOX, BUSYBOX_OF_DOCKER, PAUSE, AGNHOST, NGINX, HTTPD, NO_NEW_PRIVILEGES];

/// All of them.
pub const ALL: &[Image] = &[
    BUSYBOX,
    BUSYBOX_OF_DOCKER,
    PAUSE,
    PAUSE_OF_OLD,
    AGNHOST,
    NGINX,
    HTTPD,
    NO_NEW_PRIVILEGES,
    e2e("e2e-test-images/nonroot", &["1.5"], Content::User("1234")),
    e2e("e2e-test-images/ipc-utils", &["1.4"], Content::Shell),
    e2e("e2e-test-images/glibc-dns-testing", &["2.1.1"], Content::Tools),
    e2e("e2e-test-images/kitten", &["1.8"], Content::Picture("kitten.jpg")),
    e2e("e2e-test-images/nautilus", &["1.8"], Content::Picture("nautilus.jpg")),
    e2e("e2e-test-images/regression-issue-74839", &["1.5"], Content::Regression),
    e2e("e2e-test-images/sample-device-plugin", &["1.7"], Content::DevicePlugin),
    e2e("e2e-test-images/sample-apiserver", &["1.29.2"], Content::SampleApiServer),
    e2e("etcd", &["3.7.0-0"], Content::Etcd),
    e2e("build-image/distroless-iptables", &["v0.9.9"], Content::Shell),
    critest("k8s-staging-cri-tools/test-image-user-uid", Content::User("1002")),
    critest("k8s-staging-cri-tools/test-image-user-username", Content::User("www-data")),
    critest("k8s-staging-cri-tools/test-image-user-uid-group", Content::User("1003:1004")),
    critest("k8s-staging-cri-tools/test-image-user-username-group", Content::User("www-data:1004")),
    critest("k8s-staging-cri-tools/test-image-predefined-group", Content::PredefinedGroup),
    critest("k8s-staging-cri-tools/test-image-1", Content::Mark("test-image-1")),
    critest("k8s-staging-cri-tools/test-image-2", Content::Mark("test-image-2")),
    critest("k8s-staging-cri-tools/test-image-3", Content::Mark("test-image-3")),
    critest("k8s-staging-cri-tools/test-image-latest", Content::Mark("test-image-latest")),
    critest("k8s-staging-cri-tools/test-image-digest", Content::Mark("test-image-digest")),
    Image {
        one: true,
        tags: &["1", "2", "3"],
        ..critest("k8s-staging-cri-tools/test-image-tags", Content::Mark("same-image"))
    },
    Image { tags: &["test", "all"], ..critest("k8s-staging-cri-tools/test-image-tag", Content::Mark("tag")) },
    critest("k8s-staging-cri-tools/hostnet-nginx-amd64", Content::Nginx { port: 12003 }),
    critest("k8s-staging-cri-tools/hostnet-nginx-arm64", Content::Nginx { port: 12003 }),
];

/// A shell with busybox's programs.
pub const BUSYBOX: Image =
    e2e("e2e-test-images/busybox", &["1.29-2", "1.29-4", "1.37.0-1", "1.37.0-2"], Content::Shell);
/// The same under the name that people type.
pub const BUSYBOX_OF_DOCKER: Image =
    Image { registry: "docker.io", ..e2e("library/busybox", &["latest", "1.37"], Content::Shell) };
/// The process of sandboxes.
pub const PAUSE: Image = e2e("pause", &["3.9", "3.10", "3.10.1", "3.10.2"], Content::Pause);
/// The same under the name of an earlier registry: an image of two registries.
pub const PAUSE_OF_OLD: Image = Image { registry: "k8s.gcr.io", ..PAUSE };
/// The server, client and prober of Kubernetes' tests.
pub const AGNHOST: Image = e2e("e2e-test-images/agnhost", &["2.55", "2.66.1"], Content::Agnhost);
/// A web server.
pub const NGINX: Image =
    e2e("e2e-test-images/nginx", &["1.14-2", "1.14-4", "1.27.0-2", "1.28.0-2"], Content::Nginx { port: 80 });

/// Another web server.
pub const HTTPD: Image = e2e("e2e-test-images/httpd", &["2.4.38-4", "2.4.39-4"], Content::Httpd);
/// A program that runs as root wherever it may.
pub const NO_NEW_PRIVILEGES: Image = e2e("e2e-test-images/nonewprivs", &["1.3", "1.4"], Content::NoNewPrivileges);

const fn e2e(repository: &'static str, tags: &'static [&'static str], content: Content) -> Image {
    Image { registry: "registry.k8s.io", repository, tags, one: false, content }
}

const fn critest(repository: &'static str, content: Content) -> Image {
    Image { registry: "gcr.io", repository, tags: &["latest"], one: false, content }
}

impl Image {
    /// Its tags.
    pub fn tags(&self) -> &'static [&'static str] {
        self.tags
    }

    /// Its full names.
    pub fn names(&self) -> Vec<String> {
        self.tags.iter().map(|tag| format!("{}/{}:{tag}", self.registry, self.repository)).collect()
    }

    /// The layout with all its tags, from the cache when it is there.
    ///
    /// # Errors
    /// A package, a Go module or a compiler is missing.
    pub fn layout(&self) -> anyhow::Result<Layout> {
        let (tags, content) = (self.tags.join(" "), format!("{:?}", self.content));
        let tools = self.content.tools();
        let parts = [RECIPE, self.repository, &tags, &content].into_iter().chain(tools.as_deref()).map(str::as_bytes);
        let name = format!("image-{}", self.repository.rsplit('/').next().unwrap_or(self.repository));
        let dir = cache::entry(&name, &cache::key(parts), |dir| {
            host::install(recipes::TOOLS)?;
            eprintln!("building the image {}", self.repository);
            let mut builder = Builder::new(dir)?;
            let config = self.content.fill(&mut builder)?;
            for tag in self.tags {
                let mut config = config.clone();
                let own = if self.one { self.tags[0] } else { tag };
                config["Labels"] = json!({ "tag": own });
                builder.tag(tag, config)?;
            }
            builder.close().map(drop)
        });
        Ok(Layout::open(dir.with_context(|| format!("the image {}", self.repository))?))
    }
}

/// Builds what is not in the cache yet: while Debian's mirror and the module proxy can be reached.
///
/// # Errors
/// As [`Image::layout`].
pub fn build(images: &[Image]) -> anyhow::Result<()> {
    images.iter().try_for_each(|image| image.layout().map(drop))
}

/// Pushes `images` to `registry`.
///
/// # Errors
/// Those of [`Image::layout`] and of the registry.
pub fn publish(images: &[Image], registry: &Registry) -> anyhow::Result<()> {
    for image in images {
        let layout = image.layout()?;
        for tag in image.tags {
            registry.push(&layout.tagged(tag), image.repository, tag)?;
        }
    }
    Ok(())
}

/// Writes a `hosts.toml` for every registry that an image of the suites is named after: the one at `mirror` answers for it.
///
/// # Errors
/// Those of the file system.
pub fn write_hosts(dir: &Path, mirror: SocketAddr) -> anyhow::Result<()> {
    let hosts = ALL.iter().map(|image| image.registry).collect::<std::collections::BTreeSet<_>>();
    hosts.into_iter().try_for_each(|host| registry::write_hosts(dir, host, mirror))
}
