//! What Disco generates, judged by real Envoy (`--mode validate`).

use std::{
    collections::BTreeMap, env, fs, net::SocketAddr, path::Path, process::Command, sync::Arc,
    time::SystemTime,
};

use disco::{
    catalog::{Change, Snapshot},
    model::{Health, Incarnation, Instance, InstanceKey, Lease, Locality, Revision, Roles, State},
    resources::{self, Bootstrap, DEFAULT_ADMIN_PORT, DEFAULT_OUTBOUND_PORT, OUTBOUND, Protocol, View},
    xds::{ResourceSet, ResourceType},
};
use envoy_types::pb::{
    envoy::{
        config::{
            bootstrap::v3::{
                Bootstrap as BootstrapProto,
                bootstrap::{DynamicResources, StaticResources},
            },
            cluster::v3::{
                Cluster,
                cluster::{ClusterDiscoveryType, DiscoveryType},
            },
            core::v3::{
                ApiConfigSource, ApiVersion, GrpcService, Node,
                api_config_source::ApiType,
                grpc_service::{EnvoyGrpc, TargetSpecifier},
            },
            listener::v3::{Listener, filter::ConfigType},
        },
        extensions::filters::network::http_connection_manager::v3::{
            HttpConnectionManager, http_connection_manager::RouteSpecifier,
        },
    },
    google::protobuf::Any,
};
use prost::Message;

use crate::harness::tool;

/// What Envoy has against a configuration file; the ending says in which form it is.
fn validate(config: &Path) -> Result<(), String> {
    let mut command = Command::new(tool("envoy").unwrap());
    command.args(["--mode", "validate", "--log-level", "warning", "--use-dynamic-base-id", "-c"]).arg(config);
    let output = command.output().unwrap();
    let said =
        String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    // A deprecated field or a missing limit is only warned of.
    if output.status.success() && !said.contains("[warning]") { Ok(()) } else { Err(said) }
}

fn instance(service: &str, id: &str, address: &str, zone: &str, state: State) -> Change {
    let address: SocketAddr = address.parse().unwrap();
    Change::PutInstance(Instance {
        key: InstanceKey { service: service.parse().unwrap(), id: id.parse().unwrap() },
        incarnation: Incarnation(1),
        address: address.ip(),
        port: address.port().try_into().unwrap(),
        locality: Locality { zone: zone.into(), ..Locality::default() },
        weight: 7.try_into().unwrap(),
        metadata: [].into(),
        state,
        check: None,
        health: Health::unchecked(SystemTime::UNIX_EPOCH),
        lease: Lease::Session,
        revision: Revision(1),
        registered_at: SystemTime::UNIX_EPOCH,
        stale: None,
        damped: None,
        owner: None,
    })
}

fn snapshot() -> Snapshot {
    let changes = [
        instance("greeter", "a", "127.0.0.1:50051", "", State::Serving),
        instance("greeter", "b", "10.0.0.2:50051", "z1", State::Draining),
        instance("greeter", "c", "[fd00::1]:50051", "z1", State::Serving),
        instance("greeter.payments", "a", "127.0.0.1:50051", "", State::Serving),
        Change::PutService("empty".parse().unwrap()),
        Change::PutRoles(
            "greeter".parse().unwrap(),
            Roles { term: 1, leader: Some("a".parse().unwrap()), ..Roles::default() }.into(),
        ),
    ];
    Snapshot::default().apply(Revision(1), changes)
}

fn decode<M: Message + Default>(set: &ResourceSet, kind: ResourceType, name: &str) -> M {
    let any = Any::decode(set.get(kind, name).unwrap().resource.any()).unwrap();
    M::decode(any.value.as_slice()).unwrap()
}

