use std::{collections::HashSet, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::FutureExt as _;

use super::{Error, record};
use crate::{
    catalog::{Change, Reader, Writer},
    model::Revision,
    rt::Backoff,
    store::{Event, Key, Listing, Store, StoreError, Watch},
};

/// Most commits that are published as one snapshot, so that a long queue does not hold back what is ready.
const BATCH: usize = 1024;

/// Waits between tries to list a store that does not answer.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Keeps the catalog equal to the store. The catalog's one writer.
#[derive(Debug)]
pub(super) struct Mirror {
    store: Arc<dyn Store>,
    writer: Writer,
    catalog: Reader,
    feed: Box<dyn Watch>,
}

impl Mirror {
    /// Publishes what the store holds.
    pub(super) async fn load(
        store: Arc<dyn Store>,
        mut writer: Writer,
        catalog: Reader,
    ) -> Result<Self, Error> {
        let Listing { revision, entries } = store.list(record::ALL).await.map_err(Error::Store)?;
        let mut all = Vec::with_capacity(entries.len());
        for entry in entries {
            all.extend(record::decode(&entry.key, Some(&entry.value), entry.revision)?);
        }
        let feed = store.watch(record::ALL, revision).await.map_err(Error::Store)?;
        instances_first(&mut all);
        writer.apply(revision, all);
        Ok(Self { store, writer, catalog, feed })
    }

    /// Follows the store until it is closed. While a store fails the catalog stays as it is: what is known stays (never 1).
    pub(super) async fn run(mut self) {
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        loop {
            let mut events = match self.feed.next().await {
                Ok(event) => vec![event],
                Err(StoreError::Closed) => return,
                Err(error) => {
                    tracing::warn!(%error, "the catalog lost the store's feed and lists it again; until then what is known stays");
                    while let Err(error) = self.resync().await {
                        if error == StoreError::Closed {
                            return;
                        }
                        tracing::error!(%error, "the store cannot be listed; trying again");
                        tokio::time::sleep(backoff.next_wait()).await;
                    }
                    backoff.reset();
                    continue;
                }
            };
            while events.len() < BATCH {
                match self.feed.next().now_or_never() {
                    Some(Ok(event)) => events.push(event),
                    // An error comes again at the next turn.
                    Some(Err(_)) | None => break,
                }
            }
            self.writer.apply_all(events.into_iter().map(changes));
        }
    }

    /// Lists the store again and publishes what became different, as one change.
    async fn resync(&mut self) -> Result<(), StoreError> {
        let Listing { revision, entries } = self.store.list(record::ALL).await?;
        let known = self.catalog.latest();
        let keys: HashSet<&str> = entries.iter().map(|entry| entry.key.as_ref()).collect();
        let mut different = Vec::new();
        for service in known.services() {
            let gone = service.instances().filter(|i| !keys.contains(record::instance_key(&i.key).as_ref()));
            different.extend(gone.map(|instance| Change::RemoveInstance(instance.key.clone())));
            if !keys.contains(record::service_key(&service.id).as_ref()) {
                different.push(Change::RemoveService(service.id.clone()));
            }
        }
        for entry in entries.iter().filter(|entry| entry.revision > known.revision()) {
            different.extend(decoded(&entry.key, Some(&entry.value), entry.revision));
        }
        instances_first(&mut different);
        self.feed = self.store.watch(record::ALL, revision).await?;
        self.writer.apply(revision, different);
        Ok(())
    }
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
        rt::Tasks,
        store::{Condition, MemoryStore, Op},
    };

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
        let mirror = Mirror::load(Arc::clone(&store), writer, reader.clone()).await.unwrap();
        assert_eq!(reader.latest().services().len(), 2);

        let gone = Op::Delete { key: put(1).key().clone(), when: Condition::Always };
        store.commit(vec![gone]).await.unwrap();
        for id in 2..50 {
            store.commit(vec![put(id)]).await.unwrap();
        }
        let tasks = Tasks::default();
        tasks.spawn_until_shutdown("mirror", mirror.run());
        let last = store.commit(vec![put(50)]).await.unwrap();
        assert!(tokio::time::timeout(Duration::from_secs(10), reader.reached(last)).await.unwrap());
        let snapshot = reader.latest();
        assert_eq!(snapshot.services().len(), 50);
        assert!(snapshot.service(&"s1".parse().unwrap()).is_none());
    }
}
