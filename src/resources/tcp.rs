//! For applications that speak no HTTP: a listener on loopback for each name, which takes every connection to the cluster of that name.

use std::{net::Ipv4Addr, sync::Arc};

use envoy_types::pb::envoy::{
    config::{
        core::v3::TrafficDirection,
        listener::v3::{Filter, FilterChain, Listener, filter::ConfigType},
    },
    extensions::filters::network::tcp_proxy::v3::{
        TcpProxy,
        tcp_proxy::{ClusterSpecifier, OnDemand},
    },
};

use super::{
    View,
    endpoints::socket,
    names::Source,
    wire::{ads, any, number, seconds},
};
use crate::{
    catalog::{Changes, Snapshot},
    model::{InstanceId, Upstream},
    xds::{Change, Resource, ResourceSet, ResourceType},
};

/// How often a connection is tried, each time to the instance that is picked then.
const ATTEMPTS: u32 = 3;

/// The listeners that may be different after `changes`.
pub(super) fn listeners(
    old: &ResourceSet,
    snapshot: &Snapshot,
    changes: &Changes,
    view: &View,
) -> Vec<Change> {
    let concerned = |name: &Upstream| match changes {
        Changes::Resync => true,
        Changes::Touched(touched) => {
            let ids = [name.service(), name.group().map(|(service, _)| service)];
            let mut ids = ids.into_iter().flatten();
            ids.any(|id| touched.iter().any(|(service, _)| *service == id))
        }
    };
    let has = |name: &Upstream| old.get(ResourceType::Listener, &listener_name(name)).is_some();
    let due = view.tcp.iter().filter(|(name, _)| !has(name) || concerned(name));
    due.map(|(name, port)| Change::Put(listener(name, *port, snapshot, view))).collect()
}

fn listener_name(name: &Upstream) -> Arc<str> {
    format!("tcp/{name}").into()
}

/// It is there whether or not the name stands for anything: then connections are closed at once.
fn listener(name: &Upstream, port: u16, snapshot: &Snapshot, view: &View) -> Resource {
    let source = Source::of(name.as_str(), snapshot, view);
    let is_leader = source.is_some_and(Source::is_leader);
    let proxy = TcpProxy {
        stat_prefix: listener_name(name).to_string(),
        cluster_specifier: Some(ClusterSpecifier::Cluster(name.to_string())),
        // One leader, or none, and whoever calls it is to know soon.
        max_connect_attempts: number(if is_leader { 1 } else { ATTEMPTS }),
        // The default of 1 h would cut the quiet connections of a pool.
        idle_timeout: seconds(0),
        on_demand: view.on_demand.then(|| OnDemand {
            odcds_config: ads(),
            timeout: seconds(5),
            ..OnDemand::default()
        }),
        ..TcpProxy::default()
    };
    let filter = Filter {
        name: "envoy.filters.network.tcp_proxy".to_owned(),
        config_type: Some(ConfigType::TypedConfig(any(&proxy))),
    };
    let chain =
        FilterChain { name: chain_name(name, source), filters: vec![filter], ..FilterChain::default() };
    let message = Listener {
        name: listener_name(name).to_string(),
        address: Some(socket(Ipv4Addr::LOCALHOST.into(), port)),
        filter_chains: vec![chain],
        traffic_direction: TrafficDirection::Outbound.into(),
        ..Listener::default()
    };
    Resource::new(ResourceType::Listener, listener_name(name), &message, [])
}

/// Another name makes another chain, and Envoy closes the connections of one that is gone when it has drained: nothing else cuts those
/// to a leader that is none any more. Endpoints that leave a cluster keep their connections.
fn chain_name(name: &Upstream, source: Option<Source<'_>>) -> String {
    let roles = source.and_then(Source::roles).filter(|_| source.is_some_and(Source::is_leader));
    match roles {
        Some(roles) => {
            let leader = roles.leader.as_ref().map_or("", InstanceId::as_str);
            format!("{name}/{}/{leader}", roles.term)
        }
        None => name.to_string(),
    }
}
