//! kubeconfig files: what their authors wrote, and which cluster and user of it count.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_saphyr::UserMessageFormatter;

use super::config::{Bearer, Config, ConfigError, Identity, Pem, Secret, Server, Trust};
use super::exec::ExecPlugin;
use super::proxy::Proxy;

/// A kubeconfig file. Unknown fields are left alone, as every client does: other tools keep theirs here.
#[derive(Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct Kubeconfig {
    clusters: Vec<Named<Cluster>>,
    users: Vec<Named<User>>,
    contexts: Vec<Named<Context>>,
    current_context: String,
}

/// An element of one of the lists. Its value stands under `cluster`, `user` or `context`.
#[derive(Deserialize)]
struct Named<T> {
    name: String,
    #[serde(alias = "cluster", alias = "user", alias = "context")]
    value: Option<T>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct Cluster {
    server: String,
    tls_server_name: Option<String>,
    insecure_skip_tls_verify: bool,
    certificate_authority: Option<PathBuf>,
    certificate_authority_data: Option<String>,
    proxy_url: Option<String>,
}

#[derive(Default, Clone, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct User {
    client_certificate: Option<PathBuf>,
    client_certificate_data: Option<String>,
    client_key: Option<PathBuf>,
    client_key_data: Option<String>,
    token: Option<String>,
    #[serde(rename = "tokenFile")]
    token_file: Option<PathBuf>,
    username: Option<String>,
    password: Option<String>,
    exec: Option<Exec>,
    #[serde(rename = "auth-provider")]
    auth_provider: Option<serde_json::Value>,
}

#[derive(Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Exec {
    api_version: Option<String>,
    command: String,
    #[serde(default)]
    args: Option<Vec<String>>,
    #[serde(default)]
    env: Option<Vec<Variable>>,
    #[serde(default)]
    provide_cluster_info: bool,
    #[serde(default)]
    interactive_mode: Option<String>,
    #[serde(default)]
    install_hint: Option<String>,
}

#[derive(Clone, Deserialize)]
struct Variable {
    name: String,
    value: String,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default)]
struct Context {
    cluster: String,
    user: String,
}

/// Reads a kubeconfig file; `context` stands in for its `current-context`.
pub(super) fn read(path: &Path) -> Result<Config, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.into(), source })?;
    parse(&text, path)
}

/// The configuration in `text`; relative paths are relative to the directory of `path`, which errors name.
pub(super) fn parse(text: &str, path: &Path) -> Result<Config, ConfigError> {
    let file: Kubeconfig = serde_saphyr::from_str(text).map_err(|error| ConfigError::Syntax {
        path: path.into(),
        message: error.render_with_formatter(&UserMessageFormatter),
    })?;
    let reader = Reader { path, base: path.parent().unwrap_or(Path::new("")) };
    let (cluster, user) = reader.choose(&file)?;
    reader.config(cluster, user)
}

struct Reader<'a> {
    path: &'a Path,
    base: &'a Path,
}

