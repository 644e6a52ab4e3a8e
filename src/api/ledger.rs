//! The delivery ledger over HTTP/JSON: who has a change, what a proxy holds, and who sees an instance.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use axum::{
    Json,
    extract::{RawQuery, State},
    response::IntoResponse as _,
};
use envoy_types::pb::{
    envoy::config::{
        core::v3::{HealthStatus, address::Address, socket_address::PortSpecifier},
        endpoint::v3::{ClusterLoadAssignment, LbEndpoint, lb_endpoint::HostIdentifier},
    },
    google::protobuf::Any,
};
use prost::Message as _;
use serde_json::{Value, json};

use super::{
    Api,
    dto::InstanceDto,
    error::{ApiError, Kind},
    history,
    proxies::streams_of,
    request::{Path, Query, Reply, instance_key, read_wait},
    time::{read_time, timestamp},
};
use crate::{
    catalog::Snapshot,
    model::{Group, Instance, Problems, Revision, ServiceId, State as Health, Verdict, excerpt},
    proto, registry,
    resources::{ClientKind, leds_member},
    xds::{Concern, Delivery, Held, Lack, Progress, ProxyStatus, Resource, ResourceType, Version, Why},
};

/// A change that touched more than this, such as what was read at the start, concerns everybody.
const MANY: usize = 256;

pub(super) async fn revision(
    State(api): State<Api>,
    Path(revision): Path<String>,
    RawQuery(query): RawQuery,
) -> Reply {
    let (service, wait) = Query::of(query.as_deref()).read(|fields, problems| {
        (fields.parse("service", problems, str::parse::<ServiceId>), read_wait(fields, problems))
    })?;
    let Ok(number) = revision.parse() else {
        let mut problems = Problems::default();
        problems.add("revision", format!("{} is not a revision: want a whole number", excerpt(&revision)));
        return Err(problems.into());
    };
    let progress = api.delivered(Revision(number), service.as_ref(), wait).await?;
    let accepted = api.catalog.came(Revision(number));
    Ok(Json(json!({
        "revision": number,
        "complete": progress.complete,
        "acknowledged": progress.acknowledged,
        "pending": progress.pending,
        "accepted_at": accepted.map(timestamp),
        "waiting": progress.lacking.iter().map(|lack| waiting(lack, accepted)).collect::<Vec<_>>(),
    }))
    .into_response())
}

impl Api {
    /// Waits until all proxies that the change concerns have acknowledged it, or those that get the service's endpoints.
    pub(super) async fn delivered(
        &self,
        revision: Revision,
        service: Option<&ServiceId>,
        wait: Duration,
    ) -> Result<Progress, ApiError> {
        let catalog = &self.catalog;
        let snapshot = catalog.latest();
        let newest = snapshot.revision();
        if revision > newest {
            let mut problems = Problems::default();
            problems.add("revision", format!("{revision} has not been accepted yet: the newest is {newest}"));
            return Err(problems.into());
        }
        let concern = match (service, catalog.changes_of(revision)) {
            (Some(service), _) => Concern::Endpoints(eds_names(&snapshot, service, false).collect()),
            (None, Some(touched)) if touched.len() <= MANY => Concern::Change {
                listed: touched.iter().any(|(_, instance)| instance.is_none()),
                services: touched
                    .iter()
                    .flat_map(|(service, instance)| eds_names(&snapshot, service, instance.is_none()))
                    .collect(),
            },
            // What it changed is no longer known, or is nearly everything.
            (None, _) => Concern::All,
        };
        tokio::select! {
            biased;
            progress = self.proxies.wait_acknowledged(revision, &concern, wait) => Ok(progress),
            () = self.tasks.shutdown().wait() => Err(registry::Error::ShuttingDown.into()),
        }
    }
}

