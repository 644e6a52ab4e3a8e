//! For Envoy sidecars: a cluster per service, one listener on loopback, and one route table that sends each call by its
//! `:authority` to the cluster of that name. On demand, a call waits until Envoy has asked for its cluster (rule L1); the table
//! tells beforehand which names there are.

use std::{collections::HashMap, net::Ipv4Addr, sync::Arc};

use envoy_types::pb::envoy::{
    config::{
        accesslog::v3::{AccessLogFilter, ResponseFlagFilter, access_log_filter::FilterSpecifier},
        cluster::v3::{
            Cluster, OutlierDetection, UpstreamConnectionOptions,
            circuit_breakers::thresholds::RetryBudget,
            cluster::{
                ClusterDiscoveryType, CommonLbConfig, DiscoveryType, LbConfig, LbPolicy, LeastRequestLbConfig,
            },
        },
        core::v3::{
            DataSource, Http1ProtocolOptions, Http2ProtocolOptions, KeepaliveSettings,
            SubstitutionFormatString, TcpKeepalive, TrafficDirection, data_source::Specifier,
            substitution_format_string::Format,
        },
        listener::v3::{Filter, FilterChain, Listener, filter::ConfigType},
        route::v3::{
            DirectResponseAction, HeaderMatcher, RetryPolicy, Route, RouteConfiguration, VirtualHost,
            header_matcher::HeaderMatchSpecifier,
            retry_policy::{RetryHostPredicate, RetryPriority, retry_host_predicate, retry_priority},
            route::Action,
            route_action::ClusterSpecifier,
        },
    },
    extensions::{
        filters::{
            http::on_demand::v3::{OnDemand, OnDemandCds},
            network::http_connection_manager::v3::{
                HttpConnectionManager, HttpFilter, LocalReplyConfig, ResponseMapper,
                http_connection_manager::StripPortMode,
            },
        },
        retry::{
            host::previous_hosts::v3::PreviousHostsPredicate,
            priority::previous_priorities::v3::PreviousPrioritiesConfig,
        },
        upstreams::http::v3::{
            HttpProtocolOptions,
            http_protocol_options::{UpstreamProtocolOptions, UseDownstreamHttpConfig},
        },
    },
    r#type::matcher::v3::{RegexMatcher, StringMatcher, string_matcher::MatchPattern},
};

use super::{
    View,
    endpoints::socket,
    names::Source,
    wire::{
        ads, all_paths, any, circuit_breakers, eds, forward, http_filter, number, percent, rds, retries,
        router, seconds, virtual_host,
    },
};
use crate::xds::{Resource, ResourceType};

/// The name of the one listener of a sidecar, and of its route table.
pub const OUTBOUND: &str = "outbound";

/// Calls that a client may have open at once on one connection to its sidecar. gRPC clients use one connection and hold back
/// what exceeds the default of 1,024.
const STREAMS_PER_CONNECTION: u32 = 1_000_000;

/// Retries that may always run at once, whatever the load: enough for all calls in flight of a service whose only other instance
/// just crashed.
const RETRIES_AT_ONCE: u32 = 1_000;

const AUTHORITY: &str = ":authority";