impl Reader<'_> {
    fn fault(&self, field: &str, message: impl Into<String>) -> ConfigError {
        ConfigError::Field { path: self.path.into(), field: field.to_owned(), message: message.into() }
    }

    /// The cluster and the user of the context that counts. A file with one cluster and one user needs no context.
    fn choose(&self, file: &Kubeconfig) -> Result<(Cluster, User), ConfigError> {
        if file.current_context.is_empty() {
            return match (&file.clusters[..], &file.users[..]) {
                ([cluster], [] | [_]) => {
                    let user = file.users.first().and_then(|user| user.value.clone());
                    Ok((cluster.value.clone().unwrap_or_default(), user.unwrap_or_default()))
                }
                _ => Err(self.fault("current-context", "is empty; set it to the name of a context of the file")),
            };
        }
        let context = self.find(&file.contexts, &file.current_context, "contexts", "current-context")?;
        let cluster = self.find(&file.clusters, &context.cluster, "clusters", "contexts.cluster")?;
        // A context without a user is one without credentials.
        let user = match context.user.as_str() {
            "" => User::default(),
            name => self.find(&file.users, name, "users", "contexts.user")?,
        };
        Ok((cluster, user))
    }

    fn find<T: Clone>(&self, all: &[Named<T>], name: &str, list: &str, field: &str) -> Result<T, ConfigError> {
        let found = all.iter().find(|one| one.name == name).and_then(|one| one.value.clone());
        found.ok_or_else(|| self.fault(field, format!("names {name:?}, which {list} does not have")))
    }

    fn config(&self, cluster: Cluster, user: User) -> Result<Config, ConfigError> {
        let server = Server::parse(&cluster.server).map_err(|message| self.fault("clusters.server", message))?;
        let proxy = cluster.proxy_url.as_deref().filter(|url| !url.is_empty());
        let proxy = proxy.map(Proxy::parse).transpose().map_err(|message| self.fault("clusters.proxy-url", message))?;
        let trust = self.trust(&cluster)?;
        let mut config = Config::new(server, trust, self.identity(user, &cluster)?);
        config.server_name = cluster.tls_server_name.filter(|name| !name.is_empty());
        if proxy.is_some() {
            config.proxy = proxy;
        }
        Ok(config)
    }

    fn trust(&self, cluster: &Cluster) -> Result<Trust, ConfigError> {
        let field = "clusters.certificate-authority";
        let authority = self.pem(field, &cluster.certificate_authority, &cluster.certificate_authority_data)?;
        match (authority, cluster.insecure_skip_tls_verify) {
            (Some(_), true) => {
                Err(self.fault("clusters.insecure-skip-tls-verify", "contradicts certificate-authority; remove one"))
            }
            (None, true) => Ok(Trust::Anything),
            (Some(authority), false) => Ok(Trust::Authorities(authority)),
            (None, false) => Ok(Trust::Host),
        }
    }

    fn identity(&self, user: User, cluster: &Cluster) -> Result<Identity, ConfigError> {
        if user.auth_provider.is_some() {
            let message = "is a mechanism that Kubernetes has removed; use exec with the provider's plugin";
            return Err(self.fault("users.auth-provider", message));
        }
        let certificate =
            self.pem("users.client-certificate", &user.client_certificate, &user.client_certificate_data)?;
        let key = self.pem("users.client-key", &user.client_key, &user.client_key_data)?;
        let certificate = match (certificate, key) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            // The kubelet's own file holds both.
            (Some(certificate @ Pem::File(_)), None) => Some((certificate.clone(), certificate)),
            (None, None) => None,
            (Some(_), None) => return Err(self.fault("users.client-key", "is missing")),
            (None, Some(_)) => return Err(self.fault("users.client-certificate", "is missing")),
        };
        let bearer = match &user {
            // A file is newer than what was once written beside it.
            User { token_file: Some(file), .. } if !file.as_os_str().is_empty() => {
                Some(Bearer::File(self.base.join(file)))
            }
            User { token: Some(token), .. } if !token.is_empty() => Some(Bearer::Token(Secret::new(token.trim()))),
            User { username: Some(name), password, .. } if !name.is_empty() => {
                let pair = format!("{name}:{}", password.as_deref().unwrap_or_default());
                Some(Bearer::Basic(Secret::new(&STANDARD.encode(pair))))
            }
            _ => None,
        };
        let exec = user.exec.map(|exec| self.exec(exec, cluster)).transpose()?;
        if exec.is_some() && (bearer.is_some() || certificate.is_some()) {
            return Err(self.fault("users.exec", "stands beside other credentials; remove one"));
        }
        Ok(Identity { certificate, bearer, exec })
    }

    fn exec(&self, exec: Exec, cluster: &Cluster) -> Result<ExecPlugin, ConfigError> {
        let version = exec.api_version.unwrap_or_default();
        if !matches!(version.as_str(), "client.authentication.k8s.io/v1" | "client.authentication.k8s.io/v1beta1") {
            let message = format!("is {version:?}; use client.authentication.k8s.io/v1");
            return Err(self.fault("users.exec.apiVersion", message));
        }
        if exec.interactive_mode.as_deref() == Some("Always") {
            return Err(self.fault("users.exec.interactiveMode", "is Always, and a daemon has no terminal"));
        }
        // A bare name is looked up in PATH; what has a slash is relative to the file.
        let command = if exec.command.contains('/') { self.base.join(&exec.command) } else { exec.command.into() };
        let environment: BTreeMap<String, String> =
            exec.env.into_iter().flatten().map(|variable| (variable.name, variable.value)).collect();
        let cluster = exec.provide_cluster_info.then(|| self.cluster_info(cluster)).transpose()?;
        let arguments = exec.args.unwrap_or_default();
        Ok(ExecPlugin { command, arguments, environment, version, cluster, hint: exec.install_hint })
    }

    /// What a plugin is told of the cluster: the certificate authority in place, not as a path.
    fn cluster_info(&self, cluster: &Cluster) -> Result<serde_json::Value, ConfigError> {
        let field = "clusters.certificate-authority";
        let authority = self.pem(field, &cluster.certificate_authority, &cluster.certificate_authority_data)?;
        let authority = authority.map(|pem| pem.read()).transpose()?;
        let mut info = serde_json::json!({"server": cluster.server, "config": null});
        if let Some(authority) = authority {
            info["certificate-authority-data"] = STANDARD.encode(authority).into();
        }
        if cluster.insecure_skip_tls_verify {
            info["insecure-skip-tls-verify"] = true.into();
        }
        for (field, value) in [("tls-server-name", &cluster.tls_server_name), ("proxy-url", &cluster.proxy_url)] {
            if let Some(value) = value {
                info[field] = value.as_str().into();
            }
        }
        Ok(info)
    }

    /// Data in place win over a path, as they do for kubectl.
    fn pem(&self, field: &str, path: &Option<PathBuf>, data: &Option<String>) -> Result<Option<Pem>, ConfigError> {
        if let Some(data) = data.as_deref().filter(|data| !data.is_empty()) {
            let packed: String = data.split_ascii_whitespace().collect();
            let bytes = STANDARD.decode(packed).map_err(|_| self.fault(&format!("{field}-data"), "is not base64"))?;
            return Ok(Some(Pem::Inline { field: format!("{field}-data of {}", self.path.display()), bytes }));
        }
        Ok(path.as_ref().filter(|path| !path.as_os_str().is_empty()).map(|path| Pem::File(self.base.join(path))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Config, String> {
        parse(text, Path::new("/etc/kubernetes/kubelet.conf")).map_err(|error| error.to_string())
    }

    const KUBEADM: &str = "apiVersion: v1\nkind: Config\nclusters:\n- name: kubernetes\n  cluster:\n    certificate-authority-data: QUJD\n    server: https://10.0.0.2:6443\ncontexts:\n- name: a\n  context: {cluster: kubernetes, user: node}\ncurrent-context: a\npreferences: {}\nusers:\n- name: node\n  user:\n    client-certificate: /var/lib/kubelet/pki/kubelet-client-current.pem\n    client-key: /var/lib/kubelet/pki/kubelet-client-current.pem\n";

    #[test]
    fn what_kubeadm_writes() {
        let config = parsed(KUBEADM).unwrap();
        assert_eq!(config.server.to_string(), "https://10.0.0.2:6443");
        assert!(matches!(&config.trust, Trust::Authorities(Pem::Inline { bytes, .. }) if bytes == b"ABC"));
        let (certificate, key) = config.identity.certificate.unwrap();
        assert_eq!(
            (&certificate, &certificate),
            (&key, &Pem::File("/var/lib/kubelet/pki/kubelet-client-current.pem".into()))
        );
    }

    fn with(cluster: &str, user: &str) -> Result<Config, String> {
        parsed(&format!(
            "clusters: [{{name: c, cluster: {cluster}}}]\nusers: [{{name: u, user: {user}}}]\ncontexts: [{{name: x, context: {{cluster: c, user: u}}}}]\ncurrent-context: x\n"
        ))
    }

    #[test]
    fn paths_are_relative_to_the_file() {
        let config =
            with("{server: 'https://h/prefix/', certificate-authority: ca.crt}", "{tokenFile: token, token: old}");
        let config = config.unwrap();
        assert_eq!(config.trust, Trust::Authorities(Pem::File("/etc/kubernetes/ca.crt".into())));
        assert_eq!(config.identity.bearer, Some(Bearer::File("/etc/kubernetes/token".into())));
        assert_eq!(config.server.to_string(), "https://h:443/prefix");
    }

    #[test]
    fn plugins() {
        let exec = "{exec: {apiVersion: client.authentication.k8s.io/v1, command: bin/aws, args: [eks], env: [{name: A, value: b}], interactiveMode: Never, provideClusterInfo: true}}";
        let config = with("{server: 'https://h', certificate-authority-data: QUJD}", exec).unwrap();
        let plugin = config.identity.exec.unwrap();
        assert_eq!(plugin.command, PathBuf::from("/etc/kubernetes/bin/aws"));
        assert_eq!(plugin.cluster.unwrap()["certificate-authority-data"], "QUJD");
    }

    #[test]
    fn faults_name_file_field_and_remedy() {
        let check = |result: Result<Config, String>, words: &[&str]| {
            let error = result.map(|_| ()).unwrap_err();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
            assert!(error.contains("/etc/kubernetes/kubelet.conf"), "{error}");
        };
        check(parsed("clusters: ["), &[]);
        check(parsed("current-context: none\n"), &["current-context", "\"none\"", "contexts"]);
        check(with("{server: ''}", "{}"), &["clusters.server"]);
        check(with("{server: 'ftp://h'}", "{}"), &["clusters.server", "http"]);
        check(
            with("{server: 'https://h', certificate-authority-data: '!'}", "{}"),
            &["certificate-authority-data", "base64"],
        );
        check(
            with("{server: 'https://h', certificate-authority: a, insecure-skip-tls-verify: true}", "{}"),
            &["remove one"],
        );
        check(with("{server: 'https://h'}", "{client-key: k}"), &["client-certificate", "missing"]);
        check(with("{server: 'https://h'}", "{auth-provider: {name: gcp}}"), &["auth-provider", "exec"]);
        check(with("{server: 'https://h', proxy-url: 'gopher://h'}", "{}"), &["proxy-url"]);
    }
}
