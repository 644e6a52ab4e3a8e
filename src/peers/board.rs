//! All sets as the store's feed tells of them: for answers, for those that wait, and for who observes. It may lag behind the store,
//! so nothing that must be true is decided by it.

use std::{collections::BTreeMap, sync::Arc, time::SystemTime};

use imbl::OrdMap;

use super::{
    Facts, Liveness, NodeId, PeerSet,
    record::{self, Observed},
};
use crate::{
    catalog::Snapshot,
    model::{InstanceKey, Revision, Roles, ServiceId, Verdict},
    rt,
    store::{Entry, Event, Listing, News},
};

/// What is known of one set.
#[derive(Debug, Clone)]
pub(super) struct Known {
    pub(super) set: Arc<PeerSet>,
    pub(super) observed: Arc<Observed>,
}

/// All sets. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Board {
    pub(super) revision: Revision,
    sets: OrdMap<ServiceId, Arc<PeerSet>>,
    observed: OrdMap<ServiceId, Arc<Observed>>,
    pub(super) loaded: bool,
    pub(super) stale: Option<SystemTime>,
}

impl Board {
    pub(super) fn set(&self, name: &ServiceId) -> Option<Known> {
        let set = Arc::clone(self.sets.get(name)?);
        let observed = self.observed.get(name).cloned().unwrap_or_default();
        Some(Known { set, observed })
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &ServiceId> {
        self.sets.keys()
    }

    pub(super) fn apply(&mut self, news: News) {
        match news {
            News::Listed(Listing { revision, entries }) => {
                *self = Self { revision, loaded: true, ..Self::default() };
                for entry in entries {
                    self.put(&entry);
                }
            }
            News::Changed(Event { revision, changes }) => {
                self.revision = revision;
                for (key, value) in changes {
                    match value {
                        Some(value) => self.put(&Entry { key, value, revision }),
                        None => self.remove(&key),
                    }
                }
            }
            News::Silent(error) => {
                tracing::error!(%error, "the peer sets cannot be read from the store; trying again");
                self.stale = self.stale.or_else(|| Some(rt::now()));
            }
        }
    }

    fn put(&mut self, entry: &Entry) {
        let Some((is_set, name)) = record::name_of(&entry.key) else { return };
        let read = if is_set {
            record::decode_set(entry).map(|set| {
                self.sets.insert(name, Arc::new(set));
            })
        } else {
            record::decode_observed(entry).map(|observed| {
                self.observed.insert(name, Arc::new(observed));
            })
        };
        if let Err(reason) = read {
            // What was known of it before stays.
            tracing::error!(key = %entry.key, reason, "a record of a peer set cannot be read");
        }
    }

    fn remove(&mut self, key: &str) {
        match record::name_of(key) {
            Some((true, name)) => {
                self.sets.remove(&name);
            }
            Some((false, name)) => {
                self.observed.remove(&name);
            }
            None => {}
        }
    }
}

/// A set with all that is known beside it, at one moment.
#[derive(Debug, Clone)]
pub struct View {
    /// What is written.
    pub set: Arc<PeerSet>,
    /// Whether each replica runs, and what it says.
    pub facts: Facts,
    /// Who does what, as it is published.
    pub roles: Roles,
    /// The newest of its parts.
    pub revision: Revision,
    /// Since when it may be old, because the store is silent.
    pub stale: Option<SystemTime>,
}

impl View {
    pub(super) fn new(known: &Known, snapshot: &Snapshot, stale: Option<SystemTime>) -> Self {
        let Known { set, observed } = known;
        let service = snapshot.service(&set.spec.name);
        // The catalog and the board hear of new roles by feeds of their own. While they differ one of them lags, and who is shown
        // the old ones as of the new revision would never ask again.
        let agree = |roles: &Roles| *roles == observed.roles;
        let service = service.filter(|service| service.roles.as_deref().is_none_or(agree));
        let service = service.map(|service| service.revision);
        Self {
            facts: Facts { liveness: liveness(set, snapshot), observed: observed.by_node.clone() },
            roles: observed.roles.clone(),
            revision: set.revision.max(observed.revision).max(service.unwrap_or_default()),
            set: Arc::clone(set),
            stale,
        }
    }

    /// How many run.
    pub fn up(&self) -> usize {
        let up = |node: &&NodeId| self.facts.liveness(**node) == Liveness::Up;
        self.set.peers.keys().filter(up).count()
    }

    /// What the database and the set say differently.
    pub fn drift(&self) -> Vec<String> {
        self.set.drift(&self.facts)
    }
}

/// Whether replicas run: they are instances, so the guards that hold those hold these (rule N5).
pub(super) fn liveness(set: &PeerSet, snapshot: &Snapshot) -> BTreeMap<NodeId, Liveness> {
    let of = |key| {
        let instance = snapshot.instance(&InstanceKey { service: set.spec.name.clone(), id: key })?;
        let suspect = instance.stale.is_some() || instance.health.verdict == Verdict::Unhealthy;
        Some(if suspect || !instance.is_published() { Liveness::Suspect } else { Liveness::Up })
    };
    set.peers.values().map(|peer| (peer.node, of(peer.key.clone()).unwrap_or_default())).collect()
}
