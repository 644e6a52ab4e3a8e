//! How many HTTP requests there may be at once.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    middleware::Next,
};
use prometheus_client::metrics::{counter::Counter, gauge::Gauge};
use tokio::sync::Semaphore;

use super::{
    Api,
    error::{ApiError, Kind},
    request::Reply,
};

/// Places for requests.
#[derive(Debug, Clone)]
pub(super) struct Places {
    free: Arc<Semaphore>,
    limit: usize,
    taken: Gauge,
    refused: Counter,
}

impl Places {
    pub(super) fn new(api: &Api) -> Self {
        let limit = api.config.requests;
        Self {
            free: Arc::new(Semaphore::new(limit.min(Semaphore::MAX_PERMITS))),
            limit,
            taken: api.metrics.gauge("http_requests_open", "HTTP requests that are worked on or wait"),
            refused: api.metrics.counter("http_requests_refused", "HTTP requests beyond the limit"),
        }
    }
}

/// Turns requests away when there are as many as there may be; those that are there go on.
pub(super) async fn within_limit(State(places): State<Places>, request: Request, next: Next) -> Reply {
    let Ok(_place) = places.free.try_acquire() else {
        if places.refused.inc() == 0 {
            let limit = places.limit;
            tracing::warn!(
                limit,
                "HTTP requests are turned away (limits.http_requests); further ones are only counted"
            );
        }
        return Err(ApiError::new(
            Kind::Unavailable,
            format!(
                "this server has {} requests, as many as it may (limits.http_requests); ask another one, or later",
                places.limit
            ),
        ));
    };
    let _taken = Taken::new(&places.taken);
    Ok(next.run(request).await)
}

/// Counts while it is there; a caller that goes away takes it along.
struct Taken<'a>(&'a Gauge);

impl<'a> Taken<'a> {
    fn new(gauge: &'a Gauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}
