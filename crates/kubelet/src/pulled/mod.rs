//! Who may use the images that are on the node (KEP-2535): one that was pulled with the credentials of a pod is not for whoever
//! knows its name.
//!
//! ```text
//! image_manager/pulling/sha256-…   it is being pulled, by name
//! image_manager/pulled/sha256-…    with which credentials it was pulled, by id
//! ```
//!
//! Both are below the kubelet's root and in upstream's form, so that a node can change from one kubelet to the other. What
//! cannot be read opens nothing: the registry is asked again.

mod files;
mod name;
mod policy;
mod record;

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use cri::{ImageService, v1};
use k8s_openapi::jiff::Timestamp;

use crate::context::Credential;
use files::Files;
use name::without_tag;
use record::{Login, PulledRecord};

pub use policy::{Allowlist, Verification};

/// What is known of the images of a node.
#[derive(Debug)]
pub(crate) struct Pulled {
    policy: Verification,
    inner: Mutex<Inner>,
}

/// Short sections with small files, never over an await.
#[derive(Debug)]
struct Inner {
    files: Files,
    /// How many pulls of an image go on, by name.
    pulls: HashMap<String, usize>,
}

/// For whom an image is that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// For every pod of the node.
    Everyone,
    /// For those with a secret or a service account that has opened it before.
    Holders,
    /// For those whom the registry gives it.
    Nobody,
}

impl Pulled {
    /// Makes the directories in `root`.
    ///
    /// # Errors
    /// They cannot be made.
    pub(crate) fn open(root: &Path, policy: Verification) -> io::Result<Self> {
        fs::create_dir_all(root)?;
        let inner = Inner { files: Files::open(&root.join("image_manager"))?, pulls: HashMap::new() };
        Ok(Self { policy, inner: Mutex::new(inner) })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pulls that an earlier kubelet did not see the end of: what is there of them was pulled, nobody knows by whom.
    pub(crate) async fn take_over(&self, images: &dyn ImageService) {
        let begun = self.inner().files.pulling();
        for image in begun {
            let spec = v1::ImageSpec { image: image.clone(), ..v1::ImageSpec::default() };
            let request = v1::ImageStatusRequest { image: Some(spec), verbose: false };
            match images.image_status(request).await {
                Ok(v1::ImageStatusResponse { image: Some(found), .. }) => self.inner().interrupted(&image, &found.id),
                // It may come yet: another runtime goes on with a pull.
                Ok(_) => {}
                Err(error) => tracing::warn!(image, %error, "nobody knows what became of a pull"),
            }
        }
    }

    /// For whom the image is that a pod calls `image`, and that the runtime has as `id`.
    pub(crate) fn access(&self, image: &str, id: &str) -> Access {
        let inner = self.inner();
        let record = match inner.files.record(id) {
            Ok(record) => record,
            Err(error) => {
                tracing::warn!(image, id, %error, "a record of a pull is of no use; the registry is asked again");
                return Access::Nobody;
            }
        };
        let is_pulled = record.is_some() || inner.pulls.contains_key(image) || inner.files.is_pulling(image);
        if !self.policy.is_needed(image, is_pulled) {
            return Access::Everyone;
        }
        record.map_or(Access::Nobody, |record| record.access(without_tag(image)))
    }

    /// Whether one of these credentials has opened the image before. A secret that has changed since, or another with the
    /// same content, is written down, too.
    pub(crate) fn is_opened_by(&self, image: &str, id: &str, credentials: &[Credential]) -> bool {
        let inner = self.inner();
        let Ok(Some(mut record)) = inner.files.record(id) else { return false };
        let logins = credentials.iter().map(record::login_of);
        let Some(login) = record.opened_by(without_tag(image), logins) else { return false };
        if record.has_room(without_tag(image)) && record.admit(without_tag(image), login) {
            inner.files.write_or_warn(&record);
        }
        true
    }

    /// A pull begins.
    ///
    /// # Errors
    /// It cannot be written down; then it must not begin: nobody would know later who may have the image.
    pub(crate) fn begin(&self, image: &str) -> io::Result<Pulling<'_>> {
        let mut inner = self.inner();
        inner.files.begin(image)?;
        *inner.pulls.entry(image.to_owned()).or_default() += 1;
        Ok(Pulling { pulled: self, image: image.to_owned() })
    }