/// The EDS names of a service: its own, and those of its groups if it has roles, or may have had some.
fn eds_names<'a>(
    snapshot: &Snapshot,
    id: &'a ServiceId,
    may_have_had: bool,
) -> impl Iterator<Item = Arc<str>> + use<'a> {
    let roles = may_have_had || snapshot.service(id).is_some_and(|service| service.roles.is_some());
    let groups = Group::ALL.into_iter().filter(move |_| roles);
    std::iter::once(id.shared()).chain(groups.map(|group| group.of(id)))
}

fn waiting(lack: &Lack, accepted: Option<std::time::SystemTime>) -> Value {
    let (reason, since, error) = match &lack.why {
        // It cannot have waited for longer than it has been here.
        Why::NotSent => (
            "not sent yet",
            accepted.map_or(lack.connected_at, |accepted| accepted.max(lack.connected_at)),
            "",
        ),
        Why::NotAnswered(since) => ("not answered", *since, ""),
        Why::Rejected(rejection) => ("rejected", rejection.at, rejection.reason.as_str()),
    };
    json!({
        "node_id": lack.node_id,
        "peer": lack.peer.map(|peer| peer.to_string()).unwrap_or_default(),
        "protocol": lack.protocol.as_str(),
        "type": lack.kind.name(),
        "reason": reason,
        "since": timestamp(since),
        "error": error,
    })
}

pub(super) async fn resources(
    State(api): State<Api>,
    Path(node): Path<String>,
    RawQuery(query): RawQuery,
) -> Reply {
    let (only, body) = Query::of(query.as_deref()).read(|fields, problems| {
        let only = fields.parse("type", problems, parse_kind);
        (only, fields.parse("body", problems, str::parse::<bool>).unwrap_or_default())
    })?;
    let streams = streams_of(&api, &node)?;
    let shown = move || {
        let streams: Vec<Value> = streams.iter().map(|status| stream(status, only, body)).collect();
        Json(json!({"node_id": node, "streams": streams})).into_response()
    };
    aside(shown).await
}

/// Runs what may take long where no stream waits for it.
pub(super) async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| ApiError::new(Kind::Internal, format!("this request met a bug in Disco: {error}")))
}

fn stream(status: &ProxyStatus, only: Option<ResourceType>, body: bool) -> Value {
    let kinds = ResourceType::ALL.into_iter().filter(|kind| only.is_none_or(|only| only == *kind));
    let held = kinds.flat_map(|kind| status.holds(kind));
    json!({
        "peer": status.peer().map(|peer| peer.to_string()).unwrap_or_default(),
        "protocol": status.protocol.as_str(),
        "revision": status.set.as_ref().map(|set| set.revision().0),
        "resources": held.map(|held| resource(status, &held, body)).collect::<Vec<_>>(),
    })
}

fn parse_kind(text: &str) -> Result<ResourceType, String> {
    let found = ResourceType::ALL.into_iter().find(|of| of.name() == text);
    found.ok_or_else(|| {
        let names = ResourceType::ALL.map(ResourceType::name).join(", ");
        format!("{} is no type: want one of {names}", excerpt(text))
    })
}

fn resource(status: &ProxyStatus, held: &Held, body: bool) -> Value {
    let state = match held.delivery {
        Delivery::Acknowledged => "acknowledged",
        Delivery::Sent => "sent",
        Delivery::Pending => "pending",
        Delivery::Rejected => "rejected",
        Delivery::Absent => "absent",
    };
    let error = match held.delivery {
        Delivery::Rejected => {
            let of = status.types.iter().find(|of| of.kind == held.kind);
            of.map(|of| of.last_error()).unwrap_or_default()
        }
        _ => "",
    };
    let mut shown = json!({
        "type": held.kind.name(),
        "name": held.name,
        "version": held.resource.as_ref().map(|resource| resource.version.to_string()).unwrap_or_default(),
        "revision": held.changed.0,
        "state": state,
        "removed": held.removed,
        "earlier": held.earlier,
        "error": error,
    });
    if let (true, Value::Object(fields), Some(resource)) = (body, &mut shown, &held.resource) {
        let content = any(resource).and_then(|any| proto::message_json(&any.type_url, &any.value));
        fields.insert("body".into(), content.unwrap_or_default());
    }
    shown
}

