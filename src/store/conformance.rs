//! What every backend must do. Each case gets a place of its own.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::{BoxFuture, join_all};
use tokio::time::timeout;

use super::{Condition, Event, Key, Op, Store, StoreError, Watch};
use crate::model::Revision;

/// Where a store keeps things, in a test.
pub(crate) trait Place {
    /// Opens the store that is kept here. Called again only after the one before was closed.
    fn open(&self) -> BoxFuture<'_, Arc<dyn Store>>;

    /// Whether a reopened store holds what the one before held.
    fn durable(&self) -> bool {
        true
    }

    /// How many commits the store must be made to remember for watchers.
    fn history(&self) -> usize {
        64
    }

    /// Makes the store forget the changes before `revision`, where it has not done that by itself.
    fn forget(&self, _revision: Revision) -> BoxFuture<'_, ()> {
        Box::pin(async {})
    }

    /// Whether a reader that was there in time may be told what is forgotten since.
    fn remembers_for_readers(&self) -> bool {
        false
    }
}

/// Runs the suite.
pub(crate) async fn conforms<P: Place>(make: impl Fn() -> P) {
    conditions(&*make().open().await).await;
    all_or_nothing(&*make().open().await).await;
    later_operations_win(&*make().open().await).await;
    revisions_grow(&*make().open().await).await;
    listings(&*make().open().await).await;
    watch_tells_every_commit_in_order(&*make().open().await).await;
    watch_resumes(&*make().open().await).await;
    watch_is_cancel_safe(&*make().open().await).await;
    concurrent_committers(make().open().await).await;
    exactly_one_wins(make().open().await).await;
    revisions_advance(&make()).await;
    compaction(&make()).await;
    closing(&*make().open().await).await;
    let place = make();
    if place.durable() {
        reopening(&place).await;
        bound_keys(&make()).await;
    }
}

pub(crate) fn put(key: &str, value: &str) -> Op {
    put_when(key, value, Condition::Always)
}

pub(crate) fn put_when(key: &str, value: &str, when: Condition) -> Op {
    Op::Put { key: key.into(), value: Bytes::copy_from_slice(value.as_bytes()), when }
}

pub(crate) fn delete(key: &str) -> Op {
    delete_when(key, Condition::Always)
}

pub(crate) fn bind(key: &str, value: &str) -> Op {
    Op::Bind { key: key.into(), value: Bytes::copy_from_slice(value.as_bytes()), when: Condition::Always }
}

fn delete_when(key: &str, when: Condition) -> Op {
    Op::Delete { key: key.into(), when }
}

/// Everything under a prefix as text, with the revision that wrote it.
pub(crate) async fn listed(store: &dyn Store, prefix: &str) -> Vec<(String, String, Revision)> {
    let text = |value: &Bytes| String::from_utf8(value.to_vec()).unwrap();
    let listing = store.list(prefix).await.unwrap();
    listing.entries.iter().map(|e| (e.key.to_string(), text(&e.value), e.revision)).collect()
}

async fn keys(store: &dyn Store, prefix: &str) -> Vec<String> {
    listed(store, prefix).await.into_iter().map(|(key, _, _)| key).collect()
}

/// The next event, within a bound that only a broken store exceeds.
async fn next(watch: &mut Box<dyn Watch>) -> Result<Event, StoreError> {
    timeout(Duration::from_secs(10), watch.next()).await.expect("no event came")
}

fn event(revision: Revision, changes: &[(&str, Option<&str>)]) -> Result<Event, StoreError> {
    let change = |(key, value): &(&str, Option<&str>)| -> (Key, Option<Bytes>) {
        (Key::from(*key), value.map(|value| Bytes::copy_from_slice(value.as_bytes())))
    };
    Ok(Event { revision, changes: changes.iter().map(change).collect() })
}

fn conflict(key: &str, actual: Option<Revision>) -> Result<Revision, StoreError> {
    Err(StoreError::Conflict { key: key.into(), actual })
}

