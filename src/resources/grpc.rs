//! For gRPC clients that resolve `xds:///service` by themselves. They ask for a Listener of the service's name and follow it to a
//! RouteConfiguration, a Cluster and endpoints of the same name. Only what all of C-core, Go, Node and tonic-xds accept: one
//! refused field makes the whole service unreachable.

use std::sync::Arc;

use envoy_types::pb::envoy::{
    config::{
        cluster::v3::{
            Cluster,
            cluster::{ClusterDiscoveryType, DiscoveryType, LbPolicy},
        },
        listener::v3::{ApiListener, Listener},
        route::v3::RouteConfiguration,
    },
    extensions::filters::network::http_connection_manager::v3::HttpConnectionManager,
};

use super::{
    names::Source,
    wire::{any, circuit_breakers, eds, itself, rds, retries, router, virtual_host},
};
use crate::xds::{Resource, ResourceType};

/// `xds:///service` is the name of a Listener (A27).
pub(super) fn listener(service: &Arc<str>) -> Resource {
    let manager = HttpConnectionManager {
        http_filters: vec![router()],
        route_specifier: rds(service),
        ..Default::default()
    };
    let message = Listener {
        name: service.to_string(),
        api_listener: Some(ApiListener { api_listener: Some(any(&manager)) }),
        ..Listener::default()
    };
    Resource::new(ResourceType::Listener, Arc::clone(service), &message, [])
}

pub(super) fn routes(service: &Arc<str>, source: Source<'_>) -> Resource {
    // What a call gets when the instance that it was sent to is gone (A44). There is one leader or none: another try would only take
    // longer, and may write twice.
    let retries = (!source.is_leader()).then(|| retries("unavailable"));
    let message = RouteConfiguration {
        name: service.to_string(),
        virtual_hosts: vec![virtual_host(service, retries)],
        ..RouteConfiguration::default()
    };
    Resource::new(ResourceType::Route, Arc::clone(service), &message, [])
}

/// Round robin is the one policy that all of them take. No outlier detection: they leave out an instance whose connection broke
/// by themselves, and the kinds of it that they know (A50) judge by the answers of the application.
pub(super) fn cluster(service: &Arc<str>) -> Resource {
    let message = Cluster {
        name: service.to_string(),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Eds.into())),
        eds_cluster_config: eds(),
        lb_policy: LbPolicy::RoundRobin.into(),
        circuit_breakers: circuit_breakers(None),
        // They report the calls that they make to whom they have this from (rule C4).
        lrs_server: Some(itself()),
        ..Cluster::default()
    };
    Resource::new(ResourceType::Cluster, Arc::clone(service), &message, [Arc::clone(service)])
}
