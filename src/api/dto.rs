//! The JSON forms of the API.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{
    health::{CheckDto, HealthDto, read_check},
    time::timestamp,
};
use crate::{
    catalog::{Reader, Service, Snapshot},
    model::{
        Fields, Group, Instance, Lease, Limits, Node, Problems, RawRegistration, Registration, Role, Roles,
        State, Update, Value, Verdict, format_duration, parse_duration,
    },
    registry::Member,
};

#[derive(Debug, Serialize)]
pub(super) struct InstanceDto {
    service: String,
    id: String,
    incarnation: u64,
    address: String,
    port: u16,
    locality: LocalityDto,
    weight: u32,
    metadata: BTreeMap<String, String>,
    state: &'static str,
    /// What it does, where the instances of its service have roles.
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    check: Option<CheckDto>,
    health: HealthDto,
    lease: LeaseDto,
    revision: u64,
    /// The Disco process that counts its lease.
    #[serde(skip_serializing_if = "Option::is_none")]
    owner: Option<String>,
    registered_at: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    stale: Option<StaleDto>,
    #[serde(skip_serializing_if = "Option::is_none")]
    damped: Option<DampedDto>,
}

/// Until when proxies are not told of an instance that comes and goes.
#[derive(Debug, Serialize)]
struct DampedDto {
    until: String,
    reason: String,
}

