//! Each room's part of the configuration.

use rustix::process::{Resource, getrlimit};

use crate::{api, config::Config, health, registry, xds};

pub(super) fn registry(config: &Config) -> registry::Config {
    registry::Config {
        limits: config.limits.registration.clone(),
        session_grace: config.registry.session_grace,
        empty_service_retention: config.registry.empty_service_retention,
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
    limit.map_or(health::Config::default().connections, |limit| {
        limit.min(health::Config::default().connections)
    })
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
    api::Config { body_limit: config.limits.body, effective: config.to_yaml() }
}
