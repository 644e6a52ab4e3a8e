use std::{fmt, net::SocketAddr};

use envoy_types::pb::{
    envoy::config::core::v3 as core,
    google::protobuf::{self, value::Kind},
};
use prost::Message as _;
use serde_json::{Map, Value};

use super::{Code, Config, Feed, ProtocolError};

/// The longest `node.id` and `node.cluster`, in bytes: they are shown in tables and logs.
const MAX_ID: usize = 1024;

/// Who opened a stream, from its first request. Nothing of it is proven.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Node {
    /// `node.id`, never empty.
    pub id: String,
    /// `node.cluster`.
    pub cluster: String,
    /// What the client is, e.g. `envoy`, `gRPC Go`.
    pub user_agent_name: String,
    /// Its version, e.g. `1.40.0`.
    pub user_agent_version: String,
    /// Where it runs; parts that it does not know are empty.
    pub locality: Locality,
    /// `node.metadata` as JSON.
    pub metadata: Map<String, Value>,
    /// What it says it can do.
    pub client_features: Vec<String>,
    /// The other end of the connection.
    pub peer: Option<SocketAddr>,
    /// Whether its stream can carry glob collections: it is delta, and all that refers to a collection comes by it, or nothing
    /// but members of collections does (rule L4).
    pub collections: bool,
    /// The URL of the one type that the stream can have; `None` for an aggregated one.
    pub only: Option<&'static str>,
}

/// Region, zone and sub-zone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Locality {
    /// The region.
    pub region: String,
    /// The zone in the region.
    pub zone: String,
    /// The part of the zone.
    pub sub_zone: String,
}

impl Node {
    /// From the first request.
    ///
    /// # Errors
    /// Without a node or without its id (rule G6), or with one that is too large or cannot be shown.
    pub fn of(
        node: Option<core::Node>,
        peer: Option<SocketAddr>,
        config: &Config,
    ) -> Result<Self, ProtocolError> {
        let node = node.filter(|node| !node.id.is_empty()).ok_or(ProtocolError::NoNode)?;
        let (len, limit) = (node.encoded_len(), config.node_bytes);
        if len > limit {
            return Err(ProtocolError::LargeNode { len, limit });
        }
        let shown = |text: &str| text.len() <= MAX_ID && !text.chars().any(char::is_control);
        for (field, text) in [("id", &node.id), ("cluster", &node.cluster)] {
            if !shown(text) {
                return Err(ProtocolError::OddNode { field, limit: MAX_ID });
            }
        }
        let user_agent_version = match node.user_agent_version_type {
            Some(core::node::UserAgentVersionType::UserAgentVersion(version)) => version,
            Some(core::node::UserAgentVersionType::UserAgentBuildVersion(build)) => build
                .version
                .map(|v| format!("{}.{}.{}", v.major_number, v.minor_number, v.patch))
                .unwrap_or_default(),
            None => String::new(),
        };
        let locality = node.locality.unwrap_or_default();
        Ok(Self {
            id: node.id,
            cluster: node.cluster,
            user_agent_name: node.user_agent_name,
            user_agent_version,
            locality: Locality { region: locality.region, zone: locality.zone, sub_zone: locality.sub_zone },
            metadata: node.metadata.map(object).unwrap_or_default(),
            client_features: node.client_features,
            peer,
            collections: false,
            only: None,
        })
    }

    /// Name and version of the client, for people, e.g. `envoy 1.40.0`.
    pub fn user_agent(&self) -> String {
        format!("{} {}", self.user_agent_name, self.user_agent_version).trim().to_owned()
    }
}

fn object(message: protobuf::Struct) -> Map<String, Value> {
    message.fields.into_iter().map(|(name, value)| (name, json(value))).collect()
}

/// Depth is bounded by prost, which decodes at most 100 levels.
fn json(value: protobuf::Value) -> Value {
    match value.kind {
        None | Some(Kind::NullValue(_)) => Value::Null,
        Some(Kind::NumberValue(number)) => Value::from(number),
        Some(Kind::StringValue(text)) => Value::String(text),
        Some(Kind::BoolValue(value)) => Value::Bool(value),
        Some(Kind::StructValue(fields)) => Value::Object(object(fields)),
        Some(Kind::ListValue(list)) => list.values.into_iter().map(json).collect(),
    }
}

