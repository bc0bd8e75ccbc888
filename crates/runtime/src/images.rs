//! The image service of CRI over the node's image store.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use cri::{Error, Items, v1};
use futures_util::StreamExt as _;
use image::{Auth, Digest, GcPolicy, Image, Images, Reclaimed, Reference, Silent};

/// Which images something on this node stands on.
pub trait ImagesInUse: Send + Sync + 'static {
    /// Images that containers were made from. The store keeps the layers of these by itself.
    fn roots(&self) -> HashSet<Digest>;

    /// Images that are mounted as volumes, with one container that has each: their layers must stay.
    fn volumes(&self) -> HashMap<Digest, String>;
}

/// Images of one node. Implements `cri::ImageService`.
pub struct ImageServer {
    images: Arc<Images>,
    in_use: Arc<dyn ImagesInUse>,
}

/// Images in one message of `StreamImages`, well within gRPC's 16 MiB.
const BATCH: usize = 100;

impl ImageServer {
    /// The service for `images`; `in_use` tells what the runtime needs.
    pub fn new(images: Arc<Images>, in_use: Arc<dyn ImagesInUse>) -> Self {
        Self { images, in_use }
    }

    /// Removes images by `policy`, but none that is in use.
    ///
    /// # Errors
    /// The store's, see [`image::Error`].
    pub async fn collect_garbage(&self, policy: &GcPolicy) -> Result<Reclaimed, image::Error> {
        self.images.collect_garbage(policy, &self.all_in_use()).await
    }

    /// Removes every image that is neither pinned nor in use.
    ///
    /// # Errors
    /// The store's, see [`image::Error`].
    pub async fn remove_unused(&self) -> Result<Reclaimed, image::Error> {
        self.images.remove_unused(&self.all_in_use()).await
    }

    fn all_in_use(&self) -> HashSet<Digest> {
        let mut all = self.in_use.roots();
        all.extend(self.in_use.volumes().into_keys());
        all
    }

    fn matching(&self, filter: Option<&v1::ImageFilter>) -> Vec<v1::Image> {
        let name = filter.and_then(|filter| filter.image.as_ref()).map_or("", |image| image.image.as_str());
        let found = self.images.get(name).map(|image| image.id.clone());
        let wanted = |image: &Image| name.is_empty() || found.as_ref() == Some(&image.id) || has_name(image, name);
        self.images.list().iter().filter(|image| wanted(image)).map(|image| of_store(image)).collect()
    }
}

/// Whether `name` is one of the image's repositories: a name without tag and digest stands for all of them.
fn has_name(image: &Image, name: &str) -> bool {
    let Ok(reference) = name.parse::<Reference>() else { return false };
    let last = name.rsplit('/').next().unwrap_or(name);
    let repository = reference.repository();
    let inside = |full: &String| full.strip_prefix(&repository).is_some_and(|rest| rest.starts_with([':', '@']));
    !last.contains([':', '@']) && image.repo_tags.iter().chain(&image.repo_digests).any(inside)
}

#[async_trait]
impl cri::ImageService for ImageServer {
    async fn list_images(&self, request: v1::ListImagesRequest) -> Result<v1::ListImagesResponse, Error> {
        Ok(v1::ListImagesResponse { images: self.matching(request.filter.as_ref()) })
    }

    async fn stream_images(&self, request: v1::StreamImagesRequest) -> Result<Items<v1::StreamImagesResponse>, Error> {
        let images = self.matching(request.filter.as_ref());
        let batches: Vec<_> =
            images.chunks(BATCH).map(|batch| Ok(v1::StreamImagesResponse { images: batch.to_vec() })).collect();
        Ok(futures_util::stream::iter(batches).boxed())
    }

