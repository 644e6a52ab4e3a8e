//! Each room's part of the configuration.

use crate::{api, config::Config, model::MemberId, registry, xds};

/// What this process is called.
pub(super) fn node(config: &Config) -> MemberId {
    config.node.clone().unwrap_or_else(MemberId::sole)
}

pub(super) fn registry(config: &Config) -> registry::Config {
    registry::Config {
        limits: config.limits.registration.clone(),
        session_grace: config.registry.session_grace,
        empty_service_retention: config.registry.empty_service_retention,
    }
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
