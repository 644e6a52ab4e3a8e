//! The sets in the store, with several processes over it.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::future::{BoxFuture, join_all};
use tokio::{sync::watch, time::timeout};

use super::*;
use crate::{
    catalog::{Writer, catalog},
    model::{Members, Revision},
    rt::{Shutdown, Tasks},
    store::{Entry, Listing, MemoryStore, Op, Store, StoreError, Watch},
    telemetry::Metrics,
};

const LONG: Duration = Duration::from_secs(60);
const BELIEVED: Duration = Duration::from_secs(10);

/// What becomes of a commit.
#[derive(Debug, Clone, Copy)]
enum Fate {
    Made,
    Refused,
    /// It was made, and nobody knows.
    AnswerLost,
}

/// A store with a fate for each of the next commits, that remembers what was written.
#[derive(Debug, Default)]
struct Fated {
    store: MemoryStore,
    fates: Mutex<VecDeque<Fate>>,
    commits: Mutex<Vec<Vec<String>>>,
}

impl Fated {
    fn fates(&self, fates: &[Fate]) {
        self.fates.lock().unwrap().extend(fates);
    }

    /// The keys of the commits since the last call.
    fn commits(&self) -> Vec<Vec<String>> {
        std::mem::take(&mut *self.commits.lock().unwrap())
    }
}

