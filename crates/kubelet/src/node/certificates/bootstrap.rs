//! Joining with a token: it brings the node its first certificate, and the kubeconfig that uses it.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::Duration;

use cluster::api::{Api, Config};
use serde_json::{Value, json};

use super::{CertificateError, Files, Holder, Purpose, obtain};

/// After a failure: doubled each time up to the maximum.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);
/// How often it is looked whether somebody else has brought a certificate: the token may have ended, too.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Whether a node has to join anew: it has no kubeconfig, or one whose certificate is in `files` and does not hold.
pub fn is_needed(kubeconfig: &Path, files: &Files) -> bool {
    if !kubeconfig.exists() {
        return true;
    }
    is_own(kubeconfig, files) && !files.is_usable()
}

/// Whether `kubeconfig` shows the certificate in `files`.
pub fn is_own(kubeconfig: &Path, files: &Files) -> bool {
    let text = fs::read_to_string(kubeconfig).unwrap_or_default();
    text.contains(&*files.current().to_string_lossy())
}

/// Gets a certificate as the user of `bootstrap` and writes `kubeconfig` for it; tries until it is granted, or somebody else has
/// put one there.
///
/// # Errors
/// The configuration of `bootstrap` cannot be used, or a file cannot be written.
pub async fn join(bootstrap: &Path, kubeconfig: &Path, holder: &Holder, files: &Files) -> Result<(), CertificateError> {
    let config = Config::from_kubeconfig(bootstrap);
    let config = config.map_err(|error| content(bootstrap, error.to_string()))?;
    let api = Api::new(config).map_err(|error| content(bootstrap, error.to_string()))?;
    tokio::select! {
        done = obtain_at_last(&api, holder, files) => done.and_then(|()| write_kubeconfig(bootstrap, kubeconfig, files)),
        () = brought(kubeconfig, files) => Ok(()),
    }
}

/// Returns when there is a certificate that nobody here has asked for.
async fn brought(kubeconfig: &Path, files: &Files) {
    while is_needed(kubeconfig, files) {
        tokio::time::sleep(LOOK_EVERY).await;
    }
    tracing::info!(file = %files.current().display(), "there is a certificate that holds; no other is asked for");
}

async fn obtain_at_last(api: &Api, holder: &Holder, files: &Files) -> Result<(), CertificateError> {
    let mut pause = RETRY_FIRST;
    loop {
        match obtain(api, Purpose::Client, holder, files).await {
            Ok(()) => return Ok(()),
            Err(error @ CertificateError::File { .. }) => return Err(error),
            Err(error) => {
                tracing::warn!(
                    node = holder.node,
                    error = &error as &dyn std::error::Error,
                    "cannot join; trying again"
                );
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY_MAX);
    }
}

fn content(path: &Path, reason: String) -> CertificateError {
    CertificateError::Content { path: path.to_owned(), reason }
}

/// The server of `bootstrap`, with the certificate in `files` as the user.
fn write_kubeconfig(bootstrap: &Path, kubeconfig: &Path, files: &Files) -> Result<(), CertificateError> {
    let failed = |step: &'static str, path: &Path| {
        let path = path.to_owned();
        move |source| CertificateError::File { step, path, source }
    };
    let text = fs::read_to_string(bootstrap).map_err(failed("read", bootstrap))?;
    let value: Value = serde_saphyr::from_str(&text).map_err(|error| content(bootstrap, error.to_string()))?;
    let made =
        kubeconfig_of(&value, files).ok_or_else(|| content(bootstrap, "it has no current context".to_owned()))?;
    let text = serde_saphyr::to_string(&made).map_err(|error| content(kubeconfig, error.to_string()))?;
    let mut options = fs::OpenOptions::new();
    let opened = options.write(true).create(true).truncate(true).mode(0o600).open(kubeconfig);
    opened.and_then(|mut file| file.write_all(text.as_bytes())).map_err(failed("write", kubeconfig))
}

fn kubeconfig_of(bootstrap: &Value, files: &Files) -> Option<Value> {
    let named = |list: &str, name: &str| {
        let items = bootstrap[list].as_array()?;
        items.iter().find(|item| item["name"] == name).cloned()
    };
    let context = named("contexts", bootstrap["current-context"].as_str()?)?;
    let cluster = named("clusters", context["context"]["cluster"].as_str()?)?["cluster"].take();
    let pem = files.current();
    Some(json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{ "name": "default-cluster", "cluster": cluster }],
        "users": [{ "name": "default-auth", "user": { "client-certificate": pem, "client-key": pem } }],
        "contexts": [{
            "name": "default-context",
            "context": { "cluster": "default-cluster", "namespace": "default", "user": "default-auth" },
        }],
        "current-context": "default-context",
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the file of the token names it. Nobody listens there.
    const BOOTSTRAP: &str = "apiVersion: v1\nkind: Config\ncurrent-context: c
contexts: [{name: c, context: {cluster: k, user: u}}]
clusters: [{name: k, cluster: {server: 'http://127.0.0.1:1'}}]
users: [{name: u, user: {token: secret}}]\n";

    #[tokio::test(start_paused = true)]
    async fn a_certificate_that_somebody_brings_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::new(dir.path(), Purpose::Client);
        let (bootstrap, kubeconfig) = (dir.path().join("bootstrap"), dir.path().join("kubeconfig"));
        fs::write(&bootstrap, BOOTSTRAP).unwrap();
        let own = format!("users: [{{user: {{client-certificate: {}}}}}]", files.current().display());
        fs::write(&kubeconfig, &own).unwrap();
        let holder = Holder { node: "n".to_owned(), names: Vec::new(), addresses: Vec::new() };
        let joined = join(&bootstrap, &kubeconfig, &holder, &files);
        let bring = async {
            // The node has asked in vain, and looked.
            tokio::time::sleep(LOOK_EVERY * 3).await;
            let key = rcgen::KeyPair::generate().unwrap();
            let pem = rcgen::CertificateParams::default().self_signed(&key).unwrap().pem();
            fs::write(files.current(), pem + &key.serialize_pem()).unwrap();
        };
        let (joined, ()) = tokio::join!(joined, bring);
        joined.unwrap();
        assert_eq!(fs::read_to_string(&kubeconfig).unwrap(), own, "it is as it was");
    }

    #[test]
    fn the_server_stays_and_the_user_is_the_certificate() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::new(dir.path(), Purpose::Client);
        let (bootstrap, kubeconfig) = (dir.path().join("bootstrap"), dir.path().join("kubeconfig"));
        fs::write(
            &bootstrap,
            "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{name: c, context: {cluster: k, user: u}}]
clusters: [{name: other, cluster: {server: x}}, {name: k, cluster: {server: 'https://api:6443', certificate-authority-data: QQ==}}]
users: [{name: u, user: {token: secret}}]\n",
        )
        .unwrap();
        assert!(is_needed(&kubeconfig, &files));
        write_kubeconfig(&bootstrap, &kubeconfig, &files).unwrap();
        let text = fs::read_to_string(&kubeconfig).unwrap();
        assert!(text.contains("https://api:6443") && text.contains("kubelet-client-current.pem"), "{text}");
        assert!(!text.contains("secret"), "the token has done its work");
        assert!(is_needed(&kubeconfig, &files), "its certificate is not there");
        fs::write(&kubeconfig, "users: [{user: {token: other}}]").unwrap();
        assert!(!is_needed(&kubeconfig, &files), "somebody else's user is not ours to judge");
    }
}
