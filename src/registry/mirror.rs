use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use futures_util::FutureExt as _;

use super::{Cache, Error, cache::Cached, membership, record};
use crate::{
    catalog::{Change, Reader, Snapshot, Stale, Writer},
    model::{Group, InstanceKey, Revision, Roles, ServiceId},
    rt::{self, Backoff, Gate, Tasks},
    store::{Condition, Entry, Event, Fault, Key, Listing, Op, Store, StoreError, Watch},
};

/// Most commits that are published as one snapshot, so that a long queue does not hold back what is ready.
const BATCH: usize = 1024;

/// Waits between tries to list a store that does not answer.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// What to do about a store that cannot be read at the start.
#[derive(Debug, Clone)]
pub enum Patience {
    /// It is part of this process: say what is wrong, and end.
    None,
    /// It is elsewhere and will be back: serve the old copy meanwhile, where there is one, and wait.
    Wait(Option<Cache>),
}

/// Keeps the catalog equal to the store. The catalog's one writer.
#[derive(Debug)]
pub struct Mirror {
    store: Arc<dyn Store>,
    writer: Writer,
    catalog: Reader,
    /// The store lost what it had accepted.
    heal: bool,
    /// The catalog came from the store, not from a copy.
    followed: bool,
}

impl Mirror {
    /// A mirror of what `store` holds, as the catalog of `writer` and `catalog`.
    pub fn new(store: Arc<dyn Store>, writer: Writer, catalog: Reader) -> Self {
        Self { store, writer, catalog, heal: false, followed: false }
    }

    /// Reads the store into the catalog and starts the task that keeps it so. `synced` opens as soon as the catalog holds
    /// everything, be it from the copy; that may be after this has returned.
    ///
    /// # Errors
    /// Without patience, when the store cannot be read. When it holds a record that this version does not understand.
    pub async fn start(mut self, patience: Patience, tasks: &Tasks, synced: Gate) -> Result<(), Error> {
        let first = self.load().await;
        let feed = match (first, &patience) {
            (Ok(feed), _) => {
                synced.open();
                Some(feed)
            }
            (Err(Error::Store(error)), Patience::Wait(cache)) => {
                tracing::error!(%error, "the store cannot be read yet");
                if self.load_copy(cache.as_ref(), &error) {
                    synced.open();
                }
                None
            }
            (Err(error), _) => return Err(error),
        };
        if let Patience::Wait(Some(cache)) = patience {
            tasks.spawn_until_shutdown("catalog-copy", cache.follow(self.catalog.clone()));
        }
        tasks.spawn_until_shutdown("catalog-mirror", self.run(feed, synced));
        Ok(())
    }

    /// Publishes what the store holds, for the first time.
    async fn load(&mut self) -> Result<Box<dyn Watch>, Error> {
        let Listing { revision, entries } = self.store.list(record::CATALOG).await.map_err(Error::Store)?;
        let mut all = Vec::with_capacity(entries.len());
        for entry in entries {
            // Roles are written by others, as often as a database elects; one record that is wrong is no reason not to start.
            if entry.key.starts_with(record::ROLES) {
                all.extend(decoded(&entry.key, Some(&entry.value), entry.revision));
            } else {
                all.extend(record::decode(&entry.key, Some(&entry.value), entry.revision)?);
            }
        }
        let feed = self.store.watch(record::CATALOG, revision).await.map_err(Error::Store)?;
        instances_first(&mut all);
        self.writer.apply(revision, all);
        self.tell_of_names_taken(&Snapshot::default());
        self.followed = true;
        Ok(feed)
    }

    /// Says so where a service is registered under a name that would stand for some of another one's instances. It keeps the name:
    /// those who call it mean it.
    fn tell_of_names_taken(&self, before: &Snapshot) {
        let now = self.catalog.latest();
        for service in now.services().filter(|service| service.roles.is_some()) {
            if before.service(&service.id).is_some_and(|before| before.roles.is_some()) {
                continue;
            }
            for name in Group::ALL.map(|group| group.of(&service.id)) {
                if name.parse().is_ok_and(|id| now.service(&id).is_some()) {
                    let service = &service.id;
                    tracing::warn!(
                        %service, %name,
                        "a service of this name is registered, so it does not stand for instances of the replicated one"
                    );
                }
            }
        }
    }

    /// Publishes the copy, and returns whether there was one.
    fn load_copy(&mut self, cache: Option<&Cache>, reason: &StoreError) -> bool {
        let Some(cache) = cache else { return false };
        match cache.load() {
            Ok(None) => false,
            Ok(Some(Cached { revision, taken_at, changes })) => {
                tracing::warn!(%revision, "serving the copy of the catalog on disk until the store is back");
                self.writer.apply(revision, changes);
                self.lost(taken_at, reason);
                true
            }
            Err(error) => {
                tracing::error!(%error, "the copy of the catalog on disk cannot be used");
                false
            }
        }
    }

