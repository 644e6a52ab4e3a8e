mod guard;
mod health;
mod nodes;

use std::{sync::Arc, time::Duration};

use super::*;
use crate::{
    catalog::{self, Reader},
    model::{
        Incarnation, InstanceKey, Members, RawRegistration, Registration, Revision, Roles, State, Update,
    },
    rt::{Readiness, Shutdown},
    store::{Condition, Listing, MemoryStore, Op, Store, StoreError, Watch},
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

/// As when the clock that numbers the runs goes back between two of them.
#[tokio::test(start_paused = true)]
async fn a_new_run_follows_the_one_before_whatever_its_number() {
    let registry = node().await.registry;
    let begins =
        |port, incarnation| Registration { new_run: true, ..registration("a", port, Some(incarnation)) };
    let first = registry.session();
    assert_eq!(first.register(begins(1, 1000)).await.unwrap().instance.incarnation, Incarnation(1000));
    // Elsewhere that one may be alive.
    let second = registry.session();
    assert_eq!(refused(second.register(begins(2, 7)).await), "conflict incarnation");
    first.end(Ended::Lost).await;
    let begun = second.register(begins(2, 7)).await.unwrap();
    assert_eq!((begun.instance.incarnation, begun.instance.port.get()), (Incarnation(1001), 2));
    let again = second.register(registration("a", 2, Some(1001))).await.unwrap();
    assert_eq!(again.revision, begun.revision, "it goes on as what it was told to be");
    // On the same port it is a restart, and the run before is no new one.
    let third = registry.session();
    assert_eq!(third.register(begins(2, 8)).await.unwrap().instance.incarnation, Incarnation(1002));
    assert_eq!(refused(second.register(registration("a", 2, Some(1001))).await), "conflict incarnation");
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
async fn a_service_with_roles_is_kept_and_its_names_are_taken() {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::default());
    let registry = Node::start(Arc::clone(&store)).await.registry;
    registry.register(registration("a", 1, None)).await.unwrap();
    let roles = Roles { term: 1, leader: Some(key("a").id), ..Roles::default() };
    let (roles_key, value) = (record::roles_key(&key("a").service), record::encode_roles(&roles));
    let put = Op::Put { key: Arc::clone(&roles_key), value, when: Condition::Always };
    assert!(registry.catalog().reached(store.commit(vec![put]).await.unwrap()).await);
    for (name, want) in [("greeter.leader", "conflict service"), ("greeter.any", "conflict service")] {
        let mut other = registration("x", 2, None);
        other.key.service = name.parse().unwrap();
        assert_eq!(refused(registry.register(other).await), want, "{name}");
    }
    for free in ["other.leader", "greeter.leaders"] {
        let mut other = registration("x", 2, None);
        other.key.service = free.parse().unwrap();
        registry.register(other).await.unwrap();
    }
    registry.deregister(key("a"), None).await.unwrap();
    assert_eq!(refused(registry.remove_service(key("a").service).await), "conflict service");
    tokio::time::sleep(Duration::from_secs(10_000)).await;
    assert!(registry.catalog().latest().service(&key("a").service).is_some(), "it is not forgotten");
    let gone = Op::Delete { key: roles_key, when: Condition::Always };
    assert!(registry.catalog().reached(store.commit(vec![gone]).await.unwrap()).await);
    registry.remove_service(key("a").service).await.unwrap();
    assert!(registry.catalog().latest().service(&key("a").service).is_none());
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
