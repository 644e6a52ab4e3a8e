use std::{sync::Arc, time::Duration};

use super::*;
use crate::{
    catalog::{self, Reader},
    model::{
        HealthReport, Incarnation, InstanceKey, Members, RawCheck, RawKind, RawRegistration, Registration,
        Revision, State, Update, Verdict,
    },
    rt::{Readiness, Shutdown},
    store::{Listing, MemoryStore, Op, Store, StoreError, Watch},
};
use futures_util::future::BoxFuture;
use tokio::sync::Semaphore;

pub(super) const GRACE: Duration = Duration::from_secs(10);
pub(super) const TTL: Duration = Duration::from_secs(30);

/// A registry over a store, and the tasks that keep it.
pub(super) struct Node {
    pub(super) registry: Registry,
    tasks: Tasks,
}

impl Node {
    pub(super) async fn start(store: Arc<dyn Store>) -> Self {
        Self::start_among(store, &watch::Sender::new(Members::alone("n1".parse().unwrap()))).await
    }

    async fn start_among(store: Arc<dyn Store>, members: &watch::Sender<Members>) -> Self {
        Self::start_with(store, members, None).await
    }

    async fn start_with(
        store: Arc<dyn Store>,
        members: &watch::Sender<Members>,
        forward: Option<Arc<dyn Forward>>,
    ) -> Self {
        let tasks = Tasks::new(Shutdown::default());
        let (writer, reader) = catalog::catalog();
        let config = Config { session_grace: GRACE, ..Config::default() };
        let gate = Readiness::default().gate("registry");
        let mirror = Mirror::new(Arc::clone(&store), writer, reader.clone());
        mirror.start(Patience::None, &tasks, gate).await.unwrap();
        let members = members.subscribe();
        let registry = Registry::start(config, store, reader, members, forward, &Metrics::default(), &tasks);
        Self { registry, tasks }
    }

    pub(super) async fn stop(self) {
        self.tasks.shutdown().start();
        assert_eq!(self.tasks.join(Duration::from_secs(5)).await, 0);
    }
}

pub(super) async fn node() -> Node {
    Node::start(Arc::new(MemoryStore::default())).await
}

/// A store whose commits wait, in order, until they are let through.
#[derive(Debug)]
struct Gated {
    store: MemoryStore,
    gate: Semaphore,
    waiting: watch::Sender<usize>,
}

impl Gated {
    fn open() -> Arc<Self> {
        Arc::new(Self {
            store: MemoryStore::default(),
            gate: Semaphore::new(Semaphore::MAX_PERMITS),
            waiting: watch::Sender::default(),
        })
    }

    fn close_gate(&self) {
        self.gate.forget_permits(Semaphore::MAX_PERMITS);
    }

    fn let_through(&self, commits: usize) {
        self.gate.add_permits(commits);
    }

    async fn until_waiting(&self, commits: usize) {
        let mut waiting = self.waiting.subscribe();
        let reached = waiting.wait_for(|waiting| *waiting == commits);
        tokio::time::timeout(TTL * 2, reached).await.expect("not so many commits").unwrap();
    }
}

impl Store for Gated {
    fn commit(&self, ops: Vec<Op>) -> BoxFuture<'_, Result<Revision, StoreError>> {
        Box::pin(async {
            self.waiting.send_modify(|waiting| *waiting += 1);
            self.gate.acquire().await.unwrap().forget();
            self.waiting.send_modify(|waiting| *waiting -= 1);
            self.store.commit(ops).await
        })
    }

    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<crate::store::Entry>, StoreError>> {
        self.store.get(key)
    }

    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Listing, StoreError>> {
        self.store.list(prefix)
    }

    fn watch<'a>(
        &'a self,
        prefix: &'a str,
        after: Revision,
    ) -> BoxFuture<'a, Result<Box<dyn Watch>, StoreError>> {
        self.store.watch(prefix, after)
    }

    fn advance(&self, to: Revision) -> BoxFuture<'_, Result<(), StoreError>> {
        self.store.advance(to)
    }

    fn close(&self) -> BoxFuture<'_, Result<(), StoreError>> {
        self.store.close()
    }
}