    fn lost(&mut self, since: SystemTime, reason: &StoreError) {
        if self.catalog.stale().is_none() {
            self.writer.set_stale(Some(Stale { since, reason: reason.to_string().into() }));
        }
    }

    /// Follows the store until it is closed. While a store fails the catalog stays as it is: what is known stays (never 1).
    async fn run(mut self, feed: Option<Box<dyn Watch>>, synced: Gate) {
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        let mut status = self.store.status();
        let mut feed = feed;
        loop {
            let Some(open) = &mut feed else {
                match self.resync().await {
                    Ok(listed) => {
                        self.writer.set_stale(None);
                        synced.open();
                        backoff.reset();
                        feed = Some(listed);
                    }
                    Err(StoreError::Closed) => return,
                    Err(error) => {
                        self.lost(rt::now(), &error);
                        tracing::error!(%error, "the store cannot be listed; trying again");
                        tokio::time::sleep(backoff.next_wait()).await;
                    }
                }
                continue;
            };
            let event = tokio::select! {
                event = open.next() => event,
                () = membership::changed(&mut status) => {
                    let fault = status.borrow_and_update().fault.clone();
                    self.writer.set_stale(fault.map(|Fault { since, reason }| Stale { since, reason: reason.into() }));
                    continue;
                }
            };
            let mut events = match event {
                Ok(event) => vec![event],
                Err(StoreError::Closed) => return,
                Err(StoreError::Reset(_)) => {
                    tracing::error!(
                        "the store went back to an older state; what is registered here and not there is written again"
                    );
                    self.heal = true;
                    feed = None;
                    continue;
                }
                Err(error) => {
                    tracing::warn!(%error, "the catalog lost the store's feed and lists it again; until then what is known stays");
                    feed = None;
                    continue;
                }
            };
            while events.len() < BATCH {
                match open.next().now_or_never() {
                    Some(Ok(event)) => events.push(event),
                    // An error comes again at the next turn.
                    Some(Err(_)) | None => break,
                }
            }
            let batches: Vec<_> = events.into_iter().map(changes).collect();
            let mut changes = batches.iter().flat_map(|(_, changes)| changes);
            let roles = changes.any(|change| matches!(change, Change::PutRoles(..)));
            let before = roles.then(|| self.catalog.latest());
            self.writer.apply_all(batches);
            if let Some(before) = before {
                self.tell_of_names_taken(&before);
            }
        }
    }

