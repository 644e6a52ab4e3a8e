use std::{borrow::Cow, collections::BTreeMap, sync::Arc};

use super::View;
use crate::{
    catalog::{Endpoints, Service, Snapshot},
    model::{Group, Instance, Role, Roles, ServiceId},
};

/// What a name that callers call stands for.
#[derive(Debug, Clone, Copy)]
pub(super) enum Source<'a> {
    /// All instances of a service.
    Service(&'a Service),
    /// Some of those of a service that has roles.
    Group(&'a Service, Group),
}

impl<'a> Source<'a> {
    /// What a name stands for in a view. A service that is registered under the name of a group comes first, in all views: calls
    /// to it must not change their meaning because another service of the mesh became a replicated one.
    pub(super) fn of(name: &str, snapshot: &'a Snapshot, view: &View) -> Option<Self> {
        if let Some(service) = registered(name, snapshot) {
            return view.includes(&service.id).then_some(Self::Service(service));
        }
        let (id, group) = Group::parse(name)?;
        let service = snapshot.service(&id).filter(|service| service.roles.is_some())?;
        view.includes_group(&id, group).then_some(Self::Group(service, group))
    }

    /// Everything that a view is told of, each once, by name.
    pub(super) fn all(snapshot: &'a Snapshot, view: &View) -> Vec<(Arc<str>, Self)> {
        let of_service = move |service: &'a Arc<Service>| {
            std::iter::once((service.id.shared(), Self::Service(service))).chain(groups(service, snapshot))
        };
        let Some(names) = &view.upstreams else {
            let mut all: Vec<_> = snapshot.services().flat_map(of_service).collect();
            all.sort_by(|(a, _), (b, _)| a.cmp(b));
            return all;
        };
        let mut all = BTreeMap::new();
        for name in names.iter() {
            let service = name.service().and_then(|id| snapshot.service(&id));
            all.extend(service.into_iter().flat_map(of_service));
            let group = Self::of(name.as_str(), snapshot, view);
            all.extend(group.map(|source| (name.as_str().into(), source)));
        }
        all.into_iter().collect()
    }

    pub(super) fn is_leader(self) -> bool {
        matches!(self, Self::Group(_, Group::Leader))
    }

    /// What instances do, if it is one of the groups.
    pub(super) fn roles(self) -> Option<&'a Roles> {
        match self {
            Self::Service(_) => None,
            Self::Group(service, _) => service.roles.as_deref(),
        }
    }

    /// Who belongs to it.
    pub(super) fn instances(self) -> impl Iterator<Item = &'a Instance> {
        let (Self::Service(service) | Self::Group(service, _)) = self;
        service.instances().map(AsRef::as_ref).filter(move |instance| self.has(instance))
    }

    pub(super) fn endpoints(self) -> Cow<'a, Endpoints> {
        match self {
            Self::Service(service) => service.endpoints(),
            Self::Group(service, _) => Cow::Owned(service.endpoints_of(|instance| self.has(instance))),
        }
    }

    fn has(self, instance: &Instance) -> bool {
        match self {
            Self::Service(_) => true,
            Self::Group(service, group) => group.has(service.role(&instance.key.id).unwrap_or(Role::Unknown)),
        }
    }
}

/// The groups of a service, except those whose name another one has.
fn groups<'a>(
    service: &'a Service,
    snapshot: &'a Snapshot,
) -> impl Iterator<Item = (Arc<str>, Source<'a>)> + 'a {
    let groups = Group::ALL.into_iter().filter(|_| service.roles.is_some());
    let named = groups.map(|group| (group.of(&service.id), Source::Group(service, group)));
    named.filter(|(name, _)| registered(name, snapshot).is_none())
}

/// The names that a view is told of, each the name of its cluster.
pub fn names(snapshot: &Snapshot, view: &View) -> Vec<String> {
    Source::all(snapshot, view).iter().map(|(name, _)| name.to_string()).collect()
}

/// The service whose instances are behind a name, all or some of them.
pub fn service_of<'a>(name: &str, snapshot: &'a Snapshot) -> Option<&'a Arc<Service>> {
    let of_group = || snapshot.service(&Group::parse(name)?.0).filter(|service| service.roles.is_some());
    registered(name, snapshot).or_else(of_group)
}

fn registered<'a>(name: &str, snapshot: &'a Snapshot) -> Option<&'a Arc<Service>> {
    snapshot.service(&name.parse::<ServiceId>().ok()?)
}