    /// An image that is not there is no error: the answer is empty, as the CRI has it.
    async fn image_status(&self, request: v1::ImageStatusRequest) -> Result<v1::ImageStatusResponse, Error> {
        let name = name_of(request.image)?;
        let Some(image) = self.images.get(&name) else {
            // What is an id is no reference, but may be asked for.
            let is_name = name.parse::<Digest>().is_ok() || name.parse::<Reference>().is_ok();
            return if is_name { Ok(v1::ImageStatusResponse::default()) } else { Err(invalid_name(&name)) };
        };
        let info =
            if request.verbose { [("info".to_owned(), info(&self.images, &image)?)].into() } else { HashMap::new() };
        Ok(v1::ImageStatusResponse { image: Some(of_store(&image)), info })
    }

    async fn pull_image(&self, request: v1::PullImageRequest) -> Result<v1::PullImageResponse, Error> {
        let name = name_of(request.image)?;
        let reference: Reference = name.parse().map_err(|_| invalid_name(&name))?;
        let auth = match &request.auth {
            Some(auth) => credentials(auth, reference.host())?,
            None => None,
        };
        let image = self.images.pull(&reference, auth, &Silent).await.map_err(|error| error_of(&error))?;
        // The same in ContainerStatus.image_id and Image.id: kubelets compare the three.
        Ok(v1::PullImageResponse { image_ref: image.id.to_string() })
    }

    /// Removes an image with all its names, however it is called. What containers were made from stays until they go.
    async fn remove_image(&self, request: v1::RemoveImageRequest) -> Result<v1::RemoveImageResponse, Error> {
        let name = name_of(request.image)?;
        let Some(image) = self.images.get(&name) else { return Ok(v1::RemoveImageResponse {}) };
        if let Some(container) = self.in_use.volumes().get(&image.id) {
            let message = format!("image {name} is mounted in container {container}; remove that first");
            return Err(Error::FailedPrecondition(message));
        }
        self.images.remove(&image.id.to_string()).await.map_err(|error| error_of(&error))?;
        Ok(v1::RemoveImageResponse {})
    }

    async fn image_fs_info(&self, _request: v1::ImageFsInfoRequest) -> Result<v1::ImageFsInfoResponse, Error> {
        let store = self.images.clone();
        let usage =
            tokio::task::spawn_blocking(move || store.usage()).await.map_err(|error| Error::internal(&error))?;
        let images = filesystem_usage(self.images.state_dir(), usage, SystemTime::now());
        // What containers write lies beside the images.
        Ok(v1::ImageFsInfoResponse { image_filesystems: vec![images.clone()], container_filesystems: vec![images] })
    }
}

/// Usage of the file system that `directory` is on.
pub(crate) fn filesystem_usage(directory: &Path, usage: image::Usage, at: SystemTime) -> v1::FilesystemUsage {
    v1::FilesystemUsage {
        timestamp: crate::stats::nanoseconds(at),
        fs_id: Some(v1::FilesystemIdentifier { mountpoint: directory.to_string_lossy().into_owned() }),
        used_bytes: Some(v1::UInt64Value { value: usage.bytes }),
        inodes_used: Some(v1::UInt64Value { value: usage.inodes }),
    }
}

fn name_of(image: Option<v1::ImageSpec>) -> Result<String, Error> {
    let name = image.map(|image| image.image).unwrap_or_default();
    if name.is_empty() { Err(Error::InvalidArgument("the image's name is missing".to_owned())) } else { Ok(name) }
}

fn invalid_name(name: &str) -> Error {
    let reason = name.parse::<Reference>().err().map_or_else(String::new, |error| error.to_string());
    Error::InvalidArgument(reason)
}

fn of_store(image: &Image) -> v1::Image {
    let (uid, username) = user(&image.config.config.user);
    v1::Image {
        id: image.id.to_string(),
        repo_tags: image.repo_tags.clone(),
        repo_digests: image.repo_digests.clone(),
        // An image of nothing has a size, too: zero would mean that it is not known.
        size: image.size_bytes.max(1),
        uid,
        username,
        spec: None,
        pinned: image.pinned,
    }
}

/// The image's user, as number or name; neither where it names none.
fn user(text: &str) -> (Option<v1::Int64Value>, String) {
    let user = text.split(':').next().unwrap_or_default();
    match user.parse() {
        Ok(value) => (Some(v1::Int64Value { value }), String::new()),
        Err(_) => (None, user.to_owned()),
    }
}