/// How a kind of client wants to be treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamPolicy {
    /// An empty first request for listeners or clusters means all of them (rules W3, W10).
    pub legacy_wildcard: bool,
    /// A changed cluster waits for its endpoints, changed or not (rules O4, O6, O12).
    pub repush_endpoints: bool,
    /// The ACK of clusters says that they are warmed (rule O7).
    pub warms_clusters: bool,
    /// The version that a reconnecting SotW client states holds for every name that it asks for (rule S9).
    pub keeps_named: bool,
}

impl StreamPolicy {
    /// For Envoy.
    pub const ENVOY: Self =
        Self { legacy_wildcard: true, repush_endpoints: true, warms_clusters: true, keeps_named: true };
    /// For proxyless gRPC clients.
    pub const GRPC: Self =
        Self { legacy_wildcard: false, repush_endpoints: false, warms_clusters: false, keeps_named: false };
    /// For clients that are not known: what the protocol says, and nothing taken for granted.
    pub const OTHER: Self =
        Self { legacy_wildcard: true, repush_endpoints: true, warms_clusters: false, keeps_named: false };
}

/// What a stream that was let in is served.
#[derive(Debug, Clone)]
pub struct Admitted {
    /// Everything that it may be sent. While nothing is known, answers wait (rule K4).
    pub feed: Feed,
    /// How it is treated.
    pub policy: StreamPolicy,
}

/// Why a stream was not let in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The status.
    pub code: Code,
    /// What was wrong and what to do, for the client's operator.
    pub message: String,
}

/// Decides who is served, and what. Called once per stream; must return at once.
pub trait Admit: fmt::Debug + Send + Sync + 'static {
    /// The resources for this node.
    ///
    /// # Errors
    /// A refusal ends the stream.
    fn admit(&self, node: &Node) -> Result<Admitted, Refusal>;
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::google::protobuf::{ListValue, Struct, value::Kind};

    use super::*;

    fn value(kind: Kind) -> protobuf::Value {
        protobuf::Value { kind: Some(kind) }
    }

    #[test]
    fn g10_a_node_is_taken_over_with_its_metadata_as_json() {
        let list = ListValue { values: vec![value(Kind::BoolValue(true)), value(Kind::NullValue(0))] };
        let fields = [
            ("disco.service".to_owned(), value(Kind::StringValue("greeter".into()))),
            ("disco.outbound_port".to_owned(), value(Kind::NumberValue(10_000.0))),
            ("list".to_owned(), value(Kind::ListValue(list))),
        ];
        let message = core::Node {
            id: "n".into(),
            user_agent_name: "envoy".into(),
            user_agent_version_type: Some(core::node::UserAgentVersionType::UserAgentVersion("1.2".into())),
            metadata: Some(Struct { fields: fields.into() }),
            locality: Some(core::Locality { zone: "z".into(), ..Default::default() }),
            ..Default::default()
        };
        let node = Node::of(Some(message), None, &Config::default()).unwrap();
        assert_eq!((node.user_agent().as_str(), node.locality.zone.as_str()), ("envoy 1.2", "z"));
        let want = serde_json::json!({
            "disco.service": "greeter", "disco.outbound_port": 10_000.0, "list": [true, null]
        });
        assert_eq!(Value::Object(node.metadata), want);
    }

    #[test]
    fn g6_a_node_without_id_or_with_an_odd_one_is_refused() {
        let of = |id: &str| {
            let node = core::Node { id: id.into(), ..Default::default() };
            Node::of(Some(node), None, &Config::default()).map(|node| node.id)
        };
        assert_eq!(Node::of(None, None, &Config::default()), Err(ProtocolError::NoNode));
        assert_eq!(of(""), Err(ProtocolError::NoNode));
        assert_eq!(of("a\u{7}"), Err(ProtocolError::OddNode { field: "id", limit: MAX_ID }));
        assert_eq!(of(&"x".repeat(2000)), Err(ProtocolError::OddNode { field: "id", limit: MAX_ID }));
        assert!(matches!(of(&"x".repeat(2 << 20)), Err(ProtocolError::LargeNode { .. })));
        assert_eq!(of("sidecar~10.0.0.1~a.b"), Ok("sidecar~10.0.0.1~a.b".into()));
    }
}
