//! What instances say of themselves many times a second, to whoever watches their service.

use std::collections::BTreeMap;

use axum::{
    Json,
    extract::{RawQuery, State},
    response::IntoResponse as _,
};
use imbl::ordmap::DiffItem;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::{
    Answers, Api, QUEUE, dto,
    error::ApiError,
    request::{
        Body, Path, Query, Reply, instance_key, read_incarnation, read_poll, service_id, wait_at_most,
    },
    time::timestamp,
};
use crate::{
    catalog::{Live, LiveService, Reader},
    model::{InstanceId, InstanceKey, Problems, ServiceId, check_metadata},
    proto::v1,
    registry::{Registry, live_to_proto},
    rt::Tasks,
};

pub(super) async fn publish(
    State(api): State<Api>,
    Path((service, id)): Path<(String, String)>,
    RawQuery(query): RawQuery,
    Body(body): Body,
) -> Reply {
    let incarnation = Query::of(query.as_deref()).read(read_incarnation)?;
    let registry = api.registry()?;
    let entries = entries(dto::read_live(&body)?, registry)?;
    registry.publish(instance_key(&service, &id)?, incarnation, entries)?;
    Ok(Json(json!({})).into_response())
}

/// `?index=REVISION&wait=30s` waits for news.
pub(super) async fn list(
    State(api): State<Api>,
    Path(service): Path<String>,
    RawQuery(query): RawQuery,
) -> Reply {
    let (index, wait) = read_poll(query.as_deref())?;
    let id = service_id(&service)?;
    known(&api.catalog, &id)?;
    let mut board = api.catalog.live().watch(&id);
    wait_at_most(&api, wait, board.wait_for(|live| live.revision > index)).await;
    let LiveService { revision, instances } = board.borrow().clone();
    let instances: Vec<Value> = instances
        .iter()
        .map(|(id, live)| {
            let Live { incarnation, entries, published_at, revision } = &**live;
            json!({
                "id": id.as_str(),
                "incarnation": incarnation.0,
                "live": entries,
                "published_at": timestamp(*published_at),
                "revision": revision.0,
            })
        })
        .collect();
    Ok(Json(json!({"revision": revision.0, "instances": instances})).into_response())
}

fn known(catalog: &Reader, service: &ServiceId) -> Result<(), ApiError> {
    let snapshot = catalog.latest();
    match snapshot.service(service) {
        Some(_) => Ok(()),
        None => Err(ApiError::no_service(&snapshot, service.clone())),
    }
}

/// `disco.v1.Registry.WatchLive`: everything, then what differs from what was sent last. A slow reader skips what was
/// superseded meanwhile.
pub(super) fn watch(
    registry: &Registry,
    tasks: &Tasks,
    request: Request<v1::WatchLiveRequest>,
) -> Result<Response<Answers<v1::WatchLiveResponse>>, Status> {
    let service = service_id(&request.into_inner().service)?;
    known(registry.catalog(), &service)?;
    let mut board = registry.catalog().live().watch(&service);
    let (answers, stream) = mpsc::channel(QUEUE);
    tasks.spawn_until_shutdown("live-watch", async move {
        let mut sent: Option<LiveService> = None;
        loop {
            let Ok(place) = answers.reserve().await else { return };
            if sent.is_some() {
                tokio::select! {
                    changed = board.changed() => if changed.is_err() { return },
                    () = answers.closed() => return,
                }
            }
            let now = board.borrow_and_update().clone();
            let response = news(&service, sent.as_ref(), &now);
            sent = Some(now);
            place.send(Ok(response));
        }
    });
    Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
}

fn news(service: &ServiceId, sent: Option<&LiveService>, now: &LiveService) -> v1::WatchLiveResponse {
    let key = |id: &InstanceId| InstanceKey { service: service.clone(), id: id.clone() };
    let none = LiveService::default();
    let before = sent.unwrap_or(&none);
    let mut response = v1::WatchLiveResponse { snapshot: sent.is_none(), ..Default::default() };
    for difference in before.instances.diff(&now.instances) {
        match difference {
            DiffItem::Add(id, live) | DiffItem::Update { new: (id, live), .. } => {
                response.put.push(live_to_proto(Some(&key(id)), live));
            }
            DiffItem::Remove(id, live) => response.removed.push(v1::InstanceRef {
                service: service.to_string(),
                id: id.to_string(),
                incarnation: live.incarnation.0,
            }),
        }
    }
    response
}

/// Checked entries.
pub(super) fn entries(
    entries: BTreeMap<String, String>,
    registry: &Registry,
) -> Result<BTreeMap<String, String>, ApiError> {
    let mut problems = Problems::default();
    check_metadata(&entries, registry.limits(), &mut problems);
    if problems.is_empty() { Ok(entries) } else { Err(problems.into()) }
}