async fn conditions(store: &dyn Store) {
    use Condition::{Absent, Always, Unchanged};
    let first = store.commit(vec![put_when("a", "1", Absent)]).await.unwrap();
    assert_eq!(store.commit(vec![put_when("a", "2", Absent)]).await, conflict("a", Some(first)));
    assert_eq!(store.commit(vec![put_when("b", "2", Unchanged(first))]).await, conflict("b", None));
    let second = store.commit(vec![put_when("a", "2", Unchanged(first))]).await.unwrap();
    assert_eq!(store.commit(vec![put_when("a", "3", Unchanged(first))]).await, conflict("a", Some(second)));
    assert_eq!(store.commit(vec![delete_when("a", Unchanged(first))]).await, conflict("a", Some(second)));
    assert_eq!(store.commit(vec![delete_when("a", Absent)]).await, conflict("a", Some(second)));
    assert_eq!(listed(store, "").await, [("a".into(), "2".into(), second)]);
    store.commit(vec![delete_when("a", Unchanged(second))]).await.unwrap();
    assert_eq!(store.get("a").await, Ok(None));
    store.commit(vec![delete_when("a", Always)]).await.unwrap();
    store.commit(vec![delete_when("a", Absent)]).await.unwrap();
    let again = store.commit(vec![put_when("a", "4", Absent)]).await.unwrap();
    assert_eq!(store.get("a").await.unwrap().unwrap().revision, again);
}

async fn all_or_nothing(store: &dyn Store) {
    let first = store.commit(vec![put("a", "1"), put("b", "1")]).await.unwrap();
    let refused = store
        .commit(vec![put("a", "2"), delete("b"), put_when("b", "2", Condition::Absent), put("c", "2")])
        .await;
    assert_eq!(refused, conflict("b", Some(first)));
    assert_eq!(listed(store, "").await, [("a".into(), "1".into(), first), ("b".into(), "1".into(), first)]);
    let second = store.commit(vec![delete("a"), put("c", "3")]).await.unwrap();
    assert_eq!(listed(store, "").await, [("b".into(), "1".into(), first), ("c".into(), "3".into(), second)]);
}

async fn later_operations_win(store: &dyn Store) {
    let revision =
        store.commit(vec![put("a", "1"), put("a", "2"), put("b", "1"), delete("b")]).await.unwrap();
    assert_eq!(listed(store, "").await, [("a".into(), "2".into(), revision)]);
}

async fn revisions_grow(store: &dyn Store) {
    let mut last = store.list("").await.unwrap().revision;
    for n in 0..20 {
        let revision = store.commit(vec![put("k", &n.to_string())]).await.unwrap();
        assert!(revision > last, "{revision} after {last}");
        last = revision;
        assert_eq!(store.list("other").await.unwrap().revision, last);
        assert!(store.commit(vec![put_when("k", "x", Condition::Absent)]).await.is_err());
    }
}

async fn listings(store: &dyn Store) {
    for key in ["a/b", "a", "a/", "a/b/c", "ab", "b/a", "a0", "ä/x"] {
        store.commit(vec![put(key, key)]).await.unwrap();
    }
    for (prefix, wanted) in [
        ("a/", &["a/", "a/b", "a/b/c"][..]),
        ("a", &["a", "a/", "a/b", "a/b/c", "a0", "ab"]),
        ("a/b", &["a/b", "a/b/c"]),
        ("ä", &["ä/x"]),
        ("c", &[]),
        ("", &["a", "a/", "a/b", "a/b/c", "a0", "ab", "b/a", "ä/x"]),
    ] {
        assert_eq!(keys(store, prefix).await, wanted, "prefix {prefix:?}");
    }
    assert_eq!(store.get("a/b").await.unwrap().unwrap().value, "a/b");
    assert_eq!(store.get("a/b/").await, Ok(None));
}

async fn watch_tells_every_commit_in_order(store: &dyn Store) {
    let start = store.commit(vec![put("a/0", "before")]).await.unwrap();
    let mut watch = store.watch("a/", start).await.unwrap();
    let first = store.commit(vec![put("a/1", "1"), put("b/1", "not told")]).await.unwrap();
    store.commit(vec![put("b/2", "not told")]).await.unwrap();
    store.commit(vec![put("a", "not told")]).await.unwrap();
    assert!(store.commit(vec![put_when("a/1", "refused", Condition::Absent)]).await.is_err());
    let second = store.commit(vec![put("a/2", "2"), delete("a/1")]).await.unwrap();
    assert_eq!(next(&mut watch).await, event(first, &[("a/1", Some("1"))]));
    assert_eq!(next(&mut watch).await, event(second, &[("a/2", Some("2")), ("a/1", None)]));
    // One that has to wait for it.
    let (told, third) = tokio::join!(next(&mut watch), store.commit(vec![put("a/3", "3")]));
    assert_eq!(told, event(third.unwrap(), &[("a/3", Some("3"))]));
}

