//! Short forms for protobuf's wrappers, and the pieces that both renderings use.

use std::time;

use envoy_types::pb::{
    envoy::{
        config::{
            cluster::v3::{
                CircuitBreakers,
                circuit_breakers::{self, Thresholds},
                cluster::EdsClusterConfig,
            },
            core::v3::{
                AggregatedConfigSource, ApiVersion, ConfigSource, SelfConfigSource,
                config_source::ConfigSourceSpecifier,
            },
            route::v3::{
                RetryPolicy, Route, RouteAction, RouteMatch, VirtualHost, retry_policy::RetryBackOff,
                route::Action, route_action::ClusterSpecifier, route_match::PathSpecifier,
            },
        },
        extensions::filters::{
            http::router::v3::Router,
            network::http_connection_manager::v3::{
                HttpFilter, Rds, http_connection_manager::RouteSpecifier, http_filter::ConfigType,
            },
        },
        r#type::v3::Percent,
    },
    google::protobuf::{Any, Duration, UInt32Value},
};
use prost::{Message, Name};

/// For a limit that a client would otherwise set low by itself.
const NO_LIMIT: u32 = u32::MAX;

/// Retries of a call that failed before it was answered. With the first attempt that is as many attempts as it takes to get
/// past three instances that crash at once; gRPC clients allow one more (A44).
const RETRIES: u32 = 3;

pub(super) fn any<M: Message + Name>(message: &M) -> Any {
    Any { type_url: M::type_url(), value: message.encode_to_vec() }
}

pub(super) fn duration(duration: time::Duration) -> Duration {
    Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(duration.subsec_nanos()).unwrap_or(0),
    }
}

pub(super) fn seconds(seconds: u64) -> Option<Duration> {
    Some(duration(time::Duration::from_secs(seconds)))
}

pub(super) fn number(value: u32) -> Option<UInt32Value> {
    Some(UInt32Value { value })
}

pub(super) fn percent(value: f64) -> Option<Percent> {
    Some(Percent { value })
}

/// "Ask on the stream that you have."
pub(super) fn ads() -> Option<ConfigSource> {
    Some(ConfigSource {
        resource_api_version: ApiVersion::V3.into(),
        config_source_specifier: Some(ConfigSourceSpecifier::Ads(AggregatedConfigSource {})),
        ..ConfigSource::default()
    })
}

/// "Ask whom you have this from."
pub(super) fn itself() -> ConfigSource {
    ConfigSource {
        resource_api_version: ApiVersion::V3.into(),
        config_source_specifier: Some(ConfigSourceSpecifier::Self_(SelfConfigSource::default())),
        ..ConfigSource::default()
    }
}

/// The EDS name is the cluster's.
pub(super) fn eds() -> Option<EdsClusterConfig> {
    Some(EdsClusterConfig { eds_config: ads(), service_name: String::new() })
}

pub(super) fn rds(route_config_name: &str) -> Option<RouteSpecifier> {
    Some(RouteSpecifier::Rds(Rds { config_source: ads(), route_config_name: route_config_name.to_owned() }))
}

/// Must come last.
pub(super) fn router() -> HttpFilter {
    http_filter("envoy.filters.http.router", &Router::default())
}

pub(super) fn http_filter<M: Message + Name>(name: &str, config: &M) -> HttpFilter {
    HttpFilter {
        name: name.to_owned(),
        config_type: Some(ConfigType::TypedConfig(any(config))),
        ..HttpFilter::default()
    }
}

/// Clients come with limits (1,024 requests and connections, 3 retries) that turn a busy service into failed calls. How much a
/// service takes is for the service to say; only retries keep a bound, so that they cannot multiply an overload.
pub(super) fn circuit_breakers(
    retry_budget: Option<circuit_breakers::thresholds::RetryBudget>,
) -> Option<CircuitBreakers> {
    Some(CircuitBreakers {
        thresholds: vec![Thresholds {
            max_connections: number(NO_LIMIT),
            max_pending_requests: number(NO_LIMIT),
            max_requests: number(NO_LIMIT),
            retry_budget,
            ..Thresholds::default()
        }],
        ..CircuitBreakers::default()
    })
}

/// Retries on `conditions`, after about 10 ms at first: what is retried is expected to find another instance at once.
pub(super) fn retries(conditions: &str) -> RetryPolicy {
    RetryPolicy {
        retry_on: conditions.to_owned(),
        num_retries: number(RETRIES),
        retry_back_off: Some(RetryBackOff {
            base_interval: Some(duration(time::Duration::from_millis(10))),
            max_interval: Some(duration(time::Duration::from_millis(250))),
        }),
        ..RetryPolicy::default()
    }
}

/// Everything addressed to a service, with or without a port, goes to the cluster of its name.
pub(super) fn virtual_host(service: &str, retry_policy: Option<RetryPolicy>) -> VirtualHost {
    VirtualHost {
        name: service.to_owned(),
        domains: vec![service.to_owned(), format!("{service}:*")],
        routes: vec![forward(ClusterSpecifier::Cluster(service.to_owned()), retry_policy)],
        ..VirtualHost::default()
    }
}

/// All calls go to that cluster.
pub(super) fn forward(cluster: ClusterSpecifier, retry_policy: Option<RetryPolicy>) -> Route {
    all_paths(Action::Route(RouteAction {
        cluster_specifier: Some(cluster),
        // The call's own deadline counts; the default of 15 s would cut server streams.
        timeout: seconds(0),
        retry_policy,
        ..RouteAction::default()
    }))
}

pub(super) fn all_paths(action: Action) -> Route {
    Route {
        r#match: Some(RouteMatch {
            path_specifier: Some(PathSpecifier::Prefix("/".to_owned())),
            ..RouteMatch::default()
        }),
        action: Some(action),
        ..Route::default()
    }
}
