use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    num::NonZeroU16,
};

use envoy_types::pb::envoy::config::{
    core::v3::{
        Address, HealthStatus, Locality as ProtoLocality, SocketAddress, address,
        socket_address::PortSpecifier,
    },
    endpoint::v3::{
        ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints, lb_endpoint::HostIdentifier,
    },
};

use super::{View, wire::number};
use crate::{
    catalog::Service,
    model::{Instance, Locality, State},
    xds::{Resource, ResourceType},
};

/// With the draining instances, marked so: Envoy sends them no new calls and lets those that run finish.
pub(super) fn for_envoy(service: &Service, view: &View) -> Resource {
    resource(service, &instances(service), view)
}

/// Without the draining instances, which gRPC clients skip in any case: a locality that had no others would still get its share
/// of the calls from those that honour locality weights.
pub(super) fn for_grpc(service: &Service, view: &View) -> Resource {
    let mut instances = instances(service);
    instances.retain(|instance| instance.state == State::Serving);
    resource(service, &instances, view)
}

/// One for each address, because gRPC clients refuse a set that has an address twice.
fn instances(service: &Service) -> Vec<&Instance> {
    let endpoints = service.endpoints();
    service.instances().map(AsRef::as_ref).filter(|instance| endpoints.has(instance)).collect()
}

fn resource(service: &Service, instances: &[&Instance], view: &View) -> Resource {
    // Clients refuse weights whose sum does not fit 32 bits (gRPC A27).
    let scale = scale(instances.iter().map(|instance| u64::from(instance.weight.get())).sum());
    let weight = |instance: &Instance| scaled(instance, scale);

    let serving = instances.iter().filter(|instance| instance.state == State::Serving);
    let priority = priorities(serving.map(|instance| &instance.locality), view);
    let mut localities: BTreeMap<(u32, &Locality), Vec<&Instance>> = BTreeMap::new();
    for instance in instances {
        localities.entry((priority(&instance.locality), &instance.locality)).or_default().push(instance);
    }
    let endpoints = localities.into_iter().map(|((priority, locality), instances)| {
        let serving = instances.iter().filter(|instance| instance.state == State::Serving);
        // gRPC clients skip a locality without a weight, and share calls out by these. Envoy looks at the weights of the
        // endpoints alone, which comes to the same, since these are their sums.
        let sum = serving.map(|instance| weight(instance)).fold(0, u32::saturating_add).max(1);
        LocalityLbEndpoints {
            locality: Some(proto_locality(locality)),
            load_balancing_weight: number(sum),
            priority,
            lb_endpoints: instances
                .into_iter()
                .map(|instance| endpoint(instance, weight(instance)))
                .collect(),
            ..LocalityLbEndpoints::default()
        }
    });
    let message = ClusterLoadAssignment {
        cluster_name: service.id.to_string(),
        endpoints: endpoints.collect(),
        ..ClusterLoadAssignment::default()
    };
    Resource::new(ResourceType::Endpoints, service.id.shared(), &message, [])
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
/// insist on (A27). A draining instance stands in the level that it would serve in, or else in the next: Envoy leaves it out when it
/// counts how much of a level is healthy, so its drain sends no calls on to the next level.
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
pub(super) fn endpoint(instance: &Instance, weight: u32) -> LbEndpoint {
    let health = match instance.state {
        // Every client takes this for healthy.
        State::Serving => HealthStatus::Unknown,
        State::Draining => HealthStatus::Draining,
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
