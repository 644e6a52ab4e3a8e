//! Each room's part of the configuration.

use std::net::SocketAddr;

use rustix::process::{Resource, getrlimit};

use super::Addresses;
use crate::{
    api,
    config::{Config, Store},
    health,
    model::MemberId,
    registry::{self, Cache, Member},
    rt, xds,
};

/// What this process is called among those that share its store.
pub(super) fn node(config: &Config, addresses: &Addresses) -> MemberId {
    let shared = matches!(config.store, Store::Etcd(_));
    let by_machine = || {
        let machine = rustix::system::uname();
        let machine = machine.nodename().to_string_lossy();
        let plain = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' };
        let machine: String = machine.chars().map(plain).take(100).collect();
        let port = addresses.grpc.or(addresses.http).map_or(0, |address| address.port());
        format!("{}-{port}", machine.trim_matches(['-', '.'])).parse().ok()
    };
    let given = config.node.clone();
    given.or_else(|| shared.then(by_machine).flatten()).unwrap_or_else(MemberId::sole)
}

/// What the others are told of this process.
pub(super) fn member(config: &Config, addresses: &Addresses, id: MemberId) -> Member {
    let shown = |address: Option<SocketAddr>| address.map(|address| address.to_string()).unwrap_or_default();
    Member {
        id,
        roles: config.roles.iter().map(|role| role.name().to_owned()).collect(),
        grpc: shown(config.listen.advertise.or(addresses.grpc.filter(|grpc| !grpc.ip().is_unspecified()))),
        http: shown(addresses.http),
        started_at: rt::now(),
    }
}

/// Where the copy of the catalog is that is served while the store is away.
pub(super) fn copy(config: &Config, node: &MemberId) -> Cache {
    Cache::new(config.data_dir.join(format!("catalog-{}.copy", node.as_str().replace(':', "_"))))
}

pub(super) fn registry(config: &Config) -> registry::Config {
    registry::Config {
        limits: config.limits.registration.clone(),
        session_grace: config.registry.session_grace,
        empty_service_retention: config.registry.empty_service_retention,
        guards: config.guards.clone(),
        history: config.history.clone(),
    }
}

pub(super) fn health(config: &Config) -> health::Config {
    health::Config {
        concurrency: config.health.concurrency,
        suspend_share: config.health.suspend_share,
        connections: most_kept(),
    }
}

/// Half of the descriptors are left to those who connect to this process.
fn most_kept() -> usize {
    let limit = getrlimit(Resource::Nofile).current.and_then(|limit| usize::try_from(limit / 2).ok());
    health::Config::default().connections.min(limit.unwrap_or(usize::MAX))
}

pub(super) fn xds(config: &Config) -> xds::Config {
    xds::Config {
        ack_timeout: config.xds.ack_timeout,
        warming_timeout: config.xds.warming_timeout,
        reconnect_grace: config.xds.reconnect_grace,
        first_request_timeout: config.xds.first_request_timeout,
        streams: config.xds.streams,
        resend_on_reconnect: config.xds.resend_on_reconnect.clone(),
        request_bytes: config.limits.xds_request,
        names_per_stream: config.limits.names_per_stream,
        name_bytes: config.limits.name_bytes,
        ..xds::Config::default()
    }
}

pub(super) fn api(config: &Config) -> api::Config {
    api::Config {
        body_limit: config.limits.body,
        requests: config.limits.http_requests,
        effective: config.to_yaml(),
    }
}
