//! Lists and watches, through everything that ends them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cluster::api::{Api, Config, Selection, Sink, follow};
use cluster::k8s_openapi::api::core::v1::ConfigMap;
use cluster::{Key, Table};
use serde_json::json;
use testkit::control_plane::{Options, Part};
use testkit::serial::Test;

use crate::etcd::Etcd;
use crate::lab::{LIMIT, Lab, MAPS, key, run, store, when};

pub(crate) const TESTS: &[Test] = &[
    ("a_table_says_what_the_server_says", a_table_says_what_the_server_says),
    ("a_server_that_restarts_makes_nothing_flap", a_server_that_restarts_makes_nothing_flap),
    ("a_forgotten_version_leads_to_a_new_list", a_forgotten_version_leads_to_a_new_list),
    ("a_restored_backup_is_believed", a_restored_backup_is_believed),
    ("a_server_without_streamed_lists_is_read_in_pages", a_server_without_streamed_lists_is_read_in_pages),
    ("a_half_closed_connection_is_given_up", a_half_closed_connection_is_given_up),
    ("hundreds_of_watches_share_few_connections", hundreds_of_watches_share_few_connections),
];

fn mine() -> Selection {
    Selection::in_namespace("default")
}

fn holds(value: &str) -> impl Fn(Option<&ConfigMap>) -> bool + use<'_> {
    move |map| map.is_some_and(|map| map.data.as_ref().is_some_and(|data| data["k"] == value))
}

/// A table that notes all that is done to it.
#[derive(Clone)]
struct Noted {
    table: Table<ConfigMap>,
    notes: Arc<Mutex<Vec<String>>>,
}

impl Noted {
    fn new() -> Self {
        Noted { table: store().config_maps().clone(), notes: Arc::default() }
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.notes.lock().unwrap())
    }
}

impl Sink<ConfigMap> for Noted {
    fn put(&mut self, map: ConfigMap) {
        let name = map.metadata.name.clone().unwrap();
        assert_eq!(map.metadata.managed_fields, None);
        self.notes.lock().unwrap().push(format!("put {name}"));
        self.table.mirror(map);
    }

    fn remove(&mut self, key: &Key) {
        self.notes.lock().unwrap().push(format!("remove {}", key.name()));
        Table::remove(&self.table, key);
    }
}

fn a_table_says_what_the_server_says() {
    let lab = Lab::new();
    for name in ["a", "b"] {
        lab.map(name, "1");
    }
    run(async {
        let api = Api::new(lab.admin()).unwrap();
        let table = store().config_maps().clone();
        let following = follow(&api, mine(), table.clone());
        following.known().await;
        assert_eq!(table.keys(), ["a", "b", "kube-root-ca.crt"].map(key));
        lab.set_map("a", "2");
        when(&table, &key("a"), holds("2")).await;
        lab.others().delete(&format!("{MAPS}/b")).unwrap();
        when(&table, &key("b"), |map| map.is_none()).await;
        lab.map("c", "1");
        when(&table, &key("c"), holds("1")).await;
        let version = |map: &ConfigMap| map.metadata.resource_version.clone();
        let there = lab.others().get(&format!("{MAPS}/c")).unwrap();
        assert_eq!(version(&table.get(&key("c")).unwrap()).as_deref(), there["metadata"]["resourceVersion"].as_str());
        // One object alone, with what follows it.
        let one = store().config_maps().clone();
        let alone = follow(&api, Selection::named(&key("later")), one.clone());
        alone.known().await;
        assert!(one.is_empty());
        lab.map("later", "1");
        when(&one, &key("later"), holds("1")).await;
        assert_eq!(one.len(), 1);
        drop(following);
        lab.map("unseen", "1");
        lab.set_map("later", "2");
        when(&one, &key("later"), holds("2")).await;
        assert!(table.get(&key("unseen")).is_none(), "nobody follows it any more");
    });
}