#[derive(Debug, Serialize)]
pub(super) struct LocalityDto {
    region: String,
    zone: String,
    sub_zone: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum LeaseDto {
    Ttl(String),
    Session(bool),
}

impl From<Lease> for LeaseDto {
    fn from(lease: Lease) -> Self {
        match lease {
            Lease::Ttl(ttl) => Self::Ttl(format_duration(ttl)),
            Lease::Session => Self::Session(true),
        }
    }
}

impl From<&Instance> for InstanceDto {
    fn from(instance: &Instance) -> Self {
        let Instance {
            key,
            incarnation,
            address,
            port,
            locality,
            weight,
            metadata,
            state,
            check,
            health,
            lease,
            revision,
            owner,
            registered_at,
            stale,
            damped,
        } = instance;
        Self {
            service: key.service.to_string(),
            id: key.id.to_string(),
            incarnation: incarnation.0,
            address: address.to_string(),
            port: port.get(),
            locality: LocalityDto {
                region: locality.region.to_string(),
                zone: locality.zone.to_string(),
                sub_zone: locality.sub_zone.to_string(),
            },
            weight: weight.get(),
            metadata: metadata.clone(),
            state: match state {
                State::Serving => "serving",
                State::Draining => "draining",
            },
            role: None,
            check: check.as_deref().map(CheckDto::from),
            health: health.into(),
            lease: (*lease).into(),
            revision: revision.0,
            owner: owner.as_ref().map(ToString::to_string),
            registered_at: timestamp(*registered_at),
            stale: stale
                .as_ref()
                .map(|stale| StaleDto { since: timestamp(stale.since), reason: stale.reason.clone() }),
            damped: damped
                .as_ref()
                .map(|damped| DampedDto { until: timestamp(damped.until), reason: damped.reason.clone() }),
        }
    }
}

impl InstanceDto {
    /// As it is now, with its role.
    pub(super) fn of(instance: &Instance, catalog: &Snapshot) -> Self {
        let role = catalog.service(&instance.key.service).and_then(|service| service.role(&instance.key.id));
        Self { role: role.map(Role::as_str), ..instance.into() }
    }
}

/// The roles of a service's instances, as far as these tell it.
#[derive(Debug, Serialize)]
pub(super) struct RolesDto {
    term: u64,
    /// The id of an instance, registered or not; `null` while there is none.
    leader: Option<String>,
    /// What the groups are called by, as far as no other service has the name.
    names: Vec<String>,
}

impl RolesDto {
    /// `None` for a service whose instances have no roles.
    pub(super) fn of(service: &Service, catalog: &Snapshot) -> Option<Self> {
        let Roles { term, leader, .. } = service.roles.as_deref()?;
        let names = Group::ALL.into_iter().map(|group| group.of(&service.id));
        let taken = |name: &str| name.parse().is_ok_and(|id| catalog.service(&id).is_some());
        let names = names.filter(|name| !taken(name)).map(|name| name.to_string());
        Some(Self { term: *term, leader: leader.as_ref().map(ToString::to_string), names: names.collect() })
    }
}

/// Since when nobody vouches for what is answered, the whole catalog or an instance of it.
#[derive(Debug, Serialize)]
pub(super) struct StaleDto {
    since: String,
    reason: String,
}

impl StaleDto {
    /// `None`, which is `null`, when it is the truth.
    pub(super) fn of(catalog: &Reader) -> Option<Self> {
        catalog.stale().map(|stale| Self { since: timestamp(stale.since), reason: stale.reason.to_string() })
    }
}

/// A process that shares the store.
pub(super) fn node(member: &Member) -> serde_json::Value {
    let Member { id, roles, grpc, http, started_at } = member;
    serde_json::json!({
        "node": id.as_str(),
        "roles": roles,
        "grpc": grpc,
        "http": http,
        "started_at": timestamp(*started_at),
    })
}

#[derive(Debug, Serialize)]
pub(super) struct ServiceDto {
    name: String,
    serving: usize,
    draining: usize,
    unhealthy: usize,
    /// Those of them that are stale.
    held: usize,
    revision: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    roles: Option<RolesDto>,
}

impl ServiceDto {
    pub(super) fn of(service: &Service, catalog: &Snapshot) -> Self {
        let Counts { serving, draining, unhealthy } = count(service);
        Self {
            name: service.id.to_string(),
            serving,
            draining,
            unhealthy,
            held: service.stale(),
            revision: service.revision.0,
            roles: RolesDto::of(service, catalog),
        }
    }
}

/// Instances of a service, each counted once.
pub(super) struct Counts {
    /// Take calls, or will by their first check.
    pub(super) serving: usize,
    pub(super) draining: usize,
    /// Would serve, but their checks fail.
    pub(super) unhealthy: usize,
}

pub(super) fn count(service: &Service) -> Counts {
    let of = |draining: bool, unhealthy: bool| {
        let is = |instance: &Instance| {
            (instance.state == State::Draining) == draining
                && (instance.health.verdict == Verdict::Unhealthy) == unhealthy
        };
        service.instances().filter(|instance| is(instance)).count()
    };
    Counts {
        serving: of(false, false),
        draining: of(true, false) + of(true, true),
        unhealthy: of(false, true),
    }
}

/// A JSON text as a tree. Duplicate keys are refused: which of them was meant is a guess.
pub(super) fn parse_json(body: &[u8]) -> Result<Node, Problems> {
    if body.is_empty() {
        return Ok(Node { value: Value::Map(Vec::new()), at: None });
    }
    serde_json::from_slice::<JsonNode>(body).map(|node| node.0).map_err(|error| {
        let mut problems = Problems::default();
        problems.add("", format!("the body is not JSON: {error}"));
        problems
    })
}

struct JsonNode(Node);

impl<'de> serde::Deserialize<'de> for JsonNode {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NodeVisitor).map(|value| Self(Node { value, at: None }))
    }
}

struct NodeVisitor;

impl<'de> serde::de::Visitor<'de> for NodeVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Int(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Int(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Text(value.to_owned()))
    }

    fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(JsonNode(item)) = seq.next_element()? {
            items.push(item);
        }
        Ok(Value::List(items))
    }

    fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut entries: Vec<(String, Node)> = Vec::new();
        let mut seen = std::collections::HashSet::new();
        while let Some((key, JsonNode(value))) = map.next_entry::<String, JsonNode>()? {
            if !seen.insert(key.clone()) {
                return Err(serde::de::Error::custom(format!(
                    "the key {} is there twice",
                    crate::model::excerpt(&key)
                )));
            }
            entries.push((key, value));
        }
        Ok(Value::Map(entries))
    }
}

