use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use serde_json::Value;

use crate::{
    model::{Group, Locality, ServiceId, Upstream, excerpt},
    xds::{Node, ResourceType},
};

/// Where a sidecar listens for its service's calls, unless its node metadata says otherwise.
pub const DEFAULT_OUTBOUND_PORT: u16 = 10_000;

/// The most names that `disco.upstreams` may have. A proxy that calls more services wants all of them.
pub const MAX_UPSTREAMS: usize = 1_000;

/// The most names that `disco.tcp` may have.
pub const MAX_TCP: usize = 100;

/// What of a proxy changes its resources. Streams of equal views share one resource set.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct View {
    /// Which rendering it understands.
    pub kind: ClientKind,
    /// The loopback port of its outbound listener; [`DEFAULT_OUTBOUND_PORT`] for clients that have no such listener.
    pub outbound_port: u16,
    /// Whether it asks for each cluster by name when a call needs it. Never for clients that always do.
    pub on_demand: bool,
    /// Whether it is told of each virtual host by itself, beside the route table (rule L3).
    pub virtual_hosts: bool,
    /// Where it runs, as far as it knows; the sub-zone decides nothing and is left out.
    pub locality: Locality,
    /// The services that it is told of, registered or not, each with its groups, and the groups that it is told of alone; `None` for
    /// all.
    pub upstreams: Option<Arc<BTreeSet<Upstream>>>,
    /// What it offers to applications that speak no HTTP: the loopback port for each.
    pub tcp: Arc<BTreeMap<Upstream, u16>>,
    /// From so many instances on, it gets the endpoints of a service one by one (LEDS); 0 for never. Only for an Envoy whose stream can
    /// carry that: others crash on it, or see no endpoints.
    pub leds_from: usize,
}

/// The sorts of xDS client that need different resources.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ClientKind {
    /// A sidecar.
    Envoy,
    /// A gRPC library that resolves `xds:///service` by itself.
    Grpc,
}

/// A node whose metadata cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("node metadata {key}: {problem}")]
pub struct NodeError {
    /// The metadata key.
    pub key: &'static str,
    /// What is wrong with its value and what would be right.
    pub problem: String,
}

const CLIENT: &str = "disco.client";
const OUTBOUND_PORT: &str = "disco.outbound_port";
const ON_DEMAND: &str = "disco.on_demand";
const TCP: &str = "disco.tcp";
const UPSTREAMS: &str = "disco.upstreams";
const VIRTUAL_HOSTS: &str = "disco.virtual_hosts";

impl View {
    /// A sidecar that listens on this loopback port, runs anywhere and is told of everything.
    pub fn envoy(outbound_port: u16) -> Self {
        Self {
            kind: ClientKind::Envoy,
            outbound_port,
            on_demand: false,
            virtual_hosts: false,
            locality: Locality::default(),
            upstreams: None,
            tcp: Arc::default(),
            leds_from: 0,
        }
    }

    /// A proxyless gRPC client that runs anywhere and is told of everything.
    pub fn grpc() -> Self {
        Self { kind: ClientKind::Grpc, ..Self::envoy(DEFAULT_OUTBOUND_PORT) }
    }

    /// The view of a node, by its user agent, its locality, and the metadata keys `disco.client`, `disco.outbound_port`,
    /// `disco.on_demand`, `disco.virtual_hosts`, `disco.upstreams` and `disco.tcp`, each absent or usable; a stream of the service for
    /// virtual hosts has them anyway. What is in `disco.tcp` is an upstream.
    pub fn of(node: &Node) -> Result<Self, NodeError> {
        let value = |key: &str| node.metadata.get(key);
        let kind = match value(CLIENT) {
            None => ClientKind::of(&node.user_agent_name),
            Some(value) => match text(value).as_str() {
                "envoy" => ClientKind::Envoy,
                "grpc" => ClientKind::Grpc,
                other => {
                    let problem = format!("{} is no client kind: want envoy or grpc", excerpt(other));
                    return Err(NodeError { key: CLIENT, problem });
                }
            },
        };
        let view = Self {
            locality: locality(node),
            upstreams: value(UPSTREAMS).map(upstreams).transpose()?,
            ..Self::grpc()
        };
        if kind == ClientKind::Grpc {
            return Ok(view);
        }
        let outbound_port = match value(OUTBOUND_PORT).map(text) {
            None => DEFAULT_OUTBOUND_PORT,
            Some(text) => match text.parse() {
                Ok(port) if port > 0 => port,
                _ => {
                    let problem =
                        format!("{} is no port: want a whole number from 1 to 65535", excerpt(&text));
                    return Err(NodeError { key: OUTBOUND_PORT, problem });
                }
            },
        };
        let on_demand = flag(node, ON_DEMAND)?;
        let virtual_hosts = flag(node, VIRTUAL_HOSTS)? || node.only == Some(ResourceType::VirtualHost.url());
        let tcp = value(TCP).map(|value| tcp(value, outbound_port)).transpose()?.unwrap_or_default();
        let upstreams = view.upstreams.map(|mut upstreams| {
            if !tcp.is_empty() {
                Arc::make_mut(&mut upstreams).extend(tcp.keys().cloned());
            }
            upstreams
        });
        Ok(Self { kind, outbound_port, on_demand, virtual_hosts, upstreams, tcp: tcp.into(), ..view })
    }

