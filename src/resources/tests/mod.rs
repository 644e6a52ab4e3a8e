mod histories;
mod leds;
mod roles;

use std::{collections::BTreeMap, net::IpAddr, num::NonZeroU16, time::SystemTime};

use envoy_types::pb::envoy::{
    config::{
        cluster::v3::Cluster,
        core::v3::{HealthStatus, config_source::ConfigSourceSpecifier},
        endpoint::v3::{ClusterLoadAssignment, LbEndpoint, lb_endpoint::HostIdentifier},
        listener::v3::{Listener, filter},
        route::v3::{RouteConfiguration, VirtualHost, route::Action, route_action::ClusterSpecifier},
    },
    extensions::filters::network::http_connection_manager::v3::{
        HttpConnectionManager, http_connection_manager::RouteSpecifier,
    },
};
use prost::Message;

use super::*;
use crate::{
    catalog::{self, catalog},
    model::{
        Check, Health, Incarnation, Instance, InstanceKey, Lease, Locality, Revision, Role, Roles, State,
        Verdict,
    },
};

/// `id, address, zone or region/zone, weight, state` of an instance of `greeter`.
type Row<'a> = (&'a str, &'a str, &'a str, u32, State);

use State::{Draining, Serving};

fn instance(service: &str, (id, address, zone, weight, state): Row<'_>) -> Instance {
    let address: std::net::SocketAddr = address.parse().unwrap();
    Instance {
        key: InstanceKey { service: service.parse().unwrap(), id: id.parse().unwrap() },
        incarnation: Incarnation(1),
        address: address.ip(),
        port: address.port().try_into().unwrap(),
        locality: place(zone),
        weight: weight.try_into().unwrap(),
        metadata: BTreeMap::new(),
        state,
        check: None,
        health: Health::unchecked(SystemTime::UNIX_EPOCH),
        lease: Lease::Session,
        revision: Revision(1),
        registered_at: SystemTime::UNIX_EPOCH,
        stale: None,
        damped: None,
        owner: None,
    }
}

/// From `zone` or `region/zone`.
fn place(text: &str) -> Locality {
    let (region, zone) = text.split_once('/').unwrap_or(("", text));
    Locality { region: region.into(), zone: zone.into(), ..Locality::default() }
}

fn near(place_of_proxy: &str, view: View) -> View {
    View { locality: place(place_of_proxy), ..view }
}

fn only(upstreams: &[&str], view: View) -> View {
    View { upstreams: Some(Arc::new(upstreams.iter().map(|name| name.parse().unwrap()).collect())), ..view }
}

fn on_demand() -> View {
    View { on_demand: true, ..View::envoy(1) }
}