fn a_server_that_restarts_makes_nothing_flap() {
    let mut lab = Lab::new();
    for n in 0..20 {
        lab.map(&format!("m{n}"), "1");
    }
    run(async {
        let api = Api::new(lab.admin()).unwrap();
        let noted = Noted::new();
        let following = follow(&api, mine(), noted.clone());
        following.known().await;
        noted.take();
        let mut progress = following.progress();
        for (round, leave) in [testkit::control_plane::ControlPlane::kill, testkit::control_plane::ControlPlane::stop]
            .into_iter()
            .enumerate()
        {
            leave(&mut lab.plane, Part::ApiServer).unwrap();
            let failed = progress.wait_for(|progress| progress.failure.is_some());
            tokio::time::timeout(LIMIT, failed).await.unwrap().unwrap();
            assert!(progress.borrow().is_known, "what is known stays known");
            lab.plane.run(Part::ApiServer).unwrap();
            let begun = Instant::now();
            let (new, value) = (format!("new{round}"), format!("changed{round}"));
            lab.map(&new, "1");
            lab.set_map("m3", &value);
            when(&noted.table, &key(&new), holds("1")).await;
            when(&noted.table, &key("m3"), holds(&value)).await;
            println!("  caught up {:?} after the server was ready", begun.elapsed());
            let mut notes = noted.take();
            notes.sort();
            notes.dedup();
            assert!(notes.iter().all(|note| !note.starts_with("remove")), "{notes:?}");
        }
        assert_eq!(noted.table.len(), 23);
    });
}

fn a_forgotten_version_leads_to_a_new_list() {
    let mut lab = Lab::new();
    for name in ["stays", "goes", "changes"] {
        lab.map(name, "1");
    }
    run(async {
        let api = Api::new(lab.admin()).unwrap();
        let noted = Noted::new();
        let following = follow(&api, mine(), noted.clone());
        following.known().await;
        noted.take();
        lab.plane.kill(Part::ApiServer).unwrap();
        let etcd = Etcd;
        etcd.delete("configmaps/default/goes");
        let meta = |name: &str| json!({"name": name, "namespace": "default", "uid": name, "creationTimestamp": "2026-01-02T03:04:05Z"});
        let map =
            |name: &str| json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta(name), "data": {"k": "2"}});
        etcd.put(&[
            ("configmaps/default/changes".into(), map("changes")),
            ("configmaps/default/new".into(), map("new")),
        ]);
        etcd.compact();
        lab.plane.run(Part::ApiServer).unwrap();
        when(&noted.table, &key("goes"), |map| map.is_none()).await;
        when(&noted.table, &key("changes"), holds("2")).await;
        when(&noted.table, &key("new"), holds("2")).await;
        assert_eq!(noted.table.len(), 4);
        let notes = noted.take();
        let removed: Vec<_> = notes.iter().filter(|note| note.starts_with("remove")).collect();
        assert_eq!(removed, ["remove goes"], "after {notes:?}");
        assert_eq!(notes.last().map(String::as_str), Some("remove goes"), "only when the list is complete: {notes:?}");
    });
}

/// After a restore from a backup the server's versions are smaller than those it gave out before.
fn a_restored_backup_is_believed() {
    let mut lab = Lab::new();
    lab.map("old", "1");
    run(async {
        lab.plane.kill(Part::ApiServer).unwrap();
        lab.plane.stop(Part::Etcd).unwrap();
        let (data, backup) = (lab.dir.path().join("etcd"), lab.dir.path().join("backup"));
        copy(&data, &backup);
        lab.plane.run(Part::Etcd).unwrap();
        lab.plane.run(Part::ApiServer).unwrap();
        for n in 0..300 {
            lab.set_map("old", &n.to_string());
        }
        lab.map("lost", "1");
        let api = Api::new(Config { silence: Duration::from_secs(1), ..lab.admin() }).unwrap();
        let table = store().config_maps().clone();
        let following = follow(&api, mine(), table.clone());
        following.known().await;
        assert!(table.get(&key("lost")).is_some());
        lab.plane.kill(Part::ApiServer).unwrap();
        lab.plane.stop(Part::Etcd).unwrap();
        std::fs::remove_dir_all(&data).unwrap();
        std::fs::rename(&backup, &data).unwrap();
        lab.plane.run(Part::Etcd).unwrap();
        lab.plane.run(Part::ApiServer).unwrap();
        when(&table, &key("lost"), |map| map.is_none()).await;
        when(&table, &key("old"), holds("1")).await;
    });
}

