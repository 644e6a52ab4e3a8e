use std::sync::OnceLock;

use prost_reflect::{
    DescriptorPool, DynamicMessage, FieldDescriptor, Kind, MapKey, ReflectMessage as _, Value,
};
use serde_json::{Map, Value as Json, json};

use super::ENVOY_DESCRIPTORS;

/// Messages within messages that are shown; prost refuses to decode more anyway.
const DEPTH: usize = 100;

/// A message as the JSON of protobuf, with the names of the fields as in their definition and only those that are set. An
/// `Any` within is shown as what it holds, with its type as `@type`. `None` if the type is none of Envoy's or the bytes
/// are no such message.
pub fn message_json(type_url: &str, bytes: &[u8]) -> Option<Json> {
    decode(type_url, bytes).map(|message| fields(&message, DEPTH))
}

fn decode(type_url: &str, bytes: &[u8]) -> Option<DynamicMessage> {
    static POOL: OnceLock<DescriptorPool> = OnceLock::new();
    // Empty if the build found no descriptors.
    let pool = POOL.get_or_init(|| DescriptorPool::decode(ENVOY_DESCRIPTORS).unwrap_or_default());
    let name = type_url.rsplit('/').next()?;
    DynamicMessage::decode(pool.get_message_by_name(name)?, bytes).ok()
}

fn message(message: &DynamicMessage, depth: usize) -> Json {
    let Some(depth) = depth.checked_sub(1) else { return json!("…") };
    let descriptor = message.descriptor();
    let field = |name: &str| message.get_field_by_name(name).map(|value| value.into_owned());
    let well_known = match descriptor.full_name() {
        "google.protobuf.Any" => any(message, depth),
        "google.protobuf.Duration" => seconds(message),
        "google.protobuf.Timestamp" => timestamp(message),
        "google.protobuf.Struct" => field("fields").map(|fields| plain(&fields, depth)),
        "google.protobuf.ListValue" => field("values").map(|values| plain(&values, depth)),
        "google.protobuf.Value" => {
            let set = message.fields().next();
            Some(set.map_or(Json::Null, |(of, value)| one(&of, value, depth)))
        }
        name if name.starts_with("google.protobuf.") && name.ends_with("Value") => {
            field("value").map(|value| plain(&value, depth))
        }
        _ => None,
    };
    well_known.unwrap_or_else(|| fields(message, depth))
}

/// The fields that are set, by name.
fn fields(message: &DynamicMessage, depth: usize) -> Json {
    let set = message.fields().map(|(field, value)| (field.name().to_owned(), one(&field, value, depth)));
    Json::Object(set.collect())
}

/// The value of a field.
fn one(field: &FieldDescriptor, value: &Value, depth: usize) -> Json {
    match (value, field.kind()) {
        (Value::List(values), _) => values.iter().map(|value| scalar(&field.kind(), value, depth)).collect(),
        (Value::Map(entries), Kind::Message(entry)) => {
            let kind = entry.map_entry_value_field().kind();
            let entries = entries.iter().map(|(key, value)| (text(key), scalar(&kind, value, depth)));
            Json::Object(entries.collect())
        }
        (value, kind) => scalar(&kind, value, depth),
    }
}

fn scalar(kind: &Kind, value: &Value, depth: usize) -> Json {
    match (kind, value) {
        (Kind::Enum(names), Value::EnumNumber(number)) => names
            .get_value(*number)
            .map_or_else(|| json!(number), |value| Json::String(value.name().to_owned())),
        (_, value) => plain(value, depth),
    }
}

/// A value by itself.
fn plain(value: &Value, depth: usize) -> Json {
    match value {
        Value::Bool(value) => json!(value),
        Value::I32(value) | Value::EnumNumber(value) => json!(value),
        Value::I64(value) => json!(value),
        Value::U32(value) => json!(value),
        Value::U64(value) => json!(value),
        // 0.1, not the 0.10000000149 that it is as a wider number.
        Value::F32(value) => value.to_string().parse::<f64>().map_or(Json::Null, Json::from),
        Value::F64(value) => json!(value),
        Value::String(value) => json!(value),
        Value::Bytes(value) => bytes(value),
        Value::Message(value) => message(value, depth),
        Value::List(values) => values.iter().map(|value| plain(value, depth)).collect(),
        Value::Map(entries) => {
            let entries: Map<_, _> =
                entries.iter().map(|(key, value)| (text(key), plain(value, depth))).collect();
            Json::Object(entries)
        }
    }
}

fn text(key: &MapKey) -> String {
    match key {
        MapKey::Bool(key) => key.to_string(),
        MapKey::I32(key) => key.to_string(),
        MapKey::I64(key) => key.to_string(),
        MapKey::U32(key) => key.to_string(),
        MapKey::U64(key) => key.to_string(),
        MapKey::String(key) => key.clone(),
    }
}

