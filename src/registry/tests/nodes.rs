use futures_util::future::BoxFuture;

use super::*;
use crate::{model::MemberId, store::MemoryStore};

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

/// The way to one other node; it is cut at will.
#[derive(Debug, Default)]
struct Line {
    to: std::sync::Mutex<Option<Registry>>,
}

impl Forward for Line {
    fn renew<'a>(
        &'a self,
        _: &'a MemberId,
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
