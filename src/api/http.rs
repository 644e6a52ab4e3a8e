//! HTTP/JSON over the registry's handlers, and what operators ask a process.

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, FromRequestParts, RawQuery, Request, State},
    http::{StatusCode, header, request::Parts},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing,
};
use serde_json::json;
use tonic::transport::server::TcpConnectInfo;
use tower_http::catch_panic::CatchPanicLayer;

use super::{
    Api, SYNCED,
    dto::{self, InstanceDto, LeaseDto, RolesDto, ServiceDto, StaleDto},
    error::{ApiError, Kind},
    history, ledger,
    limit::{Places, within_limit},
    live, load, locks, peers, proxies,
    request::{
        Body, Path, Query, Reply, instance_key, read_incarnation, read_poll, service_id, wait_at_most,
    },
    snapshot,
    time::timestamp,
};
use crate::{
    health::Status,
    model::{Fields, Problems, Revision, excerpt, format_duration},
    registry::{self, Accepted, Membership, Registry, Released},
};

/// All routes.
pub(super) fn router(api: Api) -> Router {
    let body_limit = api.config.body_limit;
    let instance = "/v1/services/{service}/instances/{id}";
    Router::new()
        .route("/v1/services", routing::get(list_services))
        .route("/v1/services/{service}", routing::get(show_service).delete(remove_service))
        .route("/v1/services/{service}/release", routing::post(release))
        .route("/v1/services/{service}/instances", routing::get(list_instances))
        .route("/v1/services/{service}/history", routing::get(history::of_service))
        .route("/v1/services/{service}/live", routing::get(live::list))
        .route("/v1/services/{service}/load", routing::get(load::show))
        .route(instance, routing::get(show_instance).put(register).patch(update).delete(deregister))
        .route(&format!("{instance}/explain"), routing::get(ledger::explain))
        .route(&format!("{instance}/live"), routing::put(live::publish))
        .route(&format!("{instance}/drain"), routing::post(drain))
        .route(&format!("{instance}/renew"), routing::post(renew))
        .route("/v1/locks", routing::get(locks::list))
        .route("/v1/locks/{name}", routing::get(locks::show).put(locks::acquire).delete(locks::release))
        .route("/v1/locks/{name}/renew", routing::post(locks::renew))
        .route("/v1/peers", routing::get(peers::list))
        .route("/v1/peers/{set}", routing::get(peers::show).put(peers::create))
        .route("/v1/peers/{set}/render", routing::get(peers::rendered))
        .route("/v1/peers/{set}/propose", routing::post(peers::propose))
        .route("/v1/peers/{set}/finish", routing::post(peers::finish))
        .route("/v1/peers/{set}/refound", routing::post(peers::refound))
        .route("/v1/peers/{set}/peers/{key}", routing::put(peers::register).delete(peers::withdraw))
        .route("/v1/peers/{set}/peers/{key}/report", routing::post(peers::report))
        .route("/v1/etcd/{set}", routing::get(peers::etcd::list))
        .route("/v1/etcd/{set}/_config/size", routing::get(peers::etcd::size))
        .route("/v1/etcd/{set}/{id}", routing::get(peers::etcd::show).put(peers::etcd::put))
        .route("/v1/proxies", routing::get(proxies::list))
        .route("/v1/proxies/{node}", routing::get(proxies::show))
        .route("/v1/proxies/{node}/resources", routing::get(ledger::resources))
        .route("/v1/checks", routing::get(checks))
        .route("/v1/revisions/{revision}", routing::get(ledger::revision))
        .route("/v1/nodes", routing::get(list_nodes))
        .route("/v1/snapshot", routing::get(snapshot::save).post(snapshot::restore))
        .route("/debug/log", routing::get(get_log).put(set_log))
        .route("/debug/config", routing::get(debug_config))
        .route("/debug/catalog", routing::get(debug_catalog))
        .route("/debug/xds", routing::get(proxies::debug))
        .route("/", routing::get(index))
        .route_layer(middleware::from_fn_with_state(Places::new(&api), within_limit))
        // What tells how the process is answers also when it has too much to do.
        .route("/livez", routing::get(|| async { Json(json!({"status": "alive"})) }))
        .route("/readyz", routing::get(readyz))
        .route("/metrics", routing::get(metrics))
        .fallback(|request: Request| async move {
            ApiError::new(
                Kind::NotFound,
                format!("there is nothing at {}: GET / lists what there is", excerpt(request.uri().path())),
            )
        })
        .method_not_allowed_fallback(|request: Request| async move {
            ApiError::new(
                Kind::MethodNotAllowed,
                format!(
                    "{} is not possible at {}: GET / lists what is",
                    request.method(),
                    excerpt(request.uri().path())
                ),
            )
        })
        .layer(middleware::from_fn_with_state(api.clone(), when_synced))
        .layer(DefaultBodyLimit::max(body_limit))
        .layer(CatchPanicLayer::custom(|_| {
            ApiError::new(
                Kind::Internal,
                "this request met a bug in Disco; it is logged, and everything else goes on",
            )
            .into_response()
        }))
        .with_state(api)
}