/// The resource as it is on the wire.
pub(super) fn any(resource: &Resource) -> Option<Any> {
    Any::decode(resource.any()).ok()
}

pub(super) async fn explain(
    State(api): State<Api>,
    Path((service, id)): Path<(String, String)>,
    RawQuery(query): RawQuery,
) -> Reply {
    let key = instance_key(&service, &id)?;
    let at = Query::of(query.as_deref()).read(|fields, problems| fields.parse("at", problems, read_time))?;
    if let Some(at) = at {
        return history::at(&api, &key, at).await;
    }
    let snapshot = api.catalog.latest();
    let names: Vec<_> = eds_names(&snapshot, &key.service, false).collect();
    let instance = snapshot.instance(&key).ok_or(registry::Error::NotFound(key))?;
    let proxies = api.proxies.list();
    // Of the same endpoints the same is true.
    let mut known: HashMap<Version, Option<HealthStatus>> = HashMap::new();
    let mut sight = |status| {
        let mut own = None;
        // It may be told of the instance under several names, or of some of them only.
        for name in &names {
            let sight = Sight::of(status, instance, name, |resource| {
                *known.entry(resource.version).or_insert_with(|| health_of(resource, instance))
            });
            if sight.sees {
                return sight;
            }
            own.get_or_insert(sight);
        }
        own.unwrap_or_default()
    };
    let sights: Vec<(&ProxyStatus, Sight)> = proxies.iter().map(|status| (status, sight(status))).collect();

    // Streams of one view share its set.
    let mut views: BTreeMap<usize, (ClientKind, usize, usize)> = BTreeMap::new();
    for (status, sight) in &sights {
        let set = status.set.as_ref().map_or(0, |set| Arc::as_ptr(set).addr());
        let client = ClientKind::of(&status.node.user_agent_name);
        let (_, all, see) = views.entry(set).or_insert((client, 0, 0));
        *all += 1;
        *see += usize::from(sight.sees);
    }
    let views = views.into_values().map(|(client, proxies, see)| {
        let client = match client {
            ClientKind::Envoy => "envoy",
            ClientKind::Grpc => "grpc",
        };
        json!({"client": client, "proxies": proxies, "see": see})
    });
    let proxies = sights.iter().map(|(status, sight)| {
        json!({
            "node_id": status.node.id,
            "peer": status.peer().map(|peer| peer.to_string()).unwrap_or_default(),
            "protocol": status.protocol.as_str(),
            "sees": sight.sees,
            "why": sight.why,
        })
    });
    Ok(Json(json!({
        "revision": snapshot.revision().0,
        "instance": InstanceDto::of(instance, &snapshot),
        "abandoned": api.registry.as_ref().is_some_and(|registry| registry.is_abandoned(instance)),
        "views": views.collect::<Vec<_>>(),
        "proxies": proxies.collect::<Vec<_>>(),
    }))
    .into_response())
}

/// Whether a proxy knows an instance.
#[derive(Default)]
struct Sight {
    sees: bool,
    why: String,
}

