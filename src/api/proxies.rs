//! The connected proxies and what each has acknowledged, over HTTP/JSON and gRPC.

use std::time::Duration;

use axum::{
    Json,
    extract::State,
    response::{IntoResponse as _, Response},
};
use serde_json::{Value, json};
use tonic::{Request, Status};

use super::{
    Api,
    error::{ApiError, Kind},
    request::{Path, Reply, WAIT_MAX},
    time::timestamp,
};
use crate::{
    model::{Problems, Revision, ServiceId, excerpt, nearest},
    proto::v1::{self, proxies_server},
    xds::{ProxyStatus, TypeStatus},
};

pub(super) async fn list(State(api): State<Api>) -> Response {
    let proxies: Vec<Value> = api.proxies.list().iter().map(proxy).collect();
    Json(json!({"proxies": proxies})).into_response()
}

pub(super) async fn debug(State(api): State<Api>) -> Response {
    let proxies: Vec<Value> = api.proxies.list().iter().map(debug_proxy).collect();
    Json(json!({"proxies": proxies})).into_response()
}

pub(super) async fn show(State(api): State<Api>, Path(node): Path<String>) -> Reply {
    let proxies: Vec<Value> = streams_of(&api, &node)?.iter().map(detailed).collect();
    Ok(Json(json!({"proxies": proxies})).into_response())
}

/// The streams of a node id.
pub(super) fn streams_of(api: &Api, node: &str) -> Result<Vec<ProxyStatus>, ApiError> {
    let all = api.proxies.list();
    if !all.iter().any(|proxy| proxy.node.id == node) {
        let hint = match nearest(node, all.iter().map(|proxy| proxy.node.id.as_str())) {
            Some(near) => format!("did you mean {}?", excerpt(near)),
            None => "`disco proxy list` (GET /v1/proxies) shows those that are".to_owned(),
        };
        let message = format!("no proxy with node id {} is connected; {hint}", excerpt(node));
        return Err(ApiError::new(Kind::NotFound, message));
    }
    Ok(all.into_iter().filter(|proxy| proxy.node.id == node).collect())
}

fn proxy(status: &ProxyStatus) -> Value {
    json!({
        "node_id": status.node.id,
        "cluster": status.node.cluster,
        "user_agent": status.node.user_agent(),
        "protocol": status.protocol.as_str(),
        "peer": status.peer().map(|peer| peer.to_string()).unwrap_or_default(),
        "connected_at": timestamp(status.connected_at),
        "synced": status.synced(),
        "last_error": status.last_error(),
        "types": status.types.iter().map(proxy_type).collect::<Vec<_>>(),
    })
}

fn proxy_type(status: &TypeStatus) -> Value {
    json!({
        "type": status.kind.name(),
        "type_url": status.kind.url(),
        "wildcard": status.subscription.is_wildcard(),
        "names": status.subscription.names().len(),
        "sent": status.sent.0,
        "acknowledged": status.acknowledged.0,
        "synced": status.synced,
        "responses": status.responses,
        "rejected": status.rejected,
        "last_error": status.last_error(),
    })
}

/// As [`proxy`], with the rejections and what is on its way.
fn detailed(status: &ProxyStatus) -> Value {
    let types = status.types.iter().map(|of| {
        let mut shown = proxy_type(of);
        if let Value::Object(fields) = &mut shown {
            fields.insert("settled".into(), json!(of.settled.0));
            fields.insert("unanswered".into(), json!(of.unanswered));
            fields.insert("unanswered_since".into(), json!(of.unanswered_since().map(timestamp)));
            fields.insert("rejections".into(), rejections(of));
        }
        shown
    });
    let types: Vec<Value> = types.collect();
    let mut shown = proxy(status);
    if let Value::Object(fields) = &mut shown {
        fields.insert("types".into(), Value::Array(types));
    }
    shown
}

/// The last rejections, oldest first.
fn rejections(status: &TypeStatus) -> Value {
    let each = status.rejections.iter().map(|rejection| {
        json!({
            "at": timestamp(rejection.at),
            "revision": rejection.revision.0,
            "reason": rejection.reason,
        })
    });
    each.collect()
}

/// With the names asked for and all that the client says of itself.
fn debug_proxy(status: &ProxyStatus) -> Value {
    let types = status.types.iter().map(|of| {
        json!({
            "status": proxy_type(of),
            "names": of.subscription.names().iter().collect::<Vec<_>>(),
            "settled": of.settled.0,
            "unanswered": of.unanswered,
            "rejections": rejections(of),
        })
    });
    json!({
        "node_id": status.node.id,
        "user_agent": status.node.user_agent(),
        "protocol": status.protocol.as_str(),
        "metadata": status.node.metadata,
        "client_features": status.node.client_features,
        "types": types.collect::<Vec<_>>(),
    })
}

/// The gRPC service.
#[derive(Debug, Clone)]
pub(super) struct ProxiesService(Api);

impl ProxiesService {
    pub(super) fn new(api: Api) -> Self {
        Self(api)
    }
}

#[tonic::async_trait]
impl proxies_server::Proxies for ProxiesService {
    async fn list(
        &self,
        _: Request<v1::ListProxiesRequest>,
    ) -> Result<tonic::Response<v1::ListProxiesResponse>, Status> {
        let proxies = self.0.proxies.list().iter().map(proxy_message).collect();
        Ok(tonic::Response::new(v1::ListProxiesResponse { proxies }))
    }

    async fn wait_acknowledged(
        &self,
        request: Request<v1::WaitAcknowledgedRequest>,
    ) -> Result<tonic::Response<v1::WaitAcknowledgedResponse>, Status> {
        let v1::WaitAcknowledgedRequest { revision, service, timeout } = request.into_inner();
        let mut problems = Problems::default();
        let service = match service.as_str() {
            "" => None,
            name => problems.take("service", name.parse::<ServiceId>()),
        };
        let wait = match timeout.map(Duration::try_from) {
            None => Duration::ZERO,
            Some(Ok(wait)) if wait <= WAIT_MAX => wait,
            Some(_) => {
                problems.add("timeout", "is out of range: want 0s to 5m");
                Duration::ZERO
            }
        };
        if !problems.is_empty() {
            return Err(ApiError::from(problems).into());
        }
        let progress = self.0.delivered(Revision(revision), service.as_ref(), wait).await?;
        Ok(tonic::Response::new(v1::WaitAcknowledgedResponse {
            revision,
            complete: progress.complete,
            acknowledged: u32::try_from(progress.acknowledged).unwrap_or(u32::MAX),
            pending: progress.pending,
        }))
    }
}

fn proxy_message(status: &ProxyStatus) -> v1::Proxy {
    let types = status.types.iter().map(|of| v1::ProxyType {
        type_url: of.kind.url().to_owned(),
        wildcard: of.subscription.is_wildcard(),
        names: u32::try_from(of.subscription.names().len()).unwrap_or(u32::MAX),
        sent: of.sent.0,
        acknowledged: of.acknowledged.0,
        synced: of.synced,
        responses: of.responses,
        rejected: of.rejected,
        last_error: of.last_error().to_owned(),
    });
    v1::Proxy {
        node_id: status.node.id.clone(),
        cluster: status.node.cluster.clone(),
        user_agent: status.node.user_agent(),
        protocol: status.protocol.as_str().to_owned(),
        peer: status.peer().map(|peer| peer.to_string()).unwrap_or_default(),
        connected_at: Some(status.connected_at.into()),
        types: types.collect(),
    }
}
