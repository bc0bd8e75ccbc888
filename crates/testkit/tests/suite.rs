//! The images of the suites, as root in a network namespace of its own: what the suites call in them works.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test program")]
#![allow(clippy::disallowed_methods, reason = "it starts what is in the images")]

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Duration;

use testkit::daemon::{Daemon, Nursery};
use testkit::registry::Registry;
use testkit::serial::{self, Test};
use testkit::suite::{self, Image};
use testkit::{host, netns};

const TESTS: &[Test] = &[
    ("the_shell_keeps_odd_names_and_starts_programs", the_shell_keeps_odd_names_and_starts_programs),
    ("agnhost_has_its_tools", agnhost_has_its_tools),
    ("web_servers_serve", web_servers_serve),
    ("a_program_gains_its_owners_rights_if_it_may", a_program_gains_its_owners_rights_if_it_may),
    ("a_registry_answers_by_the_real_names", a_registry_answers_by_the_real_names),
];

fn main() -> ExitCode {
    let missing = suite::build(suite::BASIC).err();
    let missing = missing.map(|error| format!("Debian's mirror and the module proxy ({error:#})")).or_else(|| {
        let entered = netns::enter_private();
        entered.err().map(|error| format!("root for a private network ({error:#})"))
    });
    serial::main(TESTS, missing)
}

fn unpacked(image: &Image) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let blobs = image.layout().unwrap().tagged(image.tags()[0]).blobs().unwrap();
    for layer in &blobs[1..] {
        host::run(Command::new("tar").args(["-xzf"]).arg(&layer.path).arg("-C").arg(dir.path())).unwrap();
    }
    dir
}

/// The words of a command that runs in `root` as in a container, with nothing mounted for others.
fn contained(root: &Path, words: &[&str]) -> Vec<String> {
    const SCRIPT: &str = "mount --rbind /dev \"$0/dev\" && mount -t proc proc \"$0/proc\" && \
                          exec env odd-name=1 chroot \"$0\" \"$@\"";
    let before = ["--mount", "--pid", "--fork", "--kill-child", "sh", "-c", SCRIPT];
    let root = root.display().to_string();
    before.into_iter().chain([root.as_str()]).chain(words.iter().copied()).map(str::to_owned).collect()
}

fn run(root: &Path, words: &[&str]) -> String {
    let mut command = Command::new("unshare");
    command.args(contained(root, words)).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    String::from_utf8(host::output(&mut command).unwrap()).unwrap()
}

fn the_shell_keeps_odd_names_and_starts_programs() {
    let root = unpacked(&suite::BUSYBOX);
    assert!(run(root.path(), &["sh", "-c", "env"]).contains("odd-name=1"));
    std::fs::remove_file(root.path().join("bin/ls")).unwrap();
    assert_eq!(run(root.path(), &["sh", "-c", "ls / || echo gone"]), "gone\n");
    for tool in ["ipcs", "ipcmk", "pgrep"] {
        assert!(run(root.path(), &[tool, "--version"]).starts_with(tool), "{tool} is the real one");
    }
}

fn agnhost_has_its_tools() {
    let root = unpacked(&suite::AGNHOST);
    let calls: [&[&str]; 9] = [
        &["/agnhost", "--help"],
        &["/agnhost-2", "--help"],
        &["/coredns", "-version"],
        &["curl", "--version"],
        &["dig", "-v"],
        &["ss", "-V"],
        &["socat", "-V"],
        &["sh", "-c", "iperf -v 2>&1 | grep -q '^iperf version'"],
        &["ip", "-V"],
    ];
    for words in calls {
        run(root.path(), words);
    }
    assert_eq!(run(root.path(), &["id", "-G", "user-defined-in-image"]), "1000 50000\n");
    let pointer = root.path().join("var/registry/pause/manifests/testing");
    let digest = std::fs::read_to_string(pointer).unwrap();
    let hash = digest.strip_prefix("sha256:").unwrap();
    let index = root.path().join(format!("var/registry/pause/manifests/sha256/{}/{hash}/data", &hash[..2]));
    let sum = host::output(Command::new("sha256sum").arg(index)).unwrap();
    assert!(sum.starts_with(hash.as_bytes()));
}

fn get(address: SocketAddr, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    let accept = "text/html, application/vnd.oci.image.manifest.v1+json";
    write!(stream, "GET {path} HTTP/1.0\r\nAccept: {accept}\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

fn web_servers_serve() {
    serves(&suite::NGINX, &["/usr/sbin/nginx", "-g", "daemon off;"], "Welcome to nginx!");
    let httpd = ["/usr/local/apache2/bin/httpd", "-DFOREGROUND", "-f", "/usr/local/apache2/conf/httpd.conf"];
    serves(&suite::HTTPD, &httpd, "It works!");
}

fn serves(image: &Image, words: &[&str], page: &str) {
    let here = SocketAddr::from(([127, 0, 0, 1], 80));
    let root = unpacked(image);
    let log = tempfile::NamedTempFile::new().unwrap();
    let words = contained(root.path(), words);
    let nursery = Arc::new(Nursery::new());
    let mut server = Daemon::new(&nursery, Path::new("/usr/bin/unshare"), words, log.path().to_owned());
    server.start().unwrap();
    let ready = || get(here, "/").is_ok_and(|answer| answer.contains(page));
    server.wait_ready(Duration::from_secs(20), ready).unwrap();
}

fn a_program_gains_its_owners_rights_if_it_may() {
    let root = unpacked(&suite::NO_NEW_PRIVILEGES);
    let as_another = ["su", "-s", "/bin/sh", "www-data", "-c", "/usr/local/bin/nnp"];
    assert_eq!(run(root.path(), &as_another).trim(), "Effective uid: 0");
    let bound = [&["setpriv", "--nnp"], &as_another[..]].concat();
    assert_eq!(run(root.path(), &bound).trim(), "Effective uid: 33");
}

fn a_registry_answers_by_the_real_names() {
    let address = SocketAddr::from(([127, 0, 0, 1], 5000));
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(address, &dir.path().join("registry")).unwrap();
    suite::publish(suite::BASIC, &registry).unwrap();
    let hosts = dir.path().join("certs.d");
    suite::write_hosts(&hosts, address).unwrap();
    let mut digests = BTreeSet::new();
    let mut tags = 0;
    for name in suite::BASIC.iter().flat_map(Image::names) {
        let (host, rest) = name.split_once('/').unwrap();
        let (repository, tag) = rest.rsplit_once(':').unwrap();
        let toml = std::fs::read_to_string(hosts.join(host).join("hosts.toml")).unwrap();
        assert!(toml.contains(&format!("\"http://{address}\"")), "{toml}");
        let answer = get(address, &format!("/v2/{repository}/manifests/{tag}")).unwrap();
        assert!(answer.contains(" 200 OK"), "{name}: {answer}");
        let digest = answer.lines().find(|line| line.to_lowercase().starts_with("docker-content-digest:"));
        digests.insert((repository.to_owned(), digest.unwrap().to_owned()));
        tags += 1;
    }
    assert_eq!(digests.len(), tags, "each tag is an image of its own");
}
