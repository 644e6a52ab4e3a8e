//! HTTP/JSON over the registry's handlers, and what operators ask a process.

use std::{future::Future, time::Duration};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{
        self, DefaultBodyLimit, FromRequest, FromRequestParts, RawQuery, Request, State,
        rejection::BytesRejection,
    },
    http::{StatusCode, header, request::Parts},
    middleware,
    response::{IntoResponse, Response},
    routing,
};
use serde_json::json;
use tower_http::catch_panic::CatchPanicLayer;

use super::{
    Api, SYNCED,
    dto::{self, InstanceDto, LeaseDto, ServiceDto, StaleDto},
    error::{ApiError, Kind},
    ledger, live, load, locks, proxies, snapshot,
};
use crate::{
    model::{
        Fields, Incarnation, InstanceId, InstanceKey, Node, Problems, Revision, ServiceId, Value, excerpt,
        format_duration, parse_duration,
    },
    registry::{self, Accepted, Membership},
};

/// Longest that a long poll is held.
pub(super) const WAIT_MAX: Duration = Duration::from_secs(300);

/// Longest that a body may take to arrive.
const BODY_WITHIN: Duration = Duration::from_secs(30);

pub(super) type Reply = Result<Response, ApiError>;

/// All routes.
pub(super) fn router(api: Api) -> Router {
    let body_limit = api.config.body_limit;
    let instance = "/v1/services/{service}/instances/{id}";
    Router::new()
        .route("/v1/services", routing::get(list_services))
        .route("/v1/services/{service}", routing::get(show_service).delete(remove_service))
        .route("/v1/services/{service}/instances", routing::get(list_instances))
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
        .route("/v1/proxies", routing::get(proxies::list))
        .route("/v1/proxies/{node}", routing::get(proxies::show))
        .route("/v1/proxies/{node}/resources", routing::get(ledger::resources))
        .route("/v1/revisions/{revision}", routing::get(ledger::revision))
        .route("/v1/nodes", routing::get(list_nodes))
        .route("/v1/snapshot", routing::get(snapshot::save).post(snapshot::restore))
        .route("/livez", routing::get(|| async { Json(json!({"status": "alive"})) }))
        .route("/readyz", routing::get(readyz))
        .route("/metrics", routing::get(metrics))
        .route("/debug/log", routing::get(get_log).put(set_log))
        .route("/debug/config", routing::get(debug_config))
        .route("/debug/catalog", routing::get(debug_catalog))
        .route("/debug/xds", routing::get(proxies::debug))
        .route("/", routing::get(index))
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
async fn when_synced(State(api): State<Api>, request: Request, next: middleware::Next) -> Response {
    if request.uri().path().starts_with("/v1/") && api.readiness.waits_for(SYNCED) {
        let message =
            "what is registered has not been read back from the store yet: try another node or again";
        return ApiError::new(Kind::Unavailable, message).into_response();
    }
    next.run(request).await
}

/// A request body within the limit.
pub(super) struct Body(pub(super) Bytes);

impl FromRequest<Api> for Body {
    type Rejection = ApiError;

    async fn from_request(request: Request, api: &Api) -> Result<Self, ApiError> {
        let limit = api.config.body_limit;
        let too_large = || {
            let message = format!("the body is larger than {limit} bytes; limits.body raises that");
            ApiError::new(Kind::TooLarge, message)
        };
        // What is announced need not be waited for.
        let announced = request.headers().get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok());
        if announced.and_then(|length| length.parse::<usize>().ok()).is_some_and(|length| length > limit) {
            return Err(too_large());
        }
        let body = tokio::time::timeout(BODY_WITHIN, Bytes::from_request(request, api)).await;
        let body = body.map_err(|_| {
            let message = format!("the body did not arrive within {}", format_duration(BODY_WITHIN));
            ApiError::new(Kind::Invalid, message)
        })?;
        match body {
            Ok(body) => Ok(Self(body)),
            Err(BytesRejection::FailedToBufferBody(error))
                if error.status() == StatusCode::PAYLOAD_TOO_LARGE =>
            {
                Err(too_large())
            }
            Err(error) => Err(ApiError::new(Kind::Invalid, format!("the body did not arrive: {error}"))),
        }
    }
}

/// The variable parts of a path.
pub(super) struct Path<T>(pub(super) T);

impl<T: serde::de::DeserializeOwned + Send> FromRequestParts<Api> for Path<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Self, ApiError> {
        match extract::Path::from_request_parts(parts, api).await {
            Ok(extract::Path(path)) => Ok(Self(path)),
            Err(error) => Err(ApiError::new(Kind::Invalid, format!("the path is not text: {error}"))),
        }
    }
}

/// The parameters behind the `?`, read like the fields of a body.
pub(super) struct Query(Node);

