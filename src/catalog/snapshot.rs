use std::sync::Arc;

use tokio::time::Instant;

use super::{endpoints::Endpoints, live::Live};
use crate::model::{
    Health, Incarnation, Instance, InstanceId, InstanceKey, Revision, Role, Roles, ServiceId,
};

/// All services and instances as of one revision. A clone is cheap, and so is a changed copy.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    revision: Revision,
    services: imbl::OrdMap<ServiceId, Arc<Service>>,
    instances: usize,
    stale: usize,
    damped: usize,
    pub(super) taken: Option<Instant>,
}

/// A service and its instances. It may have none: a service stays known when its last instance leaves.
#[derive(Debug, Clone)]
pub struct Service {
    /// Its name.
    pub id: ServiceId,
    /// The change that last touched it, its roles or one of its instances.
    pub revision: Revision,
    /// Which of its instances does what, if it is replicated. They may be known before it or its instances are.
    pub roles: Option<Arc<Roles>>,
    /// Whether it is there for more than its roles.
    pub(super) registered: bool,
    pub(super) instances: imbl::OrdMap<InstanceId, Arc<Instance>>,
    stale: usize,
    damped: usize,
    /// Kept up for a large service only.
    pub(super) endpoints: Option<Box<Endpoints>>,
}

/// One change to the catalog.
#[derive(Debug, Clone)]
pub enum Change {
    /// The service exists.
    PutService(ServiceId),
    /// The service and its instances are gone. Roles stay until they are removed, and the service with them.
    RemoveService(ServiceId),
    /// This is what the service's instances do; it exists.
    PutRoles(ServiceId, Arc<Roles>),
    /// Nobody says any more what its instances do. It is gone if there was no more to it.
    RemoveRoles(ServiceId),
    /// This is what the instance is now, except that the same incarnation keeps its health while it is checked; its service
    /// exists.
    PutInstance(Instance),
    /// This is the verdict on that incarnation of the instance; of no meaning for another one.
    PutHealth(InstanceKey, Incarnation, Health),
    /// The instance is gone; its service stays.
    RemoveInstance(InstanceKey),
    /// What the instance says of itself now. For the board, not for the snapshot.
    PutLive(InstanceKey, Live),
    /// It says nothing any more.
    RemoveLive(InstanceKey),
}

impl Change {
    /// What it touches in the snapshot: an instance, or the service as such. `None` where it is for the board only.
    pub(super) fn touches(&self) -> Option<(&ServiceId, Option<&InstanceId>)> {
        match self {
            Self::PutService(id)
            | Self::RemoveService(id)
            | Self::PutRoles(id, _)
            | Self::RemoveRoles(id) => Some((id, None)),
            Self::PutInstance(Instance { key, .. })
            | Self::RemoveInstance(key)
            | Self::PutHealth(key, ..) => Some((&key.service, Some(&key.id))),
            Self::PutLive(..) | Self::RemoveLive(_) => None,
        }
    }

    pub(super) fn removed_service(&self) -> Option<&ServiceId> {
        if let Self::RemoveService(id) = self { Some(id) } else { None }
    }
}

impl Service {
    /// An instance by id.
    pub fn instance(&self, id: &InstanceId) -> Option<&Arc<Instance>> {
        self.instances.get(id)
    }

    /// All instances by id.
    pub fn instances(&self) -> impl ExactSizeIterator<Item = &Arc<Instance>> {
        self.instances.values()
    }

    /// How many of them are stale.
    pub fn stale(&self) -> usize {
        self.stale
    }

    /// How many of them are damped.
    pub fn damped(&self) -> usize {
        self.damped
    }

    /// Whether it is there for more than its roles.
    pub fn is_registered(&self) -> bool {
        self.registered
    }

    /// What an instance does; `None` where instances have no roles.
    pub fn role(&self, id: &InstanceId) -> Option<Role> {
        self.roles.as_ref().map(|roles| roles.of(id))
    }
}

impl Snapshot {
    /// The change that it is the state after.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// When the newest of its changes came to the catalog; `None` for the empty one.
    pub fn taken(&self) -> Option<Instant> {
        self.taken
    }

    /// A service by name.
    pub fn service(&self, id: &ServiceId) -> Option<&Arc<Service>> {
        self.services.get(id)
    }

    /// An instance by key.
    pub fn instance(&self, key: &InstanceKey) -> Option<&Arc<Instance>> {
        self.service(&key.service)?.instance(&key.id)
    }