/// Before everything has been read back, nothing would be a wrong answer (never 2).
async fn when_synced(State(api): State<Api>, request: Request, next: Next) -> Response {
    if request.uri().path().starts_with("/v1/") && api.readiness.waits_for(SYNCED) {
        let message =
            "what is registered has not been read back from the store yet: try another node or again";
        return ApiError::new(Kind::Unavailable, message).into_response();
    }
    next.run(request).await
}

/// The registry for the one who asks, whom the history names.
struct Called(Registry);

impl FromRequestParts<Api> for Called {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Self, ApiError> {
        let peer = parts.extensions.get::<TcpConnectInfo>().and_then(TcpConnectInfo::remote_addr);
        let registry = api.registry()?;
        Ok(Self(peer.map_or_else(|| registry.clone(), |peer| registry.called_by(peer.to_string()))))
    }
}

async fn list_services(State(api): State<Api>, RawQuery(query): RawQuery) -> Reply {
    let (index, wait) = read_poll(query.as_deref())?;
    let catalog = &api.catalog;
    wait_at_most(&api, wait, catalog.newer_than(index)).await;
    let snapshot = catalog.latest();
    let services: Vec<_> = snapshot.services().map(|service| ServiceDto::of(service, &snapshot)).collect();
    Ok(Json(
        json!({"revision": snapshot.revision().0, "services": services, "stale": StaleDto::of(&api.catalog)}),
    )
    .into_response())
}

async fn list_nodes(State(api): State<Api>) -> Reply {
    let nodes = api.nodes.as_ref().map(Membership::latest).unwrap_or_default();
    let nodes: Vec<_> = nodes.iter().map(dto::node).collect();
    Ok(Json(json!({"nodes": nodes, "stale": StaleDto::of(&api.catalog)})).into_response())
}

async fn show_service(State(api): State<Api>, Path(service): Path<String>) -> Reply {
    let id = service_id(&service)?;
    let snapshot = api.catalog.latest();
    let service = snapshot.service(&id).ok_or_else(|| ApiError::no_service(&snapshot, id.clone()))?;
    Ok(Json(ServiceDto::of(service, &snapshot)).into_response())
}

async fn remove_service(State(api): State<Api>, Path(service): Path<String>) -> Reply {
    let revision = api.registry()?.remove_service(service_id(&service)?).await?;
    Ok(Json(json!({"revision": revision.0})).into_response())
}

async fn release(Called(registry): Called, Path(service): Path<String>) -> Reply {
    let Released { revision, removed, published } = registry.release(service_id(&service)?).await?;
    Ok(Json(json!({"revision": revision.0, "removed": removed, "published": published})).into_response())
}

async fn list_instances(
    State(api): State<Api>,
    Path(service): Path<String>,
    RawQuery(query): RawQuery,
) -> Reply {
    let (index, wait) = read_poll(query.as_deref())?;
    let id = service_id(&service)?;
    let catalog = &api.catalog;
    wait_at_most(&api, wait, async {
        // A snapshot newer than the service's last change is no news of it.
        let mut seen = Revision::default();
        while let Some((snapshot, _)) = catalog.newer_than(seen).await {
            if snapshot.service(&id).is_none_or(|service| service.revision > index) {
                break;
            }
            seen = snapshot.revision();
        }
    })
    .await;
    let snapshot = catalog.latest();
    let service = snapshot.service(&id).ok_or_else(|| ApiError::no_service(&snapshot, id.clone()))?;
    let instances: Vec<_> =
        service.instances().map(|instance| InstanceDto::of(instance, &snapshot)).collect();
    let mut shown = json!({
        "revision": snapshot.revision().0,
        "instances": instances,
        "stale": StaleDto::of(&api.catalog),
    });
    if let (Some(roles), Some(fields)) = (RolesDto::of(service, &snapshot), shown.as_object_mut()) {
        fields.insert("roles".to_owned(), json!(roles));
    }
    Ok(Json(shown).into_response())
}