    /// Writes what is known and was lost by a store that went back. Every process does; the first wins. What the store has and
    /// nobody knows stays there, until its lease is over.
    async fn heal(&self) -> Result<(), StoreError> {
        let Listing { entries, .. } = self.store.list(record::CATALOG).await?;
        let known = self.catalog.latest();
        let there: HashMap<&str, &Entry> = entries.iter().map(|entry| (entry.key.as_ref(), entry)).collect();
        let mut lost = Vec::new();
        for service in known.services() {
            let key = record::service_key(&service.id);
            if service.is_registered() && !there.contains_key(key.as_ref()) {
                lost.push(Op::Put { key, value: Bytes::new(), when: Condition::Absent });
            }
            lost.extend(service.roles.as_ref().and_then(|roles| newer_roles(&service.id, roles, &there)));
            for instance in service.instances() {
                let key = record::instance_key(&instance.key);
                let when = match there.get(key.as_ref()) {
                    None => Condition::Absent,
                    Some(entry) => match decoded(&entry.key, Some(&entry.value), entry.revision) {
                        Some(Change::PutInstance(old)) if old.incarnation < instance.incarnation => {
                            Condition::Unchanged(entry.revision)
                        }
                        _ => continue,
                    },
                };
                lost.push(Op::Put { key, value: record::encode(instance), when });
                if instance.check.is_some() {
                    let value = record::encode_health(&instance.health, instance.incarnation);
                    let key = record::health_key(&instance.key);
                    lost.push(Op::Put { key, value, when: Condition::Absent });
                }
            }
        }
        let all = lost.len();
        for op in lost {
            match self.store.commit(vec![op]).await {
                Ok(_) | Err(StoreError::Conflict { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        if all > 0 {
            tracing::warn!(records = all, "what the store had lost is there again");
        }
        Ok(())
    }

    /// Lists the store again and publishes what became different, as one change.
    async fn resync(&mut self) -> Result<Box<dyn Watch>, StoreError> {
        // It may have gone back while nobody followed it.
        let seen = self.catalog.latest().revision();
        if self.followed && matches!(self.store.watch(record::CATALOG, seen).await, Err(StoreError::Reset(_)))
        {
            self.heal = true;
        }
        let heals = self.heal;
        if heals {
            self.heal().await?;
            self.heal = false;
        }
        let Listing { revision, entries } = self.store.list(record::CATALOG).await?;
        let known = self.catalog.latest();
        let keys: HashSet<&str> = entries.iter().map(|entry| entry.key.as_ref()).collect();
        let mut different = Vec::new();
        for service in known.services() {
            let gone = service.instances().filter(|i| !keys.contains(record::instance_key(&i.key).as_ref()));
            different.extend(gone.map(|instance| Change::RemoveInstance(instance.key.clone())));
            if service.roles.is_some() && !keys.contains(record::roles_key(&service.id).as_ref()) {
                different.push(Change::RemoveRoles(service.id.clone()));
            }
            if service.is_registered() && !keys.contains(record::service_key(&service.id).as_ref()) {
                different.push(Change::RemoveService(service.id.clone()));
            }
        }
        for (service, id) in known.services().flat_map(|service| {
            let live = self.catalog.live().latest(&service.id).instances;
            live.into_iter().map(|(id, _)| (service.id.clone(), id))
        }) {
            let key = InstanceKey { service, id };
            if !keys.contains(record::live_key(&key).as_ref()) {
                different.push(Change::RemoveLive(key));
            }
        }
        for entry in entries.iter().filter(|entry| entry.revision > known.revision()) {
            different.extend(decoded(&entry.key, Some(&entry.value), entry.revision));
        }
        instances_first(&mut different);
        let feed = self.store.watch(record::CATALOG, revision).await?;
        if heals {
            self.writer.start_over(revision, different);
        } else {
            self.writer.apply(revision, different);
        }
        self.followed = true;
        Ok(feed)
    }
}

/// Writes roles that the store has lost, or has of an earlier term: no older leader is to come back (rule N7).
fn newer_roles(id: &ServiceId, known: &Roles, there: &HashMap<&str, &Entry>) -> Option<Op> {
    let key = record::roles_key(id);
    let when = match there.get(key.as_ref()) {
        None => Condition::Absent,
        Some(entry) => match record::decode_roles(&entry.value) {
            Ok(old) if old.term >= known.term => return None,
            Ok(_) | Err(_) => Condition::Unchanged(entry.revision),
        },
    };
    Some(Op::Put { key, value: record::encode_roles(known), when })
}

fn changes(event: Event) -> (Revision, Vec<Change>) {
    let Event { revision, changes } = event;
    let changes = changes.iter().filter_map(|(key, value)| decoded(key, value.as_ref(), revision));
    let mut changes: Vec<_> = changes.collect();
    instances_first(&mut changes);
    (revision, changes)
}

/// A verdict is on an instance that is known.
fn instances_first(changes: &mut [Change]) {
    changes.sort_by_key(|change| matches!(change, Change::PutHealth(..)));
}

fn decoded(key: &Key, value: Option<&Bytes>, revision: Revision) -> Option<Change> {
    record::decode(key, value, revision).unwrap_or_else(|error| {
        tracing::error!(%error, "a record was left out of the catalog");
        None
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        catalog::catalog,
        rt::Readiness,
        store::{Condition, MemoryStore, Op},
    };

    #[tokio::test]
    async fn what_is_not_of_the_catalog_is_not_read() {
        let store: Arc<dyn Store> = Arc::new(MemoryStore::default());
        let put = |key: Key| Op::Put { key, value: Bytes::from_static(b"?"), when: Condition::Always };
        let others = ["history/s/1-0", "members/n1", "locks/l", "catalogue"];
        store.commit(others.iter().map(|key| put((*key).into())).collect()).await.unwrap();
        let service = put(record::service_key(&"s".parse().unwrap()));
        store.commit(vec![service.clone()]).await.unwrap();
        let listing = store.list(record::CATALOG).await.unwrap();
        assert_eq!(listing.entries.iter().map(|entry| &entry.key).collect::<Vec<_>>(), [service.key()]);

        let (writer, reader) = catalog();
        let mut feed = Mirror::new(Arc::clone(&store), writer, reader.clone()).load().await.unwrap();
        assert_eq!(reader.latest().services().len(), 1);
        store.commit(vec![put("history/s/2-0".into())]).await.unwrap();
        let both = store.commit(vec![put("history/s/3-0".into()), service.clone()]).await.unwrap();
        let event = feed.next().await.unwrap();
        assert_eq!((event.revision, event.changes.len()), (both, 1));
    }

    #[tokio::test]
    async fn roles_come_and_go_and_a_bad_record_fails_nothing_else() {
        let store: Arc<dyn Store> = Arc::new(MemoryStore::default());
        let put = |key: Key, value: Bytes| Op::Put { key, value, when: Condition::Always };
        let id = |name: &str| name.parse::<ServiceId>().unwrap();
        let roles = |term| Roles { term, leader: Some("n1".parse().unwrap()), ..Roles::default() };
        let elected = |name, term| put(record::roles_key(&id(name)), record::encode_roles(&roles(term)));
        let bad = put(record::roles_key(&id("bad")), Bytes::from_static(b"\xff"));
        let service = put(record::service_key(&id("s")), Bytes::new());
        store.commit(vec![bad.clone(), service, elected("db", 1)]).await.unwrap();
        let (writer, reader) = catalog();
        let mut mirror = Mirror::new(Arc::clone(&store), writer, reader.clone());
        let mut feed = mirror.load().await.unwrap();
        let shown = || {
            let catalog = reader.latest();
            let term = |roles: &Arc<Roles>| roles.term.to_string();
            let shown = catalog.services().map(|service| {
                format!("{} {}", service.id, service.roles.as_ref().map(term).unwrap_or_default())
            });
            shown.collect::<Vec<_>>()
        };
        assert_eq!(shown(), ["db 1", "s "]);
        let gone = |name| Op::Delete { key: record::roles_key(&id(name)), when: Condition::Always };
        for (ops, want) in [
            (vec![elected("db", 2), bad], vec!["db 2", "s "]),
            (vec![elected("s", 3)], vec!["db 2", "s 3"]),
            (vec![gone("db")], vec!["s 3"]),
        ] {
            store.commit(ops).await.unwrap();
            mirror.writer.apply_all([changes(feed.next().await.unwrap())]);
            assert_eq!(shown(), want);
        }
        // What went while nobody followed is noticed.
        store.commit(vec![gone("s"), elected("late", 1)]).await.unwrap();
        mirror.resync().await.unwrap();
        assert_eq!(shown(), ["late 1", "s "]);
    }

    #[tokio::test]
    async fn a_store_that_went_back_brings_no_older_leader_back() {
        let store: Arc<dyn Store> = Arc::new(MemoryStore::default());
        let id = |name: &str| name.parse::<ServiceId>().unwrap();
        let roles = |term| Roles { term, ..Roles::default() };
        let put = |name: &str, term| Op::Put {
            key: record::roles_key(&id(name)),
            value: record::encode_roles(&roles(term)),
            when: Condition::Always,
        };
        store.commit(vec![put("older", 1), put("newer", 5)]).await.unwrap();
        let (mut writer, reader) = catalog();
        let known = ["older", "newer", "lost"].map(|name| Change::PutRoles(id(name), roles(3).into()));
        writer.apply(Revision(9), known.into());
        Mirror::new(Arc::clone(&store), writer, reader).heal().await.unwrap();
        for (name, term) in [("older", 3), ("newer", 5), ("lost", 3)] {
            let entry = store.get(&record::roles_key(&id(name))).await.unwrap().unwrap();
            assert_eq!(record::decode_roles(&entry.value), Ok(roles(term)), "{name}");
        }
        assert!(store.list(record::SERVICES).await.unwrap().entries.is_empty());
    }

    #[tokio::test]
    async fn who_falls_behind_lists_again() {
        let store: Arc<dyn Store> = Arc::new(MemoryStore::with_history(4));
        let put = |id: usize| Op::Put {
            key: record::service_key(&format!("s{id}").parse().unwrap()),
            value: Bytes::new(),
            when: Condition::Always,
        };
        store.commit(vec![put(0), put(1)]).await.unwrap();
        let (writer, reader) = catalog();
        let mut mirror = Mirror::new(Arc::clone(&store), writer, reader.clone());
        let feed = mirror.load().await.unwrap();
        assert_eq!(reader.latest().services().len(), 2);

        let gone = Op::Delete { key: put(1).key().clone(), when: Condition::Always };
        store.commit(vec![gone]).await.unwrap();
        for id in 2..50 {
            store.commit(vec![put(id)]).await.unwrap();
        }
        let tasks = Tasks::default();
        let synced = Readiness::default().gate("registry");
        tasks.spawn_until_shutdown("mirror", mirror.run(Some(feed), synced));
        let last = store.commit(vec![put(50)]).await.unwrap();
        assert!(tokio::time::timeout(Duration::from_secs(10), reader.reached(last)).await.unwrap());
        let snapshot = reader.latest();
        assert_eq!(snapshot.services().len(), 50);
        assert!(snapshot.service(&"s1".parse().unwrap()).is_none());
    }
}