/// The resources of a view as one static configuration: with the endpoints within their clusters and the routes within their
/// listeners, or all as sent, left to be asked for over ADS.
fn bootstrap(set: &ResourceSet, inline: bool) -> BootstrapProto {
    let mut clusters = vec![ads_server()];
    for (name, _) in set.iter(ResourceType::Cluster) {
        let mut cluster: Cluster = decode(set, ResourceType::Cluster, name);
        if inline {
            cluster.cluster_discovery_type = Some(ClusterDiscoveryType::Type(DiscoveryType::Static.into()));
            cluster.eds_cluster_config = None;
            cluster.load_assignment = Some(decode(set, ResourceType::Endpoints, name));
        }
        clusters.push(cluster);
    }
    let listeners = (1..).zip(set.iter(ResourceType::Listener)).map(|(port, (name, _))| {
        let mut listener = socket_listener(decode(set, ResourceType::Listener, name), port);
        if inline && !name.starts_with("tcp/") {
            let Some(ConfigType::TypedConfig(any)) = &mut listener.filter_chains[0].filters[0].config_type
            else {
                panic!("no HTTP connection manager")
            };
            let mut manager = HttpConnectionManager::decode(any.value.as_slice()).unwrap();
            let Some(RouteSpecifier::Rds(rds)) = &manager.route_specifier else { panic!("no RDS") };
            let routes = decode(set, ResourceType::Route, &rds.route_config_name);
            manager.route_specifier = Some(RouteSpecifier::RouteConfig(routes));
            any.value = manager.encode_to_vec();
        }
        listener
    });
    BootstrapProto {
        node: Some(Node { id: "a".into(), cluster: "a".into(), ..Node::default() }),
        static_resources: Some(StaticResources {
            listeners: listeners.collect(),
            clusters,
            ..StaticResources::default()
        }),
        dynamic_resources: Some(DynamicResources {
            ads_config: Some(ApiConfigSource {
                api_type: ApiType::DeltaGrpc.into(),
                transport_api_version: ApiVersion::V3.into(),
                grpc_services: vec![GrpcService {
                    target_specifier: Some(TargetSpecifier::EnvoyGrpc(EnvoyGrpc {
                        cluster_name: ADS.into(),
                        ..EnvoyGrpc::default()
                    })),
                    ..GrpcService::default()
                }],
                ..ApiConfigSource::default()
            }),
            ..DynamicResources::default()
        }),
        ..BootstrapProto::default()
    }
}

const ADS: &str = "the ADS server";

fn ads_server() -> Cluster {
    let set = resources::render(&snapshot(), &View::envoy(1));
    Cluster {
        name: ADS.into(),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Static.into())),
        eds_cluster_config: None,
        ..decode(&set, ResourceType::Cluster, "empty")
    }
}

/// Envoy's own sort of listener out of one for a gRPC client, which has no address and no use for statistics.
fn socket_listener(listener: Listener, port: u16) -> Listener {
    let Some(any) = listener.api_listener.clone().and_then(|api| api.api_listener) else { return listener };
    let mut manager = HttpConnectionManager::decode(any.value.as_slice()).unwrap();
    manager.stat_prefix = listener.name.clone();
    let set = resources::render(&snapshot(), &View::envoy(port));
    let mut socket: Listener = decode(&set, ResourceType::Listener, OUTBOUND);
    socket.name = listener.name;
    socket.filter_chains[0].filters[0].config_type =
        Some(ConfigType::TypedConfig(Any { value: manager.encode_to_vec(), ..any }));
    socket
}

fn check_accepted(proto: &BootstrapProto) {
    validate_proto(proto).unwrap_or_else(|said| panic!("{said}"));
}

fn validate_proto(proto: &BootstrapProto) -> Result<(), String> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("bootstrap.pb");
    fs::write(&path, proto.encode_to_vec()).unwrap();
    validate(&path)
}

