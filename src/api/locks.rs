//! Locks, over HTTP/JSON and as `disco.v1.Locks`.

use std::{pin::Pin, time::Duration};

use axum::{
    Json,
    extract::{RawQuery, State},
    response::IntoResponse as _,
};
use futures_util::Stream;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::{
    Api, dto,
    error::{ApiError, Kind},
    request::{Body, Path, Query, Reply, read_poll, read_wait, wait_at_most},
    time::timestamp,
};
use crate::{
    model::{Claim, Fields, Lock, LockName, Problems, Revision, format_duration, parse_duration},
    proto::v1::{self, locks_server},
    registry::{self, Board, Locks, lock_to_proto},
    rt::Tasks,
};

/// Longest wait for a lock that one request may ask for over gRPC, where pings tell of who went away.
const WAIT_MAX: Duration = Duration::from_secs(24 * 60 * 60);

fn lock_name(text: &str) -> Result<LockName, ApiError> {
    let mut problems = Problems::default();
    problems.take("name", text.parse()).ok_or_else(|| problems.into())
}

fn lock_json(locks: &Locks, lock: &Lock) -> Value {
    json!({
        "name": lock.name.as_str(),
        "token": lock.token.0,
        "holder": lock.holder,
        "since": timestamp(lock.since),
        "ttl": format_duration(lock.ttl),
        "node": lock.owner.as_str(),
        "revoked": lock.revoked,
        "waiting": locks.waiting(&lock.name),
        "revision": lock.revision.0,
    })
}

fn stale(board: &Board) -> Value {
    board.stale().map_or(Value::Null, |since| json!({"since": timestamp(since)}))
}

pub(super) async fn list(State(api): State<Api>, RawQuery(query): RawQuery) -> Reply {
    let (index, wait) = read_poll(query.as_deref())?;
    let locks = api.locks()?;
    wait_at_most(&api, wait, locks.newer_than(index)).await;
    let board = locks.board();
    let all: Vec<_> = board.locks().map(|lock| lock_json(locks, lock)).collect();
    Ok(Json(json!({"revision": board.revision().0, "locks": all, "stale": stale(&board)})).into_response())
}

pub(super) async fn show(
    State(api): State<Api>,
    Path(name): Path<String>,
    RawQuery(query): RawQuery,
) -> Reply {
    let (index, wait) = read_poll(query.as_deref())?;
    let (locks, name) = (api.locks()?, lock_name(&name)?);
    wait_at_most(&api, wait, locks.newer_than(index)).await;
    let board = locks.board();
    let lock = board.lock(&name).map(|lock| lock_json(locks, lock));
    Ok(Json(json!({"revision": board.revision().0, "lock": lock, "stale": stale(&board)})).into_response())
}

pub(super) async fn acquire(State(api): State<Api>, Path(name): Path<String>, Body(body): Body) -> Reply {
    let locks = api.locks()?;
    let node = dto::parse_json(&body)?;
    let mut problems = Problems::default();
    let mut fields = Fields::of(&node, "", &mut problems);
    let mut text = |name| fields.text(name, &mut problems).unwrap_or_default().to_owned();
    let (holder, attempt) = (text("holder"), text("attempt"));
    let ttl = fields.parse("ttl", &mut problems, parse_duration);
    let wait = read_wait(&mut fields, &mut problems);
    fields.finish(&mut problems);
    let claim = Claim::check_into(&name, holder, attempt, ttl, &mut problems).ok_or(problems)?;
    let lock = acquired(&api.tasks, locks, claim, wait).await?;
    Ok(Json(json!({"revision": lock.revision.0, "lock": lock_json(locks, &lock)})).into_response())
}

fn read_token(fields: &mut Fields<'_>, problems: &mut Problems) -> Option<Revision> {
    let token = fields.integer("token", 1..=u64::MAX.into(), problems)?;
    u64::try_from(token).ok().map(Revision)
}

pub(super) async fn renew(
    State(api): State<Api>,
    Path(name): Path<String>,
    RawQuery(query): RawQuery,
) -> Reply {
    let token = Query::of(query.as_deref()).read(|fields, problems| {
        let token = read_token(fields, problems);
        if token.is_none() && problems.is_empty() {
            problems.add("token", "is missing: want the token that came with the lock");
        }
        token.unwrap_or_default()
    })?;
    let ttl = api.locks()?.renew(lock_name(&name)?, token).await?;
    Ok(Json(json!({"ttl": format_duration(ttl)})).into_response())
}

pub(super) async fn release(
    State(api): State<Api>,
    Path(name): Path<String>,
    RawQuery(query): RawQuery,
) -> Reply {
    let token = Query::of(query.as_deref()).read(read_token)?;
    let (locks, name) = (api.locks()?, lock_name(&name)?);
    let answer = match token {
        Some(token) => json!({"revision": locks.release(name, token).await?.0}),
        None => {
            let lock = locks.revoke(name).await?;
            json!({"revision": lock.revision.0, "lock": lock_json(locks, &lock)})
        }
    };
    Ok(Json(answer).into_response())
}