/// There is one leader or none. It is tried as long as it is the leader, and never put aside: who calls it is told at once what is
/// wrong, and by whom. What it is not the leader for any more, no panic sends to it.
pub(super) fn cluster(service: &Arc<str>, source: Source<'_>) -> Resource {
    let message = Cluster {
        name: service.to_string(),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Eds.into())),
        eds_cluster_config: eds(),
        // An instance that hangs or is slow collects open calls and gets no more of them, long before anything can say that
        // it is ill. With one of three instances stopped and a deadline of 1 s, 0.8 % of calls failed; with round robin 33 %,
        // and with the default of two choices 11 %.
        lb_policy: LbPolicy::LeastRequest.into(),
        lb_config: Some(LbConfig::LeastRequestLbConfig(LeastRequestLbConfig {
            choice_count: number(5),
            ..LeastRequestLbConfig::default()
        })),
        connect_timeout: seconds(1),
        circuit_breakers: circuit_breakers(Some(RetryBudget {
            // Beyond that, as many retries as there are calls: never more than double the load.
            budget_percent: percent(100.0),
            min_retry_concurrency: number(RETRIES_AT_ONCE),
            ..RetryBudget::default()
        })),
        outlier_detection: (!source.is_leader()).then(outlier_detection),
        common_lb_config: Some(CommonLbConfig {
            // Only when no instance at all is healthy, near or far, are the others tried: with the default of 50 % the calls of
            // a service that lost two of three instances would go to all three.
            healthy_panic_threshold: percent(if source.is_leader() { 0.0 } else { 1.0 }),
            // Envoy collects changes of health and weight for up to 1 s by default: a drained instance would be sent new
            // calls after the drain was acknowledged, and a crashed one after it was put aside.
            update_merge_window: seconds(0),
            ..CommonLbConfig::default()
        }),
        // What the registry removed is gone.
        ignore_health_on_host_removal: true,
        upstream_connection_options: Some(UpstreamConnectionOptions {
            // Ends idle connections to hosts that vanished. No cost to the application.
            tcp_keepalive: Some(TcpKeepalive {
                keepalive_time: number(15),
                keepalive_interval: number(5),
                keepalive_probes: number(3),
            }),
            ..UpstreamConnectionOptions::default()
        }),
        typed_extension_protocol_options: HashMap::from([(
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions".to_owned(),
            any(&protocols()),
        )]),
        ..Cluster::default()
    };
    Resource::new(ResourceType::Cluster, Arc::clone(service), &message, [Arc::clone(service)])
}

/// Two calls in a row without an answer (refused, reset, timed out while connecting) put an instance aside for 5 s, longer if it
/// goes on. What the application answers, errors too, is its own affair and counts for nothing. All may be put aside: then
/// the panic threshold has all of them tried, so nothing is lost by it.
fn outlier_detection() -> OutlierDetection {
    OutlierDetection {
        split_external_local_origin_errors: true,
        consecutive_local_origin_failure: number(2),
        consecutive_5xx: number(0),
        consecutive_gateway_failure: number(0),
        enforcing_success_rate: number(0),
        enforcing_local_origin_success_rate: number(0),
        interval: seconds(5),
        base_ejection_time: seconds(5),
        max_ejection_time: seconds(30),
        max_ejection_percent: number(100),
        ..OutlierDetection::default()
    }
}

/// Before an HTTP/2 call goes to a connection that has been silent for 10 s, a ping finds out whether the host is
/// there; if not the connection ends and its calls are retried elsewhere. Not pings at an interval: servers of C-core, Go and Java
/// close a connection on the third ping within 5 min in which they had nothing to send (`too_many_pings`), which cuts quiet
/// streams. A ping that goes with a call is followed by an answer, and then does not count.
fn protocols() -> HttpProtocolOptions {
    let options = Http2ProtocolOptions {
        connection_keepalive: Some(KeepaliveSettings {
            connection_idle_interval: seconds(10),
            timeout: seconds(5),
            ..KeepaliveSettings::default()
        }),
        ..Http2ProtocolOptions::default()
    };
    HttpProtocolOptions {
        // As it came: gRPC is HTTP/2 on both sides, and a plain web server is called with HTTP/1.
        upstream_protocol_options: Some(UpstreamProtocolOptions::UseDownstreamProtocolConfig(
            UseDownstreamHttpConfig {
                http_protocol_options: Some(Http1ProtocolOptions::default()),
                http2_protocol_options: Some(options),
                ..UseDownstreamHttpConfig::default()
            },
        )),
        ..HttpProtocolOptions::default()
    }
}