/// What `crictl inspecti` shows, in containerd's words.
fn info(images: &Images, image: &Image) -> Result<String, Error> {
    #[derive(serde::Serialize)]
    struct Info<'a> {
        #[serde(rename = "chainID")]
        chain_id: String,
        #[serde(rename = "imageSpec")]
        image_spec: &'a serde_json::value::RawValue,
    }
    let document = images.document(&image.id).map_err(|error| error_of(&error))?;
    let image_spec = serde_json::from_slice(&document).map_err(|error| Error::internal(&error))?;
    let info = Info { chain_id: chain_id(&image.config.rootfs.diff_ids), image_spec };
    serde_json::to_string(&info).map_err(|error| Error::internal(&error))
}

/// The name of all layers together (image-spec, config.md, "Layer ChainID").
fn chain_id(layers: &[Digest]) -> String {
    let Some((first, rest)) = layers.split_first() else { return String::new() };
    let chain = |below: Digest, layer: &Digest| Digest::of(format!("{below} {layer}").as_bytes());
    rest.iter().fold(first.clone(), chain).to_string()
}

/// The credentials of a request, if they are for `host`.
fn credentials(auth: &v1::AuthConfig, host: &str) -> Result<Option<Auth>, Error> {
    if !is_for(&auth.server_address, host) {
        tracing::warn!(
            registry = host,
            server_address = auth.server_address,
            "credentials are for another registry; pulling without them"
        );
        return Ok(None);
    }
    if !auth.username.is_empty() {
        return Ok(Some(Auth::Basic { username: auth.username.clone(), password: auth.password.clone() }));
    }
    if !auth.identity_token.is_empty() {
        return Ok(Some(Auth::IdentityToken(auth.identity_token.clone())));
    }
    if !auth.registry_token.is_empty() {
        return Ok(Some(Auth::RegistryToken(auth.registry_token.clone())));
    }
    if auth.auth.is_empty() {
        return Ok(None);
    }
    // The text itself is a secret: no message repeats it.
    let invalid = || Error::InvalidArgument("auth is not the base64 of user:password".to_owned());
    let decoded = BASE64.decode(auth.auth.trim()).map_err(|_| invalid())?;
    let decoded = String::from_utf8(decoded).map_err(|_| invalid())?;
    let (username, password) = decoded.split_once(':').ok_or_else(invalid)?;
    let password = password.trim_matches('\0');
    Ok(Some(Auth::Basic { username: username.to_owned(), password: password.to_owned() }))
}

/// Whether `address`, a URL or a host as docker's configuration has them, is that of a registry; empty is any.
fn is_for(address: &str, host: &str) -> bool {
    const DOCKER_HUB: [&str; 4] = ["docker.io", "index.docker.io", "registry-1.docker.io", "registry.docker.io"];
    let rest = address.split_once("://").map_or(address, |(_, rest)| rest);
    let named = rest.split('/').next().unwrap_or(rest);
    named.is_empty() || named.eq_ignore_ascii_case(host) || (host == "docker.io" && DOCKER_HUB.contains(&named))
}