/// Waits for the lock, but no longer than this server runs.
async fn acquired(tasks: &Tasks, locks: &Locks, claim: Claim, wait: Duration) -> Result<Lock, ApiError> {
    tokio::select! {
        lock = locks.acquire(claim, wait) => Ok(lock?),
        () = tasks.shutdown().wait() => Err(registry::Error::ShuttingDown.into()),
    }
}

/// The gRPC service.
#[derive(Debug)]
pub(super) struct LocksService {
    locks: Locks,
    tasks: Tasks,
}

impl LocksService {
    pub(super) fn new(locks: Locks, tasks: Tasks) -> Self {
        Self { locks, tasks }
    }

    fn message(&self, lock: &Lock) -> v1::Lock {
        lock_to_proto(lock, self.locks.waiting(&lock.name))
    }
}

#[tonic::async_trait]
impl locks_server::Locks for LocksService {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<v1::WatchLocksResponse, Status>> + Send>>;

    async fn acquire(
        &self,
        request: Request<v1::AcquireLockRequest>,
    ) -> Result<Response<v1::AcquireLockResponse>, Status> {
        let v1::AcquireLockRequest { name, holder, ttl, wait, attempt } = request.into_inner();
        let mut problems = Problems::default();
        let mut duration = |field: &str, given: Option<prost_types::Duration>| {
            let read = |given| Duration::try_from(given).map_err(|_| "is negative".to_owned());
            given.and_then(|given| problems.take(field, read(given)))
        };
        let (ttl, wait) = (duration("ttl", ttl), duration("wait", wait).unwrap_or_default());
        if wait > WAIT_MAX {
            let [wait, most] = [wait, WAIT_MAX].map(format_duration);
            problems.add("wait", format!("{wait} is too long: want at most {most}"));
        }
        let claim = Claim::check_into(&name, holder, attempt, ttl, &mut problems);
        let claim = claim.ok_or_else(|| ApiError::from(problems))?;
        let lock = acquired(&self.tasks, &self.locks, claim, wait).await?;
        Ok(Response::new(v1::AcquireLockResponse { lock: Some(self.message(&lock)) }))
    }

    async fn renew(
        &self,
        request: Request<v1::RenewLockRequest>,
    ) -> Result<Response<v1::RenewLockResponse>, Status> {
        let v1::RenewLockRequest { name, token } = request.into_inner();
        let renewal = self.locks.renew(lock_name(&name)?, Revision(token)).await;
        let ttl = renewal.map_err(ApiError::from)?;
        Ok(Response::new(v1::RenewLockResponse { ttl: ttl.try_into().ok() }))
    }

    async fn release(
        &self,
        request: Request<v1::ReleaseLockRequest>,
    ) -> Result<Response<v1::ReleaseLockResponse>, Status> {
        let v1::ReleaseLockRequest { name, token } = request.into_inner();
        let name = lock_name(&name)?;
        let answer = if token == 0 {
            let lock = self.locks.revoke(name).await.map_err(ApiError::from)?;
            v1::ReleaseLockResponse { revision: lock.revision.0, lock: Some(self.message(&lock)) }
        } else {
            let revision = self.locks.release(name, Revision(token)).await.map_err(ApiError::from)?;
            v1::ReleaseLockResponse { revision: revision.0, lock: None }
        };
        Ok(Response::new(answer))
    }

    async fn watch(
        &self,
        request: Request<v1::WatchLocksRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let v1::WatchLocksRequest { name } = request.into_inner();
        let only = if name.is_empty() { None } else { Some(lock_name(&name)?) };
        let locks = self.locks.clone();
        // One: a slow reader gets the newest state when it is ready, not a backlog.
        let (answers, stream) = mpsc::channel(1);
        self.tasks.spawn_until_shutdown("lock-watch", async move {
            let (mut seen, mut last) = (Revision::default(), None);
            loop {
                let Ok(place) = answers.reserve().await else { return };
                let board = tokio::select! {
                    board = locks.newer_than(seen) => board,
                    () = answers.closed() => return,
                };
                seen = board.revision();
                let wanted = board.locks().filter(|lock| only.as_ref().is_none_or(|only| *only == lock.name));
                let shown: Vec<_> =
                    wanted.map(|lock| lock_to_proto(lock, locks.waiting(&lock.name))).collect();
                if last.as_ref() != Some(&shown) {
                    last = Some(shown.clone());
                    place.send(Ok(v1::WatchLocksResponse { revision: seen.0, locks: shown }));
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

impl Api {
    pub(super) fn locks(&self) -> Result<&Locks, ApiError> {
        self.locks.as_ref().ok_or_else(|| {
            let message = "this node keeps no locks: it does not have the role `registry`; ask one that has";
            ApiError::new(Kind::Misdirected, message)
        })
    }
}
