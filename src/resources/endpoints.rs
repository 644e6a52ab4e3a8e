use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use envoy_types::pb::envoy::config::{
    core::v3::{
        Address, HealthStatus, Locality as ProtoLocality, SocketAddress, address,
        socket_address::PortSpecifier,
    },
    endpoint::v3::{
        ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints, cluster_load_assignment::Policy,
        lb_endpoint::HostIdentifier,
    },
};

use super::{View, wire::number};
use crate::{
    catalog::Service,
    model::{Instance, Locality, State, Verdict},
    xds::{Resource, ResourceType},
};

/// With the instances that take no new calls, marked so: Envoy lets the calls that run finish.
pub(super) fn for_envoy(service: &Service, view: &View) -> Resource {
    resource(service, &instances(service), view)
}

/// Only the instances that take calls; gRPC clients skip the others in any case (A27), and a locality that has no more than those
/// would still get its share of the calls from clients that honour locality weights.
pub(super) fn for_grpc(service: &Service, view: &View) -> Resource {
    let mut instances = instances(service);
    instances.retain(|listed| listed.part == Part::Serving);
    resource(service, &instances, view)
}

/// What part an instance has in load balancing, the most useful first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    /// It takes calls.
    Serving,
    /// It takes calls when nobody serves.
    Degraded,
    /// It finishes what it has.
    Draining,
    /// Its checks fail.
    Unhealthy,
}

/// An instance and the part that it has.
struct Listed<'a> {
    instance: &'a Instance,
    part: Part,
}

/// What proxies are told of: not an instance that has yet to pass its check for the first time.
///
/// As long as one instance works, the others get no calls. When none does, those that are degraded serve; when all fail their
/// checks, all serve again that do not drain: a check that is wrong about everybody (its own fault, or that of something behind
/// all of them) must not take a service away that may still answer. It is decided here, and not left to the clients: Envoy's panic would
/// call draining instances, too, and gRPC clients know no panic.
///
/// One for each address, because gRPC clients refuse a set that has an address twice. Where two instances claim one, the more
/// useful is kept (a successor on the port of a draining or dead one), then the first by id.
fn instances(service: &Service) -> Vec<Listed<'_>> {
    let published = service.instances().map(AsRef::as_ref).filter(|instance| instance.is_published());
    let mut instances: Vec<Listed<'_>> =
        published.map(|instance| Listed { instance, part: part(instance) }).collect();
    if let Some(best) = [Part::Serving, Part::Degraded, Part::Unhealthy]
        .into_iter()
        .find(|part| instances.iter().any(|listed| listed.part == *part))
    {
        let best = instances.iter_mut().filter(|listed| listed.part == best);
        best.for_each(|listed| listed.part = Part::Serving);
    }
    instances.sort_by_key(|listed| listed.part);
    let mut taken = BTreeSet::new();
    instances.retain(|listed| taken.insert((listed.instance.address, listed.instance.port)));
    instances.sort_by(|a, b| a.instance.key.id.cmp(&b.instance.key.id));
    instances
}

fn part(instance: &Instance) -> Part {
    match (instance.state, instance.health.verdict) {
        (State::Draining, _) => Part::Draining,
        (State::Serving, Verdict::Unknown | Verdict::Healthy) => Part::Serving,
        (State::Serving, Verdict::Degraded) => Part::Degraded,
        (State::Serving, Verdict::Unhealthy) => Part::Unhealthy,
    }
}