    /// Forgets images that are not among `ids`, unless they have been pulled since `listed`, when these were.
    pub(crate) fn keep(&self, ids: &HashSet<String>, listed: Timestamp) {
        let inner = self.inner();
        for record in inner.files.pulled() {
            if !ids.contains(&record.image_ref) && record.is_older_than(listed) {
                inner.files.forget(&record.image_ref);
            }
        }
    }
}

impl Inner {
    /// The image is there; by whose credentials is not known.
    fn interrupted(&self, image: &str, id: &str) {
        let is_known = self.files.record(id).is_ok_and(|record| record.is_some());
        if is_known || self.files.write_or_warn(&PulledRecord::new(id)) {
            self.files.end(image);
        }
    }

    /// What became of a pull is known; its file goes, unless the same is being pulled for another pod.
    fn end(&self, image: &str) {
        if self.pulls.get(image) == Some(&1) {
            self.files.end(image);
        }
    }

    fn leave(&mut self, image: &str) {
        match self.pulls.get_mut(image) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(self.pulls.remove(image)),
        }
    }
}

/// A pull that goes on. One that is dropped leaves its file: the runtime may still finish it.
#[derive(Debug)]
pub(crate) struct Pulling<'a> {
    pulled: &'a Pulled,
    image: String,
}

impl Pulling<'_> {
    /// The image is there, as `id`, and was had with `credential`. Returns whether it is new to the node.
    pub(crate) fn succeeded(self, id: &str, credential: Option<&Credential>) -> bool {
        let login = credential.map_or(Login::Node, record::login_of);
        let inner = self.pulled.inner();
        let known = inner.files.record(id).unwrap_or_else(|error| {
            tracing::warn!(id, %error, "a record of a pull is of no use; it is begun anew");
            None
        });
        let is_new = known.is_none();
        let mut record = known.unwrap_or_else(|| PulledRecord::new(id));
        let is_changed = record.admit(without_tag(&self.image), login) || is_new;
        // As long as it is not written down, its pull has not ended: the next kubelet tries again.
        if !is_changed || inner.files.write_or_warn(&record) {
            inner.end(&self.image);
        }
        is_new
    }

    /// The registry, or the runtime, did not give it.
    pub(crate) fn failed(self) {
        self.pulled.inner().end(&self.image);
    }
}