    /// The same with this `leds_from`, as far as the node can take it: an Envoy, by what it calls itself.
    #[must_use]
    pub fn with_leds(mut self, node: &Node, from: usize) -> Self {
        let is_envoy = self.kind == ClientKind::Envoy && node.user_agent_name.starts_with("envoy");
        self.leds_from = if is_envoy && node.collections { from } else { 0 };
        self
    }

    /// Whether it is told of this service.
    pub fn includes(&self, service: &ServiceId) -> bool {
        self.upstreams.as_ref().is_none_or(|upstreams| upstreams.contains(service.as_str()))
    }

    /// Whether it is told of this part of a service.
    pub fn includes_group(&self, service: &ServiceId, group: Group) -> bool {
        let is_one = |upstreams: &BTreeSet<Upstream>| upstreams.contains(&*group.of(service));
        self.includes(service) || self.upstreams.as_deref().is_some_and(is_one)
    }

    /// Whether a change of this service can be one for the view.
    pub(super) fn concerns(&self, service: &ServiceId) -> bool {
        let groups = || Group::ALL.into_iter().any(|group| self.includes_group(service, group));
        // It may have taken, or given back, the name of a group.
        let is_group =
            || Group::parse(service.as_str()).is_some_and(|(of, group)| self.includes_group(&of, group));
        self.includes(service) || groups() || is_group()
    }

    /// How far away something is: 0 in its zone, 1 in its region, 2 elsewhere. Everything is near to who does not know where it
    /// is itself. Zones of one name are one zone unless both are known to be in different regions.
    pub(super) fn distance(&self, other: &Locality) -> u8 {
        let Locality { region, zone, .. } = &self.locality;
        let known = |part: &Arc<str>| !part.is_empty();
        let same_region = *region == other.region;
        match () {
            () if !known(region) && !known(zone) => 0,
            () if known(zone)
                && *zone == other.zone
                && (same_region || !known(region) || !known(&other.region)) =>
            {
                0
            }
            () if known(region) && same_region => 1,
            () => 2,
        }
    }
}

/// Longest part of a locality that counts, in bytes. An instance cannot have a longer one, so nothing would be near.
const LONGEST_PART: usize = 4096;

fn locality(node: &Node) -> Locality {
    let part = |text: &str| if text.len() > LONGEST_PART { "".into() } else { text.into() };
    Locality { region: part(&node.locality.region), zone: part(&node.locality.zone), ..Locality::default() }
}

fn flag(node: &Node, key: &'static str) -> Result<bool, NodeError> {
    match node.metadata.get(key).map(text).as_deref() {
        None | Some("false") => Ok(false),
        Some("true") => Ok(true),
        Some(other) => {
            Err(NodeError { key, problem: format!("{} is neither true nor false", excerpt(other)) })
        }
    }
}

/// From a port for each name.
fn tcp(value: &Value, outbound_port: u16) -> Result<BTreeMap<Upstream, u16>, NodeError> {
    let bad = |problem: String| NodeError { key: TCP, problem };
    let Value::Object(fields) = value else {
        let problem = format!("{} names no ports: want {{\"redis.leader\": 6379}}", excerpt(&text(value)));
        return Err(bad(problem));
    };
    if fields.len() > MAX_TCP {
        return Err(bad(format!("{} names are too many: want at most {MAX_TCP}", fields.len())));
    }
    let mut taken = BTreeMap::from([(outbound_port, OUTBOUND_PORT.to_owned())]);
    let mut tcp = BTreeMap::new();
    for (name, port) in fields {
        let port = text(port);
        let Some(number) = port.parse().ok().filter(|port| *port > 0) else {
            let problem = format!(
                "{}: {} is no port: want a whole number from 1 to 65535",
                excerpt(name),
                excerpt(&port)
            );
            return Err(bad(problem));
        };
        let name: Upstream = name.parse().map_err(bad)?;
        if let Some(other) = taken.insert(number, name.to_string()) {
            return Err(bad(format!("{name}: port {number} is that of {other}, too")));
        }
        tcp.insert(name, number);
    }
    Ok(tcp)
}

