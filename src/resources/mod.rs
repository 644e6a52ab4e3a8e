//! What proxies are told: a pure function from a catalog snapshot to the LDS, RDS, CDS and EDS resources of one view.
//!
//! `app` calls [`render`] for a new [`View`] and [`update`] after each change; `xds` serves what comes out. No clocks, no
//! randomness, no map whose order could vary: equal snapshots give equal bytes, on every replica and after every restart.
//!
//! Envoy and proxyless gRPC clients get separate renderings (`envoy`, `grpc`), because each refuses things that the other
//! needs; they share the endpoints. Also here: the [`Bootstrap`] that points an Envoy at its servers.

mod bootstrap;
mod endpoints;
mod envoy;
mod grpc;
mod leds;
mod places;
mod view;
mod wire;

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

pub use bootstrap::{Bootstrap, DEFAULT_ADMIN_PORT, Protocol};
pub use envoy::OUTBOUND;
pub use leds::member as leds_member;
pub use places::Places;
pub use view::{ClientKind, DEFAULT_OUTBOUND_PORT, MAX_UPSTREAMS, NodeError, View};

use leds::Touched;

use crate::{
    catalog::{Changes, Service, Snapshot},
    xds::{Change, ResourceSet, ResourceType},
};

/// All resources of a view.
pub fn render(snapshot: &Snapshot, view: &View) -> ResourceSet {
    update(&ResourceSet::default(), snapshot, &Changes::Resync, view)
}

/// The resources of a view after `changes`, which lead from `old` to `snapshot`; equal to [`render`] of the snapshot. Only the
/// services that the changes name are generated again, and what comes out the same keeps its version and place.
pub fn update(old: &ResourceSet, snapshot: &Snapshot, changes: &Changes, view: &View) -> ResourceSet {
    update_beside(None, old, snapshot, changes, view)
}

/// As [`update`], beside a set of a view that differs only in where it is, which has all but some endpoints in common: what is
/// generated and equal in `other` takes no memory of its own, and endpoints that go one by one are taken over as they are, if it
/// has come as far and is of the same origin.
pub fn update_beside(
    other: Option<&ResourceSet>,
    old: &ResourceSet,
    snapshot: &Snapshot,
    changes: &Changes,
    view: &View,
) -> ResourceSet {
    let twin = other.filter(|other| {
        (other.revision(), other.origin()) == (snapshot.revision(), old.origin()) && view.leds_from > 0
    });
    let mut out = Vec::new();
    // Every service that a view includes has a cluster of its name, so the clusters of a set say which services it knows.
    let known = |name: &str| old.get(ResourceType::Cluster, name).is_some();
    let mut services_changed = false;
    let mut put = |service: &Service, touched: Touched<'_>, out: &mut Vec<Change>| {
        services_changed |= !known(service.id.as_str());
        service_resources(old, twin, service, touched, view, out);
    };
    let mut gone: Vec<Arc<str>> = Vec::new();
    match changes {
        Changes::Touched(touched) => {
            let mut services: BTreeMap<_, Option<BTreeSet<_>>> = BTreeMap::new();
            for (service, instance) in touched {
                let its = services.entry(service).or_insert_with(|| Some(BTreeSet::new()));
                // Without an id, the service as such.
                *its = its.take().zip(instance.as_ref()).map(|(mut its, id)| {
                    its.insert(id);
                    its
                });
            }
            for (id, instances) in services {
                match snapshot.service(id) {
                    _ if !view.includes(id) => {}
                    Some(service) => {
                        put(service, instances.as_ref().map_or(Touched::All, Touched::Only), &mut out);
                    }
                    None => gone.push(id.shared()),
                }
            }
        }
        Changes::Resync => {
            services(snapshot, view).for_each(|service| put(service, Touched::All, &mut out));
            let present: BTreeSet<&str> =
                services(snapshot, view).map(|service| service.id.as_str()).collect();
            let names = old.iter(ResourceType::Cluster).map(|(name, _)| name);
            gone.extend(names.filter(|name| !present.contains(name.as_ref())).cloned());
        }
    }
    services_changed |= gone.iter().any(|name| known(name));
    for name in &gone {
        if twin.is_none() {
            leds::remove(old, name, &mut out);
        }
        out.extend(removals(name, view));
    }

    if view.kind == ClientKind::Envoy {
        if old.get(ResourceType::Listener, OUTBOUND).is_none() {
            out.push(Change::Put(envoy::listener(view)));
        }
        if services_changed || old.get(ResourceType::Route, OUTBOUND).is_none() {
            let names = services(snapshot, view).map(|service| service.id.as_str());
            out.push(Change::Put(envoy::routes(names, view)));
        }
    }
    if let Some(other) = other {
        out.iter_mut().for_each(|change| share(change, other));
    }
    let next = old.apply(snapshot.revision(), out);
    match twin {
        Some(twin) => next.with(ResourceType::LbEndpoint, twin),
        None => next,
    }
}

/// Equal versions are equal contents.
fn share(change: &mut Change, other: &ResourceSet) {
    if let Change::Put(resource) = change
        && let Some(entry) = other.get(resource.kind, &resource.name)
        && entry.resource.version == resource.version
    {
        resource.clone_from(&entry.resource);
    }
}

/// What the view includes, by name.
fn services<'a>(snapshot: &'a Snapshot, view: &'a View) -> Box<dyn Iterator<Item = &'a Arc<Service>> + 'a> {
    match &view.upstreams {
        None => Box::new(snapshot.services()),
        Some(names) => Box::new(names.iter().filter_map(|name| snapshot.service(name))),
    }
}

fn service_resources(
    old: &ResourceSet,
    twin: Option<&ResourceSet>,
    service: &Service,
    touched: Touched<'_>,
    view: &View,
    out: &mut Vec<Change>,
) {
    let name = service.id.shared();
    match view.kind {
        ClientKind::Envoy => {
            out.push(Change::Put(envoy::cluster(&name)));
            out.extend(leds::changes(old, twin, service, touched, view));
            out.extend(view.virtual_hosts.then(|| Change::Put(envoy::host_of(&name))));
        }
        ClientKind::Grpc => {
            let resources = [
                grpc::cluster(&name),
                endpoints::for_grpc(service, view),
                grpc::listener(&name),
                grpc::routes(&name),
            ];
            out.extend(resources.map(Change::Put));
        }
    }
}

fn removals(name: &Arc<str>, view: &View) -> impl Iterator<Item = Change> + use<> {
    use ResourceType::{Cluster, Endpoints, Listener, Route, VirtualHost};
    let kinds: &[ResourceType] = match view.kind {
        ClientKind::Envoy => &[Cluster, Endpoints],
        ClientKind::Grpc => &[Cluster, Endpoints, Listener, Route],
    };
    let host = view.virtual_hosts.then(|| Change::Remove(VirtualHost, envoy::host_name(name)));
    let name = Arc::clone(name);
    kinds.iter().map(move |kind| Change::Remove(*kind, Arc::clone(&name))).chain(host)
}