/// What a failure of the store means to a client. Kubelets make the prefix the waiting reason.
pub(crate) fn error_of(error: &image::Error) -> Error {
    use image::Error as Of;
    match error {
        Of::InvalidReference(_) | Of::BadSubPath { .. } => Error::InvalidArgument(error.to_string()),
        Of::NotFound { .. } => Error::NotFoundAnywhere(error.to_string()),
        Of::NoSuchImage(name) => Error::NotFound { kind: "image", id: name.clone() },
        Of::Unauthorized { .. } => Error::PermissionDenied(error.to_string()),
        Of::Unavailable { .. } => Error::Unavailable(format!("RegistryUnavailable: {error}")),
        Of::DiskFull { .. } => Error::ResourceExhausted(error.to_string()),
        Of::InUse { .. } => Error::FailedPrecondition(error.to_string()),
        Of::UnsupportedPlatform { .. }
        | Of::UnsupportedMediaType { .. }
        | Of::Malformed { .. }
        | Of::MaliciousLayer { .. }
        | Of::TooLarge { .. }
        | Of::CorruptLayer { .. } => Error::InvalidArgument(error.to_string()),
        _ => Error::internal(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn auth(change: impl FnOnce(&mut v1::AuthConfig)) -> v1::AuthConfig {
        let mut auth = v1::AuthConfig::default();
        change(&mut auth);
        auth
    }

    fn basic(username: &str, password: &str) -> Option<Auth> {
        Some(Auth::Basic { username: username.into(), password: password.into() })
    }

    #[test]
    fn all_forms_of_credentials() {
        let check = |auth: v1::AuthConfig, expect: Option<Auth>| {
            assert_eq!(credentials(&auth, "reg.example").unwrap(), expect, "{auth:?}");
        };
        check(v1::AuthConfig::default(), None);
        check(
            auth(|auth| {
                auth.username = "u".into();
                auth.password = "p:q".into();
                auth.identity_token = "t".into();
            }),
            basic("u", "p:q"),
        );
        check(auth(|auth| auth.identity_token = "t".into()), Some(Auth::IdentityToken("t".into())));
        check(auth(|auth| auth.registry_token = "t".into()), Some(Auth::RegistryToken("t".into())));
        check(auth(|auth| auth.auth = BASE64.encode("u:p:q\0")), basic("u", "p:q"));
    }

    #[test]
    fn credentials_go_to_their_own_registry_only() {
        let at = |address: &str, host: &str| {
            let auth = auth(|auth| {
                auth.username = "u".into();
                auth.server_address = address.into();
            });
            credentials(&auth, host).unwrap().is_some()
        };
        assert!(at("", "reg.example") && at("https://reg.example/v2/", "reg.example") && at("reg:5000", "reg:5000"));
        assert!(at("https://index.docker.io/v1/", "docker.io") && at("registry-1.docker.io", "docker.io"));
        assert!(!at("https://other.example", "reg.example") && !at("reg.example", "reg.example:5000"));
        assert!(!at("https://reg.example.evil/", "reg.example") && !at("index.docker.io", "reg.example"));
    }

    #[test]
    fn broken_credentials_are_refused_and_not_repeated() {
        for secret in ["c2VjcmV0", "!secret!", "//79"] {
            let error = credentials(&auth(|auth| auth.auth = secret.into()), "reg").unwrap_err().to_string();
            assert!(!error.contains(secret) && !error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn users_are_numbers_or_names() {
        for (text, uid, name) in
            [("", None, ""), ("0", Some(0), ""), ("1000:2000", Some(1000), ""), ("web:web", None, "web")]
        {
            let (found, username) = user(text);
            assert_eq!((found.map(|uid| uid.value), username.as_str()), (uid, name), "{text}");
        }
    }

    #[test]
    fn layers_have_a_common_name() {
        let layers = [Digest::of(b"a"), Digest::of(b"b")];
        let expect = Digest::of(format!("{} {}", layers[0], layers[1]).as_bytes()).to_string();
        assert_eq!(chain_id(&layers), expect);
        assert_eq!((chain_id(&layers[..1]), chain_id(&[])), (layers[0].to_string(), String::new()));
    }

    #[test]
    fn failures_have_the_codes_that_clients_act_on() {
        let unavailable = image::Error::Unavailable { reference: "r".into(), host: "h".into(), reason: "away".into() };
        let error = error_of(&unavailable);
        assert!(matches!(error, Error::Unavailable(_)));
        assert!(error.to_string().starts_with("RegistryUnavailable: "), "{error}");
        let not_found = image::Error::NotFound { reference: "r".into(), hosts: vec!["h".into()] };
        let error = error_of(&not_found);
        assert!(matches!(error, Error::NotFoundAnywhere(_)));
        assert!(error.to_string().contains("imagePullSecret"), "{error}");
        assert!(matches!(error_of(&image::Error::NoSuchImage("x".into())), Error::NotFound { kind: "image", .. }));
    }
}
