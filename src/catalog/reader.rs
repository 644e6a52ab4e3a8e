use std::{collections::BTreeSet, sync::Arc, time::SystemTime};

use tokio::sync::watch;

use super::{live::LiveBoard, snapshot::Snapshot};
use crate::model::{InstanceId, Revision, ServiceId};

/// What changed between two revisions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Changes {
    /// These, each once: an instance, or a service as such where there is no id. Look at the snapshot for what they are now.
    Touched(BTreeSet<(ServiceId, Option<InstanceId>)>),
    /// More than is remembered: anything may have changed.
    Resync,
}

/// Why the catalog may be older than the truth.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stale {
    /// It was equal to the truth until then.
    pub since: SystemTime,
    /// What keeps it from being so now.
    pub reason: Arc<str>,
}

/// A snapshot and how it came about.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) snapshot: Arc<Snapshot>,
    pub(super) log: imbl::Vector<(Revision, ServiceId, Option<InstanceId>)>,
    /// The log holds every change after this.
    pub(super) log_from: Revision,
    /// When revisions came, oldest first: as many as the log has.
    pub(super) times: imbl::Vector<(Revision, SystemTime)>,
    pub(super) stale: Option<Stale>,
}

impl State {
    pub(super) fn changes_since(&self, since: Revision) -> Changes {
        if since < self.log_from {
            return Changes::Resync;
        }
        let newer = self.log.iter().rev().take_while(|(at, ..)| *at > since);
        Changes::Touched(newer.map(|(_, service, id)| (service.clone(), id.clone())).collect::<BTreeSet<_>>())
    }

    fn changes_of(&self, revision: Revision) -> Option<BTreeSet<(ServiceId, Option<InstanceId>)>> {
        if revision <= self.log_from {
            return None;
        }
        let until = self.log.iter().rev().skip_while(|(at, ..)| *at > revision);
        let its = until.take_while(|(at, ..)| *at == revision);
        Some(its.map(|(_, service, id)| (service.clone(), id.clone())).collect())
    }

    fn came(&self, revision: Revision) -> Option<SystemTime> {
        let later = self.times.iter().rev().take_while(|(at, _)| *at >= revision);
        later.last().map(|(_, time)| *time)
    }
}

/// The way out of the catalog. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Reader {
    pub(super) state: watch::Receiver<Arc<State>>,
    pub(super) live: LiveBoard,
}

impl Reader {
    /// The newest snapshot.
    pub fn latest(&self) -> Arc<Snapshot> {
        Arc::clone(&self.state.borrow().snapshot)
    }

    /// What instances say of themselves many times a second.
    pub fn live(&self) -> &LiveBoard {
        &self.live
    }

    /// Whether it may be older than the truth, because what it is told by is silent.
    pub fn stale(&self) -> Option<Stale> {
        self.state.borrow().stale.clone()
    }

    /// What changed from `since` to the newest snapshot, with that snapshot.
    pub fn since(&self, since: Revision) -> (Arc<Snapshot>, Changes) {
        let state = Arc::clone(&self.state.borrow());
        (Arc::clone(&state.snapshot), state.changes_since(since))
    }

    /// What the one change touched; `None` when that is no longer remembered.
    pub fn changes_of(&self, revision: Revision) -> Option<BTreeSet<(ServiceId, Option<InstanceId>)>> {
        self.state.borrow().changes_of(revision)
    }

    /// When the catalog came to `revision`, as far as it remembers; `None` if it has not.
    pub fn came(&self, revision: Revision) -> Option<SystemTime> {
        self.state.borrow().came(revision)
    }

    /// Waits until the catalog is at `revision` or later. False when the catalog is gone. Cancel-safe.
    pub async fn reached(&self, revision: Revision) -> bool {
        let mut state = self.state.clone();
        state.wait_for(|state| state.snapshot.revision() >= revision).await.is_ok()
    }

    /// Waits for a snapshot newer than `seen` and returns it with what changed. `None` when the catalog is gone. Cancel-safe.
    pub async fn newer_than(&self, seen: Revision) -> Option<(Arc<Snapshot>, Changes)> {
        let mut receiver = self.state.clone();
        let state = Arc::clone(&*receiver.wait_for(|state| state.snapshot.revision() > seen).await.ok()?);
        Some((Arc::clone(&state.snapshot), state.changes_since(seen)))
    }
}
