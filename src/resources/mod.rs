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
mod names;
mod places;
mod tcp;
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
pub use names::{names, service_of};
pub use places::Places;
pub use view::{ClientKind, DEFAULT_OUTBOUND_PORT, MAX_TCP, MAX_UPSTREAMS, NodeError, View};

use leds::Touched;
use names::Source;

use crate::{
    catalog::{Changes, Snapshot},
    model::Group,
    xds::{Change, Resource, ResourceSet, ResourceType},
};

/// All resources of a view.
pub fn render(snapshot: &Snapshot, view: &View) -> ResourceSet {
    update(&ResourceSet::default(), snapshot, &Changes::Resync, view)
}

/// The resources of a view after `changes`, which lead from `old` to `snapshot`; equal to [`render`] of the snapshot. Only the
/// names that the changes touch are generated again, and what comes out the same keeps its version and place.
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
    // Every name that a view is told of has a cluster, so the clusters of a set say which names it knows, and what they stood for.
    let mut names_changed = false;
    let mut settle = |name: &Arc<str>, source: Option<Source<'_>>, touched: Touched<'_>| {
        let known = old.get(ResourceType::Cluster, name);
        match source {
            Some(source) => {
                let cluster = cluster(name, source, view);
                names_changed |= known.is_none_or(|known| known.resource.version != cluster.version);
                out.push(Change::Put(cluster));
                rest(old, twin, name, source, touched, view, &mut out);
            }
            None => {
                names_changed |= known.is_some();
                if twin.is_none() {
                    leds::remove(old, name, &mut out);
                }
                out.extend(removals(name, view));
            }
        }
    };
    let known = |name: &str| old.get(ResourceType::Cluster, name).is_some();
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
            for (id, instances) in services.into_iter().filter(|(id, _)| view.concerns(id)) {
                let touched = instances.as_ref().map_or(Touched::All, Touched::Only);
                let source = Source::of(id.as_str(), snapshot, view);
                if source.is_some() || known(id.as_str()) {
                    settle(&id.shared(), source, touched);
                }
                // Roles come and go with a change of the service as such.
                let has_roles = snapshot.service(id).is_some_and(|service| service.roles.is_some());
                if !has_roles && instances.is_some() {
                    continue;
                }
                for name in Group::ALL.map(|group| group.of(id)) {
                    // What is registered under that name changes by itself.
                    let source = Source::of(&name, snapshot, view);
                    let is_group = !matches!(source, Some(Source::Service(_)));
                    if is_group && (source.is_some() || known(&name)) {
                        settle(&name, source, touched);
                    }
                }
            }
        }
        Changes::Resync => {
            let all: BTreeMap<_, _> = Source::all(snapshot, view).into_iter().collect();
            all.iter().for_each(|(name, source)| settle(name, Some(*source), Touched::All));
            let names = old.iter(ResourceType::Cluster).map(|(name, _)| name);
            names.filter(|name| !all.contains_key(*name)).for_each(|name| settle(name, None, Touched::All));
        }
    }

    if view.kind == ClientKind::Envoy {
        if old.get(ResourceType::Listener, OUTBOUND).is_none() {
            out.push(Change::Put(envoy::listener(view)));
        }
        if names_changed || old.get(ResourceType::Route, OUTBOUND).is_none() {
            out.push(Change::Put(envoy::routes(&Source::all(snapshot, view), view)));
        }
        out.extend(tcp::listeners(old, snapshot, changes, view));
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

fn cluster(name: &Arc<str>, source: Source<'_>, view: &View) -> Resource {
    match view.kind {
        ClientKind::Envoy => envoy::cluster(name, source),
        ClientKind::Grpc => grpc::cluster(name),
    }
}

/// What is sent of a name beside its cluster.
fn rest(
    old: &ResourceSet,
    twin: Option<&ResourceSet>,
    name: &Arc<str>,
    source: Source<'_>,
    touched: Touched<'_>,
    view: &View,
    out: &mut Vec<Change>,
) {
    match view.kind {
        ClientKind::Envoy => {
            out.extend(leds::changes(old, twin, name, source, touched, view));
            out.extend(view.virtual_hosts.then(|| Change::Put(envoy::host_of(name, source))));
        }
        ClientKind::Grpc => {
            let resources =
                [endpoints::for_grpc(name, source, view), grpc::listener(name), grpc::routes(name, source)];
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