async fn watch_resumes(store: &dyn Store) {
    let start = store.list("").await.unwrap().revision;
    let mut revisions = vec![];
    for n in 0..10 {
        revisions.push(store.commit(vec![put("k", &n.to_string())]).await.unwrap());
    }
    let after = std::iter::once(start).chain(revisions.iter().copied());
    for (seen, after) in after.enumerate() {
        let mut watch = store.watch("", after).await.unwrap();
        for (n, revision) in revisions.iter().enumerate().skip(seen) {
            assert_eq!(next(&mut watch).await, event(*revision, &[("k", Some(&n.to_string()))]));
        }
    }
}

async fn watch_is_cancel_safe(store: &dyn Store) {
    let mut watch = store.watch("", store.list("").await.unwrap().revision).await.unwrap();
    let mut wanted = vec![];
    let mut told = vec![];
    for n in 0..50 {
        tokio::select! {
            biased;
            event = watch.next() => told.push(event.unwrap().revision),
            revision = store.commit(vec![put("k", &n.to_string())]) => wanted.push(revision.unwrap()),
        }
    }
    // A commit whose future lost against an event may or may not have been taken.
    wanted.push(store.commit(vec![put("end", "")]).await.unwrap());
    while told.last() != wanted.last() {
        told.push(next(&mut watch).await.unwrap().revision);
    }
    let unique: BTreeSet<_> = told.iter().copied().collect();
    assert!(told.is_sorted() && unique.len() == told.len(), "out of order or twice: {told:?}");
    assert!(wanted.iter().all(|revision| unique.contains(revision)), "{wanted:?} are not all in {told:?}");
}

async fn concurrent_committers(store: Arc<dyn Store>) {
    const COMMITTERS: usize = 32;
    const EACH: usize = 20;
    let start = store.list("").await.unwrap().revision;
    let committer = |who: usize| {
        let store = Arc::clone(&store);
        async move {
            let mut revisions = vec![];
            for n in 0..EACH {
                let key = format!("k/{who}/{n}");
                revisions.push(store.commit(vec![put(&key, "")]).await.unwrap());
                // Its own write is there at once.
                assert!(store.get(&key).await.unwrap().is_some());
            }
            assert!(revisions.is_sorted());
            revisions
        }
    };
    let mut revisions: Vec<_> = join_all((0..COMMITTERS).map(committer)).await.concat();
    revisions.sort_unstable();
    revisions.dedup();
    assert_eq!(revisions.len(), COMMITTERS * EACH);
    assert!(revisions[0] > start);
    assert_eq!(store.list("k/").await.unwrap().entries.len(), COMMITTERS * EACH);
}

async fn revisions_advance(place: &impl Place) {
    let mut store = place.open().await;
    let before = store.commit(vec![put("k", "1")]).await.unwrap();
    let far = Revision(before.0 + 5_000_000);
    store.advance(far).await.unwrap();
    if place.durable() {
        store.close().await.unwrap();
        store = place.open().await;
    }
    store.advance(before).await.unwrap();
    assert_eq!(store.get("k").await.unwrap().unwrap().value, "1");
    let start = store.list("").await.unwrap().revision;
    let mut watch = store.watch("", start).await.unwrap();
    let after = store.commit(vec![put("k", "2")]).await.unwrap();
    assert!(after > far, "{after} is not after {far}");
    assert_eq!(next(&mut watch).await, event(after, &[("k", Some("2"))]));
    if place.durable() {
        store.close().await.unwrap();
        store = place.open().await;
        assert_eq!(listed(&*store, "k").await, [("k".to_owned(), "2".to_owned(), after)]);
    }
    store.close().await.unwrap();
}

async fn exactly_one_wins(store: Arc<dyn Store>) {
    let mut before = None;
    for round in 0..10 {
        let when = before.map_or(Condition::Absent, Condition::Unchanged);
        let tries = (0..16).map(|n| store.commit(vec![put_when("lock", &n.to_string(), when)]));
        let outcomes = join_all(tries).await;
        let won: Vec<_> = outcomes.iter().filter_map(|outcome| outcome.as_ref().ok()).collect();
        assert_eq!(won.len(), 1, "round {round}: {outcomes:?}");
        before = won.first().copied().copied();
        for outcome in outcomes.iter().filter(|outcome| outcome.is_err()) {
            assert_eq!(*outcome, conflict("lock", before));
        }
    }
}