/// From a list of names, or from text with commas between them.
fn upstreams(value: &Value) -> Result<Arc<BTreeSet<Upstream>>, NodeError> {
    let bad = |problem: String| NodeError { key: UPSTREAMS, problem };
    let names = match value {
        Value::Array(list) => list.iter().map(text).collect(),
        Value::String(text) => text.split(',').map(|name| name.trim().to_owned()).collect(),
        other => {
            let problem = format!("{} is no list of service names", excerpt(&text(other)));
            return Err(bad(problem));
        }
    };
    let names: Vec<String> = names;
    if names.len() > MAX_UPSTREAMS {
        let count = names.len();
        return Err(bad(format!(
            "{count} names are too many: want at most {MAX_UPSTREAMS}, or leave it out for all"
        )));
    }
    let names: Result<BTreeSet<Upstream>, String> = names.iter().map(|name| name.parse()).collect();
    names.map(Arc::new).map_err(bad)
}

impl ClientKind {
    /// By the `user_agent_name` of the node: every gRPC library puts gRPC first (`gRPC C-core linux`, `gRPC Go`,
    /// `gRPC Node Pure JS`, `gRPC Rust tonic-xds`; A27). Anything else is taken for an Envoy.
    pub fn of(user_agent_name: &str) -> Self {
        let name = user_agent_name.to_ascii_lowercase();
        let grpc = ["grpc", "tonic", "xds-client"].iter().any(|start| name.starts_with(start));
        if grpc { Self::Grpc } else { Self::Envoy }
    }
}