impl Drop for Pulling<'_> {
    fn drop(&mut self) {
        self.pulled.inner().leave(&self.image);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::context::{Holder, ObjectName};

    const ID: &str = "sha256:0123";

    fn credential(secret: &str, password: &str) -> Credential {
        let auth = v1::AuthConfig { password: password.to_owned(), ..v1::AuthConfig::default() };
        let name = |text: &str| text.to_owned();
        let secret = ObjectName { uid: name(secret), namespace: name("default"), name: name(secret) };
        Credential { auth, holder: Holder::Secret(secret) }
    }

    /// A login in the name of a service account.
    fn in_name_of(account: &str, password: &str) -> Credential {
        let Credential { auth, .. } = credential(account, password);
        let [uid, namespace, name] = [account, "default", account].map(str::to_owned);
        Credential { auth, holder: Holder::ServiceAccount(ObjectName { uid, namespace, name }) }
    }

    fn pulled(dir: &tempfile::TempDir, policy: Verification) -> Pulled {
        Pulled::open(dir.path(), policy).unwrap()
    }

    #[test]
    fn who_pulled_an_image_may_have_it_again() {
        let dir = tempfile::tempdir().unwrap();
        let images = pulled(&dir, Verification::default());
        assert_eq!(images.access("r.io/app:1", ID), Access::Everyone, "it was there before");
        let pulling = images.begin("r.io/app:1").unwrap();
        assert_eq!(images.access("r.io/app:1", ID), Access::Nobody, "it is being pulled");
        assert!(pulling.succeeded(ID, Some(&credential("a", "one"))));
        let images = pulled(&dir, Verification::default());
        assert_eq!(images.access("r.io/app:2", ID), Access::Holders, "a tag is no other repository");
        assert_eq!(images.access("r.io/other:1", ID), Access::Nobody);
        let opens = |secret, password| images.is_opened_by("r.io/app:1", ID, &[credential(secret, password)]);
        assert!(!opens("b", "two") && opens("a", "one"));
        assert!(opens("b", "one"), "the same login by another name");
        assert!(opens("a", "new"), "a secret that has changed");
        assert!(opens("b", "one") && opens("a", "new") && !opens("c", "two"));
        assert!(!images.begin("r.io/app:1").unwrap().succeeded(ID, None));
        assert_eq!(images.access("r.io/app:1", ID), Access::Everyone, "it needs no login");
        assert_eq!(pulled(&dir, Verification::Always).access("r.io/app:1", ID), Access::Everyone);
    }

    #[test]
    fn what_a_service_account_pulled_is_for_its_pods() {
        let dir = tempfile::tempdir().unwrap();
        let images = pulled(&dir, Verification::default());
        let pulling = images.begin("r.io/app:1").unwrap();
        assert!(pulling.succeeded(ID, Some(&in_name_of("builder", "one"))));
        let images = pulled(&dir, Verification::default());
        assert_eq!(images.access("r.io/app:1", ID), Access::Holders, "not for every pod of the node");
        let opens = |credential: Credential| images.is_opened_by("r.io/app:1", ID, &[credential]);
        assert!(opens(in_name_of("builder", "two")), "whatever it is given");
        assert!(!opens(in_name_of("other", "one")) && !opens(credential("builder", "one")));
        images.begin("r.io/app:1").unwrap().succeeded(ID, Some(&credential("a", "three")));
        assert!(opens(in_name_of("builder", "two")) && opens(credential("a", "three")), "both have opened it");
    }

    #[test]
    fn a_pull_whose_end_nobody_saw_opens_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let images = pulled(&dir, Verification::default());
        drop(images.begin("r.io/app:1").unwrap());
        assert_eq!(images.access("r.io/app:1", ID), Access::Nobody);
        let (one, other) = (images.begin("r.io/app:1").unwrap(), images.begin("r.io/app:1").unwrap());
        one.failed();
        assert_eq!(images.access("r.io/app:1", ID), Access::Nobody, "the other goes on");
        other.failed();
        assert_eq!(images.access("r.io/app:1", ID), Access::Everyone);
    }

    #[test]
    fn a_damaged_record_opens_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let images = pulled(&dir, Verification::default());
        images.begin("r.io/app:1").unwrap().succeeded(ID, None);
        let file = std::fs::read_dir(dir.path().join("image_manager/pulled")).unwrap().next().unwrap().unwrap().path();
        std::fs::write(file, "{").unwrap();
        assert_eq!(images.access("r.io/app:1", ID), Access::Nobody);
        assert!(images.begin("r.io/app:1").unwrap().succeeded(ID, None), "it is written anew");
        assert_eq!(images.access("r.io/app:1", ID), Access::Everyone);
    }

    #[test]
    fn what_is_gone_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let images = pulled(&dir, Verification::default());
        for id in ["a", "b"] {
            images.begin("r.io/app:1").unwrap().succeeded(id, Some(&credential("a", "one")));
        }
        images.keep(&HashSet::new(), Timestamp::UNIX_EPOCH);
        assert_eq!(images.access("r.io/app:1", "a"), Access::Holders, "it has been pulled since");
        let later = Timestamp::now() + k8s_openapi::jiff::SignedDuration::from_secs(60);
        images.keep(&HashSet::from(["a".to_owned()]), later);
        assert_eq!(images.access("r.io/app:1", "a"), Access::Holders);
        assert_eq!(images.access("r.io/app:1", "b"), Access::Everyone);
    }
}