pub(super) fn registration(id: &str, port: u16, incarnation: Option<u64>) -> Registration {
    let raw = RawRegistration {
        service: "greeter".into(),
        id: id.into(),
        incarnation,
        address: Some("127.0.0.1".into()),
        port: Some(port.into()),
        ttl: Some(TTL),
        ..RawRegistration::default()
    };
    Registration::check(raw, &Limits::default()).unwrap()
}

pub(super) fn key(id: &str) -> InstanceKey {
    InstanceKey { service: "greeter".parse().unwrap(), id: id.parse().unwrap() }
}

pub(super) fn ids(catalog: &Reader) -> Vec<String> {
    let snapshot = catalog.latest();
    let service = snapshot.service(&key("a").service).cloned();
    service.map(|s| s.instances().map(|i| i.key.id.to_string()).collect()).unwrap_or_default()
}

pub(super) fn refused<T: std::fmt::Debug>(result: Result<T, Error>) -> String {
    match result.unwrap_err() {
        Error::Conflict(problem) => format!("conflict {}", problem.field),
        Error::NotFound(key) => format!("not found {key}"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_write_is_visible_when_answered_and_a_renewal_writes_nothing() {
    let registry = node().await.registry;
    let accepted = registry.register(registration("a", 1, None)).await.unwrap();
    assert_eq!(registry.catalog().latest().instance(&key("a")), Some(&accepted.instance));
    let again = registry.register(registration("a", 1, None)).await.unwrap();
    assert_eq!(again.revision, accepted.revision);
    let moved = registry.register(registration("a", 2, None)).await.unwrap();
    assert!(moved.revision > accepted.revision);
    assert_eq!(moved.instance.incarnation, accepted.instance.incarnation);
    assert_eq!(registry.renew(key("a"), None).await.unwrap(), (TTL, moved.revision));
    assert_eq!(refused(registry.renew(key("b"), None).await), "not found greeter/b");
    let revision = registry.deregister(key("a"), None).await.unwrap();
    assert_eq!(ids(registry.catalog()), [""; 0]);
    assert_eq!(registry.deregister(key("a"), None).await.unwrap(), revision, "removing twice is no change");
    assert_eq!(registry.catalog().latest().services().len(), 1, "the service stays known");
}

#[tokio::test(start_paused = true)]
async fn two_incarnations_of_one_id() {
    let registry = node().await.registry;
    registry.register(registration("a", 1, Some(5))).await.unwrap();
    for (port, incarnation, want) in [
        (1, Some(4), Err("conflict incarnation")),
        (2, Some(6), Err("conflict incarnation")),
        (2, Some(5), Ok(5)),
        (2, Some(6), Ok(6)),
        (2, None, Ok(6)),
        (2, Some(5), Err("conflict incarnation")),
    ] {
        let got = registry.register(registration("a", port, incarnation)).await;
        match want {
            Ok(want) => assert_eq!(got.unwrap().instance.incarnation, Incarnation(want)),
            Err(want) => assert_eq!(refused(got), want, "{port} {incarnation:?}"),
        }
    }
    assert_eq!(refused(registry.drain(key("a"), Some(Incarnation(5))).await), "conflict incarnation");
    assert_eq!(refused(registry.deregister(key("a"), Some(Incarnation(7))).await), "conflict incarnation");
}

#[tokio::test(start_paused = true)]
async fn a_renewal_does_not_end_a_drain_but_a_new_run_does() {
    let registry = node().await.registry;
    registry.register(registration("a", 1, Some(1))).await.unwrap();
    let drained = registry.drain(key("a"), None).await.unwrap();
    assert_eq!(drained.instance.state, State::Draining);
    assert_eq!(registry.drain(key("a"), None).await.unwrap().revision, drained.revision);
    for (incarnation, want) in
        [(None, State::Draining), (Some(1), State::Draining), (Some(2), State::Serving)]
    {
        let accepted = registry.register(registration("a", 1, incarnation)).await.unwrap();
        assert_eq!(accepted.instance.state, want, "{incarnation:?}");
    }
    let update = Update { weight: 7.try_into().ok(), metadata: None };
    let updated = registry.update(key("a"), None, update.clone()).await.unwrap();
    assert_eq!(updated.instance.weight.get(), 7);
    assert_eq!(registry.update(key("a"), None, update).await.unwrap().revision, updated.revision);
}

#[tokio::test(start_paused = true)]
async fn leases_end_and_sessions_end() {
    let registry = node().await.registry;
    registry.register(registration("ttl", 1, None)).await.unwrap();
    let (closed, lost) = (registry.session(), registry.session());
    closed.register(registration("closed", 2, None)).await.unwrap();
    lost.register(registration("lost", 3, None)).await.unwrap();
    assert_eq!(refused(registry.register(registration("lost", 3, None)).await), "conflict incarnation");
    assert_eq!(refused(registry.renew(key("lost"), None).await), "conflict instance");

    closed.end(Ended::Closed).await;
    assert_eq!(ids(registry.catalog()), ["lost", "ttl"]);
    lost.end(Ended::Lost).await;
    assert_eq!(ids(registry.catalog()), ["lost", "ttl"]);
    let gone = |want: Vec<&'static str>| {
        let catalog = registry.catalog().clone();
        async move {
            let start = tokio::time::Instant::now();
            while ids(&catalog) != want {
                catalog.newer_than(catalog.latest().revision()).await;
            }
            start.elapsed()
        }
    };
    assert_eq!(gone(vec!["ttl"]).await.as_secs(), GRACE.as_secs());
    assert_eq!(gone(vec![]).await.as_secs(), (TTL - GRACE).as_secs());
}

#[tokio::test(start_paused = true)]
async fn a_restart_expires_nobody_and_owners_come_back() {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::default());
    let first = Node::start(Arc::clone(&store)).await;
    first.registry.register(registration("ttl", 1, None)).await.unwrap();
    let session = first.registry.session();
    session.register(registration("session", 2, Some(9))).await.unwrap();
    let revision = first.registry.catalog().latest().revision();
    first.stop().await;

    tokio::time::sleep(TTL * 10).await;
    let second = Node::start(store).await;
    let registry = &second.registry;
    assert_eq!(ids(registry.catalog()), ["session", "ttl"]);
    assert_eq!(registry.catalog().latest().revision(), revision);
    let session = registry.session();
    let back = session.register(registration("session", 2, Some(9))).await.unwrap();
    assert!(back.revision <= revision, "coming back changes nothing: {} {revision}", back.revision);
    registry.renew(key("ttl"), None).await.unwrap();
    tokio::time::sleep(TTL - Duration::from_secs(1)).await;
    assert_eq!(ids(registry.catalog()), ["session", "ttl"]);
}

#[tokio::test]
async fn many_writers_of_one_instance_and_of_many_all_get_an_answer() {
    let registry = node().await.registry;
    let writes = (0..200u16).map(|n| {
        let registry = registry.clone();
        async move {
            registry.register(registration(&format!("i{}", n % 20), 1000 + n, None)).await.unwrap();
            if n % 3 == 0 {
                registry.deregister(key(&format!("i{}", n % 20)), None).await.map(drop)
            } else {
                Ok(())
            }
        }
    });
    for result in futures_util::future::join_all(writes).await {
        assert!(matches!(result, Ok(()) | Err(Error::Conflict(_))), "{result:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_empty_service_is_forgotten_after_its_retention() {
    let registry = node().await.registry;
    registry.register(registration("a", 1, None)).await.unwrap();
    assert_eq!(refused(registry.remove_service(key("a").service).await), "conflict service");
    registry.deregister(key("a"), None).await.unwrap();
    let start = tokio::time::Instant::now();
    while registry.catalog().latest().services().len() > 0 {
        registry.catalog().newer_than(registry.catalog().latest().revision()).await;
    }
    let after = start.elapsed();
    assert!((3600..=4000).contains(&after.as_secs()), "{after:?}");
    assert!(matches!(registry.remove_service(key("a").service).await, Err(Error::NoService(_))));
}

#[tokio::test(start_paused = true)]
async fn an_answered_registration_outlives_the_removal_that_was_under_way() {
    for session in [false, true] {
        let store = Gated::open();
        let registry = Node::start(Arc::clone(&store) as Arc<dyn Store>).await.registry;
        let ends = registry.session();
        if session {
            ends.register(registration("a", 1, Some(1))).await.unwrap();
        } else {
            registry.register(registration("a", 1, Some(1))).await.unwrap();
        }
        store.close_gate();
        let ((), (registered, renewed)) = tokio::join!(
            async {
                if session {
                    ends.end(Ended::Closed).await;
                }
            },
            async {
                store.until_waiting(1).await;
                let renewed = registry.renew(key("a"), None).await;
                let (again, ()) = tokio::join!(registry.register(registration("a", 1, Some(1))), async {
                    store.until_waiting(2).await;
                    store.let_through(10);
                });
                (again, renewed)
            },
        );
        assert_eq!(refused(renewed), "not found greeter/a", "its removal was under way");
        assert_eq!(registered.unwrap().instance.incarnation, Incarnation(1));
        assert_eq!(ids(registry.catalog()), ["a"], "session: {session}");
        registry.renew(key("a"), None).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_service_is_not_removed_under_a_registration() {
    let store = Gated::open();
    let registry = Node::start(Arc::clone(&store) as Arc<dyn Store>).await.registry;
    registry.register(registration("a", 1, None)).await.unwrap();
    registry.deregister(key("a"), None).await.unwrap();
    store.close_gate();
    let (registered, removed, ()) = tokio::join!(
        registry.register(registration("b", 2, None)),
        async {
            store.until_waiting(1).await;
            registry.remove_service(key("b").service).await
        },
        async {
            store.until_waiting(2).await;
            store.let_through(10);
        },
    );
    registered.unwrap();
    assert_eq!(refused(removed), "conflict service");
    assert_eq!(ids(registry.catalog()), ["b"]);
    registry.deregister(key("b"), None).await.unwrap();
    assert!(store.list(record::INSTANCES).await.unwrap().entries.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_write_that_lost_to_a_removal_waits_until_it_is_seen() {
    let store = Gated::open();
    let registry = Node::start(Arc::clone(&store) as Arc<dyn Store>).await.registry;
    registry.register(registration("a", 1, None)).await.unwrap();
    store.close_gate();
    let (removed, moved, ()) = tokio::join!(
        registry.deregister(key("a"), None),
        async {
            store.until_waiting(1).await;
            registry.register(registration("a", 2, None)).await
        },
        async {
            store.until_waiting(2).await;
            store.let_through(10);
        },
    );
    removed.unwrap();
    assert_eq!(moved.unwrap().instance.port.get(), 2);
}

/// Processes that share a store, and what each sees of the others.
struct Cluster {
    nodes: std::collections::BTreeMap<&'static str, (Node, watch::Sender<Members>)>,
}

impl Cluster {
    async fn start(names: &[&'static str]) -> Self {
        let store: Arc<dyn Store> = Arc::new(MemoryStore::default());
        let mut nodes = std::collections::BTreeMap::new();
        for name in names {
            let members = watch::Sender::new(members(name, names));
            nodes.insert(*name, (Node::start_among(Arc::clone(&store), &members).await, members));
        }
        Self { nodes }
    }

    fn registry(&self, name: &str) -> &Registry {
        &self.nodes.get(name).unwrap().0.registry
    }

    /// `name` is dead in the eyes of all, itself included; it is not told otherwise.
    fn lose(&self, name: &str) {
        let live: Vec<&str> = self.nodes.keys().copied().filter(|node| *node != name).collect();
        for (own, (_, sender)) in &self.nodes {
            sender.send_replace(members(own, &live));
        }
    }

    /// Until all nodes know what the store holds.
    async fn settled(&self) {
        let newest = self.nodes.values().map(|(node, _)| node.registry.catalog().latest().revision()).max();
        for (node, _) in self.nodes.values() {
            node.registry.catalog().reached(newest.unwrap()).await;
        }
        // The tasks that follow the catalog have their turn.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }

    fn owner(&self, id: &str) -> String {
        let (node, _) = self.nodes.values().next().unwrap();
        let snapshot = node.registry.catalog().latest();
        snapshot
            .instance(&key(id))
            .and_then(|i| i.owner.as_ref().map(ToString::to_string))
            .unwrap_or_default()
    }
}

fn members(own: &str, live: &[&str]) -> Members {
    Members { own: own.parse().unwrap(), live: live.iter().map(|id| id.parse().unwrap()).collect() }
}

#[tokio::test(start_paused = true)]
async fn an_owner_moves_with_its_lease_to_the_node_it_comes_to() {
    let cluster = Cluster::start(&["n1", "n2", "n3"]).await;
    let (n1, n2) = (cluster.registry("n1"), cluster.registry("n2"));
    n1.register(registration("a", 1, Some(1))).await.unwrap();
    cluster.settled().await;
    assert_eq!(cluster.owner("a"), "n1");
    for turn in 0..5 {
        tokio::time::sleep(TTL / 2).await;
        n2.renew(key("a"), Some(Incarnation(1))).await.unwrap();
        cluster.settled().await;
        assert_eq!((cluster.owner("a").as_str(), ids(n1.catalog())), ("n2", vec!["a".to_owned()]), "{turn}");
    }
    let revision = n2.catalog().latest().revision();
    n2.renew(key("a"), None).await.unwrap();
    assert_eq!(n2.catalog().latest().revision(), revision, "only the move was written");

    // Whether it may be replaced elsewhere only its owner's node can tell.
    let moved = n1.register(registration("a", 2, Some(2))).await.unwrap_err();
    assert!(matches!(moved, Error::Elsewhere { owner, .. } if owner.as_str() == "n2"));
    let session = n1.session();
    session.register(registration("a", 1, Some(1))).await.unwrap();
    cluster.settled().await;
    session.end(Ended::Closed).await;
    cluster.settled().await;
    assert_eq!(ids(n2.catalog()), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn the_leases_of_a_dead_node_go_on_elsewhere_whole() {
    let cluster = Cluster::start(&["n1", "n2", "n3"]).await;
    let (n1, n2, n3) = (cluster.registry("n1"), cluster.registry("n2"), cluster.registry("n3"));
    let stays = n1.session();
    for id in ["a", "b", "c", "d"] {
        n1.register(registration(id, 1, Some(1))).await.unwrap();
    }
    stays.register(registration("s", 2, Some(1))).await.unwrap();
    cluster.settled().await;
    tokio::time::sleep(TTL - Duration::from_secs(1)).await;
    let died = tokio::time::Instant::now();
    cluster.lose("n1");
    cluster.settled().await;

    assert!(matches!(n1.renew(key("a"), None).await, Err(Error::Isolated)), "who is dead keeps nothing");
    assert!(matches!(n1.register(registration("x", 1, None)).await, Err(Error::Isolated)));
    n1.left().await;

    // Some come back: to either node, and in time.
    tokio::time::sleep(GRACE / 2).await;
    let session = n3.session();
    session.register(registration("s", 2, Some(1))).await.unwrap();
    n2.renew(key("a"), None).await.unwrap();
    n3.renew(key("b"), None).await.unwrap();
    cluster.settled().await;
    assert_eq!(cluster.owner("s"), "n3");

    // The session that n1 still has cannot take anything away.
    stays.end(Ended::Closed).await;
    cluster.settled().await;
    assert_eq!(ids(n2.catalog()), ["a", "b", "c", "d", "s"]);

    while ids(n2.catalog()).len() > 3 {
        n2.catalog().newer_than(n2.catalog().latest().revision()).await;
    }
    assert_eq!(died.elapsed().as_secs(), TTL.as_secs(), "a whole TTL for those that did not come back");
    assert_eq!(ids(n2.catalog()), ["a", "b", "s"]);
}

#[tokio::test(start_paused = true)]
async fn a_node_that_returns_counts_again_what_it_owns() {
    let cluster = Cluster::start(&["n1", "n2"]).await;
    let (n1, n2) = (cluster.registry("n1"), cluster.registry("n2"));
    n1.register(registration("a", 1, Some(1))).await.unwrap();
    cluster.settled().await;
    cluster.lose("n1");
    cluster.settled().await;
    tokio::time::sleep(TTL / 2).await;
    let back = tokio::time::Instant::now();
    for (own, (_, sender)) in &cluster.nodes {
        sender.send_replace(members(own, &["n1", "n2"]));
    }
    cluster.settled().await;
    while ids(n2.catalog()) == ["a"] {
        n2.catalog().newer_than(n2.catalog().latest().revision()).await;
    }
    assert_eq!(back.elapsed().as_secs(), TTL.as_secs());
}

#[tokio::test(start_paused = true)]
async fn what_is_said_many_times_a_second_reaches_watchers_and_no_snapshot() {
    let cluster = Cluster::start(&["n1", "n2"]).await;
    let (n1, n2) = (cluster.registry("n1"), cluster.registry("n2"));
    n1.register(registration("a", 1, Some(1))).await.unwrap();
    cluster.settled().await;
    let revision = n2.catalog().latest().revision();
    let mut heard = n2.catalog().live().watch(&key("a").service);
    let said = |block: u32| std::collections::BTreeMap::from([("block".to_owned(), block.to_string())]);

    let start = tokio::time::Instant::now();
    for block in 0..1000 {
        n1.publish(key("a"), None, said(block)).unwrap();
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let last = |live: &catalog::LiveService| live.instances.values().any(|live| live.entries == said(999));
    heard.wait_for(last).await.unwrap();
    assert!(start.elapsed() < Duration::from_millis(1100), "{:?}", start.elapsed());
    let stored = n1.inner.store.list("").await.unwrap().revision.0 - revision.0;
    assert!((10..=25).contains(&stored), "{stored} commits for 1000 in a second");
    assert_eq!(n2.catalog().latest().revision(), revision, "no snapshot, so no proxy is woken");

    assert_eq!(refused(n1.publish(key("b"), None, said(0))), "not found greeter/b");
    assert_eq!(refused(n1.publish(key("a"), Some(Incarnation(2)), said(0))), "conflict incarnation");

    // What a run said ends with it, also what comes late.
    n1.publish(key("a"), None, said(1000)).unwrap();
    n1.register(registration("a", 1, Some(2))).await.unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    cluster.settled().await;
    assert!(n2.catalog().live().get(&key("a")).is_none());
    n2.publish(key("a"), None, said(7)).unwrap();
    heard.wait_for(|live| live.instances.values().any(|live| live.entries == said(7))).await.unwrap();
    n2.deregister(key("a"), None).await.unwrap();
    assert!(n2.catalog().live().get(&key("a")).is_none());
    cluster.settled().await;
    assert!(n1.inner.store.list(record::LIVE).await.unwrap().entries.is_empty(), "nothing is left behind");
}

fn checked(id: &str, incarnation: u64) -> Registration {
    let raw = RawRegistration {
        service: "greeter".into(),
        id: id.into(),
        incarnation: Some(incarnation),
        address: Some("127.0.0.1".into()),
        port: Some(1),
        ttl: Some(TTL),
        check: Some(RawCheck::default()),
        ..RawRegistration::default()
    };
    Registration::check(raw, &Limits::default()).unwrap()
}

fn report(id: &str, incarnation: u64, verdict: Verdict) -> HealthReport {
    HealthReport { key: key(id), incarnation: Incarnation(incarnation), verdict, reason: "seen\nso".into() }
}

/// `verdict, passed` of an instance.
fn verdict(registry: &Registry, id: &str) -> (Verdict, bool) {
    let snapshot = registry.catalog().latest();
    let health = &snapshot.instance(&key(id)).unwrap().health;
    (health.verdict, health.passed)
}

async fn records(store: &Arc<dyn Store>) -> usize {
    store.list(record::HEALTH).await.unwrap().entries.len()
}

#[tokio::test(start_paused = true)]
async fn a_verdict_is_written_when_it_changes_and_outlives_a_restart() {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::default());
    let node = Node::start(Arc::clone(&store)).await;
    let registry = &node.registry;
    let first = registry.register(checked("a", 1)).await.unwrap();
    assert_eq!(verdict(registry, "a"), (Verdict::Unknown, false));
    assert_eq!(registry.catalog().latest().instance(&key("a")), Some(&first.instance));

    let healthy = registry.set_health(vec![report("a", 1, Verdict::Healthy)]).await.unwrap();
    assert!(healthy > first.revision);
    assert_eq!(verdict(registry, "a"), (Verdict::Healthy, true));
    assert_eq!(registry.set_health(vec![report("a", 1, Verdict::Healthy)]).await.unwrap(), healthy);
    registry.set_health(vec![report("a", 1, Verdict::Unhealthy)]).await.unwrap();
    let reason = registry.catalog().latest().instance(&key("a")).unwrap().health.reason.clone();
    assert_eq!(&*reason, "seen so");

    // Neither a renewal nor an update touches it, and it does not stand in their way.
    assert_eq!(registry.register(checked("a", 1)).await.unwrap().revision, first.revision);
    let update = Update { weight: 3.try_into().ok(), metadata: None };
    let updated = registry.update(key("a"), None, update).await.unwrap();
    assert_eq!(updated.instance.health.verdict, Verdict::Unhealthy);
    assert_eq!(verdict(registry, "a"), (Verdict::Unhealthy, true));

    node.stop().await;
    let node = Node::start(Arc::clone(&store)).await;
    assert_eq!(verdict(&node.registry, "a"), (Verdict::Unhealthy, true));
    assert_eq!(records(&store).await, 1);
    node.registry.deregister(key("a"), None).await.unwrap();
    assert_eq!(records(&store).await, 0, "the verdict goes with its instance");
}

#[tokio::test(start_paused = true)]
async fn a_verdict_is_on_one_run_of_a_checked_instance() {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::default());
    let registry = Node::start(Arc::clone(&store)).await.registry;
    registry.register(checked("a", 1)).await.unwrap();
    registry.set_health(vec![report("a", 1, Verdict::Healthy)]).await.unwrap();
    registry.register(checked("a", 2)).await.unwrap();
    assert_eq!(verdict(&registry, "a"), (Verdict::Unknown, false), "a new run is checked anew");
    registry
        .set_health(vec![report("a", 1, Verdict::Unhealthy), report("b", 1, Verdict::Healthy)])
        .await
        .unwrap();
    assert_eq!(verdict(&registry, "a"), (Verdict::Unknown, false));
    registry.set_health(vec![report("a", 2, Verdict::Degraded)]).await.unwrap();
    assert_eq!(verdict(&registry, "a"), (Verdict::Degraded, true));
    let wrong = registry.report_health(report("a", 2, Verdict::Healthy)).await;
    assert_eq!(refused(wrong), "conflict health");

    // Without the check there is no verdict; with it again, proxies go on to know of the instance.
    registry.register(Registration { check: None, ..checked("a", 2) }).await.unwrap();
    assert_eq!(verdict(&registry, "a"), (Verdict::Unknown, true));
    assert_eq!(records(&store).await, 0);
    registry.register(checked("a", 2)).await.unwrap();
    assert_eq!(verdict(&registry, "a"), (Verdict::Unknown, true));

    let raw = RawCheck { kind: RawKind::Owner, ..RawCheck::default() };
    let owner = crate::model::Check::check_into(raw, &Limits::default(), &mut Default::default());
    registry.register(Registration { check: owner, ..checked("o", 1) }).await.unwrap();
    assert_eq!(verdict(&registry, "o"), (Verdict::Healthy, true));
    registry.report_health(report("o", 1, Verdict::Unhealthy)).await.unwrap();
    assert_eq!(verdict(&registry, "o"), (Verdict::Unhealthy, true));
    assert_eq!(
        refused(registry.report_health(report("o", 2, Verdict::Healthy)).await),
        "conflict incarnation"
    );
    registry.set_health(vec![report("o", 1, Verdict::Healthy)]).await.unwrap();
    assert_eq!(verdict(&registry, "o"), (Verdict::Unhealthy, true), "the server does not check it");
}

#[tokio::test(start_paused = true)]
async fn many_verdicts_are_few_commits_and_a_removal_meanwhile_harms_none() {
    let store = Gated::open();
    let registry = Node::start(Arc::clone(&store) as Arc<dyn Store>).await.registry;
    for n in 0..200 {
        registry.register(checked(&format!("i{n}"), 1)).await.unwrap();
    }
    store.close_gate();
    let reports = (0..200).map(|n| report(&format!("i{n}"), 1, Verdict::Healthy)).collect();
    let (removed, judged) = tokio::join!(registry.deregister(key("i7"), None), async {
        let judging = registry.set_health(reports);
        tokio::join!(judging, async {
            store.until_waiting(5).await;
            store.let_through(Semaphore::MAX_PERMITS);
        })
        .0
    });
    removed.unwrap();
    judged.unwrap();
    let snapshot = registry.catalog().latest();
    let healthy = |n: &usize| snapshot.instance(&key(&format!("i{n}"))).map(|i| i.health.verdict);
    assert!((0..200).filter(|n| *n != 7).all(|n| healthy(&n) == Some(Verdict::Healthy)));
    assert_eq!(records(&(store as Arc<dyn Store>)).await, 199);
}

/// The way to one other node; it is cut at will.
#[derive(Debug, Default)]
struct Line {
    to: std::sync::Mutex<Option<Registry>>,
}

impl Forward for Line {
    fn renew<'a>(
        &'a self,
        _: &'a crate::model::MemberId,
        key: &'a InstanceKey,
        incarnation: Incarnation,
    ) -> BoxFuture<'a, Option<Duration>> {
        let to = self.to.lock().unwrap().clone();
        Box::pin(async move { to?.renew_here(key.clone(), Some(incarnation)).await.ok().map(|(ttl, _)| ttl) })
    }
}

#[tokio::test(start_paused = true)]
async fn renewals_at_any_node_are_counted_where_the_lease_is_and_write_nothing() {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::default());
    let senders = ["n1", "n2"].map(|own| watch::Sender::new(members(own, &["n1", "n2"])));
    let line = Arc::new(Line::default());
    let n1 = Node::start_among(Arc::clone(&store), &senders[0]).await.registry;
    let n2 = Node::start_with(Arc::clone(&store), &senders[1], Some(line.clone())).await.registry;
    *line.to.lock().unwrap() = Some(n1.clone());
    let first = n1.register(registration("a", 1, Some(1))).await.unwrap();
    n2.catalog().reached(first.revision).await;
    for _ in 0..5 {
        tokio::time::sleep(TTL / 2).await;
        n2.renew(key("a"), None).await.unwrap();
        tokio::time::sleep(TTL / 2).await;
        // A second PUT renews, too.
        let again = n2.register(registration("a", 1, None)).await.unwrap();
        assert_eq!(again.revision, first.revision);
    }
    assert_eq!(n1.catalog().latest().revision(), first.revision, "nothing was written");

    // What changes something is written, and moves the lease; so is what cannot be told.
    let moved = n2.register(registration("a", 2, None)).await.unwrap();
    assert_eq!(moved.instance.owner.as_ref().map(|owner| owner.as_str()), Some("n2"));
    n1.register(registration("b", 3, Some(1))).await.unwrap();
    n2.catalog().reached(n1.catalog().latest().revision()).await;
    *line.to.lock().unwrap() = None;
    n2.renew(key("b"), None).await.unwrap();
    let snapshot = n2.catalog().latest();
    let owner = snapshot.instance(&key("b")).unwrap().owner.clone();
    assert_eq!(owner.as_ref().map(|owner| owner.as_str()), Some("n2"));
}
