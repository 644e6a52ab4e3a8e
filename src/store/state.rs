use std::{collections::HashMap, ops::Bound, sync::Arc};

use bytes::Bytes;
use imbl::OrdMap;

use super::{Condition, Entry, Event, Key, Listing, Op, StoreError};
use crate::model::Revision;

/// What a record costs on disk beside its key and value, roughly; for bounds only.
const RECORD_OVERHEAD: u64 = 16;

/// A value and the commit that wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) value: Bytes,
    pub(super) revision: Revision,
    /// Whether it goes with the process.
    pub(super) bound: bool,
}

/// All keys at one revision. Cloning shares the tree, so a snapshot is written from a clone while commits go on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct State {
    records: OrdMap<Key, Record>,
    revision: Revision,
    bytes: u64,
}

impl State {
    /// The last commit applied.
    pub(super) fn revision(&self) -> Revision {
        self.revision
    }

    /// The revision numbers up to `revision` are taken, whatever became of their commits.
    pub(super) fn skip_to(&mut self, revision: Revision) {
        self.revision = self.revision.max(revision);
    }

    /// About how many bytes a snapshot of it takes.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How many keys there are.
    pub(super) fn len(&self) -> usize {
        self.records.len()
    }

    /// In the order of their keys.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&Key, &Record)> {
        self.records.iter()
    }

    pub(super) fn get(&self, key: &str) -> Option<Entry> {
        let (key, record) = self.records.get_key_value(key)?;
        Some(Entry { key: Arc::clone(key), value: record.value.clone(), revision: record.revision })
    }

    pub(super) fn list(&self, prefix: &str) -> Listing {
        let entries = self
            .records
            .range::<_, str>((Bound::Included(prefix), Bound::Unbounded))
            .take_while(|(key, _)| key.starts_with(prefix))
            .map(|(key, record)| Entry {
                key: Arc::clone(key),
                value: record.value.clone(),
                revision: record.revision,
            })
            .collect();
        Listing { revision: self.revision, entries }
    }

    /// Checks the conditions of a commit against this state with `ahead` applied.
    pub(super) fn check(&self, ops: &[Op], ahead: &Ahead) -> Result<(), StoreError> {
        for op in ops {
            let (key, when) = (op.key(), op.when());
            if when == Condition::Always {
                continue;
            }
            let actual = match ahead.get(key) {
                Some(revision) => revision,
                None => self.records.get(key).map(|record| record.revision),
            };
            let wanted = match when {
                Condition::Unchanged(revision) => Some(revision),
                Condition::Absent | Condition::Always => None,
            };
            if actual != wanted {
                return Err(StoreError::Conflict { key: Arc::clone(key), actual });
            }
        }
        Ok(())
    }

    /// Applies an accepted commit and tells what it changed.
    pub(super) fn apply(&mut self, revision: Revision, ops: Vec<Op>) -> Event {
        let mut changes = Vec::with_capacity(ops.len());
        for op in ops {
            let bound = matches!(op, Op::Bind { .. });
            match op {
                Op::Put { key, value, .. } | Op::Bind { key, value, .. } => {
                    self.insert(Arc::clone(&key), Record { value: value.clone(), revision, bound });
                    changes.push((key, Some(value)));
                }
                Op::Delete { key, .. } => {
                    if let Some(old) = self.records.remove(&key) {
                        self.bytes -= size(key.len(), &old.value);
                        changes.push((key, None));
                    }
                }
            }
        }
        self.revision = revision;
        Event { revision, changes }
    }

    /// Adds a record as it is, from a snapshot.
    pub(super) fn insert(&mut self, key: Key, record: Record) {
        let length = key.len();
        self.bytes += size(length, &record.value);
        if let Some(old) = self.records.insert(key, record) {
            self.bytes -= size(length, &old.value);
        }
    }
}

fn size(key: usize, value: &Bytes) -> u64 {
    (key + value.len()) as u64 + RECORD_OVERHEAD
}

/// What commits that are accepted but not yet applied will have written: the revision of each key, `None` when absent. They
/// come in two batches at most: one that is being gathered, and the one before it.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    latest: HashMap<Key, Option<Revision>>,
    earlier: HashMap<Key, Option<Revision>>,
}

impl Ahead {
    /// For the batch after this one, which is not applied yet.
    pub(super) fn next(self) -> Self {
        Self { latest: HashMap::with_capacity(self.latest.len()), earlier: self.latest }
    }

    /// Notes an accepted commit.
    pub(super) fn note(&mut self, revision: Revision, ops: &[Op]) {
        for op in ops {
            let after = match op {
                Op::Put { .. } | Op::Bind { .. } => Some(revision),
                Op::Delete { .. } => None,
            };
            self.latest.insert(Arc::clone(op.key()), after);
        }
    }

    fn get(&self, key: &str) -> Option<Option<Revision>> {
        self.latest.get(key).or_else(|| self.earlier.get(key)).copied()
    }
}