async fn show_instance(State(api): State<Api>, Path((service, id)): Path<(String, String)>) -> Reply {
    let key = instance_key(&service, &id)?;
    let snapshot = api.catalog.latest();
    let instance = snapshot.instance(&key).ok_or(registry::Error::NotFound(key))?;
    Ok(Json(InstanceDto::of(instance, &snapshot)).into_response())
}

async fn register(
    Called(registry): Called,
    Path((service, id)): Path<(String, String)>,
    Body(body): Body,
) -> Reply {
    let registration = dto::read_registration(service, id, &body, registry.limits())?;
    let Accepted { revision, instance } = registry.register(registration).await?;
    let lease = LeaseDto::from(instance.lease);
    let instance = InstanceDto::of(&instance, &registry.catalog().latest());
    Ok(Json(json!({"revision": revision.0, "lease": lease, "instance": instance})).into_response())
}

async fn update(
    Called(registry): Called,
    Path((service, id)): Path<(String, String)>,
    RawQuery(query): RawQuery,
    Body(body): Body,
) -> Reply {
    let incarnation = Query::of(query.as_deref()).read(read_incarnation)?;
    let update = dto::read_update(&body, registry.limits())?;
    let accepted = registry.update(instance_key(&service, &id)?, incarnation, update).await?;
    Ok(accepted_reply(&registry, &accepted))
}

async fn drain(
    Called(registry): Called,
    Path((service, id)): Path<(String, String)>,
    RawQuery(query): RawQuery,
) -> Reply {
    let incarnation = Query::of(query.as_deref()).read(read_incarnation)?;
    let accepted = registry.drain(instance_key(&service, &id)?, incarnation).await?;
    Ok(accepted_reply(&registry, &accepted))
}

fn accepted_reply(registry: &Registry, Accepted { revision, instance }: &Accepted) -> Response {
    let instance = InstanceDto::of(instance, &registry.catalog().latest());
    Json(json!({"revision": revision.0, "instance": instance})).into_response()
}

async fn checks(State(api): State<Api>) -> Response {
    let Status { instances, machines, silent, suspended } = api.checks.status();
    let suspended = suspended.map(timestamp);
    Json(json!({"instances": instances, "machines": machines, "silent": silent, "suspended": suspended}))
        .into_response()
}

async fn renew(
    Called(registry): Called,
    Path((service, id)): Path<(String, String)>,
    RawQuery(query): RawQuery,
) -> Reply {
    let incarnation = Query::of(query.as_deref()).read(read_incarnation)?;
    let (ttl, revision) = registry.renew(instance_key(&service, &id)?, incarnation).await?;
    Ok(Json(json!({"revision": revision.0, "ttl": format_duration(ttl)})).into_response())
}

async fn deregister(
    Called(registry): Called,
    Path((service, id)): Path<(String, String)>,
    RawQuery(query): RawQuery,
) -> Reply {
    let incarnation = Query::of(query.as_deref()).read(read_incarnation)?;
    let revision = registry.deregister(instance_key(&service, &id)?, incarnation).await?;
    Ok(Json(json!({"revision": revision.0})).into_response())
}

async fn readyz(State(api): State<Api>) -> Response {
    let waiting = api.readiness.waiting();
    let status = if waiting.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(json!({"ready": waiting.is_empty(), "waiting": waiting}))).into_response()
}

async fn metrics(State(api): State<Api>) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], api.metrics.text()).into_response()
}

async fn get_log(State(api): State<Api>) -> Response {
    Json(json!({"filter": api.log.get()})).into_response()
}

async fn set_log(State(api): State<Api>, Body(body): Body) -> Reply {
    let node = dto::parse_json(&body)?;
    let mut problems = Problems::default();
    let mut fields = Fields::of(&node, "", &mut problems);
    let filter = fields.text("filter", &mut problems);
    if filter.is_none() && problems.is_empty() {
        problems.add("filter", "is missing: want a level or a list such as info,disco::xds=debug");
    }
    fields.finish(&mut problems);
    if let Some(filter) = filter
        && problems.is_empty()
    {
        problems.take("filter", api.log.set(filter));
    }
    if !problems.is_empty() {
        return Err(problems.into());
    }
    tracing::info!(filter = api.log.get(), "the log filter was changed");
    Ok(get_log(State(api)).await)
}