/// The body of a PUT.
pub(super) fn read_registration(
    service: String,
    id: String,
    body: &[u8],
    limits: &Limits,
) -> Result<Registration, Problems> {
    let node = parse_json(body)?;
    let mut problems = Problems::default();
    let mut fields = Fields::of(&node, "", &mut problems);
    let address = fields.text("address", &mut problems).map(str::to_owned);
    let port = fields.integer("port", 1..=65_535, &mut problems);
    let weight = fields.integer("weight", 1..=limits.weight_max.into(), &mut problems);
    let incarnation = fields.integer("incarnation", 1..=u64::MAX.into(), &mut problems);
    let ttl = fields.parse("ttl", &mut problems, parse_duration);
    let metadata = read_metadata(&mut fields, &mut problems);
    let locality = match fields.fields("locality", &mut problems) {
        Some(mut parts) => {
            let mut part = |name| parts.text(name, &mut problems).unwrap_or_default().to_owned();
            let locality = [part("region"), part("zone"), part("sub_zone")];
            parts.finish(&mut problems);
            locality
        }
        None => Default::default(),
    };
    let check = read_check(&mut fields, &mut problems);
    fields.finish(&mut problems);
    let raw = RawRegistration {
        service,
        id,
        incarnation: incarnation.and_then(|n| u64::try_from(n).ok()),
        new_run: false,
        address,
        port,
        locality,
        weight,
        metadata: metadata.unwrap_or_default(),
        ttl,
        check,
    };
    match Registration::check_into(raw, limits, &mut problems) {
        Some(registration) if problems.is_empty() => Ok(registration),
        _ => Err(problems),
    }
}

/// The body of a PATCH.
pub(super) fn read_update(body: &[u8], limits: &Limits) -> Result<Update, Problems> {
    let node = parse_json(body)?;
    let mut problems = Problems::default();
    let mut fields = Fields::of(&node, "", &mut problems);
    let weight = fields.integer("weight", 1..=limits.weight_max.into(), &mut problems);
    let metadata = read_metadata(&mut fields, &mut problems);
    fields.finish(&mut problems);
    let update = Update::check_into(weight, metadata, limits, &mut problems);
    if problems.is_empty() { Ok(update) } else { Err(problems) }
}

/// `{"live": {…}}`.
pub(super) fn read_live(body: &[u8]) -> Result<BTreeMap<String, String>, Problems> {
    let node = parse_json(body)?;
    let mut problems = Problems::default();
    let mut fields = Fields::of(&node, "", &mut problems);
    let entries = fields.texts("live", &mut problems);
    if entries.is_none() && problems.is_empty() {
        problems.add("live", "is missing: want a map of texts, such as {\"block\": \"17\"}");
    }
    fields.finish(&mut problems);
    let entries = entries.unwrap_or_default().into_iter();
    let entries = entries.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    if problems.is_empty() { Ok(entries) } else { Err(problems) }
}

