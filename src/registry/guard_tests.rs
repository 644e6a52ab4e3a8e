//! Guards with real connections to instances, in paused time.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tokio::{net::TcpListener, time::Instant};

use super::{
    ask::tests::silence,
    tests::{GRACE, Node, TTL, ids, key, node, refused, registration},
    *,
};
use crate::{
    catalog::Reader,
    model::Revision,
    store::{MemoryStore, Store},
};

/// A port at which a process accepts connections, until it is dropped.
struct Process {
    tasks: Tasks,
    port: u16,
}

impl Process {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let tasks = Tasks::default();
        let port = listener.local_addr().unwrap().port();
        tasks.spawn_until_shutdown("process", async move {
            loop {
                drop(listener.accept().await.unwrap());
            }
        });
        Self { tasks, port }
    }

    async fn kill(self) {
        self.tasks.shutdown().start();
        assert_eq!(self.tasks.join(Duration::from_secs(1)).await, 0);
    }
}

fn stale(catalog: &Reader) -> Vec<String> {
    let snapshot = catalog.latest();
    let service = snapshot.service(&key("a").service).cloned();
    let all = service.iter().flat_map(|service| service.instances());
    all.filter(|it| it.stale.is_some()).map(|it| it.key.id.to_string()).collect()
}

/// Waits until the instances are these and those of them are stale.
async fn until(registry: &Registry, all: usize, held: usize) -> Duration {
    let (catalog, start) = (registry.catalog(), Instant::now());
    let seen = || (catalog.latest().instances(), catalog.latest().stale());
    let reached = async {
        while seen() != (all, held) {
            catalog.newer_than(catalog.latest().revision()).await;
        }
    };
    let reached = tokio::time::timeout(TTL * 20, reached).await;
    assert!(reached.is_ok(), "want {:?}, there are {:?}", (all, held), seen());
    start.elapsed()
}

#[tokio::test(start_paused = true)]
async fn instances_that_live_stay_when_all_renewals_stop() {
    let (registry, process) = (node().await.registry, Process::start().await);
    // Renewed at different times, then never again.
    let ids: Vec<String> = (0..10).map(|n| format!("i{n}")).collect();
    for id in &ids {
        registry.register(registration(id, process.port, None)).await.unwrap();
    }
    for _ in 0..2 {
        for id in &ids {
            tokio::time::sleep(TTL / 30).await;
            registry.renew(key(id), None).await.unwrap();
        }
    }
    let before = registry.catalog().latest().revision();
    until(&registry, 10, 10).await;
    let changes = registry.catalog().since(before).1;
    assert!(matches!(changes, catalog::Changes::Touched(touched) if touched.len() == 10));
    tokio::time::sleep(TTL * 10).await;
    assert_eq!(registry.catalog().latest().stale(), 10, "they are asked again and again");
    let snapshot = registry.catalog().latest();
    let reason = snapshot.instance(&key("i0")).unwrap().stale.clone().unwrap().reason;
    assert_eq!(
        reason,
        "its lease of 30s ended without a renewal, too many others went, and it still accepts connections"
    );

    // Owners come back: by a renewal, by a registration.
    for (n, id) in ids.iter().enumerate() {
        if n % 2 == 0 {
            registry.renew(key(id), None).await.unwrap();
        } else {
            let back = registry.register(registration(id, process.port, None)).await.unwrap();
            assert_eq!(back.instance.stale, None);
        }
    }
    until(&registry, 10, 0).await;
    assert_eq!(until(&registry, 10, 10).await.as_secs(), TTL.as_secs(), "and have leases again");
    process.kill().await;
    until(&registry, 0, 0).await;
}

#[tokio::test(start_paused = true)]
async fn instances_that_are_gone_go_at_once() {
    let registry = node().await.registry;
    for n in 1..=20 {
        registry.register(registration(&format!("i{n}"), n, None)).await.unwrap();
    }
    assert_eq!(until(&registry, 0, 0).await.as_secs(), TTL.as_secs());
}

