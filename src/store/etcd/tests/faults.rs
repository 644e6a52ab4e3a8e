//! etcd that dies, stands still, forgets, goes back; a process that stands still.

use std::{collections::BTreeSet, time::Duration};

use futures_util::future::join_all;
use rustix::process::Signal;
use tokio::time::{Instant, timeout};

use super::{
    super::*,
    cluster::{BOUND, Cluster, until},
    compact,
};
use crate::store::{
    Condition, Event,
    conformance::{bind, put, put_when},
};

async fn next(watch: &mut Box<dyn Watch>) -> Result<Event, StoreError> {
    timeout(BOUND, watch.next()).await.expect("no event came")
}

fn reason(error: StoreError) -> String {
    match error {
        StoreError::Failed(reason) => reason,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_killed_etcd_comes_back_with_everything() {
    let mut cluster = Cluster::start(1);
    let store = cluster.store().await;
    let start = store.commit(vec![put("k", "0")]).await.unwrap();
    let mut watch = store.watch("", start).await.unwrap();
    let mut idle = store.watch("", start).await.unwrap();
    let first = store.commit(vec![put("k", "1")]).await.unwrap();
    assert_eq!(next(&mut watch).await.unwrap().revision, first);

    cluster.kill(0);
    let began = Instant::now();
    let error = reason(store.commit(vec![put("k", "2")]).await.unwrap_err());
    assert!(began.elapsed() < cluster.config().timeout * 2, "{:?}", began.elapsed());
    for part in ["etcd did not answer within 4s", "endpoint health", "not"] {
        assert!(error.contains(part), "{part} is not in {error}");
    }
    let fault = store.status().borrow().fault.clone().unwrap();
    assert!(fault.reason.contains("did not answer"), "{fault:?}");

    cluster.begin(0);
    until(&store, "well again", |status| status.fault.is_none()).await;
    let second = store.commit(vec![put("k", "3")]).await.unwrap();
    let mut told = next(&mut watch).await.unwrap();
    // The commit that failed may have been made.
    if told.revision < second {
        told = next(&mut watch).await.unwrap();
    }
    assert_eq!((told.revision, &told.changes[0].1), (second, &Some(Bytes::from_static(b"3"))));

    // One that did not read meanwhile, and whose history is gone.
    let last = store.commit(vec![put("k", "4")]).await.unwrap();
    compact(&cluster.config(), last).await;
    let over = loop {
        match next(&mut idle).await {
            Ok(event) => assert!(event.revision <= first, "{event:?} after the stream broke off"),
            Err(error) => break error,
        }
    };
    assert_eq!(over, StoreError::Compacted(last));
    assert_eq!(next(&mut idle).await, Err(StoreError::Compacted(last)));
}

/// Commits under keys of its own until `end`; who is told of a conflict was not told of its own commit.
async fn writer(store: Arc<EtcdStore>, name: usize, end: Instant) -> (BTreeSet<Revision>, usize) {
    let (mut made, mut failed) = (BTreeSet::new(), 0);
    for n in 0.. {
        if Instant::now() > end {
            break;
        }
        match store.commit(vec![put_when(&format!("k/{name}/{n}"), "", Condition::Absent)]).await {
            Ok(revision) => assert!(made.insert(revision)),
            Err(StoreError::Failed(reason)) => {
                eprintln!("k/{name}/{n}: {reason}");
                failed += 1;
            }
            Err(error) => panic!("k/{name}/{n}: {error}"),
        }
    }
    (made, failed)
}

async fn leader(cluster: &Cluster) -> usize {
    let found = async {
        loop {
            match cluster.leader() {
                Some(leader) => break leader,
                None => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    };
    timeout(BOUND, found).await.expect("nobody leads")
}

#[tokio::test]
async fn leaders_that_die_or_stand_still_cost_no_commit_and_no_event() {
    let mut cluster = Cluster::start(3);
    // A busy machine elects slowly, and a mark is as good as its session.
    let patient = EtcdConfig {
        timeout: Duration::from_secs(15),
        session_ttl: Duration::from_secs(60),
        ..cluster.config()
    };
    let store = Arc::new(EtcdStore::open(&patient).unwrap());
    let start = store.commit(vec![put("start", "")]).await.unwrap();
    let mut watch = store.watch("k/", start).await.unwrap();

    let writing = Duration::from_secs(7);
    let end = Instant::now() + writing;
    let writers = join_all((0..8).map(|name| writer(Arc::clone(&store), name, end)));
    let faults = async {
        let dead = leader(&cluster).await;
        cluster.kill(dead);
        tokio::time::sleep(writing / 4).await;
        cluster.begin(dead);
        let frozen = leader(&cluster).await;
        cluster.signal(frozen, Signal::STOP);
        tokio::time::sleep(writing / 4).await;
        cluster.signal(frozen, Signal::CONT);
    };
    let (written, ()) = tokio::join!(writers, faults);
    let failed: usize = written.iter().map(|(_, failed)| failed).sum();
    let made: BTreeSet<Revision> = written.into_iter().flat_map(|(made, _)| made).collect();
    assert!(made.len() > 100, "{} commits", made.len());
    assert_eq!(failed, 0, "a majority was there all the time, beside {} that came through", made.len());

    let listing = store.list("k/").await.unwrap();
    let held: BTreeSet<Revision> = listing.entries.iter().map(|entry| entry.revision).collect();
    assert_eq!(held, made);
    let mut told = vec![];
    while told.last() != held.last() {
        told.push(next(&mut watch).await.unwrap().revision);
    }
    assert!(told.is_sorted());
    assert_eq!(told, held.into_iter().collect::<Vec<_>>(), "each once and none left out");
}

#[tokio::test]
async fn a_process_that_stood_still_loses_its_session_and_learns_of_it() {
    let cluster = Cluster::start(1);
    let (frozen, other) = (cluster.store().await, cluster.store().await);
    let session = frozen.status().borrow().session.unwrap();
    let bound = frozen.commit(vec![bind("member", "a"), put("stays", "")]).await.unwrap();
    assert!(session.holds());
    let mut watch = other.watch("", bound).await.unwrap();

    frozen.inner.frozen.store(true, std::sync::atomic::Ordering::SeqCst);
    let gone = next(&mut watch).await.unwrap();
    assert_eq!(gone.changes, [("member".into(), None)]);
    assert!(!frozen.status().borrow().session.unwrap().holds(), "it outlived its session");

    // What it binds now goes into another session, and it is told so.
    let mut status = frozen.status();
    status.mark_unchanged();
    frozen.commit(vec![bind("member", "again")]).await.unwrap();
    assert!(status.has_changed().unwrap());
    let renewed = status.borrow_and_update().session.unwrap();
    assert!(renewed.id != session.id && renewed.holds());
    assert_eq!(other.get("member").await.unwrap().unwrap().value, "again");

    frozen.close().await.unwrap();
    assert_eq!(next(&mut watch).await.unwrap().changes[0].1, Some("again".into()));
    assert_eq!(next(&mut watch).await.unwrap().changes, [("member".into(), None)]);
    assert_eq!(other.list("").await.unwrap().entries.len(), 1);
}

#[tokio::test]
async fn a_session_that_holds_again_is_told() {
    let nowhere = EtcdConfig { endpoints: vec!["http://127.0.0.1:1".into()], ..EtcdConfig::default() };
    let store = EtcdStore::open(&nowhere).unwrap();
    let mut status = store.status();
    let told = |status: &mut latest::Receiver<Status>| {
        let changed = status.has_changed().unwrap();
        status.mark_unchanged();
        changed
    };
    let now = Instant::now();
    store.inner.holds(5, now - Duration::from_secs(9), 10);
    assert!(told(&mut status), "a session");
    store.inner.holds(5, now - Duration::from_secs(11), 10);
    assert!(!told(&mut status), "moved on");
    store.inner.holds(5, now, 10);
    assert!(told(&mut status), "back after it was over");
    store.inner.holds(6, now, 10);
    assert!(told(&mut status), "another one");
}

#[tokio::test]
async fn revisions_go_on_when_etcd_is_restored_from_an_older_backup() {
    let mut cluster = Cluster::start(1);
    let (one, two) = (cluster.store().await, cluster.store().await);
    let kept = one.commit(vec![put("kept", "")]).await.unwrap();
    let backup = cluster.path().join("backup").display().to_string();
    cluster.ctl(&["snapshot", "save", &backup]);
    let mut last = kept;
    for n in 0..10 {
        last = one.commit(vec![put("lost", &n.to_string())]).await.unwrap();
    }
    assert_eq!(two.get("lost").await.unwrap().unwrap().revision, last);
    let mut watch = one.watch("", last).await.unwrap();

    cluster.kill(0);
    cluster.restore(0, &backup);
    cluster.begin(0);
    let stale = put_when("kept", "", Condition::Unchanged(kept));
    let (on_one, on_two) = tokio::join!(
        until(&one, "well again", |status| status.fault.is_none()),
        until(&two, "well again", |status| status.fault.is_none()),
    );
    assert!(on_one.fault.is_none() && on_two.fault.is_none());
    assert!(matches!(next(&mut watch).await, Err(StoreError::Reset(to)) if to > last));
    let refused = one.commit(vec![stale]).await;
    assert!(
        matches!(refused, Err(StoreError::Conflict { actual: Some(now), .. }) if now > last),
        "{refused:?}"
    );
    let next = two.commit(vec![put("new", "")]).await.unwrap();
    assert!(next > last, "{next} after {last}");
    let newcomer = cluster.store().await;
    for store in [&one, &two, &newcomer] {
        assert_eq!(store.get("lost").await, Ok(None));
        assert_eq!(store.get("new").await.unwrap().unwrap().revision, next);
    }
    assert!(one.commit(vec![put("new", "")]).await.unwrap() > next);
}

#[tokio::test]
async fn a_commit_that_is_too_much_says_so() {
    let cluster = Cluster::start(1);
    let store = cluster.store().await;
    let many = |count: usize| (0..count).map(|n| put_when(&n.to_string(), "", Condition::Absent)).collect();
    store.commit(many(126)).await.unwrap();
    let error = reason(store.commit(many(127)).await.unwrap_err());
    assert!(error.contains("too many keys") && error.contains("not made"), "{error}");
    let error = reason(store.commit(vec![put("k", &"v".repeat(2 << 20))]).await.unwrap_err());
    assert!(error.contains("too large"), "{error}");
    assert!(store.status().borrow().fault.is_none(), "that is no fault of etcd");
}

#[tokio::test]
async fn a_dropped_commit_leaves_nothing_behind_that_disturbs() {
    let cluster = Cluster::start(1);
    let store = cluster.store().await;
    for n in 0..100 {
        // Dropped at a different await each time.
        let commit = store.commit(vec![put("k", &n.to_string())]);
        let _ = timeout(Duration::from_micros(n * 20), commit).await;
    }
    let last = store.commit(vec![put("k", "last")]).await.unwrap();
    let entry = store.get("k").await.unwrap().unwrap();
    assert_eq!((entry.value.as_ref(), entry.revision), (&b"last"[..], last));
    let marks = cluster.ctl(&["get", "--prefix", "--keys-only", "/disco/meta/commits/"]);
    assert!(marks.lines().filter(|line| !line.is_empty()).count() < 10, "{marks}");
    store.close().await.unwrap();
    assert_eq!(cluster.ctl(&["get", "--prefix", "--keys-only", "/disco/meta/commits/"]), "");
}