fn greeters(rows: &[Row<'_>]) -> Snapshot {
    let put = |row: &Row<'_>| catalog::Change::PutInstance(instance("greeter", *row));
    let service = catalog::Change::PutService("greeter".parse().unwrap());
    Snapshot::default().apply(Revision(1), [service].into_iter().chain(rows.iter().map(put)))
}

fn decode<M: Message + Default + prost::Name>(set: &ResourceSet, kind: ResourceType, name: &str) -> M {
    let resource = &set.get(kind, name).unwrap_or_else(|| panic!("no {kind:?} {name}")).resource;
    let any = envoy_types::pb::google::protobuf::Any::decode(resource.any()).unwrap();
    assert_eq!(any.type_url, M::type_url());
    M::decode(any.value.as_slice()).unwrap()
}

fn load_assignment(set: &ResourceSet, name: &str) -> ClusterLoadAssignment {
    decode(set, ResourceType::Endpoints, name)
}

/// What one must have that is not to end Envoy: an IP address and a port.
fn socket(endpoint: &LbEndpoint) -> (IpAddr, NonZeroU16) {
    let Some(HostIdentifier::Endpoint(host)) = &endpoint.host_identifier else { panic!("no endpoint") };
    endpoints::socket_of(host.address.as_ref().unwrap()).expect("an IP address and a port")
}

/// Each locality as `zone*weight: address*weight …`, a draining endpoint in parentheses.
fn endpoints(set: &ResourceSet) -> Vec<String> {
    let assignment = load_assignment(set, "greeter");
    assert_eq!(assignment.cluster_name, "greeter");
    let locality = |locality: &envoy_types::pb::envoy::config::endpoint::v3::LocalityLbEndpoints| {
        let weight = locality.load_balancing_weight.unwrap().value;
        let mut text = format!("{}*{weight}:", locality.locality.as_ref().unwrap().zone);
        for endpoint in &locality.lb_endpoints {
            let (address, port) = socket(endpoint);
            let weight = endpoint.load_balancing_weight.unwrap().value;
            let host = format!("{address}:{port}*{weight}");
            text += &match endpoint.health_status() {
                HealthStatus::Draining => format!(" ({host})"),
                _ => format!(" {host}"),
            };
        }
        text
    };
    assignment.endpoints.iter().map(locality).collect()
}

#[test]
fn endpoints_by_case() {
    type Case<'a> = (&'a str, &'a [Row<'a>], &'a [&'a str], &'a [&'a str]);
    let cases: [Case<'_>; 5] = [
        ("no instance", &[], &[], &[]),
        (
            "localities in order, weighted by what they serve",
            &[
                ("c", "10.0.0.3:1", "z1", 5, Serving),
                ("b", "10.0.0.2:1", "z2", 2, Serving),
                ("a", "10.0.0.1:1", "z1", 1, Serving),
            ],
            &["z1*6: 10.0.0.1:1*1 10.0.0.3:1*5", "z2*2: 10.0.0.2:1*2"],
            &["z1*6: 10.0.0.1:1*1 10.0.0.3:1*5", "z2*2: 10.0.0.2:1*2"],
        ),
        (
            "draining",
            &[
                ("a", "10.0.0.1:1", "z1", 1, Draining),
                ("b", "10.0.0.2:1", "z2", 2, Draining),
                ("c", "10.0.0.3:1", "z2", 3, Serving),
            ],
            &["z1*1: (10.0.0.1:1*1)", "z2*3: (10.0.0.2:1*2) 10.0.0.3:1*3"],
            &["z2*3: 10.0.0.3:1*3"],
        ),
        (
            "an address twice: the serving one, else the first",
            &[
                ("a", "10.0.0.1:1", "", 1, Draining),
                ("b", "10.0.0.1:1", "", 2, Serving),
                ("c", "10.0.0.1:1", "", 3, Serving),
                ("d", "10.0.0.1:2", "", 4, Serving),
            ],
            &["*6: 10.0.0.1:1*2 10.0.0.1:2*4"],
            &["*6: 10.0.0.1:1*2 10.0.0.1:2*4"],
        ),
        (
            "weights that do not fit are scaled",
            &[("a", "[::1]:1", "", u32::MAX, Serving), ("b", "[::1]:2", "z", u32::MAX, Serving)],
            &["*1431655765: ::1:1*1431655765", "z*1431655765: ::1:2*1431655765"],
            &["*1431655765: ::1:1*1431655765", "z*1431655765: ::1:2*1431655765"],
        ),
    ];
    for (case, rows, envoy, grpc) in cases {
        let snapshot = greeters(rows);
        assert_eq!(endpoints(&render(&snapshot, &View::envoy(1))), envoy, "{case}: Envoy");
        assert_eq!(endpoints(&render(&snapshot, &View::grpc())), grpc, "{case}: gRPC");
    }
}

/// The ports of each level, by priority; a draining endpoint in parentheses.
fn levels(set: &ResourceSet) -> Vec<String> {
    let mut levels: BTreeMap<u32, Vec<String>> = BTreeMap::new();
    for locality in load_assignment(set, "greeter").endpoints {
        for endpoint in &locality.lb_endpoints {
            let (_, port) = socket(endpoint);
            let draining = endpoint.health_status() == HealthStatus::Draining;
            let shown = if draining { format!("({port})") } else { port.to_string() };
            levels.entry(locality.priority).or_default().push(shown);
        }
    }
    assert!(levels.keys().copied().eq(0..u32::try_from(levels.len()).unwrap()), "a gap: {levels:?}");
    levels
        .into_values()
        .map(|mut ports| {
            ports.sort();
            ports.join(" ")
        })
        .collect()
}