fn read_metadata(fields: &mut Fields<'_>, problems: &mut Problems) -> Option<BTreeMap<String, String>> {
    let entries = fields.texts("metadata", problems)?;
    Some(entries.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: &str) -> Result<Registration, String> {
        read_registration("greeter".into(), "a".into(), body.as_bytes(), &Limits::default())
            .map_err(|problems| problems.to_string())
    }

    #[test]
    fn bodies_are_read_or_refused_by_field() {
        assert!(read(r#"{"address":"127.0.0.1","port":1,"ttl":"30s","health":"none","weight":2}"#).is_ok());
        for (body, want) in [
            (r#"{"address":"127.0.0.1","port":"x"}"#, "port: is text: want a whole number from 1 to 65535"),
            (
                r#"{"address":"127.0.0.1","port":70000}"#,
                "port: 70000 is out of range: want a whole number from 1 to 65535",
            ),
            (
                r#"{"address":"127.0.0.1","port":1.5}"#,
                "port: is a fraction: want a whole number from 1 to 65535",
            ),
            (
                r#"{"address":"127.0.0.1","port":1,"health":"ping"}"#,
                "health: \"ping\" is not a kind of check: want none, grpc, http, tcp, owner, or {\"kind\": one of these, \"interval\": \"5s\", …}",
            ),
            (
                r#"{"address":"127.0.0.1","port":1,"health":{"kind":"http","path":"x","expect":["2xx"],"intervall":"1s","timeout":"9s"}}"#,
                "health.expect: \"2xx\" is no range of statuses: want e.g. 200 or 200-299; \
                 health.intervall: is not a known field; did you mean `interval`?; \
                 health.path: \"x\" is not a path: want one such as /healthz, at most 1024 bytes; \
                 health.timeout: 9s is out of range: want 10ms to 5s",
            ),
            (r#"{"address":5,"port":1}"#, "address: is a whole number: want text"),
            (
                r#"{"address":"127.0.0.1","port":1,"prot":2}"#,
                "prot: is not a known field; did you mean `port`?",
            ),
            (r#"{"address":"127.0.0.1","port":1,"ttl":"0s"}"#, "ttl: 0s is out of range: want 1s to 1h"),
            (
                r#"{"address":"127.0.0.1","port":1,"ttl":"1y"}"#,
                "ttl: \"1y\" is not a duration: want a number and a unit, such as 30s, 5m or 500ms",
            ),
            (
                r#"{"address":"127.0.0.1","port":1,"ttl":30}"#,
                "ttl: \"30\" is not a duration: want a number and a unit, such as 30s, 5m or 500ms",
            ),
            (
                r#"{"address":"127.0.0.1","port":1,"locality":{"zoone":"z"}}"#,
                "locality.zoone: is not a known field; did you mean `zone`?",
            ),
            (
                r#"{"address":"127.0.0.1","port":1,"metadata":{"a":1}}"#,
                "metadata.a: is a whole number: want text",
            ),
            (
                r#"{"address":"127.0.0.1","port":1,"port":2}"#,
                "the body is not JSON: the key \"port\" is there twice at line 1 column 41",
            ),
            (
                "[]",
                "is a list: want a map of fields; address: is missing: want the IP address that the instance listens on; port: is missing: want a whole number from 1 to 65535",
            ),
        ] {
            assert_eq!(read(body).unwrap_err(), want, "{body}");
        }
        for (body, want) in [
            (
                r#""tcp""#,
                r#"{"kind":"tcp","interval":"5s","timeout":"1s","healthy_threshold":2,"unhealthy_threshold":3,"jitter":10}"#,
            ),
            (r#""owner""#, r#"{"kind":"owner"}"#),
            (
                r#"{"kind":"http","path":"/h","expect":[200,"300-399"],"degraded":[429],"port":9,"interval":"1s","jitter":0}"#,
                r#"{"kind":"http","path":"/h","expect":["200","300-399"],"degraded":["429"],"port":9,"interval":"1s","timeout":"1s","healthy_threshold":2,"unhealthy_threshold":3,"jitter":0}"#,
            ),
        ] {
            let check =
                read(&format!(r#"{{"address":"127.0.0.1","port":1,"health":{body}}}"#)).unwrap().check;
            let shown = |check| serde_json::to_string(&CheckDto::from(check)).unwrap();
            assert_eq!(shown(check.as_ref().unwrap()), want);
            let again =
                read(&format!(r#"{{"address":"127.0.0.1","port":1,"health":{want}}}"#)).unwrap().check;
            assert_eq!(again, check);
        }
        assert!(read("{").unwrap_err().starts_with("the body is not JSON"));
        // Depth is bounded by the parser.
        assert!(read(&"[".repeat(100_000)).unwrap_err().contains("recursion limit"));
    }
}