async fn debug_config(State(api): State<Api>) -> Response {
    ([(header::CONTENT_TYPE, "application/yaml")], api.config.effective.clone()).into_response()
}

async fn debug_catalog(State(api): State<Api>) -> Response {
    let snapshot = api.catalog.latest();
    let services: serde_json::Map<_, _> = snapshot
        .services()
        .map(|service| {
            let instances: Vec<_> = service.instances().map(|i| InstanceDto::of(i, &snapshot)).collect();
            let shown = json!({
                "revision": service.revision.0,
                "roles": RolesDto::of(service, &snapshot),
                "instances": instances,
            });
            (service.id.to_string(), shown)
        })
        .collect();
    Json(json!({"revision": snapshot.revision().0, "services": services})).into_response()
}

async fn index() -> &'static str {
    "Disco, HTTP API\n\
     \n\
     GET    /v1/services                               all services\n\
     GET    /v1/services/{service}                     one\n\
     DELETE /v1/services/{service}                     forget one that has no instances\n\
     POST   /v1/services/{service}/release             remove its stale instances, and show proxies those that are damped\n\
     GET    /v1/services/{service}/instances           its instances; ?index=REVISION&wait=30s waits for news\n\
     GET    /v1/services/{service}/history             what changed, when, by whom and why; ?since=TIME&id=ID\n\
     GET    /v1/services/{service}/live                what they say many times a second; ?index=REVISION&wait=30s\n\
     GET    /v1/services/{service}/load                the calls to it, as clients report them to this server\n\
     GET    /v1/services/{service}/instances/{id}      one\n\
     PUT    /v1/services/{service}/instances/{id}      register, update and renew\n\
     PATCH  /v1/services/{service}/instances/{id}      change weight or metadata\n\
     DELETE /v1/services/{service}/instances/{id}      deregister\n\
     POST   /v1/services/{service}/instances/{id}/drain, /renew\n\
     PUT    /v1/services/{service}/instances/{id}/live  say what changes many times a second; no proxy is told\n\
     GET    /v1/services/{service}/instances/{id}/explain  who holds it, and which proxies see it; ?at=TIME: what it was then\n\
     GET    /v1/locks                                  all locks that are held; ?index=REVISION&wait=30s waits for news\n\
     GET    /v1/locks/{name}                           one\n\
     PUT    /v1/locks/{name}                           take it: {\"holder\":\"me\",\"ttl\":\"10s\",\"wait\":\"30s\"}\n\
     POST   /v1/locks/{name}/renew                     ?token=N\n\
     DELETE /v1/locks/{name}                           ?token=N gives it back; without one its holder loses it\n\
     GET    /v1/peers                                  peer sets, without lists\n\
     GET    /v1/peers/{set}                            one with its list, once it is founded (425 before); ?up=N&leader=true&added=KEY&wait=30s waits\n\
     GET    /v1/peers/{set}/render                     its list for a database: ?format=etcd-env&peer=KEY&wait=30s\n\
     PUT    /v1/peers/{set}                            make one: {\"kind\":\"etcd\",\"expect\":3}\n\
     POST   /v1/peers/{set}/propose                    the next safe step: {\"add\":KEY} or remove, replace, demote, and from_revision\n\
     POST   /v1/peers/{set}/finish                     the pending change was made, or {\"cancel\":true} will not be\n\
     POST   /v1/peers/{set}/refound                    give the database up and found another: {\"cluster_id\":ID,\"expect\":3}\n\
     PUT    /v1/peers/{set}/peers/{key}                register a replica: {\"disk\":ID,\"raft\":\"IP:PORT\",\"client\":\"IP:PORT\"}\n\
     DELETE /v1/peers/{set}/peers/{key}                withdraw one that was handed nothing\n\
     POST   /v1/peers/{set}/peers/{key}/report         what it does: {\"role\":\"leader\",\"term\":N}\n\
     GET    /v1/etcd/{set}                             etcd's v2 discovery: etcd --discovery http://IP:PORT/v1/etcd/{set}\n\
     GET    /v1/nodes                                  the Disco processes that share the store\n\
     GET    /v1/checks                                 what the health checks of this server are doing\n\
     GET    /v1/proxies                                connected proxies and what they acknowledged\n\
     GET    /v1/proxies/{node}                         one, with what it rejected\n\
     GET    /v1/proxies/{node}/resources               what it holds; ?type=cluster&body=true\n\
     GET    /v1/revisions/{revision}                   who has acknowledged it, who has not and why; ?service=NAME&wait=10s\n\
     GET    /v1/snapshot                               everything that the store holds, as one file\n\
     POST   /v1/snapshot                               put it into an empty store; ?replace=true into any\n\
     GET    /livez /readyz /metrics\n\
     GET    /debug/catalog /debug/config /debug/log /debug/xds;  PUT /debug/log {\"filter\":\"debug\"}\n"
}