/// Depends on nothing that changes: a changed listener drains its connections.
pub(super) fn listener(view: &View) -> Resource {
    let mut manager = HttpConnectionManager {
        stat_prefix: OUTBOUND.to_owned(),
        route_specifier: rds(OUTBOUND),
        http_filters: vec![router()],
        http2_protocol_options: Some(Http2ProtocolOptions {
            max_concurrent_streams: number(STREAMS_PER_CONNECTION),
            ..Http2ProtocolOptions::default()
        }),
        // The default of 5 min would cut quiet server streams.
        stream_idle_timeout: seconds(0),
        ..HttpConnectionManager::default()
    };
    if view.on_demand {
        manager.http_filters.insert(0, on_demand());
        // The cluster is named by the `:authority`, so that has to be the name alone: `greeter` for `greeter:50051`.
        manager.strip_port_mode = Some(StripPortMode::StripAnyHostPort(true));
        manager.local_reply_config = Some(cluster_not_found());
    }
    let filter = Filter {
        name: "envoy.filters.network.http_connection_manager".to_owned(),
        config_type: Some(ConfigType::TypedConfig(any(&manager))),
    };
    let message = Listener {
        name: OUTBOUND.to_owned(),
        address: Some(socket(Ipv4Addr::LOCALHOST.into(), view.outbound_port)),
        filter_chains: vec![FilterChain { filters: vec![filter], ..FilterChain::default() }],
        traffic_direction: TrafficDirection::Outbound.into(),
        ..Listener::default()
    };
    Resource::new(ResourceType::Listener, OUTBOUND, &message, [])
}

/// Holds a call until Envoy has its cluster or knows that there is none.
fn on_demand() -> HttpFilter {
    let odcds = OnDemandCds {
        source: ads(),
        // Until a server that is out of reach is back, or another one is found.
        timeout: seconds(5),
        ..OnDemandCds::default()
    };
    http_filter("envoy.filters.http.on_demand", &OnDemand { odcds: Some(odcds) })
}

/// Says what is wrong where Envoy by itself says nothing: the service is just going, or no server of Disco can be asked.
fn cluster_not_found() -> LocalReplyConfig {
    let no_cluster = ResponseFlagFilter { flags: vec!["NC".to_owned()] };
    let mapper = ResponseMapper {
        filter: Some(AccessLogFilter {
            filter_specifier: Some(FilterSpecifier::ResponseFlagFilter(no_cluster)),
        }),
        body_format_override: text(&format!("{NOT_KNOWN} could be had from Disco")),
        ..ResponseMapper::default()
    };
    LocalReplyConfig { mappers: vec![mapper], body_format: None }
}

