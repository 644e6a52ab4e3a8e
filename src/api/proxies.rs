//! The connected proxies and what each has acknowledged, over HTTP/JSON and gRPC.

use std::time::Duration;

use axum::{
    Json,
    extract::{RawQuery, State},
    response::{IntoResponse as _, Response},
};
use serde_json::{Value, json};
use tonic::{Request, Status};

use super::{
    Api, dto,
    error::ApiError,
    http::{Path, Query, Reply, read_wait},
};
use crate::{
    model::{Problems, Revision, ServiceId, excerpt},
    proto::v1::{self, proxies_server},
    xds::{Protocol, ProxyStatus, ResourceType, TypeStatus},
};

/// Longest that a wait for acknowledgements is held.
const WAIT_MAX: Duration = Duration::from_secs(300);

pub(super) async fn list(State(api): State<Api>) -> Response {
    let proxies: Vec<Value> = api.proxies.list().iter().map(proxy).collect();
    Json(json!({"proxies": proxies})).into_response()
}

pub(super) async fn debug(State(api): State<Api>) -> Response {
    let proxies: Vec<Value> = api.proxies.list().iter().map(debug_proxy).collect();
    Json(json!({"proxies": proxies})).into_response()
}

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
    let progress = api.wait_acknowledged(Revision(number), service.as_ref(), wait).await?;
    Ok(Json(json!({
        "revision": number,
        "complete": progress.complete,
        "acknowledged": progress.acknowledged,
        "pending": progress.pending,
    }))
    .into_response())
}

impl Api {
    async fn wait_acknowledged(
        &self,
        revision: Revision,
        service: Option<&ServiceId>,
        wait: Duration,
    ) -> Result<crate::xds::Progress, ApiError> {
        let newest = self.registry.catalog().latest().revision();
        if revision > newest {
            let mut problems = Problems::default();
            problems.add("revision", format!("{revision} has not been accepted yet: the newest is {newest}"));
            return Err(problems.into());
        }
        // The EDS name of a service is its name.
        tokio::select! {
            biased;
            progress = self.proxies.wait_acknowledged(revision, service.map(ServiceId::as_str), wait) => Ok(progress),
            () = self.tasks.shutdown().wait() => Err(crate::registry::Error::ShuttingDown.into()),
        }
    }
}

fn protocol(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Delta => "delta",
        Protocol::Sotw => "sotw",
    }
}

fn kind(kind: ResourceType) -> &'static str {
    match kind {
        ResourceType::Cluster => "cluster",
        ResourceType::Endpoints => "endpoints",
        ResourceType::Listener => "listener",
        ResourceType::Route => "route",
    }
}

fn proxy(status: &ProxyStatus) -> Value {
    json!({
        "node_id": status.node.id,
        "cluster": status.node.cluster,
        "user_agent": status.node.user_agent(),
        "protocol": protocol(status.protocol),
        "peer": status.peer().map(|peer| peer.to_string()).unwrap_or_default(),
        "connected_at": dto::timestamp(status.connected_at),
        "synced": status.synced(),
        "last_error": status.last_error(),
        "types": status.types.iter().map(proxy_type).collect::<Vec<_>>(),
    })
}

fn proxy_type(status: &TypeStatus) -> Value {
    json!({
        "type": kind(status.kind),
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

/// As [`proxy`], with the names asked for and the rejections.
fn debug_proxy(status: &ProxyStatus) -> Value {
    let types = status.types.iter().map(|of| {
        let rejections = of.rejections.iter().map(|rejection| {
            json!({
                "at": dto::timestamp(rejection.at),
                "revision": rejection.revision.0,
                "reason": rejection.reason,
            })
        });
        json!({
            "status": proxy_type(of),
            "names": of.subscription.names().iter().collect::<Vec<_>>(),
            "settled": of.settled.0,
            "unanswered": of.unanswered,
            "rejections": rejections.collect::<Vec<_>>(),
        })
    });
    json!({
        "node_id": status.node.id,
        "user_agent": status.node.user_agent(),
        "protocol": protocol(status.protocol),
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
        let progress = self.0.wait_acknowledged(Revision(revision), service.as_ref(), wait).await?;
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
        protocol: protocol(status.protocol).to_owned(),
        peer: status.peer().map(|peer| peer.to_string()).unwrap_or_default(),
        connected_at: Some(status.connected_at.into()),
        types: types.collect(),
    }
}