#[test]
fn what_is_near_comes_first() {
    type Case<'a> = (&'a str, &'a str, &'a [(u16, &'a str, State)], &'a [&'a str], &'a [&'a str]);
    let everywhere: &[(u16, &str, State)] =
        &[(1, "r1/a", Serving), (2, "r1/b", Serving), (3, "r2/c", Serving), (4, "", Serving)];
    let zones: &[(u16, &str, State)] = &[(1, "a", Serving), (2, "b", Serving), (3, "r1/a", Serving)];
    let local_drains: &[(u16, &str, State)] = &[(1, "a", Draining), (2, "a", Serving), (3, "b", Serving)];
    let zone_drains: &[(u16, &str, State)] =
        &[(1, "r1/a", Draining), (2, "r1/b", Serving), (3, "r2/c", Serving)];
    let far_drains: &[(u16, &str, State)] =
        &[(1, "r2/c", Serving), (2, "r1/b", Serving), (3, "r1/a", Draining), (4, "r1/a", Serving)];
    let last_drains: &[(u16, &str, State)] = &[(1, "r2/c", Draining), (2, "r1/b", Serving)];
    let cases: [Case<'_>; 14] = [
        ("zone, region, rest", "r1/a", everywhere, &["1", "2", "3 4"], &["1", "2", "3 4"]),
        ("no one in the zone", "r1/x", everywhere, &["1 2", "3 4"], &["1 2", "3 4"]),
        ("no zone", "r1/", everywhere, &["1 2", "3 4"], &["1 2", "3 4"]),
        ("no one near", "r9/x", everywhere, &["1 2 3 4"], &["1 2 3 4"]),
        ("nowhere", "", everywhere, &["1 2 3 4"], &["1 2 3 4"]),
        ("a zone of a region only", "r2/c", everywhere, &["3", "1 2 4"], &["3", "1 2 4"]),
        ("the zone's name in another region", "r2/a", everywhere, &["3", "1 2 4"], &["3", "1 2 4"]),
        ("the proxy knows no region", "a", zones, &["1 3", "2"], &["1 3", "2"]),
        ("an instance knows no region", "r2/a", zones, &["1", "2 3"], &["1", "2 3"]),
        ("one of the zone drains", "a", local_drains, &["(1) 2", "3"], &["2", "3"]),
        ("the last of the zone drains", "r1/a", zone_drains, &["(1) 2", "3"], &["2", "3"]),
        ("one far away drains", "r1/b", far_drains, &["2", "(3) 4", "1"], &["2", "4", "1"]),
        ("the last far away drains", "r1/b", last_drains, &["(1) 2"], &["2"]),
        ("all drain", "r1/a", &[(1, "r1/a", Draining), (2, "r2/b", Draining)], &["(1) (2)"], &[]),
    ];
    for (case, proxy, rows, envoy, grpc) in cases {
        let rows: Vec<_> = rows
            .iter()
            .map(|(port, place, state)| (format!("i{port}"), format!("10.0.0.1:{port}"), *place, *state))
            .collect();
        let rows: Vec<Row<'_>> = rows
            .iter()
            .map(|(id, address, place, state)| (id.as_str(), address.as_str(), *place, 1, *state))
            .collect();
        let snapshot = greeters(&rows);
        assert_eq!(levels(&render(&snapshot, &near(proxy, View::envoy(1)))), envoy, "{case}: Envoy");
        assert_eq!(levels(&render(&snapshot, &near(proxy, View::grpc()))), grpc, "{case}: gRPC");
    }
}

/// What a letter says of an instance: serving, degraded, unhealthy, draining, not checked yet.
fn judged(letter: char, port: u16) -> Instance {
    let (id, address) = (format!("i{port}"), format!("10.0.0.1:{port}"));
    let state = if letter == 'D' { Draining } else { Serving };
    let (verdict, passed) = match letter {
        's' => (Verdict::Healthy, true),
        'd' => (Verdict::Degraded, true),
        'u' | 'D' => (Verdict::Unhealthy, true),
        'n' => (Verdict::Unhealthy, false),
        _ => (Verdict::Unknown, false),
    };
    let unchecked = instance("greeter", (&id, &address, "", 1, state));
    let health = Health { verdict, passed, ..unchecked.health };
    Instance { check: Some(Check::Owner.into()), health, ..unchecked }
}

#[test]
fn verdicts_by_case() {
    // Each instance on the port of its place; what Envoy is told (the letter after a port: degraded, unhealthy, draining) and gRPC.
    for (case, envoy, grpc) in [
        ("ss", "1 2", "1 2"),
        ("su", "1 2u", "1"),
        ("sd", "1 2d", "1"),
        ("sduD", "1 2d 3u 4D", "1"),
        // None is healthy: the degraded serve.
        ("du", "1 2u", "1"),
        ("dD", "1 2D", "1"),
        // All fail: never is a service emptied by its checks.
        ("uu", "1 2", "1 2"),
        ("uD", "1 2D", "1"),
        ("D", "1D", ""),
        // What has never passed is nobody's last resort.
        ("?", "", ""),
        ("n", "", ""),
        ("?s", "2", "2"),
        ("nu", "2", "2"),
    ] {
        let instances = case.chars().zip(1..).map(|(letter, port)| judged(letter, port));
        let snapshot = Snapshot::default().apply(Revision(1), instances.map(catalog::Change::PutInstance));
        let shown = |view: &View| {
            let sent = load_assignment(&render(&snapshot, view), "greeter");
            let all = sent.endpoints.iter().flat_map(|locality| &locality.lb_endpoints);
            let all: Vec<_> = all
                .map(|endpoint| {
                    let (_, port) = socket(endpoint);
                    let health = match endpoint.health_status() {
                        HealthStatus::Unknown => "",
                        HealthStatus::Degraded => "d",
                        HealthStatus::Unhealthy => "u",
                        HealthStatus::Draining => "D",
                        other => panic!("{other:?}"),
                    };
                    format!("{port}{health}")
                })
                .collect();
            let sick = all.iter().any(|endpoint| endpoint.ends_with(['d', 'u']));
            assert_eq!(sent.policy.is_some(), sick, "{case}");
            all.join(" ")
        };
        assert_eq!(shown(&View::envoy(1)), envoy, "{case}: Envoy");
        assert_eq!(shown(&View::grpc()), grpc, "{case}: gRPC");
    }
}

#[test]
fn places_that_see_the_same_get_the_same_bytes() {
    let snapshot =
        greeters(&[("a", "10.0.0.1:1", "r1/a", 1, Serving), ("b", "10.0.0.2:1", "r2/b", 1, Serving)]);
    let set = |proxy: &str| contents(&render(&snapshot, &near(proxy, View::envoy(1))));
    assert_eq!(set("r1/x"), set("r1/y"));
    assert_eq!(set("r9/x"), set(""));
    assert_ne!(set("r1/a"), set(""));
}

#[test]
fn only_upstreams_are_sent() {
    let put = |service: &str| catalog::Change::PutService(service.parse().unwrap());
    let snapshot = Snapshot::default().apply(Revision(1), ["a", "b", "b.c"].map(put));
    let names = |view: &View, kind| {
        let set = render(&snapshot, view);
        set.iter(kind).map(|(name, _)| name.to_string()).collect::<Vec<_>>()
    };
    for (upstreams, want) in
        [(&[] as &[&str], &[] as &[&str]), (&["b"], &["b"]), (&["b.c", "unknown", "a"], &["a", "b.c"])]
    {
        let envoy = only(upstreams, View::envoy(1));
        assert_eq!(names(&envoy, ResourceType::Cluster), want);
        assert_eq!(names(&envoy, ResourceType::Endpoints), want);
        assert_eq!(names(&only(upstreams, on_demand()), ResourceType::Cluster), want);
        for kind in
            [ResourceType::Cluster, ResourceType::Endpoints, ResourceType::Listener, ResourceType::Route]
        {
            assert_eq!(names(&only(upstreams, View::grpc()), kind), want, "{kind:?}");
        }
        let routes: RouteConfiguration = decode(&render(&snapshot, &envoy), ResourceType::Route, OUTBOUND);
        let hosts: Vec<_> = routes.virtual_hosts.iter().map(|host| host.name.as_str()).collect();
        assert_eq!(hosts, [want, &["*"]].concat());
    }
}

fn by_host() -> View {
    View { virtual_hosts: true, ..View::envoy(1) }
}

#[test]
fn l3_virtual_hosts_are_those_of_the_route_table() {
    let put = |service: &str| catalog::Change::PutService(service.parse().unwrap());
    let snapshot = Snapshot::default().apply(Revision(1), ["a", "b.c"].map(put));
    let set = render(&snapshot, &by_host());
    let table: RouteConfiguration = decode(&set, ResourceType::Route, OUTBOUND);
    assert_eq!(set.len(ResourceType::VirtualHost), 2);
    for host in table.virtual_hosts.iter().filter(|host| host.name != "*") {
        let name = format!("{OUTBOUND}/{}", host.name);
        assert_eq!(&decode::<VirtualHost>(&set, ResourceType::VirtualHost, &name), host);
    }
    // Of what the proxy is told of only; and it costs nobody else anything.
    assert_eq!(render(&snapshot, &only(&["b.c"], by_host())).len(ResourceType::VirtualHost), 1);
    for view in [View::envoy(1), on_demand(), View::grpc()] {
        assert_eq!(render(&snapshot, &view).len(ResourceType::VirtualHost), 0);
    }
}

#[test]
fn an_upstream_appears_when_it_registers_and_others_change_nothing() {
    let (mut writer, reader) = catalog();
    let view = only(&["late"], View::envoy(1));
    let one = render(&reader.latest(), &view);
    let apply = |writer: &mut catalog::Writer, revision, service: &str| {
        writer.apply(Revision(revision), vec![catalog::Change::PutService(service.parse().unwrap())]);
    };
    apply(&mut writer, 1, "other");
    let (snapshot, changes) = reader.since(Revision(0));
    let two = update(&one, &snapshot, &changes, &view);
    assert_eq!(contents(&two), contents(&one));
    assert_eq!(two.revision(), Revision(1));
    apply(&mut writer, 2, "late");
    let (snapshot, changes) = reader.since(Revision(1));
    let three = update(&two, &snapshot, &changes, &view);
    assert!(three.get(ResourceType::Cluster, "late").is_some());
    assert_eq!(three.get(ResourceType::Route, OUTBOUND).unwrap().changed, Revision(2));
}

#[test]
fn on_demand_a_call_asks_for_its_cluster() {
    let set = render(&greeters(&[]), &on_demand());
    let manager = http_connection_manager(&decode(&set, ResourceType::Listener, OUTBOUND));
    let filters: Vec<_> = manager.http_filters.iter().map(|filter| filter.name.as_str()).collect();
    assert_eq!(filters, ["envoy.filters.http.on_demand", "envoy.filters.http.router"]);
    let routes: RouteConfiguration = decode(&set, ResourceType::Route, OUTBOUND);
    // The names are there, so that a call to another one fails at once.
    let domains: Vec<_> = routes.virtual_hosts.iter().map(|host| host.domains.clone()).collect();
    assert_eq!(domains, [vec!["greeter"], vec!["*"]]);
    let routes = &routes.virtual_hosts[0].routes;
    let Some(Action::Route(action)) = &routes[0].action else { panic!("no route") };
    assert_eq!(action.cluster_specifier, Some(ClusterSpecifier::ClusterHeader(":authority".into())));
    assert!(matches!(routes[1].action, Some(Action::DirectResponse(_))));

    let routes: RouteConfiguration =
        decode(&render(&Snapshot::default(), &on_demand()), ResourceType::Route, OUTBOUND);
    assert!(routes.virtual_hosts.iter().all(|host| !host.domains.is_empty()), "Envoy refuses it: {routes:?}");
}

#[test]
fn a_sidecar_listens_on_its_port() {
    let set = render(&greeters(&[]), &View::envoy(12_345));
    let listener: Listener = decode(&set, ResourceType::Listener, OUTBOUND);
    assert_eq!(listener.address, Some(endpoints::socket([127, 0, 0, 1].into(), 12_345)));
    let manager = http_connection_manager(&listener);
    assert_eq!(manager.stream_idle_timeout, wire::seconds(0));
    assert_eq!(route_name(&manager), OUTBOUND);
}

#[test]
fn a_call_is_routed_by_authority_and_retried_elsewhere() {
    let set = render(&greeters(&[]), &View::envoy(1));
    let routes: RouteConfiguration = decode(&set, ResourceType::Route, OUTBOUND);
    let domains: Vec<_> = routes.virtual_hosts.iter().map(|host| host.domains.clone()).collect();
    assert_eq!(domains, [vec!["greeter", "greeter:*"], vec!["*"]]);
    let Some(Action::Route(action)) = &routes.virtual_hosts[0].routes[0].action else { panic!("no route") };
    assert_eq!(action.timeout, wire::seconds(0));
    let retry = action.retry_policy.as_ref().unwrap();
    assert_eq!(retry.retry_on, "connect-failure,refused-stream,reset,unavailable");
    assert_eq!(retry.retry_host_predicate.len(), 1);
    assert_eq!(
        retry.retry_priority.as_ref().map(|priority| priority.name.as_str()),
        Some("envoy.retry_priorities.previous_priorities"),
        "the last local instance may be up and turn calls away"
    );
    let Some(Action::DirectResponse(answer)) = &routes.virtual_hosts[1].routes[0].action else {
        panic!("no answer")
    };
    assert_eq!(answer.status, 503);
}

/// Left at its default, each of these loses calls; see `envoy.rs` for how.
#[test]
fn a_cluster_of_a_sidecar_loses_no_call() {
    let set = render(&greeters(&[]), &View::envoy(1));
    let cluster: Cluster = decode(&set, ResourceType::Cluster, "greeter");
    let common = cluster.common_lb_config.unwrap();
    assert_eq!(common.update_merge_window, wire::seconds(0));
    assert_eq!(common.healthy_panic_threshold, wire::percent(1.0));
    let thresholds = &cluster.circuit_breakers.unwrap().thresholds[0];
    assert_eq!(thresholds.max_requests, wire::number(u32::MAX));
    assert_eq!(thresholds.retry_budget.unwrap().min_retry_concurrency, wire::number(1_000));
    let outliers = cluster.outlier_detection.unwrap();
    assert!(outliers.split_external_local_origin_errors);
    assert_eq!(
        (outliers.consecutive_5xx, outliers.consecutive_gateway_failure),
        (wire::number(0), wire::number(0))
    );
    assert_eq!(cluster.typed_extension_protocol_options.len(), 1, "more than one entry encodes in any order");
}

#[test]
fn a_grpc_client_finds_all_under_the_services_name() {
    let set = render(&greeters(&[]), &View::grpc());
    let listener: Listener = decode(&set, ResourceType::Listener, "greeter");
    assert_eq!(listener.address, None);
    let manager = http_connection_manager(&listener);
    assert_eq!(manager.http_filters.len(), 1);
    let routes: RouteConfiguration = decode(&set, ResourceType::Route, &route_name(&manager));
    assert_eq!(routes.virtual_hosts.len(), 1);
    assert_eq!(routes.virtual_hosts[0].domains, ["greeter", "greeter:*"]);
    let cluster: Cluster = decode(&set, ResourceType::Cluster, "greeter");
    // 0 is round robin; C-core and Node refuse others, and all refuse what they do not know of the rest.
    assert_eq!(cluster.lb_policy, 0);
    assert!(cluster.transport_socket.is_none() && cluster.typed_extension_protocol_options.is_empty());
}

#[test]
fn c4_grpc_clients_report_to_whom_they_have_the_cluster_from() {
    let server =
        |view| decode::<Cluster>(&render(&greeters(&[]), &view), ResourceType::Cluster, "greeter").lrs_server;
    let of_grpc = server(View::grpc()).and_then(|server| server.config_source_specifier);
    assert!(matches!(of_grpc, Some(ConfigSourceSpecifier::Self_(_))), "{of_grpc:?}");
    // Envoy has it from its bootstrap.
    assert_eq!(server(View::envoy(1)), None);
}

#[test]
fn an_unchanged_service_is_not_touched() {
    let (mut writer, reader) = catalog();
    let row = |id, address| (id, address, "", 1, Serving);
    let put = |service, row| catalog::Change::PutInstance(instance(service, row));
    writer.apply(
        Revision(1),
        vec![put("greeter", row("a", "10.0.0.1:1")), put("other", row("a", "10.0.0.9:1"))],
    );
    let view = View::envoy(1);
    let one = render(&reader.latest(), &view);

    writer.apply(Revision(2), vec![put("greeter", row("b", "10.0.0.2:1"))]);
    let (snapshot, changes) = reader.since(Revision(1));
    let two = update(&one, &snapshot, &changes, &view);
    let changed =
        |kind| two.changed_since(kind, Revision(1)).unwrap().map(AsRef::as_ref).collect::<Vec<&str>>();
    assert_eq!(changed(ResourceType::Endpoints), ["greeter"]);
    for kind in [ResourceType::Cluster, ResourceType::Listener, ResourceType::Route] {
        assert!(changed(kind).is_empty(), "{kind:?}");
    }
}

fn http_connection_manager(listener: &Listener) -> HttpConnectionManager {
    let any = match &listener.api_listener {
        Some(api) => api.api_listener.clone().unwrap(),
        None => match listener.filter_chains[0].filters[0].config_type.clone().unwrap() {
            filter::ConfigType::TypedConfig(any) => any,
            other => panic!("{other:?}"),
        },
    };
    assert_eq!(any.type_url, <HttpConnectionManager as prost::Name>::type_url());
    HttpConnectionManager::decode(any.value.as_slice()).unwrap()
}

fn route_name(manager: &HttpConnectionManager) -> String {
    match &manager.route_specifier {
        Some(RouteSpecifier::Rds(rds)) => {
            let source = rds.config_source.as_ref().unwrap().config_source_specifier.as_ref();
            assert!(matches!(source, Some(ConfigSourceSpecifier::Ads(_))));
            rds.route_config_name.clone()
        }
        other => panic!("{other:?}"),
    }
}

/// The digest and the bytes, which include name and version, of each type.
fn contents(set: &ResourceSet) -> Vec<(u64, Vec<bytes::Bytes>)> {
    let of = |kind| set.iter(kind).map(|(_, entry)| entry.resource.delta_field()).collect();
    ResourceType::ALL.into_iter().map(|kind| (set.digest(kind), of(kind))).collect()
}

#[test]
fn equal_snapshots_give_equal_bytes() {
    let rows: [Row<'_>; 3] = [
        ("a", "10.0.0.1:1", "z1", 1, Serving),
        ("b", "10.0.0.2:1", "z2", 1, Serving),
        ("c", "10.0.0.3:1", "z1", 1, Draining),
    ];
    for view in [View::envoy(1), View::grpc(), near("z2", View::envoy(1)), on_demand()] {
        let want = contents(&render(&greeters(&rows), &view));
        for n in 0..100 {
            let mut rows = rows;
            rows.rotate_left(n % 3);
            assert_eq!(contents(&render(&greeters(&rows), &view)), want);
        }
    }
}