async fn compaction(place: &impl Place) {
    let store = &*place.open().await;
    let start = store.commit(vec![put("k", "0")]).await.unwrap();
    let mut slow = store.watch("", start).await.unwrap();
    let mut revisions = vec![start];
    for n in 0..=place.history() {
        revisions.push(store.commit(vec![put("k", &n.to_string())]).await.unwrap());
    }
    let last = revisions.pop().unwrap();
    place.forget(*revisions.last().unwrap()).await;
    let late = match store.watch("", start).await {
        Ok(mut watch) => next(&mut watch).await.map(drop),
        Err(error) => Err(error),
    };
    let told = next(&mut slow).await;
    let compacted = |outcome: &Result<(), StoreError>| matches!(outcome, Err(StoreError::Compacted(to)) if *to > start && *to < last);
    assert!(compacted(&late), "{late:?}");
    let in_time = place.remembers_for_readers() && told == event(revisions[1], &[("k", Some("0"))]);
    assert!(in_time || compacted(&told.clone().map(drop)), "{told:?}");
    // Listing again is the way out.
    let revision = store.list("").await.unwrap().revision;
    let mut watch = store.watch("", revision).await.unwrap();
    let revision = store.commit(vec![put("k", "x")]).await.unwrap();
    assert_eq!(next(&mut watch).await, event(revision, &[("k", Some("x"))]));
}

async fn closing(store: &dyn Store) {
    let start = store.list("").await.unwrap().revision;
    let mut watch = store.watch("", start).await.unwrap();
    let revision = store.commit(vec![put("k", "1")]).await.unwrap();
    store.close().await.unwrap();
    store.close().await.unwrap();
    assert_eq!(next(&mut watch).await, event(revision, &[("k", Some("1"))]));
    assert_eq!(next(&mut watch).await, Err(StoreError::Closed));
    assert_eq!(store.commit(vec![put("k", "2")]).await, Err(StoreError::Closed));
    assert_eq!(store.get("k").await, Err(StoreError::Closed));
    assert_eq!(store.list("").await, Err(StoreError::Closed));
    assert!(matches!(store.watch("", start).await, Err(StoreError::Closed)));
}

async fn reopening(place: &impl Place) {
    let store = place.open().await;
    store.commit(vec![put("a", "1"), put("b", "1")]).await.unwrap();
    store.commit(vec![put("a", "2"), delete("b")]).await.unwrap();
    let commits = (0..200).map(|n| store.commit(vec![put(&format!("k/{n}"), "x")]));
    // Accepted before the close, answered or not.
    let (revisions, closed) = tokio::join!(join_all(commits), store.close());
    closed.unwrap();
    let accepted: BTreeSet<_> = revisions.into_iter().flatten().collect();
    let last = *accepted.last().unwrap();

    let store = place.open().await;
    let found = listed(&*store, "k/").await.into_iter().map(|(_, _, revision)| revision);
    assert_eq!(found.collect::<BTreeSet<_>>(), accepted);
    assert_eq!(store.get("a").await.unwrap().unwrap().value, "2");
    assert_eq!(store.get("b").await, Ok(None));
    assert!(store.list("").await.unwrap().revision >= last);
    assert!(store.commit(vec![put("c", "1")]).await.unwrap() > last);
    store.close().await.unwrap();
}

async fn bound_keys(place: &impl Place) {
    let store = place.open().await;
    let status = store.status();
    store.commit(vec![put("a", "stays"), put("b", "before")]).await.unwrap();
    let session = status.borrow().session.unwrap();
    let bound = store.commit(vec![bind("b", "bound"), bind("c", "bound"), bind("d", "bound")]).await.unwrap();
    let unbound = store.commit(vec![put("d", "unbound")]).await.unwrap();
    assert!(session.holds());
    assert_eq!(status.borrow().session.map(|session| session.id), Some(session.id));
    let shown = listed(&*store, "").await.into_iter().skip(1).collect::<Vec<_>>();
    let shown_wanted = [("b", "bound", bound), ("c", "bound", bound), ("d", "unbound", unbound)];
    assert_eq!(
        shown,
        shown_wanted.map(|(key, value, revision)| (key.to_owned(), value.to_owned(), revision))
    );
    store.close().await.unwrap();

    let store = place.open().await;
    assert_eq!(keys(&*store, "").await, ["a", "d"]);
    assert!(store.commit(vec![put_when("b", "again", Condition::Absent)]).await.unwrap() > unbound);
    store.close().await.unwrap();
}
