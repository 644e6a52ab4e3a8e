use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    num::NonZeroU16,
    sync::Arc,
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

use super::{View, names::Source, wire::number};
use crate::{
    catalog::{Endpoints, Part},
    model::{Instance, Locality},
    xds::{Resource, ResourceType},
};

/// With the instances that take no new calls, marked so: Envoy lets the calls that run finish.
pub(super) fn for_envoy(name: &Arc<str>, source: Source<'_>, view: &View) -> Resource {
    let endpoints = source.endpoints();
    resource(name, &endpoints, &listed(source, &endpoints), view)
}

/// Only the instances that take calls; gRPC clients skip the others in any case (A27), and a locality that has no more than those
/// would still get its share of the calls from clients that honour locality weights.
pub(super) fn for_grpc(name: &Arc<str>, source: Source<'_>, view: &View) -> Resource {
    let endpoints = source.endpoints();
    let mut instances = listed(source, &endpoints);
    instances.retain(|listed| listed.part == Part::Serving);
    resource(name, &endpoints, &instances, view)
}

/// An instance and the part that it has.
struct Listed<'a> {
    instance: &'a Instance,
    part: Part,
}

/// One for each address, because gRPC clients refuse a set that has an address twice.
///
/// Who serves when some or all are ill is decided by [`Endpoints`], and not left to the clients: Envoy's panic would call draining
/// instances, too, and gRPC clients know no panic.
///
/// The leader is the leader, whatever its checks say and even while it drains: only those who elected it know better, and there is
/// nobody else to call.
fn listed<'a>(source: Source<'a>, endpoints: &Endpoints) -> Vec<Listed<'a>> {
    if source.is_leader() {
        let leader = source.instances().next();
        return leader.into_iter().map(|instance| Listed { instance, part: Part::Serving }).collect();
    }
    let instances = source.instances().filter(|instance| endpoints.has(instance));
    instances.map(|instance| Listed { instance, part: endpoints.part(instance) }).collect()
}

fn resource(name: &Arc<str>, endpoints: &Endpoints, instances: &[Listed<'_>], view: &View) -> Resource {
    // Clients refuse weights whose sum does not fit 32 bits (gRPC A27).
    let scale = scale(instances.iter().map(|listed| u64::from(listed.instance.weight.get())).sum());
    let weight = |listed: &Listed<'_>| scaled(listed.instance, scale);

    let serving = instances.iter().filter(|listed| listed.part == Part::Serving);
    let priority = priorities(serving.map(|listed| &listed.instance.locality), view);
    let mut localities: BTreeMap<(u32, &Locality), Vec<&Listed<'_>>> = BTreeMap::new();
    for listed in instances {
        let locality = &listed.instance.locality;
        localities.entry((priority(locality), locality)).or_default().push(listed);
    }
    let localities = localities.into_iter().map(|((priority, locality), instances)| {
        let serving = instances.iter().filter(|listed| listed.part == Part::Serving);
        // gRPC clients skip a locality without a weight, and share calls out by these. Envoy looks at the weights of the
        // endpoints alone, which comes to the same, since these are their sums.
        let sum = serving.map(|listed| weight(listed)).fold(0, u32::saturating_add).max(1);
        let endpoints = instances.into_iter();
        LocalityLbEndpoints {
            locality: Some(proto_locality(locality)),
            load_balancing_weight: number(sum),
            priority,
            lb_endpoints: endpoints.map(|of| endpoint(of.instance, of.part, weight(of))).collect(),
            ..LocalityLbEndpoints::default()
        }
    });
    let ill = instances.iter().any(|listed| matches!(listed.part, Part::Degraded | Part::Unhealthy));
    let message = ClusterLoadAssignment {
        cluster_name: name.to_string(),
        endpoints: localities.collect(),
        policy: policy(ill && endpoints.some_are_ill()),
        ..ClusterLoadAssignment::default()
    };
    Resource::new(ResourceType::Endpoints, Arc::clone(name), &message, [])
}

/// In percent, how much more than its share a healthy instance is taken to bear: enough for one of a million. Else Envoy sends
/// calls on to the next level, or to degraded instances, as soon as less than 72 % of a level are healthy, and to unhealthy ones (panic)
/// when less than 1 % are; gRPC clients stay as long as one is left.
const FACTOR: u32 = 100_000_000;

/// What goes with endpoints of which some are ill.
pub(super) fn policy(ill: bool) -> Option<Policy> {
    ill.then(|| Policy { overprovisioning_factor: number(FACTOR), ..Policy::default() })
}

/// What weights are divided by, so that their sum fits.
pub(super) fn scale(total: u64) -> u32 {
    u32::try_from(total / u64::from(u32::MAX)).unwrap_or(u32::MAX).saturating_add(1)
}

pub(super) fn scaled(instance: &Instance, scale: u32) -> u32 {
    (instance.weight.get() / scale).max(1)
}

pub(super) fn proto_locality(locality: &Locality) -> ProtoLocality {
    ProtoLocality {
        region: locality.region.to_string(),
        zone: locality.zone.to_string(),
        sub_zone: locality.sub_zone.to_string(),
    }
}

/// The nearest come first: each distance at which somebody serves is a level, counted from 0 without gaps, which gRPC clients
/// insist on (A27). Another instance stands in the level that it would serve in, or else in the next: Envoy leaves a draining one out
/// when it counts how much of a level is healthy, and [`FACTOR`] does as much for the others, so none sends calls on to the next level.
pub(super) fn priorities<'a>(
    serving: impl Iterator<Item = &'a Locality>,
    view: &View,
) -> impl Fn(&Locality) -> u32 {
    let distances: BTreeSet<u8> = serving.map(|locality| view.distance(locality)).collect();
    let last = distances.len().saturating_sub(1);
    move |locality| {
        let nearer = distances.range(..view.distance(locality)).count();
        u32::try_from(nearer.min(last)).unwrap_or(u32::MAX)
    }
}

/// Only an address and a port make one, so that none can be made which Envoy cannot use: by LEDS that would end it.
pub(super) fn endpoint(instance: &Instance, part: Part, weight: u32) -> LbEndpoint {
    let health = match part {
        // Every client takes this for healthy.
        Part::Serving => HealthStatus::Unknown,
        Part::Degraded => HealthStatus::Degraded,
        Part::Draining => HealthStatus::Draining,
        Part::Unhealthy => HealthStatus::Unhealthy,
    };
    LbEndpoint {
        health_status: health.into(),
        load_balancing_weight: number(weight),
        host_identifier: Some(HostIdentifier::Endpoint(Endpoint {
            address: Some(socket(instance.address, instance.port.get())),
            ..Endpoint::default()
        })),
        ..LbEndpoint::default()
    }
}

/// The address that [`socket`] made.
pub(super) fn socket_of(address: &Address) -> Option<(IpAddr, NonZeroU16)> {
    let Some(address::Address::SocketAddress(socket)) = &address.address else { return None };
    let Some(PortSpecifier::PortValue(port)) = socket.port_specifier else { return None };
    Some((socket.address.parse().ok()?, u16::try_from(port).ok()?.try_into().ok()?))
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