#[cfg(test)]
mod tests {
    use tower::ServiceExt as _;

    use std::{sync::Arc, time::Duration};

    use super::*;
    use crate::{
        rt::{Readiness, Tasks},
        store::MemoryStore,
        telemetry::{LogFilter, LogFormat, Metrics},
        xds::{Loads, Proxies},
    };

    async fn api(tasks: &Tasks, requests: usize) -> Api {
        let core = Tasks::default();
        let (writer, reader) = crate::catalog::catalog();
        let (store, readiness, metrics) =
            (Arc::new(MemoryStore::default()), Readiness::default(), Metrics::default());
        let store: Arc<dyn crate::store::Store> = store;
        let mirror = registry::Mirror::new(Arc::clone(&store), writer, reader.clone());
        mirror.start(registry::Patience::None, &core, readiness.gate(SYNCED)).await.unwrap();
        let (members, config) =
            (crate::model::Members::alone("n1".parse().unwrap()), registry::Config::default());
        let members = tokio::sync::watch::Sender::new(members).subscribe();
        let registry = Registry::start(config, store, reader.clone(), members, None, &metrics, &core);
        let log = LogFilter::start("off", LogFormat::Text).unwrap();
        let config = super::super::Config { body_limit: 1024, requests, effective: String::new() };
        Api {
            config: Arc::new(config),
            catalog: reader,
            nodes: None,
            registry: Some(registry),
            locks: None,
            peers: None,
            checks: Default::default(),
            proxies: Proxies::default(),
            loads: Loads::new(Duration::from_secs(10)),
            readiness,
            metrics,
            log,
            tasks: tasks.clone(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn requests_beyond_the_limit_are_turned_away_and_the_others_go_on() {
        let tasks = Tasks::default();
        let router = router(api(&tasks, 1).await);
        let get = |path: &str| {
            let request = Request::get(path).body(axum::body::Body::empty()).unwrap();
            let response = router.clone().oneshot(request);
            async { response.await.unwrap().status() }
        };
        let mut waits = std::pin::pin!(get("/v1/services?index=9&wait=1m"));
        assert!(futures_util::poll!(waits.as_mut()).is_pending());
        for (path, status) in [
            ("/v1/services", StatusCode::SERVICE_UNAVAILABLE),
            ("/debug/log", StatusCode::SERVICE_UNAVAILABLE),
            ("/nothing", StatusCode::NOT_FOUND),
            ("/livez", StatusCode::OK),
            ("/metrics", StatusCode::OK),
        ] {
            assert_eq!(get(path).await, status, "{path}");
        }
        assert_eq!(waits.await, StatusCode::OK);
        assert_eq!(get("/v1/services").await, StatusCode::OK);
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_is_answered_when_the_server_ends() {
        let tasks = Tasks::default();
        let api = api(&tasks, 10).await;
        let body = br#"{"address":"127.0.0.1","port":1}"#;
        let limits = api.registry().unwrap().limits();
        let registration = dto::read_registration("greeter".into(), "a".into(), body, limits).unwrap();
        api.registry().unwrap().register(registration).await.unwrap();

        tasks.shutdown().start();
        for (path, status) in [
            ("/v1/services?index=9&wait=5m", StatusCode::OK),
            ("/v1/services/greeter/instances?index=9&wait=5m", StatusCode::OK),
        ] {
            let start = tokio::time::Instant::now();
            let request = Request::get(path).body(axum::body::Body::empty()).unwrap();
            let response = router(api.clone()).oneshot(request).await.unwrap();
            assert_eq!((response.status(), start.elapsed()), (status, Duration::ZERO), "{path}");
        }
    }
}
