use std::sync::Arc;

use futures_util::FutureExt as _;

use super::{Error, record};
use crate::{
    catalog::{Change, Writer},
    model::Revision,
    store::{Event, Listing, Store, StoreError, Watch},
};

/// Most commits that are published as one snapshot, so that a long queue does not hold back what is ready.
const BATCH: usize = 1024;

/// Keeps the catalog equal to the store. The catalog's one writer.
#[derive(Debug)]
pub(super) struct Mirror {
    store: Arc<dyn Store>,
    writer: Writer,
    feed: Box<dyn Watch>,
}

impl Mirror {
    /// Publishes what the store holds.
    pub(super) async fn load(store: Arc<dyn Store>, mut writer: Writer) -> Result<Self, Error> {
        let Listing { revision, entries } = store.list(record::ALL).await.map_err(Error::Store)?;
        let mut batches = Vec::with_capacity(entries.len());
        for entry in entries {
            if let Some(change) = record::decode(&entry.key, Some(&entry.value), entry.revision)? {
                batches.push(change);
            }
        }
        let feed = store.watch(record::ALL, revision).await.map_err(Error::Store)?;
        writer.apply(revision, batches);
        Ok(Self { store, writer, feed })
    }

    /// Follows the store until it is closed. A store that fails leaves the catalog as it is: what is known stays (never 1).
    pub(super) async fn run(mut self) {
        loop {
            let mut events = match self.feed.next().await {
                Ok(event) => vec![event],
                Err(StoreError::Closed) => return,
                Err(error) => {
                    tracing::error!(%error, "the catalog no longer follows the store; what is known stays");
                    return;
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
            // The store is held for as long as its feed is followed.
            debug_assert!(Arc::strong_count(&self.store) > 0);
        }
    }
}

fn changes(event: Event) -> (Revision, Vec<Change>) {
    let Event { revision, changes } = event;
    let changes = changes.iter().filter_map(|(key, value)| {
        record::decode(key, value.as_ref(), revision).unwrap_or_else(|error| {
            tracing::error!(%error, "a record was left out of the catalog");
            None
        })
    });
    (revision, changes.collect())
}
