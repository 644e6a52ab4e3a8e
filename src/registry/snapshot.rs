//! Backups: everything that is kept in the store, out of it and into another one.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;
use prost::Message as _;

use super::{Error, Registry, membership, record};
use crate::{
    model::Revision,
    proto::v1,
    rt,
    store::{Backup, Condition, Entry, Listing, Op, Store},
};

/// How far revisions jump beyond all that a backup knows of: more changes than anybody makes between a backup and its use, so that
/// no revision and no fencing token is given out twice.
const JUMP: u64 = 1_000_000_000;

/// How far the ids that replicas are given jump, and the numbers of foundings, likewise (rules N12 and N2 of peer sets): small, since
/// some databases want small ones.
const ID_JUMP: u64 = 1000;

/// Where peer sets are kept.
const PEER_SETS: &str = "peers/sets/";

/// Operations of one commit. etcd takes at most 128 with what a commit adds to them.
const BATCH: usize = 100;

/// What a restore did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Restored {
    /// How many entries were written.
    pub entries: usize,
    /// How many others were removed.
    pub removed: usize,
    /// The store's revision afterwards.
    pub revision: Revision,
}

/// The prefix of all keys.
const EVERYTHING: &str = "";

/// Whether an entry of a store is kept in backups: those of the processes themselves go with them.
pub fn kept(entry: &Entry) -> bool {
    !entry.key.starts_with(membership::MEMBERS)
}

impl Registry {
    /// Everything that the store holds, at one revision.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn backup(&self) -> Result<Backup, Error> {
        let Listing { revision, mut entries } =
            self.inner.store.list(EVERYTHING).await.map_err(Error::Store)?;
        entries.retain(kept);
        Ok(Backup { taken_at: rt::now(), listing: Listing { revision, entries } })
    }

    /// As [`restore`], into the store of this process.
    ///
    /// # Errors
    /// As [`restore`].
    pub async fn restore(&self, backup: Backup, replace: bool) -> Result<Restored, Error> {
        restore(&*self.inner.store, backup, replace).await
    }
}

/// Puts a backup into a store that is empty, or in the place of what it holds. Revisions jump first. Leases start whole with
/// whichever process counts them. When it fails in the middle, doing it again with `replace` completes it.
///
/// # Errors
/// [`Error::NotEmpty`], [`Error::Store`].
pub async fn restore(store: &dyn Store, backup: Backup, replace: bool) -> Result<Restored, Error> {
    let Listing { revision, entries: mut present } = store.list(EVERYTHING).await.map_err(Error::Store)?;
    present.retain(kept);
    if !present.is_empty() && !replace {
        return Err(Error::NotEmpty(present.len()));
    }
    let highest = revision.max(backup.listing.revision);
    store.advance(Revision(highest.0.saturating_add(JUMP))).await.map_err(Error::Store)?;

    let entries: Vec<_> = backup.listing.entries.into_iter().filter(kept).collect();
    let names: HashSet<_> = entries.iter().map(|entry| &entry.key).collect();
    let sets = present.iter().filter(|entry| entry.key.starts_with(PEER_SETS));
    let sets: HashMap<_, _> = sets.map(|entry| (entry.key.clone(), entry.value.clone())).collect();
    let over = present.into_iter().filter(|entry| !names.contains(&entry.key));
    let removals: Vec<_> = over.map(|entry| Op::Delete { key: entry.key, when: Condition::Always }).collect();
    let removed = removals.len();
    let when = if replace { Condition::Always } else { Condition::Absent };
    let written = entries.len();
    let puts = entries.into_iter().map(|Entry { key, value, .. }| {
        let value = match &*key {
            key if key.starts_with(record::INSTANCES) => without_owner(value),
            key if key.starts_with(PEER_SETS) => with_later_ids(value, sets.get(key)),
            _ => value,
        };
        Op::Put { key, value, when }
    });
    let ops: Vec<_> = removals.into_iter().chain(puts).collect();
    for batch in ops.chunks(BATCH) {
        store.commit(batch.to_vec()).await.map_err(Error::Store)?;
    }
    let revision = store.list("-").await.map_err(Error::Store)?.revision;
    tracing::warn!(entries = written, removed, %revision, "a snapshot was restored");
    Ok(Restored { entries: written, removed, revision })
}

/// A process takes a lease that has no owner for one that it has to begin to count; its own it would think counted already.
fn without_owner(value: Bytes) -> Bytes {
    match v1::Instance::decode(value.clone()) {
        Ok(instance) => v1::Instance { owner: String::new(), ..instance }.encode_to_vec().into(),
        // Whoever reads it reports it.
        Err(_) => value,
    }
}

/// Replicas and foundings that came after the backup have ids that it does not know of; what is in its place, `present`, may.
///
/// A list that was not frozen then may have been since, and handed out: so what is collected for now is another founding, with
/// another identity (rule N2).
fn with_later_ids(value: Bytes, present: Option<&Bytes>) -> Bytes {
    // Whoever reads one that cannot be read reports it.
    let Ok(mut record) = v1::PeerSetRecord::decode(value.clone()) else { return value };
    let generation = |record: &v1::PeerSetRecord| {
        record.last_generation.max(record.set.as_ref().map_or(0, |set| set.generation))
    };
    let present = present.and_then(|value| v1::PeerSetRecord::decode(value.clone()).ok()).unwrap_or_default();
    record.next_node = record.next_node.max(present.next_node).saturating_add(ID_JUMP);
    record.last_generation = generation(&record).max(generation(&present)).saturating_add(ID_JUMP);
    if let Some(set) = record.set.as_mut().filter(|set| set.founding.is_none()) {
        set.generation = record.last_generation;
        set.cluster_id = format!("{:032x}", fastrand::u128(1..));
    }
    record.encode_to_vec().into()
}
