//! The calls to a service, as its clients report them.

use axum::{
    Json,
    extract::{Path, State},
    response::IntoResponse as _,
};
use serde_json::{Map, Value, json};
use tokio::time::Instant;

use super::{
    Api,
    error::ApiError,
    request::{Reply, service_id},
};
use crate::{
    model::{Locality, format_duration},
    xds::{Load, Traffic},
};

pub(super) async fn show(State(api): State<Api>, Path(service): Path<String>) -> Reply {
    let id = service_id(&service)?;
    let snapshot = api.catalog.latest();
    if snapshot.service(&id).is_none() {
        return Err(ApiError::no_service(&snapshot, id));
    }
    let Load { localities, drops } = api.loads.of(id.as_str(), Instant::now());
    let drops = drops.into_iter().map(|(category, a_second)| (category, rounded(a_second)));
    let shown = json!({
        "service": id.as_str(),
        "interval": format_duration(api.loads.interval()),
        "localities": localities.iter().map(locality).collect::<Vec<_>>(),
        "drops": drops.collect::<Map<_, _>>(),
    });
    Ok(Json(shown).into_response())
}

fn locality((locality, traffic): (&Locality, &Traffic)) -> Value {
    json!({
        "region": &*locality.region,
        "zone": &*locality.zone,
        "sub_zone": &*locality.sub_zone,
        "reporters": traffic.reporters,
        "rps": rounded(traffic.calls),
        "errors_per_second": rounded(traffic.errors),
        "in_progress": traffic.in_progress,
    })
}

/// To a thousandth: the rest is noise of the clients' timers.
fn rounded(rate: f64) -> Value {
    json!((rate * 1000.0).round() / 1000.0)
}
