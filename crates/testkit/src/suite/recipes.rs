//! What is in the images.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::certificates;
use crate::host::Tool;
use crate::image::{self, Builder, Layer, append_dir, append_file, append_symlink, append_text};
use crate::{cache, debian, go};

/// What building needs on the host.
pub(super) const TOOLS: &[Tool] = &[
    certificates::TOOL,
    debian::TOOL,
    Tool { program: "/bin/busybox", deb: "busybox-static", rpm: "busybox" },
    Tool { program: "gcc", deb: "gcc", rpm: "gcc" },
];

/// Debian's packages with what the suites call.
const PACKAGES: &[&str] = &[
    "apache2-bin",
    "bash-static",
    "bind9-dnsutils",
    "curl",
    "iperf",
    "iproute2",
    "netcat-openbsd",
    "nginx-light",
    "procps",
    "socat",
    "wget",
];

/// A recipe.
#[derive(Debug, Clone, Copy)]
pub(super) enum Content {
    /// Busybox, with a shell that keeps variables whose names no shell could set, and that starts programs instead of
    /// being them: the suites mask `/bin/ls` and look into `env`.
    Shell,
    /// The same, run as this user.
    User(&'static str),
    /// The same, with a file of this name.
    Mark(&'static str),
    /// The same, with a user who belongs to a group only in the image.
    PredefinedGroup,
    /// A process that waits for ever and reaps.
    Pause,
    /// The same, with tools that look into networks.
    Tools,
    /// Kubernetes' test program, and the tools that its tests call beside it.
    Agnhost,
    /// Kubernetes' test program, serving a picture's name.
    Picture(&'static str),
    /// A web server.
    Nginx { port: u16 },
    /// Another web server.
    Httpd,
    /// A program that runs as its file's owner if it may.
    NoNewPrivileges,
    /// Kubernetes' test of a mended kernel.
    Regression,
    /// A device plugin.
    DevicePlugin,
    /// An API server to aggregate.
    SampleApiServer,
    /// etcd for it.
    Etcd,
}

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

impl Content {
    /// Adds the layers and returns the configuration.
    pub(super) fn fill(self, builder: &mut Builder) -> anyhow::Result<Value> {
        match self {
            Self::Pause => pause(builder),
            Self::Etcd => etcd(builder),
            _ => {
                shell(builder)?;
                let own = self.on_shell(builder)?;
                Ok(with_defaults(own))
            }
        }
    }

    /// What it has of [`TESTERS_TOOLS`], as a text.
    pub(super) fn tools(self) -> Option<String> {
        matches!(self, Self::Tools | Self::Agnhost).then(|| format!("{TESTERS_TOOLS:?}"))
    }

    /// What comes on top of the shell.
    fn on_shell(self, builder: &mut Builder) -> anyhow::Result<Value> {
        match self {
            Self::Shell | Self::Pause | Self::Etcd => Ok(json!({})),
            Self::User(user) => Ok(json!({ "User": user })),
            Self::Mark(file) => {
                builder.layer(|tar| append_text(tar, file, ""))?;
                Ok(json!({}))
            }
            Self::PredefinedGroup => {
                builder.layer(|tar| append_users(tar, "default-user"))?;
                Ok(json!({ "User": "1000" }))
            }
            Self::Tools => tools_layer(builder).map(|()| json!({})),
            Self::Agnhost => agnhost(builder),
            Self::Picture(name) => picture(builder, name),
            Self::Nginx { port } => nginx(builder, port),
            Self::Httpd => httpd(builder),
            Self::NoNewPrivileges => no_new_privileges(builder),
            Self::Regression => program(builder, &go::REGRESSION_74839),
            Self::DevicePlugin => program(builder, &go::SAMPLE_DEVICE_PLUGIN),
            Self::SampleApiServer => program(builder, &go::SAMPLE_APISERVER),
        }
    }
}

/// `config` with a path to search programs in, and a shell for those who name no program.
fn with_defaults(mut config: Value) -> Value {
    config["Env"] = json!([PATH]);
    if config["Entrypoint"].is_null() && config["Cmd"].is_null() {
        config["Cmd"] = json!(["sh"]);
    }
    config
}

fn tools() -> anyhow::Result<PathBuf> {
    debian::root(PACKAGES)
}

fn shell(builder: &mut Builder) -> anyhow::Result<()> {
    image::busybox_layer(builder)?;
    let root = tools()?;
    builder.layer(|tar| {
        for name in ["bin/bash", "bin/sh"] {
            append_file(tar, name, 0o755, &root.join("bin/bash-static"))?;
        }
        let programs = ["ipcs", "ipcmk", "pgrep"].map(|name| format!("usr/bin/{name}"));
        debian::append_programs(tar, &root, &programs.each_ref().map(|path| (path.as_str(), path.as_str())))
    })
}

/// The users of [`image::busybox_layer`], and one who belongs to a group only by the image's `/etc/group`.
fn append_users(tar: &mut Layer<'_>, user: &str) -> anyhow::Result<()> {
    let (users, groups) = (image::USERS, image::GROUPS);
    append_text(tar, "etc/passwd", &format!("{users}{user}:x:1000:1000::/home/{user}:/bin/sh\n"))?;
    append_text(tar, "etc/group", &format!("{groups}{user}:x:1000:\ngroup-defined-in-image:x:50000:{user}\n"))
}

fn pause(builder: &mut Builder) -> anyhow::Result<Value> {
    image::pause_layer(builder)?;
    Ok(json!({ "Entrypoint": ["/pause"] }))
}

fn etcd(builder: &mut Builder) -> anyhow::Result<Value> {
    let etcd = go::build(&go::ETCD_FOR_IMAGES)?;
    builder.layer(|tar| append_file(tar, "usr/local/bin/etcd", 0o755, &etcd))?;
    Ok(json!({ "Cmd": ["etcd"], "Env": [PATH] }))
}

fn agnhost(builder: &mut Builder) -> anyhow::Result<Value> {
    tools_layer(builder)?;
    program_layer(builder, &go::AGNHOST)?;
    program_layer(builder, &go::COREDNS)?;
    let scratch = tempfile::tempdir()?;
    let pair = certificates::self_signed(scratch.path(), "localhost", "localhost")?;
    builder.layer(|tar| {
        append_symlink(tar, "agnhost-2", "agnhost")?;
        append_file(tar, "localhost.crt", 0o644, &pair.certificate)?;
        append_file(tar, "localhost.key", 0o644, &pair.key)?;
        append_dir(tar, "uploads", 0o755)?;
        append_users(tar, "user-defined-in-image")?;
        append_registry(tar, scratch.path())
    })?;
    Ok(json!({
        "Entrypoint": ["/agnhost"],
        "Cmd": ["pause"],
        "ExposedPorts": { "80/tcp": {}, "8080/tcp": {}, "8081/tcp": {}, "9376/tcp": {}, "5000/tcp": {} },
    }))
}

/// Tools and where the tests look for them.
const TESTERS_TOOLS: &[(&str, &str)] = &[
    ("usr/bin/curl", "usr/bin/curl"),
    ("usr/bin/dig", "usr/bin/dig"),
    ("usr/bin/nslookup", "usr/bin/nslookup"),
    ("usr/bin/iperf", "usr/bin/iperf"),
    ("usr/bin/socat", "usr/bin/socat"),
    ("usr/bin/getent", "usr/bin/getent"),
    // That of Debian's busybox dies of the option `-T`.
    ("usr/bin/wget", "usr/bin/wget"),
    ("bin/nc.openbsd", "usr/bin/nc"),
    ("bin/ss", "usr/sbin/ss"),
    ("bin/ip", "usr/sbin/ip"),
];

/// A program in a layer of its own, which images share.
fn program_layer(builder: &mut Builder, program: &go::Program) -> anyhow::Result<()> {
    let file = go::build(program)?;
    builder.layer(|tar| append_file(tar, program.name, 0o755, &file))
}

fn tools_layer(builder: &mut Builder) -> anyhow::Result<()> {
    let root = tools()?;
    builder.layer(|tar| debian::append_programs(tar, &root, TESTERS_TOOLS))
}

/// What the registry inside of agnhost serves: `pause:testing`, as files under their digests.
fn append_registry(tar: &mut Layer<'_>, scratch: &Path) -> anyhow::Result<()> {
    let mut builder = Builder::new(scratch.join("pause"))?;
    let config = pause(&mut builder)?;
    let layout = builder.finish(config)?;
    let manifest = layout.manifest()?;
    let digest = digest_of(&manifest.bytes);
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [{
            "mediaType": manifest.media_type, "digest": digest, "size": manifest.bytes.len(),
            "platform": { "os": "linux", "architecture": image::architecture() },
        }],
    });
    let index = serde_json::to_vec(&index)?;
    append_text(tar, "var/registry/pause/manifests/testing", &digest_of(&index))?;
    for (content, kind) in [(&index, "manifests"), (&manifest.bytes, "manifests")] {
        append_text(tar, &place_of(kind, &digest_of(content))?, std::str::from_utf8(content)?)?;
    }
    for blob in layout.blobs()? {
        append_file(tar, &place_of("blobs", &blob.digest)?, 0o644, &blob.path)?;
    }
    Ok(())
}

fn digest_of(content: &[u8]) -> String {
    format!("sha256:{}", cache::hex(&Sha256::digest(content)))
}

fn place_of(kind: &str, digest: &str) -> anyhow::Result<String> {
    let (algorithm, hash) = digest.split_once(':').context("a digest names its algorithm")?;
    Ok(format!("var/registry/pause/{kind}/{algorithm}/{}/{hash}/data", &hash[..2]))
}

/// A picture's name is all that its test asks for.
fn picture(builder: &mut Builder, name: &str) -> anyhow::Result<Value> {
    program_layer(builder, &go::AGNHOST)?;
    builder.layer(|tar| {
        append_text(tar, "data.json", &json!({ "image": name }).to_string())?;
        append_text(tar, name, "no picture")
    })?;
    Ok(json!({ "Entrypoint": ["/agnhost"], "Cmd": ["test-webserver"] }))
}

fn nginx(builder: &mut Builder, port: u16) -> anyhow::Result<Value> {
    let root = tools()?;
    let server = format!(
        "server {{\n  listen {port};\n  location / {{ root /usr/share/nginx/html; index index.html index.htm; }}\n}}\n"
    );
    builder.layer(|tar| {
        debian::append_programs(tar, &root, &[("usr/sbin/nginx", "usr/sbin/nginx")])?;
        append_file(tar, "etc/nginx/mime.types", 0o644, &root.join("etc/nginx/mime.types"))?;
        append_text(tar, "etc/nginx/nginx.conf", NGINX_CONFIG)?;
        append_text(tar, "etc/nginx/conf.d/default.conf", &server)?;
        append_text(tar, "usr/share/nginx/html/index.html", "<html><title>Welcome to nginx!</title></html>\n")?;
        for place in ["var/run", "var/log/nginx", "var/lib/nginx", "var/cache/nginx"] {
            append_dir(tar, place, 0o755)?;
        }
        // It opens this file before it reads that it should not.
        append_symlink(tar, "var/log/nginx/error.log", "/dev/stderr")
    })?;
    Ok(json!({
        "Cmd": ["nginx", "-g", "daemon off;"],
        "ExposedPorts": { format!("{port}/tcp"): {} },
        "StopSignal": "SIGQUIT",
    }))
}

const NGINX_CONFIG: &str = "\
user nobody nobody;
worker_processes 1;
pid /var/run/nginx.pid;
error_log /dev/stderr notice;
events { worker_connections 256; }
http {
  include /etc/nginx/mime.types;
  access_log /dev/stdout;
  include /etc/nginx/conf.d/*.conf;
}
";

fn httpd(builder: &mut Builder) -> anyhow::Result<Value> {
    let root = tools()?;
    let modules = HTTPD_MODULES.map(|name| format!("usr/lib/apache2/modules/mod_{name}.so"));
    let mut files: Vec<(&str, &str)> = modules.iter().map(|path| (path.as_str(), path.as_str())).collect();
    files.push(("usr/sbin/apache2", "usr/local/apache2/bin/httpd"));
    let load = |(name, path): (&&str, &String)| format!("LoadModule {name}_module /{path}\n");
    let config: String = HTTPD_MODULES.iter().zip(&modules).map(load).collect();
    let config = config + HTTPD_CONFIG;
    builder.layer(|tar| {
        debian::append_programs(tar, &root, &files)?;
        append_text(tar, "usr/local/apache2/conf/httpd.conf", &config)?;
        append_text(tar, "usr/local/apache2/htdocs/index.html", "<html><body><h1>It works!</h1></body></html>\n")?;
        append_dir(tar, "usr/local/apache2/logs", 0o755)
    })?;
    let command = ["/usr/local/apache2/bin/httpd", "-DFOREGROUND", "-f", "/usr/local/apache2/conf/httpd.conf"];
    Ok(json!({ "Cmd": command, "ExposedPorts": { "80/tcp": {} }, "StopSignal": "SIGWINCH" }))
}

const HTTPD_MODULES: [&str; 4] = ["mpm_event", "authz_core", "dir", "mime"];

const HTTPD_CONFIG: &str = "\
ServerRoot /usr/local/apache2
ServerName localhost
PidFile logs/httpd.pid
Listen 80
User nobody
Group nobody
ErrorLog /dev/stderr
TypesConfig /dev/null
AddType text/html .html
DocumentRoot /usr/local/apache2/htdocs
DirectoryIndex index.html
";

fn no_new_privileges(builder: &mut Builder) -> anyhow::Result<Value> {
    let nnp = go::build(&go::NNP)?;
    builder.layer(|tar| {
        append_file(tar, "usr/local/bin/nnp", 0o4755, &nnp)?;
        append_file(tar, "nnp", 0o4755, &nnp)
    })?;
    Ok(json!({ "Cmd": ["nnp"] }))
}

/// A program of its own name in the root.
fn program(builder: &mut Builder, program: &go::Program) -> anyhow::Result<Value> {
    program_layer(builder, program)?;
    Ok(json!({ "Entrypoint": [format!("/{}", program.name)] }))
}