impl Sight {
    fn of(
        status: &ProxyStatus,
        instance: &Instance,
        service: &str,
        mut health_of: impl FnMut(&Resource) -> Option<HealthStatus>,
    ) -> Self {
        let no = |why: String| Self { sees: false, why };
        let endpoints = status.types.iter().find(|of| of.kind == ResourceType::Endpoints);
        let Some(of) = endpoints.filter(|of| of.subscription.covers(service)) else {
            return no(format!("it has not asked for the endpoints of {service}"));
        };
        let Some(set) = &status.set else { return no("what it is to be sent is not known yet".to_owned()) };
        let globs = set.get(ResourceType::Endpoints, service).map(|entry| Arc::clone(&entry.resource.needs));
        let members = globs.iter().flat_map(|globs| globs.iter());
        let member = members
            .map(|glob| leds_member(glob, &instance.key.id))
            .find(|name| set.get(ResourceType::LbEndpoint, name).is_some());
        // One by one, or all together.
        let (kind, name) = match &member {
            Some(member) => (ResourceType::LbEndpoint, member.as_str()),
            None => (ResourceType::Endpoints, service),
        };
        let Some(health) = set.get(kind, name).and_then(|entry| health_of(&entry.resource)) else {
            return no(match (instance.state, instance.health.verdict) {
                _ if !instance.is_published() => {
                    "it has not passed its check yet: proxies are told of it once it does".to_owned()
                }
                _ if instance.damped.is_some() => {
                    "it is damped, because it comes and goes: proxies are told of it once it has lasted"
                        .to_owned()
                }
                (Health::Draining, _) => "it drains: clients of this kind are told no more of it".to_owned(),
                (_, Verdict::Unhealthy) => {
                    "its checks fail: clients of this kind are told no more of it".to_owned()
                }
                (_, Verdict::Degraded) => {
                    "it is degraded: clients of this kind are told of it when no healthy one is left"
                        .to_owned()
                }
                _ => "what it is sent leaves this instance out".to_owned(),
            });
        };
        let of = status.types.iter().find(|of| of.kind == kind).unwrap_or(of);
        match status.holding(kind, name).map(|held| held.delivery) {
            Some(Delivery::Acknowledged) => {}
            Some(Delivery::Sent) => return no("it has not answered what was sent".to_owned()),
            Some(Delivery::Rejected) => return no(format!("it rejected what was sent: {}", of.last_error())),
            Some(Delivery::Pending | Delivery::Absent) | None => {
                return no("it is still to be sent".to_owned());
            }
        }
        let why = match (health, instance.state) {
            (HealthStatus::Draining, _) | (_, Health::Draining) => "without new calls: it drains",
            (HealthStatus::Unhealthy | HealthStatus::Timeout, _) => "without new calls: its checks fail",
            (HealthStatus::Degraded, _) => "for when no healthy one is left: it is degraded",
            _ if instance.health.verdict == Verdict::Unhealthy => {
                "as a last resort: its checks fail, and so do those of all others"
            }
            _ => "",
        };
        let part = (service != instance.key.service.as_str()).then(|| format!("as {service}"));
        let why = [part.as_deref().unwrap_or_default(), why];
        let why: Vec<_> = why.into_iter().filter(|why| !why.is_empty()).collect();
        Self { sees: true, why: why.join(", ") }
    }
}

/// The health of the instance in what proxies are sent; `None` if it is not there.
fn health_of(resource: &Resource, instance: &Instance) -> Option<HealthStatus> {
    let body = resource.body();
    let all = match resource.kind {
        ResourceType::LbEndpoint => vec![LbEndpoint::decode(body).ok()?],
        _ => {
            let sent = ClusterLoadAssignment::decode(body).ok()?;
            sent.endpoints.into_iter().flat_map(|locality| locality.lb_endpoints).collect()
        }
    };
    let mut all = all.iter();
    let found = all.find(|it| {
        let Some(HostIdentifier::Endpoint(endpoint)) = &it.host_identifier else { return false };
        match endpoint.address.as_ref().and_then(|address| address.address.as_ref()) {
            Some(Address::SocketAddress(socket)) => {
                socket.address == instance.address.to_string()
                    && socket.port_specifier == Some(PortSpecifier::PortValue(instance.port.get().into()))
            }
            _ => false,
        }
    })?;
    Some(HealthStatus::try_from(found.health_status).unwrap_or(HealthStatus::Unknown))
}
