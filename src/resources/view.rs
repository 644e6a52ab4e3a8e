use serde_json::Value;

use crate::{model::excerpt, xds::Node};

/// Where a sidecar listens for its service's calls, unless its node metadata says otherwise.
pub const DEFAULT_OUTBOUND_PORT: u16 = 10_000;

/// What of a proxy changes its resources. Streams of equal views share one resource set.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct View {
    /// Which rendering it understands.
    pub kind: ClientKind,
    /// The loopback port of its outbound listener; [`DEFAULT_OUTBOUND_PORT`] for clients that have no such listener.
    pub outbound_port: u16,
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

impl View {
    /// A sidecar that listens on this loopback port.
    pub fn envoy(outbound_port: u16) -> Self {
        Self { kind: ClientKind::Envoy, outbound_port }
    }

    /// A proxyless gRPC client.
    pub fn grpc() -> Self {
        Self { kind: ClientKind::Grpc, outbound_port: DEFAULT_OUTBOUND_PORT }
    }

    /// The view of a node, by its user agent and the metadata keys `disco.client` and `disco.outbound_port`, each absent or
    /// usable.
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
        if kind == ClientKind::Grpc {
            return Ok(Self::grpc());
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
        Ok(Self::envoy(outbound_port))
    }
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
    fn unusable_metadata_is_named() {
        for (key, value, want) in [
            ("disco.outbound_port", json!(70_000.0), "\"70000\" is no port"),
            ("disco.outbound_port", json!(80.5), "\"80.5\" is no port"),
            ("disco.outbound_port", json!(0.0), "\"0\" is no port"),
            ("disco.outbound_port", json!("http"), "\"http\" is no port"),
            ("disco.outbound_port", Value::Null, "\"null\" is no port"),
            ("disco.client", json!("Envoy\n"), "\"Envoy\\n\" is no client kind"),
        ] {
            let message = View::of(&node("envoy", &[(key, value)])).unwrap_err().to_string();
            assert!(message.starts_with(&format!("node metadata {key}: {want}")), "{message}");
        }
    }
}