    /// All services by name.
    pub fn services(&self) -> impl ExactSizeIterator<Item = &Arc<Service>> {
        self.services.values()
    }

    /// How many instances there are in all.
    pub fn instances(&self) -> usize {
        self.instances
    }

    /// How many of them are stale.
    pub fn stale(&self) -> usize {
        self.stale
    }

    /// How many of them are damped.
    pub fn damped(&self) -> usize {
        self.damped
    }

    /// The state after `changes`, as of `revision`. Costs as much as the changes.
    #[must_use]
    pub fn apply(&self, revision: Revision, changes: impl IntoIterator<Item = Change>) -> Self {
        let mut next = self.clone();
        next.revision = revision;
        for change in changes {
            match change {
                Change::PutService(id) => {
                    next.service_mut(revision, &id).registered = true;
                }
                Change::RemoveService(id) => {
                    if let Some(service) = next.services.remove(&id) {
                        next.instances -= service.instances.len();
                        next.stale -= service.stale;
                        next.damped -= service.damped;
                        if let Some(roles) = &service.roles {
                            let left = next.service_mut(revision, &id);
                            left.roles = Some(Arc::clone(roles));
                        }
                    }
                }
                Change::PutRoles(id, roles) => {
                    let service = next.service_mut(revision, &id);
                    service.revision = revision;
                    service.roles = Some(roles);
                }
                Change::RemoveRoles(id) => match next.services.get(&id) {
                    Some(service) if !service.registered => {
                        next.services.remove(&id);
                    }
                    Some(service) if service.roles.is_some() => {
                        let service = next.service_mut(revision, &id);
                        service.revision = revision;
                        service.roles = None;
                    }
                    Some(_) | None => {}
                },
                Change::PutInstance(mut instance) => {
                    if instance.check.is_some()
                        && let Some(present) = next.instance(&instance.key)
                        && present.incarnation == instance.incarnation
                    {
                        instance.health = present.health.clone();
                    }
                    next.set(revision, instance.key.clone(), Some(instance));
                }
                Change::PutLive(..) | Change::RemoveLive(_) => {}
                Change::PutHealth(key, incarnation, health) => {
                    let present = next.instance(&key).filter(|present| present.incarnation == incarnation);
                    if let Some(present) = present.filter(|present| present.check.is_some()) {
                        let instance = Instance { health, ..(**present).clone() };
                        next.set(revision, key, Some(instance));
                    }
                }
                Change::RemoveInstance(key) => {
                    if next.instance(&key).is_some() {
                        next.set(revision, key, None);
                    }
                }
            }
        }
        next
    }

    /// What an instance is from now on; `None`: it is gone.
    fn set(&mut self, revision: Revision, key: InstanceKey, instance: Option<Instance>) {
        let service = self.service_mut(revision, &key.service);
        service.revision = revision;
        let instance = instance.map(|mut instance| {
            // One name in memory for all of them.
            instance.key.service.clone_from(&service.id);
            Arc::new(instance)
        });
        service.registered |= instance.is_some();
        let before = match &instance {
            Some(instance) => service.instances.insert(key.id, Arc::clone(instance)),
            None => service.instances.remove(&key.id),
        };
        service.follow(before.as_deref(), instance.as_ref());
        let counts = |it: &Option<Arc<Instance>>| {
            let (is, stale) = (it.is_some(), it.as_ref().is_some_and(|it| it.stale.is_some()));
            [is, stale, it.as_ref().is_some_and(|it| it.damped.is_some())].map(usize::from)
        };
        let ([is, stale, damped], [was, was_stale, was_damped]) = (counts(&instance), counts(&before));
        (service.stale, service.damped) =
            (service.stale + stale - was_stale, service.damped + damped - was_damped);
        (self.stale, self.damped) = (self.stale + stale - was_stale, self.damped + damped - was_damped);
        self.instances = self.instances + is - was;
    }

    fn service_mut(&mut self, revision: Revision, id: &ServiceId) -> &mut Service {
        let service = self.services.entry(id.clone()).or_insert_with(|| {
            Arc::new(Service {
                id: id.clone(),
                revision,
                roles: None,
                registered: false,
                instances: imbl::OrdMap::new(),
                stale: 0,
                damped: 0,
                endpoints: None,
            })
        });
        Arc::make_mut(service)
    }
}