#[test]
fn envoy_accepts_what_is_generated_for_it() {
    let anywhere = View::envoy(DEFAULT_OUTBOUND_PORT);
    let in_zone = View {
        locality: Locality { zone: "z1".into(), ..Locality::default() },
        upstreams: Some(Arc::new(["greeter".parse().unwrap(), "unknown".parse().unwrap()].into())),
        ..anywhere.clone()
    };
    let tcp = [("greeter.leader", 1), ("greeter", 2), ("greeter.any", 3)];
    let tcp = tcp.map(|(name, port)| (name.parse().unwrap(), port));
    let tcp = View { tcp: Arc::new(tcp.into()), ..anywhere.clone() };
    let on_demand = View { on_demand: true, ..tcp.clone() };
    for view in [anywhere, in_zone, tcp, on_demand] {
        let set = resources::render(&snapshot(), &view);
        check_accepted(&bootstrap(&set, true));
        check_accepted(&bootstrap(&set, false));
    }
}

/// They have no validator; Envoy at least knows the same protos.
#[test]
fn envoy_accepts_what_is_generated_for_grpc_clients() {
    check_accepted(&bootstrap(&resources::render(&snapshot(), &View::grpc()), true));
}

#[test]
fn the_oracle_refuses_what_is_wrong() {
    let mut wrong = bootstrap(&resources::render(&snapshot(), &View::envoy(1)), true);
    let clusters = &mut wrong.static_resources.as_mut().unwrap().clusters;
    clusters[1].name = "not the one that the route names".into();
    let said = validate_proto(&wrong).unwrap_err();
    assert!(said.contains("unknown cluster 'empty'"), "{said}");
}

fn sidecar(node_id: &str) -> Bootstrap {
    Bootstrap {
        node_id: node_id.into(),
        cluster: "web".into(),
        service: Some("web".parse().unwrap()),
        locality: Locality { region: "eu-west".into(), zone: "eu-west-1a".into(), sub_zone: "".into() },
        admin_port: DEFAULT_ADMIN_PORT,
        outbound_port: DEFAULT_OUTBOUND_PORT,
        servers: vec!["127.0.0.1:18000".parse().unwrap()],
        upstreams: vec![],
        tcp: BTreeMap::new(),
        protocol: Protocol::Delta,
    }
}

#[test]
fn the_supported_bootstraps_are_what_is_generated() {
    let servers = ["10.0.0.1:18000", "10.0.0.2:18000", "10.0.0.3:18000"];
    for (file, bootstrap) in [
        ("delta.yaml", sidecar("web-1")),
        ("sotw.yaml", Bootstrap { protocol: Protocol::Sotw, ..sidecar("web-1") }),
        ("on-demand.yaml", Bootstrap { protocol: Protocol::OnDemand, ..sidecar("web-1") }),
        ("tcp.yaml", Bootstrap { tcp: [("redis.leader".parse().unwrap(), 6379)].into(), ..sidecar("web-1") }),
        (
            "several-servers.yaml",
            Bootstrap { servers: servers.map(|server| server.parse().unwrap()).into(), ..sidecar("web-1") },
        ),
    ] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("envoy").join(file);
        let want = bootstrap.to_yaml();
        if env::var_os("UPDATE_GOLDEN").is_some() {
            fs::write(&path, &want).unwrap();
        }
        let have = fs::read_to_string(&path).unwrap_or_default();
        assert!(
            have == want,
            "envoy/{file} is not what is generated: run the test with UPDATE_GOLDEN=1 and look at the difference"
        );
        validate(&path).unwrap();
    }
}

#[test]
fn envoy_reads_any_text_in_a_bootstrap() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("bootstrap.yaml");
    let bootstrap = Bootstrap {
        service: None,
        locality: Locality { zone: "no".into(), ..Locality::default() },
        servers: vec!["[::1]:18000".parse().unwrap()],
        ..sidecar("a \"b\" \\ é 🦀 {x}: #\n\u{2028}")
    };
    fs::write(&path, bootstrap.to_yaml()).unwrap();
    validate(&path).unwrap();
}
