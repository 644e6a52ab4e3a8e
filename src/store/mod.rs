//! Durable key-value state: what was accepted, in the order it was accepted.
//!
//! Written by `registry`; read by it at start-up and through [`Store::watch`]. A commit that was answered survives
//! `kill -9` right after. Backends differ in where they keep things, not in what they do: one conformance suite holds
//! them all. [`MemoryStore`] keeps nothing; [`FileStore`] keeps a log in a directory of this machine; [`EtcdStore`] keeps
//! everything in an etcd cluster that several processes share.

mod backup;
#[cfg(test)]
mod conformance;
mod etcd;
mod feed;
mod file;
mod follow;
mod memory;
mod state;
mod status;

pub use backup::{Backup, BackupError};
pub use etcd::{EtcdConfig, EtcdError, EtcdStore, EtcdTls, EtcdUser};
pub use file::{Config, Cut, Damage, FileError, FileStore, Loss, OpenError, Recovery, Stats};
pub use follow::{Follower, News};
pub use memory::Memory as MemoryStore;
pub use status::{Fault, Session, Status};

use std::{fmt, sync::Arc};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use tokio::sync::watch;

use crate::model::Revision;

/// A key: `/`-separated path segments without a leading slash, e.g. `catalog/instances/greeter/a`.
pub type Key = Arc<str>;

/// What must hold of a key for an operation on it to be accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condition {
    /// Nothing.
    Always,
    /// There is no such key.
    Absent,
    /// The key was last written at this revision.
    Unchanged(Revision),
}

/// One operation of a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Writes a value.
    Put {
        /// Where.
        key: Key,
        /// What.
        value: Bytes,
        /// If.
        when: Condition,
    },
    /// Writes a value that is bound to this process: it goes when the store is closed, and when the process is gone or was
    /// silent for longer than its session lasts (see [`Status::session`]). A later [`Op::Put`] unbinds the key.
    Bind {
        /// Where.
        key: Key,
        /// What.
        value: Bytes,
        /// If.
        when: Condition,
    },
    /// Removes a key. Removing one that is absent is accepted under [`Condition::Always`].
    Delete {
        /// Which.
        key: Key,
        /// If.
        when: Condition,
    },
}

impl Op {
    /// The key that it touches.
    pub fn key(&self) -> &Key {
        match self {
            Self::Put { key, .. } | Self::Bind { key, .. } | Self::Delete { key, .. } => key,
        }
    }

    /// What must hold of the key.
    pub fn when(&self) -> Condition {
        match self {
            Self::Put { when, .. } | Self::Bind { when, .. } | Self::Delete { when, .. } => *when,
        }
    }
}

/// A key with its value and the revision that last wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: Key,
    /// Its value.
    pub value: Bytes,
    /// The commit that last wrote it.
    pub revision: Revision,
}

/// All entries under a prefix at one revision, by key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// The revision that this is the state of.
    pub revision: Revision,
    /// In the order of their keys.
    pub entries: Vec<Entry>,
}

/// What one commit did under a watched prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The commit.
    pub revision: Revision,
    /// Its operations under the prefix: the new value, or `None` for a removal. Removing an absent key changes nothing
    /// and is not told.
    pub changes: Vec<(Key, Option<Bytes>)>,
}

/// A feed of commits under a prefix.
pub trait Watch: Send + fmt::Debug {
    /// The next commit that touched the prefix, in order and without gaps. [`StoreError::Compacted`] when the reader fell
    /// too far behind and [`StoreError::Reset`] when the store went back: list again, and watch from there.
    /// [`StoreError::Closed`] when the store is gone. Cancel-safe.
    fn next(&mut self) -> BoxFuture<'_, Result<Event, StoreError>>;
}

/// Durable key-value state with revisions, compare-and-set and a feed of changes.
pub trait Store: Send + Sync + fmt::Debug + 'static {
    /// Applies all operations or none. Durable when answered. The revision is greater than that of every commit answered
    /// before, and every accepted commit has its own. Conditions are checked against the state before the commit; of
    /// two operations on one key the later wins. Dropping the future does not take a commit back.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] names the first key whose condition did not hold; nothing was written.
    fn commit(&self, ops: Vec<Op>) -> BoxFuture<'_, Result<Revision, StoreError>>;

    /// One entry, as of some moment during the call: it shows every commit that was answered before, by whichever process.
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Entry>, StoreError>>;

    /// Everything whose key starts with `prefix` (as text: end it with `/` to stay within a segment) at one revision.
    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Listing, StoreError>>;

    /// Every commit after `after` that touches the prefix.
    ///
    /// # Errors
    /// [`StoreError::Compacted`] when the store no longer remembers that far back: list again. A store that is far away may
    /// say so at the first [`Watch::next`] only.
    fn watch<'a>(
        &'a self,
        prefix: &'a str,
        after: Revision,
    ) -> BoxFuture<'a, Result<Box<dyn Watch>, StoreError>>;

    /// From now on every commit has a revision greater than `to`. Durable when answered. For restoring a backup: what was
    /// given out since then is not given out again. Readers may be told [`StoreError::Reset`].
    fn advance(&self, to: Revision) -> BoxFuture<'_, Result<(), StoreError>>;

    /// How the store is, and the session of what is bound to this process. The receiver of a store that is always there
    /// never changes: its sender is gone.
    fn status(&self) -> watch::Receiver<Status> {
        watch::channel(Status::local()).1
    }

    /// Refuses new commits, writes out what was accepted and releases files. Later calls answer [`StoreError::Closed`].
    fn close(&self) -> BoxFuture<'_, Result<(), StoreError>>;
}

/// Why the store did not do it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The condition on a key did not hold; nothing was written.
    #[error("{key} was changed by somebody else")]
    Conflict {
        /// The key.
        key: Key,
        /// The revision that last wrote it, `None` when it is absent.
        actual: Option<Revision>,
    },
    /// The feed does not go back that far.
    #[error("the store remembers changes after revision {0} only; list again")]
    Compacted(Revision),
    /// The store was restored from an older state or replaced: what was accepted since then is lost. Revisions go on after
    /// this one, so none is given twice.
    #[error(
        "the store was restored from an older state or replaced; its revisions go on after {0}; list again"
    )]
    Reset(Revision),
    /// The medium failed; the commit may or may not be durable. Later ones fail too until the medium works again.
    #[error("{0}")]
    Failed(String),
    /// The store was closed.
    #[error("the store is closed")]
    Closed,
}