impl Query {
    pub(super) fn of(raw: Option<&str>) -> Self {
        let pairs = raw.unwrap_or_default().split('&').filter(|pair| !pair.is_empty()).map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = percent_decode(value);
            let value = value.parse().map_or(Value::Text(value), Value::Int);
            (percent_decode(name), Node { value, at: None })
        });
        Self(Node { value: Value::Map(pairs.collect()), at: None })
    }

    pub(super) fn read<T>(
        &self,
        read: impl FnOnce(&mut Fields<'_>, &mut Problems) -> T,
    ) -> Result<T, ApiError> {
        let mut problems = Problems::default();
        let mut fields = Fields::of(&self.0, "", &mut problems);
        let value = read(&mut fields, &mut problems);
        fields.finish(&mut problems);
        if problems.is_empty() { Ok(value) } else { Err(problems.into()) }
    }
}

fn percent_decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let mut digits = rest.clone();
        let hex = |digit: Option<u8>| digit.and_then(|d| char::from(d).to_digit(16));
        match (byte, hex(digits.next()), hex(digits.next())) {
            (b'%', Some(high), Some(low)) => {
                bytes.push(u8::try_from(high * 16 + low).unwrap_or(b'?'));
                rest = digits;
            }
            (b'+', ..) => bytes.push(b' '),
            _ => bytes.push(byte),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// How long a long poll waits; absent means not at all.
pub(super) fn read_wait(fields: &mut Fields<'_>, problems: &mut Problems) -> Duration {
    let wait = fields.parse("wait", problems, parse_duration).unwrap_or_default();
    if wait > WAIT_MAX {
        problems.add(
            "wait",
            format!("{} is too long: want at most {}", format_duration(wait), format_duration(WAIT_MAX)),
        );
    }
    wait
}

pub(super) fn read_incarnation(fields: &mut Fields<'_>, problems: &mut Problems) -> Option<Incarnation> {
    fields
        .integer("incarnation", 1..=u64::MAX.into(), problems)
        .and_then(|number| u64::try_from(number).ok())
        .map(Incarnation)
}

pub(super) fn service_id(text: &str) -> Result<ServiceId, ApiError> {
    let mut problems = Problems::default();
    problems.take("service", text.parse()).ok_or_else(|| problems.into())
}

pub(super) fn instance_key(service: &str, id: &str) -> Result<InstanceKey, ApiError> {
    let mut problems = Problems::default();
    let service = problems.take("service", service.parse::<ServiceId>());
    let id = problems.take("id", id.parse::<InstanceId>());
    match (service, id) {
        (Some(service), Some(id)) => Ok(InstanceKey { service, id }),
        _ => Err(problems.into()),
    }
}

async fn list_services(State(api): State<Api>, RawQuery(query): RawQuery) -> Reply {
    let (index, wait) = read_poll(query.as_deref())?;
    let catalog = &api.catalog;
    wait_at_most(&api, wait, catalog.newer_than(index)).await;
    let snapshot = catalog.latest();
    let services: Vec<_> = snapshot.services().map(|service| ServiceDto::from(&**service)).collect();
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
    let service = snapshot.service(&id).ok_or(registry::Error::NoService(id))?;
    Ok(Json(ServiceDto::from(&**service)).into_response())
}

async fn remove_service(State(api): State<Api>, Path(service): Path<String>) -> Reply {
    let revision = api.registry()?.remove_service(service_id(&service)?).await?;
    Ok(Json(json!({"revision": revision.0})).into_response())
}

/// `?index` and `?wait` of a long poll.
pub(super) fn read_poll(query: Option<&str>) -> Result<(Revision, Duration), ApiError> {
    Query::of(query).read(|fields, problems| {
        let index = fields.integer("index", 0..=u64::MAX.into(), problems).unwrap_or_default();
        (Revision(u64::try_from(index).unwrap_or_default()), read_wait(fields, problems))
    })
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
    let service = snapshot.service(&id).ok_or(registry::Error::NoService(id))?;
    let instances: Vec<_> = service.instances().map(|instance| InstanceDto::from(&**instance)).collect();
    Ok(Json(json!({"revision": snapshot.revision().0, "instances": instances, "stale": StaleDto::of(&api.catalog)})).into_response())
}

/// Waits for `event`, but no longer than `wait`, nor than this server runs: what there is then is the answer.
pub(super) async fn wait_at_most<T>(api: &Api, wait: Duration, event: impl Future<Output = T>) {
    if wait.is_zero() {
        return;
    }
    tokio::select! {
        _ = tokio::time::timeout(wait, event) => {}
        () = api.tasks.shutdown().wait() => {}
    }
}

async fn show_instance(State(api): State<Api>, Path((service, id)): Path<(String, String)>) -> Reply {
    let key = instance_key(&service, &id)?;
    let snapshot = api.catalog.latest();
    let instance = snapshot.instance(&key).ok_or(registry::Error::NotFound(key))?;
    Ok(Json(InstanceDto::from(&**instance)).into_response())
}

async fn register(
    State(api): State<Api>,
    Path((service, id)): Path<(String, String)>,
    Body(body): Body,
) -> Reply {
    let registration = dto::read_registration(service, id, &body, api.registry()?.limits())?;
    let Accepted { revision, instance } = api.registry()?.register(registration).await?;
    let lease = LeaseDto::from(instance.lease);
    Ok(Json(json!({"revision": revision.0, "lease": lease, "instance": InstanceDto::from(&*instance)}))
        .into_response())
}

async fn update(
    State(api): State<Api>,
    Path((service, id)): Path<(String, String)>,
    RawQuery(query): RawQuery,
    Body(body): Body,
) -> Reply {
    let incarnation = Query::of(query.as_deref()).read(read_incarnation)?;
    let update = dto::read_update(&body, api.registry()?.limits())?;
    let accepted = api.registry()?.update(instance_key(&service, &id)?, incarnation, update).await?;
    Ok(accepted_reply(&accepted))
}

async fn drain(
    State(api): State<Api>,
    Path((service, id)): Path<(String, String)>,
    RawQuery(query): RawQuery,
) -> Reply {
    let incarnation = Query::of(query.as_deref()).read(read_incarnation)?;
    let accepted = api.registry()?.drain(instance_key(&service, &id)?, incarnation).await?;
    Ok(accepted_reply(&accepted))
}

fn accepted_reply(Accepted { revision, instance }: &Accepted) -> Response {
    Json(json!({"revision": revision.0, "instance": InstanceDto::from(&**instance)})).into_response()
}

async fn renew(
    State(api): State<Api>,
    Path((service, id)): Path<(String, String)>,
    RawQuery(query): RawQuery,
) -> Reply {
    let incarnation = Query::of(query.as_deref()).read(read_incarnation)?;
    let (ttl, revision) = api.registry()?.renew(instance_key(&service, &id)?, incarnation).await?;
    Ok(Json(json!({"revision": revision.0, "ttl": format_duration(ttl)})).into_response())
}

async fn deregister(
    State(api): State<Api>,
    Path((service, id)): Path<(String, String)>,
    RawQuery(query): RawQuery,
) -> Reply {
    let incarnation = Query::of(query.as_deref()).read(read_incarnation)?;
    let revision = api.registry()?.deregister(instance_key(&service, &id)?, incarnation).await?;
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
            let instances: Vec<_> = service.instances().map(|i| InstanceDto::from(&**i)).collect();
            (service.id.to_string(), json!({"revision": service.revision.0, "instances": instances}))
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
     GET    /v1/services/{service}/instances           its instances; ?index=REVISION&wait=30s waits for news\n\
     GET    /v1/services/{service}/live                what they say many times a second; ?index=REVISION&wait=30s\n\
     GET    /v1/services/{service}/load                the calls to it, as clients report them to this server\n\
     GET    /v1/services/{service}/instances/{id}      one\n\
     PUT    /v1/services/{service}/instances/{id}      register, update and renew\n\
     PATCH  /v1/services/{service}/instances/{id}      change weight or metadata\n\
     DELETE /v1/services/{service}/instances/{id}      deregister\n\
     POST   /v1/services/{service}/instances/{id}/drain, /renew\n\
     PUT    /v1/services/{service}/instances/{id}/live  say what changes many times a second; no proxy is told\n\
     GET    /v1/services/{service}/instances/{id}/explain  who holds it, and which proxies see it\n\
     GET    /v1/locks                                  all locks that are held; ?index=REVISION&wait=30s waits for news\n\
     GET    /v1/locks/{name}                           one\n\
     PUT    /v1/locks/{name}                           take it: {\"holder\":\"me\",\"ttl\":\"10s\",\"wait\":\"30s\"}\n\
     POST   /v1/locks/{name}/renew                     ?token=N\n\
     DELETE /v1/locks/{name}                           ?token=N gives it back; without one its holder loses it\n\
     GET    /v1/nodes                                  the Disco processes that share the store\n\
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

    use std::sync::Arc;

    use super::*;
    use crate::{
        rt::{Readiness, Tasks},
        store::MemoryStore,
        telemetry::{LogFilter, LogFormat, Metrics},
        xds::{Loads, Proxies},
    };

    #[test]
    fn queries_are_read_like_fields() {
        let (index, wait) = read_poll(Some("index=7&wait=1m")).unwrap();
        assert_eq!((index, wait), (Revision(7), Duration::from_secs(60)));
        for bad in ["index=x", "wait=30", "wait=1h", "indx=7", "index=-1"] {
            assert!(read_poll(Some(bad)).is_err(), "{bad}");
        }
        let service =
            Query::of(Some("service=123")).read(|f, p| f.parse("service", p, str::parse::<ServiceId>));
        assert_eq!(service.unwrap().unwrap().as_str(), "123", "a name of digits is a name");
        assert_eq!(percent_decode("a%20b+c%zz%"), "a b c%zz%");
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_is_answered_when_the_server_ends() {
        let tasks = Tasks::default();
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
        let registry = registry::Registry::start(config, store, reader.clone(), members, &metrics, &core);
        let log = LogFilter::start("off", LogFormat::Text).unwrap();
        let config = super::super::Config { body_limit: 1024, effective: String::new() };
        let api = Api {
            config: Arc::new(config),
            catalog: reader,
            nodes: None,
            registry: Some(registry),
            locks: None,
            proxies: Proxies::default(),
            loads: Loads::new(Duration::from_secs(10)),
            readiness,
            metrics,
            log,
            tasks: tasks.clone(),
        };
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