/// Text if they are that, otherwise hexadecimal.
fn bytes(value: &[u8]) -> Json {
    match std::str::from_utf8(value) {
        Ok(text) => json!(text),
        Err(_) => json!({"hex": value.iter().map(|byte| format!("{byte:02x}")).collect::<String>()}),
    }
}

fn any(message: &DynamicMessage, depth: usize) -> Option<Json> {
    let type_url = message.get_field_by_name("type_url")?.as_str()?.to_owned();
    let value = message.get_field_by_name("value")?.as_bytes()?.clone();
    let mut shown = Map::new();
    shown.insert("@type".to_owned(), json!(type_url));
    match decode(&type_url, &value).map(|inner| self::message(&inner, depth)) {
        Some(Json::Object(fields)) => shown.extend(fields),
        Some(other) => {
            shown.insert("value".to_owned(), other);
        }
        None => {
            shown.insert("value".to_owned(), bytes(&value));
        }
    }
    Some(Json::Object(shown))
}

/// E.g. `1.5s`.
fn seconds(message: &DynamicMessage) -> Option<Json> {
    let seconds = message.get_field_by_name("seconds")?.as_i64()?;
    let nanos = message.get_field_by_name("nanos")?.as_i32()?;
    let sign = if seconds < 0 || nanos < 0 { "-" } else { "" };
    let fraction = format!("{:09}", nanos.unsigned_abs());
    let fraction = fraction.trim_end_matches('0');
    let point = if fraction.is_empty() { "" } else { "." };
    Some(json!(format!("{sign}{}{point}{fraction}s", seconds.unsigned_abs())))
}

/// RFC 3339.
fn timestamp(message: &DynamicMessage) -> Option<Json> {
    let seconds = message.get_field_by_name("seconds")?.as_i64()?;
    let nanos = message.get_field_by_name("nanos")?.as_i32()?;
    jiff::Timestamp::new(seconds, nanos).ok().map(|at| json!(at.to_string()))
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::{
        envoy::{
            config::{
                cluster::v3::{Cluster, cluster::ClusterDiscoveryType},
                core::v3::{Metadata, TypedExtensionConfig},
            },
            extensions::filters::http::router::v3::Router,
        },
        google::protobuf::{Any, BoolValue, Duration, Struct, UInt32Value, Value, value::Kind},
    };
    use prost::{Message as _, Name};

    use super::*;

    fn any<M: Name>(message: &M) -> Any {
        Any { type_url: M::type_url(), value: message.encode_to_vec() }
    }

    #[test]
    fn a_cluster_is_shown_as_it_would_be_written() {
        let inner = Router { suppress_envoy_headers: true, ..Router::default() };
        let number = |number| Value { kind: Some(Kind::NumberValue(number)) };
        let metadata =
            Struct { fields: [("b".to_owned(), number(2.0)), ("a".to_owned(), number(1.5))].into() };
        let cluster = Cluster {
            name: "greeter".into(),
            cluster_discovery_type: Some(ClusterDiscoveryType::Type(3)),
            connect_timeout: Some(Duration { seconds: 1, nanos: 500_000_000 }),
            per_connection_buffer_limit_bytes: Some(UInt32Value { value: 7 }),
            ignore_health_on_host_removal: true,
            metadata: Some(Metadata {
                filter_metadata: [("disco".to_owned(), metadata)].into(),
                ..Metadata::default()
            }),
            typed_extension_protocol_options: [
                ("known".to_owned(), any(&inner)),
                ("wrapped".to_owned(), any(&BoolValue { value: true })),
                ("unknown".to_owned(), Any { type_url: "x/none.such".into(), value: vec![255] }),
            ]
            .into(),
            upstream_config: Some(TypedExtensionConfig { name: "u".into(), typed_config: None }),
            ..Cluster::default()
        };
        let shown = message_json(&Cluster::type_url(), &cluster.encode_to_vec()).unwrap();
        let want = json!({
            "name": "greeter",
            "type": "EDS",
            "connect_timeout": "1.5s",
            "per_connection_buffer_limit_bytes": 7,
            "ignore_health_on_host_removal": true,
            "metadata": {"filter_metadata": {"disco": {"a": 1.5, "b": 2.0}}},
            "typed_extension_protocol_options": {
                "known": {"@type": Router::type_url(), "suppress_envoy_headers": true},
                "unknown": {"@type": "x/none.such", "value": {"hex": "ff"}},
                "wrapped": {"@type": BoolValue::type_url(), "value": true},
            },
            "upstream_config": {"name": "u"},
        });
        assert_eq!(shown, want);
    }

    #[test]
    fn what_is_unknown_or_broken_is_not_shown() {
        assert_eq!(message_json("type.googleapis.com/none.such", b""), None);
        assert_eq!(message_json(&Cluster::type_url(), &[255]), None);
    }
}
