//! Guards with real connections to instances, in paused time.

use std::net::SocketAddr;

use tokio::{net::TcpListener, time::Instant};

use super::{super::ask::tests::silence, *};

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
    assert_eq!(reason, "its lease of 30s ended without a renewal, but it still accepts connections");

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

#[tokio::test]
async fn a_connection_that_was_closed_is_the_end_of_those_that_refuse() {
    let (registry, process, dead) = (node().await.registry, Process::start().await, Process::start().await);
    let mut sessions = Vec::new();
    for id in ["a", "b", "c"] {
        let session = registry.session();
        session.register(registration(id, process.port, Some(1))).await.unwrap();
        sessions.push(session);
    }
    let of_dead = registry.session();
    of_dead.register(registration("dead", dead.port, Some(1))).await.unwrap();
    dead.kill().await;
    let start = Instant::now();
    of_dead.end(Ended::HungUp).await;
    assert_eq!(ids(registry.catalog()), ["a", "b", "c"]);
    assert!(start.elapsed() < GRACE);

    // As when a network mends: all at once, and all are there. Of one the end of its stream came alone.
    let ends = [Ended::HungUp, Ended::HungUp, Ended::Closed];
    let ended = sessions.into_iter().zip(ends).map(|(session, how)| session.end(how));
    futures_util::future::join_all(ended).await;
    assert_eq!(ids(registry.catalog()), ["a", "b", "c"]);
    assert_eq!(stale(registry.catalog()), [""; 0]);
    let instance = |id: &str| Arc::clone(registry.catalog().latest().instance(&key(id)).unwrap());
    assert!(registry.is_abandoned(&instance("a")), "its owner has the grace");
    let session = registry.session();
    session.register(registration("a", process.port, Some(1))).await.unwrap();
    assert!(!registry.is_abandoned(&instance("a")));

    // It accepted connections for a moment longer than its owner had one.
    let (dying, of_dying) = (Process::start().await, registry.session());
    of_dying.register(registration("dying", dying.port, Some(1))).await.unwrap();
    of_dying.end(Ended::HungUp).await;
    assert!(ids(registry.catalog()).contains(&"dying".to_owned()));
    let start = Instant::now();
    dying.kill().await;
    until(&registry, 3, 0).await;
    assert!(start.elapsed() < GRACE / 4, "{:?}", start.elapsed());

    // The end of the last one is believed, too, when it refuses.
    process.kill().await;
    session.end(Ended::HungUp).await;
    assert_eq!(ids(registry.catalog()), ["b", "c"]);
}

/// What lives is not removed for its owner's silence, except one alone whose lease has a TTL: a process that renews its own
/// lease and stands still accepts connections, too.
#[tokio::test(start_paused = true)]
async fn owners_that_fall_silent_one_after_the_other() {
    let registry = node().await.registry;
    let (process, other, third) = (Process::start().await, Process::start().await, Process::start().await);
    let mut keep = Vec::new();
    for n in 0..10 {
        let session = registry.session();
        session.register(registration(&format!("s{n}"), process.port, Some(1))).await.unwrap();
        keep.push(session);
    }
    registry.register(registration("alone", process.port, Some(1))).await.unwrap();
    assert_eq!(until(&registry, 10, 0).await.as_secs(), TTL.as_secs(), "the end of one lease is believed");
    let entries = registry.history(&key("a").service).await.unwrap();
    let last = entries.last().unwrap();
    let why = "its lease of 30s ended without a renewal, and it still accepts connections";
    assert_eq!((last.id.as_str(), last.why.as_str()), ("alone", why));

    // Far fewer than the share, spread over minutes.
    for (n, session) in keep.drain(..4).enumerate() {
        session.end(Ended::Lost).await;
        assert_eq!(until(&registry, 10, n + 1).await.as_secs(), GRACE.as_secs());
        tokio::time::sleep(Guards::default().window / 3).await;
    }
    registry.register(registration("second", third.port, Some(1))).await.unwrap();
    until(&registry, 11, 5).await;
    let snapshot = registry.catalog().latest();
    let reason = |id: &str| snapshot.instance(&key(id)).unwrap().stale.clone().unwrap().reason;
    assert_eq!(
        reason("s0"),
        "its session was lost, and its owner did not come back within 10s, but it still accepts connections"
    );
    assert_eq!(
        reason("second"),
        "its lease of 30s ended without a renewal, but it still accepts connections"
    );

    // Another one has the address of one that is held, and of one whose lease ends.
    registry.register(registration("before", other.port, Some(1))).await.unwrap();
    tokio::time::sleep(TTL / 2).await;
    keep.push(registry.session());
    keep[6].register(registration("after", other.port, Some(1))).await.unwrap();
    until(&registry, 12, 5).await;
    let entries = registry.history(&key("a").service).await.unwrap();
    let why = "its lease of 30s ended without a renewal, and another instance has its address";
    assert_eq!(entries.last().map(|it| (it.id.as_str(), it.why.as_str())), Some(("before", why)));
    process.kill().await;
    until(&registry, 8, 1).await;
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
    let Released { revision, removed, published } = second.release(key("a").service).await.unwrap();
    assert_eq!((removed, published, revision), (1, 0, second.catalog().latest().revision()));
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