fn resource(service: &Service, instances: &[Listed<'_>], view: &View) -> Resource {
    // Clients refuse weights whose sum does not fit 32 bits (gRPC A27).
    let total: u64 = instances.iter().map(|listed| u64::from(listed.instance.weight.get())).sum();
    let scale = u32::try_from(total / u64::from(u32::MAX)).unwrap_or(u32::MAX).saturating_add(1);
    let weight = |listed: &Listed<'_>| (listed.instance.weight.get() / scale).max(1);

    let priority = priorities(instances, view);
    let mut localities: BTreeMap<(u32, &Locality), Vec<&Listed<'_>>> = BTreeMap::new();
    for listed in instances {
        localities.entry((priority(listed), &listed.instance.locality)).or_default().push(listed);
    }
    let endpoints = localities.into_iter().map(|((priority, locality), instances)| {
        let serving = instances.iter().filter(|listed| listed.part == Part::Serving);
        // gRPC clients skip a locality without a weight, and share calls out by these. Envoy looks at the weights of the
        // endpoints alone, which comes to the same, since these are their sums.
        let sum = serving.map(|listed| weight(listed)).fold(0, u32::saturating_add).max(1);
        LocalityLbEndpoints {
            locality: Some(ProtoLocality {
                region: locality.region.to_string(),
                zone: locality.zone.to_string(),
                sub_zone: locality.sub_zone.to_string(),
            }),
            load_balancing_weight: number(sum),
            priority,
            lb_endpoints: instances.into_iter().map(|listed| endpoint(listed, weight(listed))).collect(),
            ..LocalityLbEndpoints::default()
        }
    });
    let sick = instances.iter().any(|listed| matches!(listed.part, Part::Degraded | Part::Unhealthy));
    let message = ClusterLoadAssignment {
        cluster_name: service.id.to_string(),
        endpoints: endpoints.collect(),
        policy: sick.then(|| Policy { overprovisioning_factor: number(FACTOR), ..Policy::default() }),
        ..ClusterLoadAssignment::default()
    };
    Resource::new(ResourceType::Endpoints, service.id.shared(), &message, [])
}

/// In percent, how much more than its share a healthy instance is taken to bear: enough for one of a million. Else Envoy sends
/// calls on to the next level, or to degraded instances, as soon as less than 72 % of a level are healthy, and to unhealthy ones (panic)
/// when less than 1 % are; gRPC clients stay as long as one is left.
const FACTOR: u32 = 100_000_000;

/// The nearest come first: each distance at which somebody serves is a level, counted from 0 without gaps, which gRPC clients
/// insist on (A27). Another instance stands in the level that it would serve in, or else in the next: Envoy leaves a draining one out
/// when it counts how much of a level is healthy, and [`FACTOR`] does as much for the others, so none sends calls on to the next level.
fn priorities(instances: &[Listed<'_>], view: &View) -> impl Fn(&Listed<'_>) -> u32 {
    let distance = |listed: &Listed<'_>| view.distance(&listed.instance.locality);
    let serving = instances.iter().filter(|listed| listed.part == Part::Serving);
    let distances: BTreeSet<u8> = serving.map(distance).collect();
    let last = distances.len().saturating_sub(1);
    move |listed| {
        let nearer = distances.range(..distance(listed)).count();
        u32::try_from(nearer.min(last)).unwrap_or(u32::MAX)
    }
}

fn endpoint(listed: &Listed<'_>, weight: u32) -> LbEndpoint {
    let health = match listed.part {
        // Every client takes this for healthy.
        Part::Serving => HealthStatus::Unknown,
        Part::Degraded => HealthStatus::Degraded,
        Part::Draining => HealthStatus::Draining,
        Part::Unhealthy => HealthStatus::Unhealthy,
    };
    let Instance { address, port, .. } = listed.instance;
    LbEndpoint {
        health_status: health.into(),
        load_balancing_weight: number(weight),
        host_identifier: Some(HostIdentifier::Endpoint(Endpoint {
            address: Some(socket(*address, port.get())),
            ..Endpoint::default()
        })),
        ..LbEndpoint::default()
    }
}

pub(super) fn socket(address: IpAddr, port: u16) -> Address {
    Address {
        address: Some(address::Address::SocketAddress(SocketAddress {
            address: address.to_string(),
            port_specifier: Some(PortSpecifier::PortValue(u32::from(port))),
            ..SocketAddress::default()
        })),
    }
}
