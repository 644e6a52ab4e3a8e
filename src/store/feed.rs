use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard},
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use tokio::sync::watch;

use super::{
    Entry, Event, Key, Listing, Op, StoreError, Watch,
    state::{Ahead, State},
};
use crate::model::Revision;

/// How many bytes of keys and values the history holds at most, so that large values cannot fill the memory.
const HISTORY_BYTES: usize = 64 << 20;

/// What a backend in this process shows to readers: the state of accepted commits, and the latest of them in order.
#[derive(Debug)]
pub(super) struct Readable {
    state: RwLock<State>,
    history: Mutex<History>,
    progress: watch::Sender<Progress>,
}

#[derive(Debug, Clone, Copy)]
struct Progress {
    revision: Revision,
    closed: bool,
}

impl Readable {
    /// Shows `state`; remembers at most `history` commits from here on.
    pub(super) fn new(state: State, history: usize) -> Arc<Self> {
        let revision = state.revision();
        Arc::new(Self {
            state: RwLock::new(state),
            history: Mutex::new(History {
                events: VecDeque::new(),
                forgotten: revision,
                bytes: 0,
                limit: history,
            }),
            progress: watch::Sender::new(Progress { revision, closed: false }),
        })
    }

    /// The state as readers see it. Held briefly: the writer waits for it.
    pub(super) fn state(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Applies accepted commits, in order, and tells the watchers. Only the one writer calls it.
    pub(super) fn publish(&self, commits: impl IntoIterator<Item = (Revision, Vec<Op>)>) {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let mut history = self.history();
        for (revision, ops) in commits {
            history.push(state.apply(revision, ops));
        }
        let revision = state.revision();
        drop((history, state));
        self.progress.send_modify(|progress| progress.revision = revision);
    }

    /// Checks and applies one commit at once, for a backend that has nothing to write.
    pub(super) fn commit(&self, ops: Vec<Op>) -> Result<Revision, StoreError> {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        self.open()?;
        state.check(&ops, &Ahead::default())?;
        let revision = Revision(state.revision().0 + 1);
        self.history().push(state.apply(revision, ops));
        // Within the lock, so that the revision told never goes back.
        self.progress.send_modify(|progress| progress.revision = revision);
        Ok(revision)
    }

    /// Later commits have revisions greater than `to`.
    pub(super) fn advance(&self, to: Revision) -> Result<(), StoreError> {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        self.open()?;
        state.skip_to(to);
        let revision = state.revision();
        self.progress.send_modify(|progress| progress.revision = revision);
        Ok(())
    }

    /// No more commits: readers are refused, watchers end after what is left for them.
    pub(super) fn close(&self) {
        let _state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        self.progress.send_modify(|progress| progress.closed = true);
    }

    /// Returns once closed.
    pub(super) async fn closed(&self) {
        let mut progress = self.progress.subscribe();
        // The sender lives as long as `self`, so this ends by closing only.
        let _ = progress.wait_for(|progress| progress.closed).await;
    }

    pub(super) fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        self.open()?;
        Ok(self.state().get(key))
    }

    pub(super) fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        self.open()?;
        // A clone shares the tree: the writer does not wait for a long listing.
        let state = self.state().clone();
        Ok(state.list(prefix))
    }

    pub(super) fn watch(
        self: &Arc<Self>,
        prefix: &str,
        after: Revision,
    ) -> Result<Box<dyn Watch>, StoreError> {
        self.open()?;
        let forgotten = self.history().forgotten;
        if after < forgotten {
            return Err(StoreError::Compacted(forgotten));
        }
        Ok(Box::new(Follower {
            prefix: prefix.into(),
            seen: after,
            progress: self.progress.subscribe(),
            from: Arc::clone(self),
        }))
    }

    fn open(&self) -> Result<(), StoreError> {
        if self.progress.borrow().closed { Err(StoreError::Closed) } else { Ok(()) }
    }

    fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The latest commits in order.
#[derive(Debug)]
struct History {
    events: VecDeque<Event>,
    /// Everything up to here is no longer known.
    forgotten: Revision,
    bytes: usize,
    limit: usize,
}

impl History {
    fn push(&mut self, event: Event) {
        self.bytes += size(&event);
        self.events.push_back(event);
        while self.events.len() > self.limit || self.bytes > HISTORY_BYTES {
            let Some(oldest) = self.events.pop_front() else { return };
            self.bytes -= size(&oldest);
            self.forgotten = oldest.revision;
        }
    }

    /// The first commit after `seen` that touches the prefix, if there is one, and what is seen then.
    fn after(&self, seen: Revision, prefix: &str) -> Result<(Revision, Option<Event>), StoreError> {
        if seen < self.forgotten {
            return Err(StoreError::Compacted(self.forgotten));
        }
        let first = self.events.partition_point(|event| event.revision <= seen);
        for event in self.events.range(first..) {
            let changes: Vec<(Key, Option<Bytes>)> =
                event.changes.iter().filter(|(key, _)| key.starts_with(prefix)).cloned().collect();
            if !changes.is_empty() {
                return Ok((event.revision, Some(Event { revision: event.revision, changes })));
            }
        }
        Ok((self.events.back().map_or(seen, |event| event.revision.max(seen)), None))
    }
}

fn size(event: &Event) -> usize {
    event.changes.iter().map(|(key, value)| key.len() + value.as_ref().map_or(0, Bytes::len)).sum()
}

/// One reader of the history.
#[derive(Debug)]
struct Follower {
    prefix: Box<str>,
    seen: Revision,
    progress: watch::Receiver<Progress>,
    from: Arc<Readable>,
}

impl Watch for Follower {
    fn next(&mut self) -> BoxFuture<'_, Result<Event, StoreError>> {
        Box::pin(async move {
            loop {
                // Before looking into the history: what comes in after the look then ends the wait below.
                let closed = self.progress.borrow_and_update().closed;
                let (seen, event) = self.from.history().after(self.seen, &self.prefix)?;
                self.seen = seen;
                if let Some(event) = event {
                    return Ok(event);
                }
                if closed || self.progress.changed().await.is_err() {
                    return Err(StoreError::Closed);
                }
            }
        })
    }
}
