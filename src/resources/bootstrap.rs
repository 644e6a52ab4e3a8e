use std::{collections::BTreeMap, fmt::Write as _, net::SocketAddr};

use crate::model::{Locality, ServiceId, Upstream};

/// Where a sidecar's admin interface listens on loopback, unless told otherwise.
pub const DEFAULT_ADMIN_PORT: u16 = 19_000;

/// The static configuration that makes an Envoy a sidecar of Disco. Everything else it is told over ADS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bootstrap {
    /// Names the proxy among all; two that use one at the same time cannot be told apart in lists.
    pub node_id: String,
    /// The group that it is shown under.
    pub cluster: String,
    /// The service that it stands beside, if any.
    pub service: Option<ServiceId>,
    /// Where it runs.
    pub locality: Locality,
    /// The loopback port of the admin interface; 0 for any.
    pub admin_port: u16,
    /// The loopback port on which it is to take the service's calls, not 0.
    pub outbound_port: u16,
    /// The gRPC addresses of the Disco servers. Envoy spreads its streams over them and goes on to the next when one fails.
    pub servers: Vec<SocketAddr>,
    /// The only services, or parts of services, that it is to be told of; all if there are none here.
    pub upstreams: Vec<Upstream>,
    /// What it is to offer to applications that speak no HTTP: the loopback port for each.
    pub tcp: BTreeMap<Upstream, u16>,
    /// How it asks for what it needs.
    pub protocol: Protocol,
}

/// How a sidecar asks for its resources.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Protocol {
    /// Delta (incremental) xDS: everything at the start, then what changes.
    #[default]
    Delta,
    /// State of the world: all clusters again whenever one changes.
    Sotw,
    /// Delta; starts with no clusters and asks for each when it is first called.
    OnDemand,
}

impl Bootstrap {
    /// The configuration file, for Envoy 1.40.
    pub fn to_yaml(&self) -> String {
        let api_type = if self.protocol == Protocol::Sotw { "GRPC" } else { "DELTA_GRPC" };
        let clusters = if self.protocol == Protocol::OnDemand {
            "  # No cds_config: a cluster is asked for when it is first called."
        } else {
            "  cds_config: { ads: {}, resource_api_version: V3 }"
        };
        let node = self.node();
        let endpoints = self.endpoints();
        let admin_port = self.admin_port;
        format!(
            "\
{node}
admin:
  address:
    socket_address: {{ address: 127.0.0.1, port_value: {admin_port} }}
  # Reachable also when the connections of the application are at their limit.
  ignore_global_conn_limit: true

# Clusters, endpoints, listeners and routes all come over one stream from Disco.
dynamic_resources:
  ads_config:
    api_type: {api_type}
    transport_api_version: V3
    set_node_on_first_message_only: true
    grpc_services:
    - envoy_grpc:
        cluster_name: disco_servers
        # After a server is lost, the next one is tried soon, and all proxies of a mesh are back within seconds.
        retry_policy:
          retry_back_off: {{ base_interval: 0.25s, max_interval: 5s }}
{clusters}
  lds_config: {{ ads: {{}}, resource_api_version: V3 }}

static_resources:
  clusters:
  # No service can have this name, so none can take its place.
  - name: disco_servers
    # Addresses, not names: nothing here needs DNS.
    type: STATIC
    connect_timeout: 1s
    load_assignment:
      cluster_name: disco_servers
      endpoints:
      - lb_endpoints:
{endpoints}
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        \"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config:
          http2_protocol_options:
            # A server that is silently gone is noticed within 15 s.
            connection_keepalive: {{ interval: 10s, timeout: 5s }}
    # A server that does not answer is left out for a while, unless none answers.
    outlier_detection:
      split_external_local_origin_errors: true
      consecutive_local_origin_failure: 1
      consecutive_5xx: 0
      interval: 5s
      base_ejection_time: 5s
      max_ejection_time: 30s
      max_ejection_percent: 100
    common_lb_config:
      healthy_panic_threshold: {{ value: 1 }}

# How many calls go where, for `disco service load`: Envoy reports it as often as Disco asks for it.
cluster_manager:
  load_stats_config:
    api_type: GRPC
    transport_api_version: V3
    grpc_services:
    - envoy_grpc: {{ cluster_name: disco_servers }}

overload_manager:
  resource_monitors:
  - name: envoy.resource_monitors.global_downstream_max_connections
    typed_config:
      \"@type\": type.googleapis.com/envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig
      max_active_downstream_connections: 50000
"
        )
    }

    fn node(&self) -> String {
        let mut node =
            format!("node:\n  id: {}\n  cluster: {}\n", quoted(&self.node_id), quoted(&self.cluster));
        let Locality { region, zone, sub_zone } = &self.locality;
        let parts = [("region", region), ("zone", zone), ("sub_zone", sub_zone)];
        if parts.iter().any(|(_, part)| !part.is_empty()) {
            node.push_str("  locality:\n");
        }
        for (key, part) in parts.into_iter().filter(|(_, part)| !part.is_empty()) {
            let _ = writeln!(node, "    {key}: {}", quoted(part));
        }
        node.push_str("  metadata:\n");
        if let Some(service) = &self.service {
            let _ = writeln!(node, "    disco.service: {}", quoted(service.as_str()));
        }
        let _ = writeln!(node, "    disco.outbound_port: {}", self.outbound_port);
        if self.protocol == Protocol::OnDemand {
            node.push_str("    disco.on_demand: true\n");
        }
        if !self.upstreams.is_empty() {
            let names: Vec<_> = self.upstreams.iter().map(|name| quoted(name.as_str())).collect();
            let _ = writeln!(node, "    disco.upstreams: [{}]", names.join(", "));
        }
        if !self.tcp.is_empty() {
            let ports = self.tcp.iter().map(|(name, port)| format!("{}: {port}", quoted(name.as_str())));
            let _ = writeln!(node, "    disco.tcp: {{ {} }}", ports.collect::<Vec<_>>().join(", "));
        }
        node
    }