#[tokio::test(start_paused = true)]
async fn a_session_that_hung_up_is_evidence_of_few_but_not_of_all() {
    let (registry, process) = (node().await.registry, Process::start().await);
    let mut sessions = Vec::new();
    for id in ["a", "b", "c", "d"] {
        let session = registry.session();
        session.register(registration(id, process.port, Some(1))).await.unwrap();
        sessions.push(session);
    }
    let start = Instant::now();
    let mut sessions = sessions.into_iter();
    for (left, held) in [(vec!["b", "c", "d"], vec![]), (vec!["c", "d"], vec![]), (vec!["c", "d"], vec!["c"])]
    {
        sessions.next().unwrap().end(Ended::HungUp).await;
        assert_eq!(ids(registry.catalog()), left);
        assert_eq!(stale(registry.catalog()), held);
    }
    assert!(start.elapsed() < GRACE);
    // Its owner comes back; the other closes its session itself.
    let session = registry.session();
    session.register(registration("c", process.port, Some(1))).await.unwrap();
    assert_eq!(stale(registry.catalog()), [""; 0]);
    sessions.next().unwrap().end(Ended::Closed).await;
    assert_eq!(ids(registry.catalog()), ["c"]);
    process.kill().await;
    session.end(Ended::HungUp).await;
    assert_eq!(ids(registry.catalog()), [""; 0]);
}

#[tokio::test]
async fn many_that_hang_up_at_the_same_time_are_counted_together() {
    let (registry, process) = (node().await.registry, Process::start().await);
    let mut sessions = Vec::new();
    for n in 0..40 {
        let session = registry.session();
        session.register(registration(&format!("i{n}"), process.port, Some(1))).await.unwrap();
        sessions.push(session);
    }
    futures_util::future::join_all(sessions.into_iter().map(|session| session.end(Ended::HungUp))).await;
    let snapshot = registry.catalog().latest();
    assert_eq!((snapshot.instances(), snapshot.stale()), (20, 20));
}

#[tokio::test(start_paused = true)]
async fn held_instances_survive_a_restart_and_an_operator_lets_them_go() {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::default());
    let first = Node::start(Arc::clone(&store)).await;
    let (silent, ..) = &silence().await;
    for id in ["i1", "i2", "i3"] {
        first.registry.register(registration(id, silent.port(), None)).await.unwrap();
    }
    until(&first.registry, 3, 3).await;
    let revision = first.registry.catalog().latest().revision();
    first.stop().await;

    let second = Node::start(store).await.registry;
    tokio::time::sleep(TTL * 10).await;
    assert_eq!(second.catalog().latest().stale(), 3);
    assert_eq!(second.catalog().latest().revision(), revision);
    second.drain(key("i1"), None).await.unwrap();
    assert_eq!(stale(second.catalog()).len(), 3, "a change by others is no sign of life");
    second.deregister(key("i3"), None).await.unwrap();
    second.register(registration("i2", silent.port(), None)).await.unwrap();
    let (released, removed) = second.release(key("a").service).await.unwrap();
    assert_eq!((removed, released), (1, second.catalog().latest().revision()));
    assert_eq!(ids(second.catalog()), ["i2"]);
    assert!(matches!(second.release("else".parse().unwrap()).await, Err(Error::NoService(_))));
    assert_eq!(refused(second.renew(key("i1"), None).await), "not found greeter/i1");
}

#[tokio::test(start_paused = true)]
async fn thousands_that_are_held_at_once_are_few_commits() {
    let (registry, process) = (node().await.registry, Process::start().await);
    let registrations =
        (0..2000).map(|n| registry.register(registration(&format!("i{n}"), process.port, None)));
    futures_util::future::join_all(registrations).await;
    let Revision(before) = registry.catalog().latest().revision();
    until(&registry, 2000, 2000).await;
    let Revision(after) = registry.catalog().latest().revision();
    assert!(after - before <= 2000 / 40 + 20, "{} commits", after - before);
    let address = SocketAddr::from(([127, 0, 0, 1], process.port));
    assert!(tokio::net::TcpStream::connect(address).await.is_ok());
}
