//! The locks that are held, as the store's feed tells of them: for lists, for those that wait, and to know whose leases to
//! count. It may lag behind the store, so nothing that must be true is decided by it.

use std::{
    future,
    sync::Arc,
    time::{Duration, SystemTime},
};

use imbl::OrdMap;
use tokio::time::Instant;

use super::{Locks, record};
use crate::{
    model::{Lock, LockName, Members, Revision},
    registry::keeper::keeps,
    rt::{self, Backoff},
    store::{Entry, Event, StoreError, Watch},
};

/// Waits between tries to list a store that does not answer.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// When to try again to become the owner of a lock whose owner is dead.
const ADOPT_AGAIN: Duration = Duration::from_secs(1);

/// The locks that are held. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Board {
    revision: Revision,
    locks: OrdMap<LockName, Arc<Lock>>,
    loaded: bool,
    stale: Option<SystemTime>,
}

impl Board {
    /// The last change that it shows.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// All locks that are held, by name.
    pub fn locks(&self) -> impl ExactSizeIterator<Item = &Arc<Lock>> {
        self.locks.values()
    }

    /// One lock, if it is held.
    pub fn lock(&self, name: &LockName) -> Option<&Arc<Lock>> {
        self.locks.get(name)
    }

    /// Since when it may be old, because the store is silent.
    pub fn stale(&self) -> Option<SystemTime> {
        self.stale
    }

    pub(super) fn loaded(&self) -> bool {
        self.loaded
    }

    fn apply(&mut self, event: &Event) {
        self.revision = event.revision;
        for (key, value) in &event.changes {
            let Ok(name) = record::name(key) else { continue };
            let lock = value
                .clone()
                .and_then(|value| read(&Entry { key: Arc::clone(key), value, revision: event.revision }));
            match lock {
                Some(lock) => self.locks.insert(name, lock),
                None => self.locks.remove(&name),
            };
        }
    }
}

fn read(entry: &Entry) -> Option<Arc<Lock>> {
    match record::decode(entry) {
        Ok(lock) => Some(Arc::new(lock)),
        Err(error) => {
            tracing::error!(%error, "a lock is not shown");
            None
        }
    }
}

impl Locks {
    /// Keeps the board equal to the store, and the leases equal to what this process has to count. While the store fails
    /// both stay as they are.
    pub(super) async fn keep(self) {
        let mut members = self.inner.members.clone();
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        let mut feed = None;
        let mut again = None;
        loop {
            let Some(open) = &mut feed else {
                match self.load().await {
                    Ok(opened) => {
                        feed = Some(opened);
                        backoff.reset();
                        again = self.settle_all();
                    }
                    Err(StoreError::Closed) => return,
                    Err(error) => {
                        let since = rt::now();
                        self.inner.board.send_modify(|board| board.stale = board.stale.or(Some(since)));
                        tracing::error!(%error, "the locks cannot be read from the store; trying again");
                        tokio::time::sleep(backoff.next_wait()).await;
                    }
                }
                continue;
            };
            let members_changed = async {
                if members.changed().await.is_err() {
                    future::pending::<()>().await;
                }
            };
            tokio::select! {
                event = open.next() => match event {
                    Ok(event) => {
                        self.inner.board.send_modify(|board| board.apply(&event));
                        let touched = event.changes.iter().filter_map(|(key, _)| record::name(key).ok());
                        again = self.settle(touched).or(again);
                    }
                    Err(StoreError::Closed) => return,
                    Err(error) => {
                        tracing::warn!(%error, "the feed of locks was lost; they are listed again");
                        feed = None;
                    }
                },
                () = members_changed => again = self.settle_all(),
                () = tokio::time::sleep_until(again.unwrap_or_else(Instant::now)), if again.is_some() => {
                    again = self.settle_all();
                }
            }
        }
    }

    async fn load(&self) -> Result<Box<dyn Watch>, StoreError> {
        let listing = self.inner.store.list(record::LOCKS).await?;
        let feed = self.inner.store.watch(record::LOCKS, listing.revision).await?;
        let locks = listing.entries.iter().filter_map(read).map(|lock| (lock.name.clone(), lock)).collect();
        self.inner.board.send_replace(Board { revision: listing.revision, locks, loaded: true, stale: None });
        Ok(feed)
    }

    fn settle_all(&self) -> Option<Instant> {
        let names: Vec<_> = self.board().locks().map(|lock| lock.name.clone()).collect();
        self.settle(names)
    }

    /// Counts the leases of locks that this process owns. Returns when to look again, where it tries to become the
    /// owner in a dead one's place.
    fn settle(&self, names: impl IntoIterator<Item = LockName>) -> Option<Instant> {
        let (board, members) = (self.board(), self.inner.members.borrow().clone());
        let mut again = None;
        for name in names {
            match board.lock(&name) {
                Some(lock) if self.inner.owns(lock) => self.inner.adopt(lock),
                Some(lock) if self.adopts(&members, lock) => {
                    again = Some(Instant::now() + ADOPT_AGAIN);
                    self.spawn_adoption(name);
                }
                // A lease of another process ends here without effect. It is not dropped: the board may lag behind a write
                // of this one.
                Some(_) | None => {}
            }
        }
        again
    }

    /// Whether this process is to become the owner in the place of a dead one, which may be its own last run.
    pub(super) fn adopts(&self, members: &Members, lock: &Lock) -> bool {
        !self.inner.owns(lock) && keeps(members, Some(&lock.owner), &lock.name)
    }
}