    fn endpoints(&self) -> String {
        let lines = self.servers.iter().map(|server| {
            format!(
                "        - endpoint: {{ address: {{ socket_address: {{ address: {}, port_value: {} }} }} }}",
                quoted(&server.ip().to_string()),
                server.port()
            )
        });
        lines.collect::<Vec<_>>().join("\n")
    }
}

/// As a YAML scalar that nothing in the text can end, turn into another type, or hide from a reader.
fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            ' '..='~' => out.push(c),
            _ => {
                let _ = write!(out, "\\U{:08x}", u32::from(c));
            }
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn bootstrap() -> Bootstrap {
        Bootstrap {
            node_id: "web-1".into(),
            cluster: "web".into(),
            service: Some("web".parse().unwrap()),
            locality: Locality::default(),
            admin_port: DEFAULT_ADMIN_PORT,
            outbound_port: 10_000,
            servers: vec!["127.0.0.1:18000".parse().unwrap()],
            upstreams: vec![],
            tcp: BTreeMap::new(),
            protocol: Protocol::Delta,
        }
    }

    fn parsed(bootstrap: &Bootstrap) -> Value {
        serde_saphyr::from_str(&bootstrap.to_yaml()).unwrap()
    }

    #[test]
    fn says_what_it_is_told() {
        let yaml = parsed(&Bootstrap {
            locality: Locality { region: "r".into(), zone: "z".into(), sub_zone: "".into() },
            admin_port: 1,
            outbound_port: 2,
            servers: vec!["10.0.0.1:3".parse().unwrap(), "[::1]:4".parse().unwrap()],
            upstreams: vec!["a".parse().unwrap(), "b.c".parse().unwrap()],
            tcp: [("db.leader", 6), ("db", 5)].map(|(name, port)| (name.parse().unwrap(), port)).into(),
            protocol: Protocol::Sotw,
            ..bootstrap()
        });
        assert_eq!(
            yaml["node"],
            json!({
                "id": "web-1",
                "cluster": "web",
                "locality": { "region": "r", "zone": "z" },
                "metadata": {
                    "disco.service": "web", "disco.outbound_port": 2, "disco.upstreams": ["a", "b.c"],
                    "disco.tcp": { "db": 5, "db.leader": 6 },
                },
            })
        );
        assert_eq!(
            yaml["admin"]["address"]["socket_address"],
            json!({ "address": "127.0.0.1", "port_value": 1 })
        );
        assert_eq!(yaml["dynamic_resources"]["ads_config"]["api_type"], "GRPC");
        let server = |address: &str, port: u16| json!({ "endpoint": { "address": { "socket_address": { "address": address, "port_value": port } } } });
        assert_eq!(
            yaml["static_resources"]["clusters"][0]["load_assignment"]["endpoints"][0]["lb_endpoints"],
            json!([server("10.0.0.1", 3), server("::1", 4)])
        );
    }

    #[test]
    fn defaults() {
        let yaml = parsed(&Bootstrap { service: None, ..bootstrap() });
        assert_eq!(yaml["node"].get("locality"), None);
        assert_eq!(yaml["node"]["metadata"], json!({ "disco.outbound_port": 10_000 }));
        assert_eq!(yaml["dynamic_resources"]["ads_config"]["api_type"], "DELTA_GRPC");
        assert!(yaml["dynamic_resources"]["cds_config"].is_object());
        let services = &yaml["cluster_manager"]["load_stats_config"]["grpc_services"];
        assert_eq!(services, &json!([{ "envoy_grpc": { "cluster_name": "disco_servers" } }]));
    }

    #[test]
    fn on_demand_it_asks_for_no_clusters() {
        let yaml = parsed(&Bootstrap { protocol: Protocol::OnDemand, ..bootstrap() });
        assert_eq!(yaml["node"]["metadata"]["disco.on_demand"], true);
        assert_eq!(yaml["dynamic_resources"]["ads_config"]["api_type"], "DELTA_GRPC");
        assert_eq!(yaml["dynamic_resources"].get("cds_config"), None);
        assert!(yaml["dynamic_resources"]["lds_config"].is_object());
    }

    proptest! {
        /// No text breaks out of its place.
        #[test]
        fn any_text_is_safe(id in "(\\PC|[\"'\\\\\n\r\t:{}#\u{7f}\u{85}\u{2028}\u{feff}])*", zone in ".+") {
            let yaml = parsed(&Bootstrap {
                node_id: id.clone(),
                locality: Locality { zone: zone.as_str().into(), ..Locality::default() },
                ..bootstrap()
            });
            prop_assert_eq!(&yaml["node"]["id"], &json!(id));
            prop_assert_eq!(&yaml["node"]["locality"]["zone"], &json!(zone));
            prop_assert!(yaml["static_resources"].is_object());
        }
    }
}