/// One table for all names of the view, so it changes only when one of them comes or goes.
pub(super) fn routes(names: &[(Arc<str>, Source<'_>)], view: &View) -> Resource {
    let mut virtual_hosts: Vec<_> = if view.on_demand {
        let (leaders, others): (Vec<_>, Vec<_>) = names.iter().partition(|(_, source)| source.is_leader());
        let hosts = [("services", others, retry_policy()), ("leaders", leaders, leader_retry_policy())];
        let hosts = hosts.into_iter().filter_map(|(host, names, retry_policy)| {
            let names = names.iter().map(|(name, _)| name.to_string()).collect();
            on_demand_host(host, names, retry_policy, view)
        });
        hosts.collect()
    } else {
        let policies = [retry_policy(), leader_retry_policy()];
        let [of_others, of_leaders] = &policies;
        let of = |source: Source<'_>| if source.is_leader() { of_leaders } else { of_others };
        names.iter().map(|(name, source)| virtual_host(name, Some(of(*source).clone()))).collect()
    };
    // No service can have this name.
    virtual_hosts.push(host("*", vec!["*".to_owned()], vec![no_such_service(view)]));
    let message =
        RouteConfiguration { name: OUTBOUND.to_owned(), virtual_hosts, ..RouteConfiguration::default() };
    Resource::new(ResourceType::Route, OUTBOUND, &message, [])
}

/// The part of the route table that is about one service, as the table has it, named `<table>/<host>`.
pub(super) fn host_of(service: &Arc<str>, source: Source<'_>) -> Resource {
    let retry_policy = if source.is_leader() { leader_retry_policy() } else { retry_policy() };
    let message = virtual_host(service, Some(retry_policy));
    Resource::new(ResourceType::VirtualHost, host_name(service), &message, [])
}

pub(super) fn host_name(service: &str) -> Arc<str> {
    format!("{OUTBOUND}/{service}").into()
}

/// One for many names: little more than a list of names. Without that list every name would be asked for, and Envoy asks only
/// once: it has calls to a name that it knows to be missing wait for the whole time-out.
fn on_demand_host(
    name: &str,
    services: Vec<String>,
    retry_policy: RetryPolicy,
    view: &View,
) -> Option<VirtualHost> {
    // Domains match in any case, clusters do not.
    let lower_case = RegexMatcher { regex: "[-.a-z0-9]+".to_owned(), ..RegexMatcher::default() };
    let mut route = forward(ClusterSpecifier::ClusterHeader(AUTHORITY.to_owned()), Some(retry_policy));
    if let Some(condition) = &mut route.r#match {
        condition.headers.push(HeaderMatcher {
            name: AUTHORITY.to_owned(),
            header_match_specifier: Some(HeaderMatchSpecifier::StringMatch(StringMatcher {
                match_pattern: Some(MatchPattern::SafeRegex(lower_case)),
                ..StringMatcher::default()
            })),
            ..HeaderMatcher::default()
        });
    }
    // Envoy refuses a host without domains.
    (!services.is_empty()).then(|| host(name, services, vec![route, no_such_service(view)]))
}

/// Calls that got no answer go to another instance: whether they could not be sent, were refused by a server that shuts down, lost
/// their connection to a crash, or were turned away with UNAVAILABLE. A crash may come after the call had its effect, so calls
/// must bear to be made twice, as with any retry.
fn retry_policy() -> RetryPolicy {
    RetryPolicy {
        retry_host_predicate: vec![RetryHostPredicate {
            name: "envoy.retry_host_predicates.previous_hosts".to_owned(),
            config_type: Some(retry_host_predicate::ConfigType::TypedConfig(any(&PreviousHostsPredicate {}))),
        }],
        // Crashed instances have no open calls and so are picked with preference until they are put aside; with a few tries a
        // retry could land on one again.
        host_selection_retry_max_attempts: 20,
        // Likewise the last local instances, when they crash, take all calls until they are put aside: a retry goes on to the next
        // zone at once. Where there is none it stays.
        retry_priority: Some(RetryPriority {
            name: "envoy.retry_priorities.previous_priorities".to_owned(),
            config_type: Some(retry_priority::ConfigType::TypedConfig(any(&PreviousPrioritiesConfig {
                update_frequency: 1,
            }))),
        }),
        ..retries("connect-failure,refused-stream,reset,unavailable")
    }
}

/// Only calls that the leader has certainly not begun, and to the same one unless another was elected meanwhile: a write that got no
/// answer may have had its effect.
fn leader_retry_policy() -> RetryPolicy {
    retries("connect-failure,refused-stream")
}

/// How a call to nobody is answered; what follows says where it was looked for.
const NOT_KNOWN: &str = "disco: no service named %REQ(:AUTHORITY)%";

/// Fails the call at once with what is wrong. Envoy makes 503 into gRPC's UNAVAILABLE, as for a name that does not resolve: the
/// service may be about to register.
fn no_such_service(view: &View) -> Route {
    let place = if view.upstreams.is_some() { " among those of disco.upstreams" } else { "" };
    let action = DirectResponseAction {
        status: 503,
        body_format: text(&format!("{NOT_KNOWN}{place} is registered")),
        ..DirectResponseAction::default()
    };
    all_paths(Action::DirectResponse(action))
}

fn host(name: &str, domains: Vec<String>, routes: Vec<Route>) -> VirtualHost {
    VirtualHost { name: name.to_owned(), domains, routes, ..VirtualHost::default() }
}

fn text(format: &str) -> Option<SubstitutionFormatString> {
    Some(SubstitutionFormatString {
        format: Some(Format::TextFormatSource(DataSource {
            specifier: Some(Specifier::InlineString(format.to_owned())),
            ..DataSource::default()
        })),
        ..SubstitutionFormatString::default()
    })
}
