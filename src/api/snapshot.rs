//! Backups over HTTP.

use std::time::Duration;

use axum::{
    Json,
    body::{Body, to_bytes},
    extract::{RawQuery, Request, State},
    http::header,
    response::IntoResponse as _,
};
use futures_util::stream;
use serde_json::json;

use super::{
    Api,
    error::{ApiError, Kind},
    request::{Query, Reply},
};
use crate::store::Backup;

/// Largest snapshot that is taken, in bytes.
const LARGEST: usize = 1 << 30;

/// Longest that one may take to arrive.
const WITHIN: Duration = Duration::from_secs(600);

/// Bytes of the parts of an answer, at least.
const PART: usize = 64 << 10;

pub(super) async fn save(State(api): State<Api>) -> Reply {
    let backup = api.registry()?.backup().await?;
    let mut parts = backup.into_parts();
    let larger = std::iter::from_fn(move || {
        let mut part = parts.next()?.to_vec();
        while part.len() < PART
            && let Some(more) = parts.next()
        {
            part.extend_from_slice(&more);
        }
        Some(Ok::<_, std::convert::Infallible>(part))
    });
    let kind = [(header::CONTENT_TYPE, "application/octet-stream")];
    Ok((kind, Body::from_stream(stream::iter(larger))).into_response())
}

pub(super) async fn restore(State(api): State<Api>, RawQuery(query): RawQuery, request: Request) -> Reply {
    let registry = api.registry()?.clone();
    let replace = Query::of(query.as_deref()).read(|fields, problems| {
        fields.parse("replace", problems, |text| match text {
            "true" => Ok(true),
            "false" => Ok(false),
            _ => Err("want true or false"),
        })
    })?;
    let body = tokio::time::timeout(WITHIN, to_bytes(request.into_body(), LARGEST)).await;
    let body = body.ok().and_then(Result::ok).ok_or_else(|| {
        let message =
            format!("the snapshot did not arrive whole within {WITHIN:?}, or has more than {LARGEST} bytes");
        ApiError::new(Kind::Invalid, message)
    })?;
    let backup = Backup::read(&body).map_err(|error| ApiError::new(Kind::Invalid, error.to_string()))?;
    drop(body);
    // To its end even if the caller goes away.
    let (answer, answered) = tokio::sync::oneshot::channel();
    api.tasks.spawn("restore", async move {
        let _ = answer.send(registry.restore(backup, replace.unwrap_or_default()).await);
    });
    let restored = answered.await.map_err(|_| ApiError::new(Kind::Unavailable, "the server ended"))??;
    let answer =
        json!({"revision": restored.revision.0, "entries": restored.entries, "removed": restored.removed});
    Ok(Json(answer).into_response())
}