fn copy(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

fn a_server_without_streamed_lists_is_read_in_pages() {
    let extra = vec![(Part::ApiServer, "--feature-gates=WatchList=false".to_owned())];
    let lab = Lab::with(Options { extra, ..Options::default() });
    let meta = |name: &str| json!({"name": name, "namespace": "default", "uid": name, "creationTimestamp": "2026-01-02T03:04:05Z"});
    let map = |n: usize| {
        let name = format!("m{n}");
        let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta(&name), "data": {"k": "1"}});
        (format!("configmaps/default/{name}"), map)
    };
    Etcd.put(&(0..1200).map(map).collect::<Vec<_>>());
    run(async {
        let api = Api::new(lab.admin()).unwrap();
        let table = store().config_maps().clone();
        let following = follow(&api, mine(), table.clone());
        tokio::time::timeout(LIMIT, following.known()).await.unwrap();
        assert_eq!(table.len(), 1201);
        lab.set_map("m7", "2");
        when(&table, &key("m7"), holds("2")).await;
        assert!(following.progress().borrow().failure.is_none());
    });
}

/// The network swallows what is sent: neither side hears of it.
fn a_half_closed_connection_is_given_up() {
    let lab = Lab::new();
    lab.map("a", "1");
    run(async {
        let config = lab.admin();
        let relay = Relay::start(lab.plane.address()).await;
        let server = cluster::api::Server::new("127.0.0.1", relay.port);
        let api = Api::new(Config { server, silence: Duration::from_secs(2), ..config }).unwrap();
        let table = store().config_maps().clone();
        let following = follow(&api, mine(), table.clone());
        following.known().await;
        relay.swallow.send_replace(true);
        lab.set_map("a", "2");
        let begun = Instant::now();
        when(&table, &key("a"), holds("2")).await;
        assert!((1.0..20.0).contains(&begun.elapsed().as_secs_f64()), "after {:?}", begun.elapsed());
    });
}

/// Passes bytes on, until it swallows those of the connections that it has; new ones work again.
struct Relay {
    port: u16,
    swallow: tokio::sync::watch::Sender<bool>,
}

impl Relay {
    async fn start(server: std::net::SocketAddr) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let swallow = tokio::sync::watch::Sender::new(false);
        let told = swallow.clone();
        tokio::spawn(async move {
            loop {
                let (mut client, _) = listener.accept().await.unwrap();
                let mut swallows = told.subscribe();
                let is_old = !*swallows.borrow();
                tokio::spawn(async move {
                    let mut server = tokio::net::TcpStream::connect(server).await.unwrap();
                    let swallowed = async { drop(swallows.wait_for(|swallow| *swallow && is_old).await) };
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut client, &mut server) => {}
                        () = swallowed => std::future::pending().await,
                    }
                });
            }
        });
        Self { port, swallow }
    }
}

fn hundreds_of_watches_share_few_connections() {
    let lab = Lab::new();
    run(async {
        let api = Api::new(lab.admin()).unwrap();
        api.server_version().await.unwrap();
        let before = connections();
        let followed: BTreeMap<String, _> = (0..350)
            .map(|n| {
                let (name, table) = (format!("w{n}"), store().config_maps().clone());
                let following = follow(&api, Selection::named(&key(&name)), table.clone());
                (name, (following, table))
            })
            .collect();
        let begun = Instant::now();
        for (following, _) in followed.values() {
            following.known().await;
        }
        println!("  350 watches known after {:?} on {} connections", begun.elapsed(), connections() - before);
        assert!(connections() - before <= 5);
        lab.map("w340", "1");
        when(&followed["w340"].1, &key("w340"), holds("1")).await;
    });
}

/// Connections of this process to the API server.
fn connections() -> usize {
    let mine: Vec<String> = std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
        .filter_map(|link| Some(link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
        .collect();
    let table = std::fs::read_to_string("/proc/thread-self/net/tcp").unwrap();
    let to_server = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    to_server.filter(|fields| fields[2].ends_with(":192B") && mine.iter().any(|inode| inode == fields[9])).count()
}
