//! What instances say many times a second, on its way to the store: the newest of each, a few commits a second.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::sync::Notify;

use super::{Error, Inner, Registry, record, write::expect_incarnation};
use crate::{
    catalog::Live,
    model::{Incarnation, InstanceKey, Revision},
    rt,
    store::{Condition, Op},
};

/// The least time between two commits of one process: watchers hear of it in about that time.
const PACE: Duration = Duration::from_millis(50);

/// Most instances in one commit; a store bounds its operations.
const BATCH: usize = 100;

/// What was said since the last commit.
#[derive(Debug, Default)]
pub(super) struct Said {
    waiting: Mutex<HashMap<InstanceKey, Live>>,
    more: Notify,
}

impl Registry {
    /// Takes what an instance says of itself. Answered before it is stored: a crash of this process within the next moment
    /// loses it, as would the next thing that is said.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Conflict`] when another incarnation is registered.
    pub fn publish(
        &self,
        key: InstanceKey,
        incarnation: Option<Incarnation>,
        entries: BTreeMap<String, String>,
    ) -> Result<(), Error> {
        let snapshot = self.inner.catalog.latest();
        let present = snapshot.instance(&key).ok_or_else(|| Error::NotFound(key.clone()))?;
        expect_incarnation(present, incarnation)?;
        let live = Live {
            incarnation: present.incarnation,
            entries,
            published_at: rt::now(),
            revision: Revision::default(),
        };
        self.inner.said.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(key, live);
        self.inner.said.more.notify_one();
        self.inner.metrics.published.inc();
        Ok(())
    }

    /// Brings what was said to the store.
    pub(super) async fn store_live(self) {
        loop {
            self.inner.said.more.notified().await;
            let taken =
                std::mem::take(&mut *self.inner.said.waiting.lock().unwrap_or_else(PoisonError::into_inner));
            let ops: Vec<Op> =
                taken.into_iter().filter_map(|(key, live)| self.inner.live_op(&key, &live)).collect();
            for ops in ops.chunks(BATCH) {
                if let Err(error) = self.inner.store.commit(ops.to_vec()).await {
                    tracing::warn!(%error, instances = ops.len(), "live metadata was not stored; what is said next replaces it");
                }
            }
            tokio::time::sleep(PACE).await;
        }
    }
}

impl Inner {
    /// Stores what is new.
    fn live_op(&self, key: &InstanceKey, live: &Live) -> Option<Op> {
        let present = self.catalog.live().get(key);
        let same =
            |present: &Live| present.incarnation == live.incarnation && present.entries == live.entries;
        if present.is_some_and(|present| same(&present)) {
            return None;
        }
        Some(Op::Put {
            key: record::live_key(key),
            value: record::encode_live(live),
            when: Condition::Always,
        })
    }

    /// Takes what the instance said out of the store, beside the instance itself.
    pub(super) fn unsay(&self, key: &InstanceKey) -> Option<Op> {
        self.catalog.live().get(key)?;
        Some(Op::Delete { key: record::live_key(key), when: Condition::Always })
    }
}
