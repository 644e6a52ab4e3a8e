use std::{collections::BTreeMap, sync::Arc, time::SystemTime};

use dashmap::DashMap;
use tokio::sync::watch;

use crate::model::{Incarnation, InstanceId, InstanceKey, Revision, ServiceId};

/// What an instance says of itself many times a second, e.g. the range of blocks that it has. Beside the snapshots, so that
/// it wakes nobody who does not ask for it, and nothing of it goes to a proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Live {
    /// The run that said it.
    pub incarnation: Incarnation,
    /// What it said last; it replaces what it said before.
    pub entries: BTreeMap<String, String>,
    /// When it came to Disco.
    pub published_at: SystemTime,
    /// The change that brought it. What came between two changes was never stored.
    pub revision: Revision,
}

/// The live metadata of one service.
#[derive(Debug, Clone, Default)]
pub struct LiveService {
    /// The newest change in it.
    pub revision: Revision,
    /// By instance.
    pub instances: imbl::OrdMap<InstanceId, Arc<Live>>,
}

/// The live metadata of all instances. Cheap to clone; a clone is the same board.
#[derive(Debug, Clone, Default)]
pub struct LiveBoard {
    services: Arc<DashMap<ServiceId, watch::Sender<LiveService>>>,
}

impl LiveBoard {
    /// That of one service, now and as it changes. It ends when the service is gone.
    pub fn watch(&self, service: &ServiceId) -> watch::Receiver<LiveService> {
        self.services.entry(service.clone()).or_default().subscribe()
    }

    /// That of one service now.
    pub fn latest(&self, service: &ServiceId) -> LiveService {
        self.services.get(service).map(|sender| sender.borrow().clone()).unwrap_or_default()
    }

    /// That of one instance.
    pub fn get(&self, key: &InstanceKey) -> Option<Arc<Live>> {
        self.services.get(&key.service)?.borrow().instances.get(&key.id).cloned()
    }

    /// Notes what an instance said; `None` takes it away. A revision that is not newer than what is there changes nothing.
    pub(super) fn put(&self, key: &InstanceKey, revision: Revision, said: Option<Live>) {
        if said.is_none() && !self.services.contains_key(&key.service) {
            return;
        }
        let sender = self.services.entry(key.service.clone()).or_default();
        sender.send_if_modified(|live| {
            if live.instances.get(&key.id).is_some_and(|present| present.revision >= revision) {
                return false;
            }
            let modified = match said {
                Some(said) => {
                    live.instances.insert(key.id.clone(), Arc::new(said));
                    true
                }
                None => live.instances.remove(&key.id).is_some(),
            };
            if modified {
                live.revision = revision;
            }
            modified
        });
    }

    /// Forgets a service.
    pub(super) fn forget(&self, service: &ServiceId) {
        self.services.remove(service);
    }
}