impl Store for Fated {
    fn commit(&self, ops: Vec<Op>) -> BoxFuture<'_, Result<Revision, StoreError>> {
        Box::pin(async move {
            // Others may come in between.
            tokio::task::yield_now().await;
            let fate = self.fates.lock().unwrap().pop_front().unwrap_or(Fate::Made);
            let failed = Err(StoreError::Failed("no answer".into()));
            if matches!(fate, Fate::Refused) {
                return failed;
            }
            let keys = ops.iter().map(|op| op.key().to_string()).collect();
            let revision = self.store.commit(ops).await?;
            self.commits.lock().unwrap().push(keys);
            if matches!(fate, Fate::AnswerLost) { failed } else { Ok(revision) }
        })
    }

    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Entry>, StoreError>> {
        Box::pin(async move {
            tokio::task::yield_now().await;
            self.store.get(key).await
        })
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

struct Node {
    peers: Peers,
    members: watch::Sender<Members>,
    tasks: Tasks,
    _catalog: Writer,
}

impl Node {
    async fn start(store: &Arc<Fated>, id: &str, all: &[&str]) -> Self {
        let own = id.parse().unwrap();
        let live = all.iter().map(|id| id.parse().unwrap()).collect();
        let members = watch::Sender::new(Members { own, live });
        let tasks = Tasks::new(Shutdown::default());
        let (writer, reader) = catalog();
        let store = Arc::clone(store) as Arc<dyn Store>;
        let peers = Peers::start(store, reader, members.subscribe(), &Metrics::default(), &tasks);
        tokio::task::yield_now().await;
        Self { peers, members, tasks, _catalog: writer }
    }

    async fn dies(self) {
        self.tasks.shutdown().start();
        assert_eq!(self.tasks.join(LONG).await, 0);
    }

    fn sees(&self, live: &[&str]) {
        let live = live.iter().map(|id| id.parse().unwrap()).collect();
        self.members.send_modify(|members| members.live = live);
    }
}

fn db() -> crate::model::ServiceId {
    "db".parse().unwrap()
}

fn said(text: &str) -> Observation {
    says(text).observed.into_values().next().unwrap()
}

/// Three processes over a store with a set of three that is founded.
async fn three(kind: Kind) -> (Arc<Fated>, Vec<Node>) {
    let store = Arc::new(Fated::default());
    let ids = ["a", "b", "c"];
    let mut nodes = vec![];
    for id in ids {
        nodes.push(Node::start(&store, id, &ids).await);
    }
    nodes[0].peers.create(spec(kind, 3)).await.unwrap();
    for n in 1..=3 {
        nodes[0].peers.register(&db(), newcomer(n)).await.unwrap();
    }
    for node in &nodes {
        timeout(LONG, node.peers.wait(&db(), &Until::default())).await.unwrap();
    }
    store.commits();
    (store, nodes)
}

/// Who is published, at all of them, within `within`.
async fn published(nodes: &[Node], leader: Option<u64>, within: Duration) -> bool {
    let all = nodes.iter().map(|node| async {
        loop {
            let view = node.peers.view(&db()).unwrap();
            if view.roles.leader == leader.map(key) {
                return;
            }
            node.peers.changed(view.revision).await;
        }
    });
    timeout(within, join_all(all)).await.is_ok()
}

#[tokio::test(start_paused = true)]
async fn n2_whoever_comes_at_once_at_whichever_process_there_is_one_founding() {
    let store = Arc::new(Fated::default());
    let ids = ["a", "b", "c"];
    let mut nodes = vec![];
    for id in ids {
        nodes.push(Node::start(&store, id, &ids).await);
    }
    let waits = nodes
        .iter()
        .map(|node| node.peers.clone())
        .map(|peers| async move { timeout(LONG, peers.wait(&db(), &Until::default())).await.unwrap().set });
    let comes = (1..=9u64).map(|n| {
        let peers = nodes[n as usize % 3].peers.clone();
        async move {
            if n <= 3 {
                peers.create(spec(Kind::Etcd, 5)).await.unwrap();
            }
            let mut tries = 0;
            loop {
                tries += 1;
                match peers.register(&db(), newcomer(n)).await {
                    Ok((_, peer)) => return peer,
                    Err(Error::NoSet(_) | Error::Contended(_) | Error::Store(_)) if tries < 20 => {
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                    Err(error) => panic!("{error}"),
                }
            }
        }
    });
    let made = [Fate::Made; 4];
    store.fates(
        &[&made[..], &[Fate::AnswerLost, Fate::Refused, Fate::AnswerLost], &made, &[Fate::AnswerLost]]
            .concat(),
    );
    let (sets, came) = tokio::join!(join_all(waits), join_all(comes));
    let founding = sets[0].founding.clone().unwrap();
    assert_eq!(founding.list.len(), 5);
    for set in &sets {
        assert_eq!(set.founding.as_ref(), Some(&founding));
        assert_eq!(set.members().count(), 5);
    }
    let mut nodes: Vec<_> = came.iter().map(|peer| peer.node.0).collect();
    nodes.sort_unstable();
    assert_eq!(nodes, (1..=9).collect::<Vec<_>>());
    assert_eq!(came.iter().filter(|peer| peer.birth == Birth::Founder).count(), 5);
}

#[tokio::test(start_paused = true)]
async fn n6_of_two_that_propose_from_one_state_one_is_told_to_look_again() {
    let (store, nodes) = three(Kind::Nats).await;
    for n in 4..=6 {
        nodes[0].peers.register(&db(), newcomer(n)).await.unwrap();
    }
    let from = nodes[0].peers.view(&db()).unwrap().set.revision;
    // Nobody runs, so only what changes no quorum is safe.
    let refused = nodes[1].peers.propose(&db(), &Want::Add(key(4)), from).await.unwrap_err();
    assert!(matches!(refused, Error::Refused(Refusal::NoQuorum { .. })), "{refused}");
    drop((store, nodes));

    let (store, nodes) = three(Kind::Etcd).await;
    for n in 4..=6 {
        nodes[0].peers.register(&db(), newcomer(n)).await.unwrap();
    }
    let from = nodes[0].peers.view(&db()).unwrap().set.revision;
    store.fates(&[Fate::AnswerLost]);
    let proposes = (4..=6).map(|n| {
        let peers = &nodes[n as usize % 3].peers;
        async move { peers.propose(&db(), &Want::Add(key(n)), from).await }
    });
    let told = join_all(proposes).await;
    assert!(told.iter().all(Result::is_err), "one was made, and its answer lost: {told:?}");
    let stale = told.iter().filter(|told| matches!(told, Err(Error::Refused(Refusal::Stale { .. }))));
    assert_eq!(stale.count(), 2);
    let view = timeout(LONG, nodes[0].peers.wait(&db(), &Until { after: from, ..Until::default() })).await;
    assert!(view.unwrap().set.pending.is_some());
}

#[tokio::test(start_paused = true)]
async fn n7_roles_are_written_with_what_they_follow_from_and_only_when_something_is_new() {
    let (store, nodes) = three(Kind::Redis).await;
    let report = async |node: usize, n: u64, text: &str| {
        nodes[node].peers.report(&db(), &key(n), said(&format!("{n} {text}"))).await.unwrap();
        tokio::time::sleep(Duration::from_millis(1)).await;
    };
    report(0, 1, "leader 5 @1").await;
    assert_eq!(store.commits(), [["peers/observed/db", "catalog/roles/db"]]);
    assert!(published(&nodes, Some(1), LONG).await);
    // How far it has come is written now and then, also when it tells now this process and now that one.
    for n in 0..40 {
        report(n % 3, 1, &format!("leader 5 @{n}")).await;
        tokio::time::sleep(Duration::from_millis(99)).await;
    }
    let commits = store.commits();
    assert!(commits.len() <= 3 && commits.iter().all(|keys| *keys == ["peers/observed/db"]), "{commits:?}");
    report(0, 2, "leader 6").await;
    assert_eq!(store.commits(), [["peers/observed/db", "catalog/roles/db"]]);
    assert!(published(&nodes, Some(2), LONG).await);
    report(0, 1, "follower 6").await;
    assert_eq!(store.commits().len(), 1);
    for _ in 0..9 {
        report(0, 1, "follower 6").await;
    }
    assert_eq!(store.commits(), Vec::<Vec<String>>::new());
}

#[tokio::test(start_paused = true)]
async fn n7_what_was_said_is_forgotten_by_who_heard_it_or_by_another_when_that_one_is_gone() {
    for dies in [false, true] {
        let (_store, mut nodes) = three(Kind::Redis).await;
        // All have heard it at some time, the last one lately.
        for node in &nodes {
            node.peers.report(&db(), &key(1), said("1 leader 5")).await.unwrap();
            tokio::time::sleep(Duration::from_secs(6)).await;
        }
        nodes[2].peers.report(&db(), &key(1), said("1 leader 5")).await.unwrap();
        assert!(published(&nodes, Some(1), LONG).await);
        if dies {
            nodes.pop().unwrap().dies().await;
            for node in &nodes {
                node.sees(&["a", "b"]);
            }
        }
        assert!(!published(&nodes, None, BELIEVED - Duration::from_secs(1)).await, "too early; dies: {dies}");
        assert!(published(&nodes, None, Duration::from_secs(4)).await, "too late; dies: {dies}");
    }
}

#[tokio::test(start_paused = true)]
async fn n7_who_tells_another_process_is_not_forgotten() {
    let (_store, nodes) = three(Kind::Redis).await;
    for second in 0..60 {
        let peers = &nodes[(second / 3) % 3].peers;
        peers.report(&db(), &key(1), said("1 leader 5")).await.unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
        let leader = nodes[0].peers.view(&db()).unwrap().roles.leader;
        assert_eq!(leader, Some(key(1)), "after {second} s");
    }
}

#[tokio::test(start_paused = true)]
async fn who_is_not_named_by_who_observes_all_is_silent() {
    let (_store, nodes) = three(Kind::Etcd).await;
    nodes[0].peers.observed(&db(), says("1 leader 5 >1; 2 follower 5 >1").observed).await.unwrap();
    assert!(published(&nodes, Some(1), LONG).await);
    nodes[0].peers.observed(&db(), says("2 follower 5 >1").observed).await.unwrap();
    assert!(published(&nodes, None, LONG).await);
    assert_eq!(nodes[0].peers.view(&db()).unwrap().facts.observed.len(), 1);
    // A leader of a term that is over is none.
    nodes[0].peers.observed(&db(), says("1 leader 4 >1; 2 follower 4 >1").observed).await.unwrap();
    assert!(published(&nodes, None, LONG).await);
    nodes[1].peers.observed(&db(), says("3 leader 5 >3; 2 follower 5 >3").observed).await.unwrap();
    assert!(published(&nodes, None, LONG).await, "term 5 is that of 1");
    nodes[1].peers.observed(&db(), says("3 leader 6 >3; 2 follower 6 >3").observed).await.unwrap();
    assert!(published(&nodes, Some(3), LONG).await);
}

#[tokio::test(start_paused = true)]
async fn n11_a_joiner_waits_until_the_leader_lists_it_also_when_that_was_told_before_it_was_proposed() {
    let (store, nodes) = three(Kind::Etcd).await;
    nodes[0].peers.register(&db(), newcomer(4)).await.unwrap();
    let mut seen = says("1 leader 5 >1; 2 follower 5 >1").observed;
    seen.get_mut(&NodeId(1)).unwrap().members = Some(members("1 2 3 4-"));
    nodes[1].peers.observed(&db(), seen.clone()).await.unwrap();
    assert!(published(&nodes, Some(1), LONG).await);
    let added = Until { added: Some(key(4)), ..Until::default() };
    assert!(timeout(LONG / 20, nodes[2].peers.wait(&db(), &added)).await.is_err());

    nodes[1].peers.observed(&db(), seen.clone()).await.unwrap();
    let from = nodes[0].peers.view(&db()).unwrap().set.revision;
    nodes[0].peers.propose(&db(), &Want::Add(key(4)), from).await.unwrap();
    store.commits();
    let tells = async {
        loop {
            tokio::time::sleep(Duration::from_millis(100)).await;
            nodes[1].peers.observed(&db(), seen.clone()).await.unwrap();
        }
    };
    let name = db();
    tokio::select! {
        view = timeout(LONG, nodes[2].peers.wait(&name, &added)) => {
            assert_eq!(view.unwrap().set.pending, None);
        }
        () = tells => {}
    }
    assert_eq!(store.commits(), [["peers/sets/db", "peers/observed/db"]]);
}

#[tokio::test(start_paused = true)]
async fn n7_nothing_of_a_founding_that_is_given_up_is_published() {
    let (_store, nodes) = three(Kind::Redis).await;
    let peers = &nodes[0].peers;
    let cluster = peers.view(&db()).unwrap().set.cluster;
    peers.report(&db(), &key(1), said("1 leader 57")).await.unwrap();
    assert!(published(&nodes, Some(1), LONG).await);
    assert!(matches!(peers.refound(&db(), cluster, 0).await, Err(Error::Refused(Refusal::Expect(0)))));
    // One that has not seen it yet writes what the old ones say.
    let (name, old) = (db(), key(2));
    let late = nodes[1].peers.report(&name, &old, said("2 leader 58"));
    let (refounded, _) = tokio::join!(peers.refound(&name, cluster, 1), late);
    assert!(refounded.is_ok());
    assert!(published(&nodes, None, LONG).await);
    let view = nodes[2].peers.view(&db()).unwrap();
    assert_eq!((view.roles.term, view.facts.observed.len()), (0, 0));
    peers.register(&db(), Newcomer { disk: "empty".into(), ..newcomer(1) }).await.unwrap();
    peers.report(&db(), &key(1), said("4 leader 1")).await.unwrap();
    assert!(published(&nodes, Some(1), LONG).await);
}