/// A metadata value as one would write it. JSON knows only one kind of number, so a whole one may come as `9000.0`.
fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Number(number) => {
            number.as_f64().map_or_else(|| number.to_string(), |number| number.to_string())
        }
        Value::Bool(bool) => bool.to_string(),
        Value::Null => "null".to_owned(),
        Value::Object(_) => "{…}".to_owned(),
        Value::Array(_) => "[…]".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(user_agent: &str, metadata: &[(&str, Value)]) -> Node {
        let metadata = metadata.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
        Node { user_agent_name: user_agent.into(), metadata, ..Node::default() }
    }

    #[test]
    fn user_agents() {
        use ClientKind::{Envoy, Grpc};
        for (user_agent, want) in [
            ("envoy", Envoy),
            ("", Envoy),
            ("something new", Envoy),
            ("gRPC C-core linux", Grpc),
            ("gRPC Go", Grpc),
            ("gRPC Java", Grpc),
            ("gRPC Node Pure JS", Grpc),
            ("gRPC Rust tonic-xds", Grpc),
            ("grpc", Grpc),
            ("grpc-go", Grpc),
            ("tonic-xds", Grpc),
            ("xds-client", Grpc),
        ] {
            assert_eq!(ClientKind::of(user_agent), want, "{user_agent:?}");
        }
    }

    #[test]
    fn metadata_counts() {
        for (user_agent, metadata, want) in [
            ("envoy", vec![], View::envoy(10_000)),
            ("envoy", vec![("disco.outbound_port", json!(9_000.0))], View::envoy(9_000)),
            ("envoy", vec![("disco.outbound_port", json!("9001"))], View::envoy(9_001)),
            ("envoy", vec![("disco.client", json!("grpc"))], View::grpc()),
            ("gRPC Go", vec![("disco.client", json!("envoy"))], View::envoy(10_000)),
            // Not a sidecar: the port is none of its business.
            ("gRPC Go", vec![("disco.outbound_port", json!("9001"))], View::grpc()),
        ] {
            assert_eq!(View::of(&node(user_agent, &metadata)), Ok(want), "{user_agent} {metadata:?}");
        }
        assert_eq!(View::of(&Node::default()), Ok(View::envoy(DEFAULT_OUTBOUND_PORT)));
    }

    #[test]
    fn upstreams_and_on_demand() {
        let only = |names: &[&str]| Some(Arc::new(names.iter().map(|name| name.parse().unwrap()).collect()));
        for (key, value, upstreams, on_demand) in [
            ("disco.upstreams", json!(["b.c", "a", "a"]), only(&["a", "b.c"]), false),
            ("disco.upstreams", json!("a, b.c"), only(&["a", "b.c"]), false),
            ("disco.upstreams", json!("a"), only(&["a"]), false),
            ("disco.upstreams", json!([]), only(&[]), false),
            ("disco.on_demand", json!(true), None, true),
            ("disco.on_demand", json!("true"), None, true),
            ("disco.on_demand", json!(false), None, false),
        ] {
            let want = View { upstreams, on_demand, ..View::envoy(10_000) };
            assert_eq!(View::of(&node("envoy", &[(key, value.clone())])), Ok(want), "{key}: {value}");
        }
        // A gRPC client always asks by name, and may be kept to its upstreams all the same.
        let grpc = node("gRPC Go", &[("disco.on_demand", json!(true)), ("disco.upstreams", json!("a"))]);
        assert_eq!(View::of(&grpc), Ok(View { upstreams: only(&["a"]), ..View::grpc() }));
    }

    #[test]
    fn what_is_called_over_tcp_is_an_upstream() {
        let ports = json!({ "redis.leader": 6379.0, "pg": "6432" });
        let tcp: BTreeMap<Upstream, u16> =
            [("redis.leader", 6379), ("pg", 6432)].map(|(name, port)| (name.parse().unwrap(), port)).into();
        let want = View { tcp: tcp.clone().into(), ..View::envoy(10_000) };
        assert_eq!(View::of(&node("envoy", &[("disco.tcp", ports.clone())])), Ok(want.clone()));
        let names = ["a", "pg", "redis.leader"].map(|name| name.parse().unwrap());
        let want = View { upstreams: Some(Arc::new(names.into())), ..want };
        let metadata = [("disco.tcp", ports.clone()), ("disco.upstreams", json!("a"))];
        assert_eq!(View::of(&node("envoy", &metadata)), Ok(want));
        // It has no listeners.
        assert_eq!(View::of(&node("gRPC Go", &[("disco.tcp", ports)])), Ok(View::grpc()));
    }

    #[test]
    fn l3_who_asks_for_virtual_hosts_has_them() {
        let want = View { virtual_hosts: true, ..View::envoy(10_000) };
        assert_eq!(View::of(&node("envoy", &[("disco.virtual_hosts", json!(true))])), Ok(want.clone()));
        for (kind, hosts) in ResourceType::ALL.map(|kind| (kind, kind == ResourceType::VirtualHost)) {
            let of_one_type = Node { only: Some(kind.url()), ..Node::default() };
            assert_eq!(View::of(&of_one_type).unwrap().virtual_hosts, hosts, "{kind:?}");
        }
    }

    #[test]
    fn where_a_proxy_runs_is_part_of_its_view() {
        let at = |region: &str, zone: &str, sub_zone: &str| {
            let locality =
                crate::xds::Locality { region: region.into(), zone: zone.into(), sub_zone: sub_zone.into() };
            View::of(&Node { locality, ..Node::default() }).unwrap()
        };
        assert_eq!(at("", "", "rack"), View::envoy(10_000));
        assert_eq!(at("r", "z", "rack"), at("r", "z", ""));
        assert_ne!(at("r", "z", ""), at("r", "y", ""));
        assert_eq!(at("r", &"z".repeat(5000), ""), at("r", "", ""));
    }

    #[test]
    fn unusable_metadata_is_named() {
        for (key, value, want) in [
            ("disco.outbound_port", json!(70_000.0), "\"70000\" is no port"),
            ("disco.outbound_port", json!(80.5), "\"80.5\" is no port"),
            ("disco.outbound_port", json!(0.0), "\"0\" is no port"),
            ("disco.outbound_port", json!("http"), "\"http\" is no port"),
            ("disco.outbound_port", Value::Null, "\"null\" is no port"),
            ("disco.virtual_hosts", json!(1), "\"1\" is neither true nor false"),
            ("disco.on_demand", json!("yes"), "\"yes\" is neither true nor false"),
            ("disco.upstreams", json!(""), "an empty text is not a service name"),
            ("disco.upstreams", json!("a,,b"), "an empty text is not a service name"),
            ("disco.upstreams", json!(["a", "B"]), "\"B\" is not a service name"),
            ("disco.upstreams", json!([["a"]]), "\"[…]\" is not a service name"),
            ("disco.upstreams", json!({ "a": 1 }), "\"{…}\" is no list"),
            ("disco.upstreams", json!(vec!["a"; 1001]), "1001 names are too many"),
            ("disco.tcp", json!("a=1"), "\"a=1\" names no ports"),
            ("disco.tcp", json!({ "a": 0 }), "\"a\": \"0\" is no port"),
            ("disco.tcp", json!({ "a.b.c": 1 }), "\"a.b.c\" is not a service name"),
            ("disco.tcp", json!({ "a": 1, "b": 1 }), "b: port 1 is that of a, too"),
            ("disco.tcp", json!({ "a": 10000 }), "a: port 10000 is that of disco.outbound_port, too"),
            ("disco.client", json!("Envoy\n"), "\"Envoy\\n\" is no client kind"),
        ] {
            let message = View::of(&node("envoy", &[(key, value)])).unwrap_err().to_string();
            assert!(message.starts_with(&format!("node metadata {key}: {want}")), "{message}");
        }
    }
}
