//! Connections: a bounded number of them, each served in a task of its own, and old ones told to go elsewhere.

use std::{pin::pin, sync::Arc, time::Duration};

use axum::{
    extract::{Request, State},
    middleware::Next,
    response::Response,
};
use bytes::{BufMut as _, Bytes, BytesMut};
use hyper::{
    body,
    server::conn::{http1, http2},
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use prometheus_client::metrics::{counter::Counter, family::Family, gauge::Gauge};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};
use tonic::{
    service::Routes,
    transport::server::{Connected as _, TcpConnectInfo},
};
use tower::{Service as _, util::MapRequest};

use super::incoming::Incoming;
use crate::{
    rt::{Hangup, Leave, Shutdown, Tasks, Watched},
    telemetry::Metrics,
};

/// How often a silent peer is asked whether it is there, and how long it may take to answer: after both a dead proxy's
/// stream is dropped. Live clients answer within a round trip.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(15), Duration::from_secs(10));

/// How long an HTTP client may take from connecting, or from its last answer, to having sent the head of a request, and a
/// gRPC client from connecting to having sent the preface. Whoever
/// sends nothing, or a byte now and then, does not hold a descriptor for ever.
const HEADERS_WITHIN: Duration = Duration::from_secs(30);

/// Bytes of responses that wait for a socket, for each stream. When all proxies are sent everything at once this is what they take, and
/// the allocator keeps it.
const SEND_BUFFER: usize = 32 << 10;

/// Bytes of the preface that every HTTP/2 connection begins with. Keep-alive watches over it from there on.
const PREFACE: usize = 24;

/// Connections age by up to this part more or less than they should: those that were made together do not end together
/// (rule K7).
const JITTER: f64 = 0.1;

/// Connections that are told at the same time why they are turned away, and how long that may take. Others are only closed.
const REFUSALS: usize = 64;
const REFUSAL: Duration = Duration::from_secs(1);

/// How often a limit that is hit is logged.
const WARN_EVERY: Duration = Duration::from_secs(10);

/// A listener and the number of connections that it may have at the same time.
#[derive(Debug)]
pub(super) struct Door {
    incoming: Incoming,
    limit: usize,
    /// The setting of the limit.
    setting: &'static str,
    open: Gauge,
    refused: Counter,
}

impl Door {
    pub(super) fn grpc(incoming: Incoming, limit: usize, metrics: &Metrics) -> Self {
        Self {
            incoming,
            limit,
            setting: "limits.grpc_connections",
            open: metrics.gauge("grpc_connections", "Open gRPC connections"),
            refused: metrics.counter("grpc_connections_refused", "gRPC connections beyond the limit"),
        }
    }

    pub(super) fn http(incoming: Incoming, limit: usize, metrics: &Metrics) -> Self {
        Self {
            incoming,
            limit,
            setting: "limits.http_connections",
            open: metrics.gauge("http_connections", "Open HTTP connections"),
            refused: metrics.counter("http_connections_refused", "HTTP connections beyond the limit"),
        }
    }

    /// Hands each connection to `serve` until shutdown. Those beyond the limit are told why and closed; the others go on.
    async fn run(mut self, tasks: &Tasks, refusal: impl Fn(&str) -> Bytes, serve: impl Fn(TcpStream, Place)) {
        let places = Arc::new(Semaphore::new(self.limit.min(Semaphore::MAX_PERMITS)));
        let refusals = Arc::new(Semaphore::new(REFUSALS));
        let Self { limit, setting, .. } = self;
        let reason = format!(
            "this server has {limit} connections, as many as it may ({setting}); connect to another one, or later"
        );
        let refusal = refusal(&reason);
        let mut warned: Option<Instant> = None;
        loop {
            let stream = tokio::select! {
                stream = self.incoming.next() => stream,
                () = tasks.shutdown().wait() => return,
            };
            if let Ok(permit) = Arc::clone(&places).try_acquire_owned() {
                self.open.inc();
                serve(stream, Place { open: self.open.clone(), _permit: permit });
                continue;
            }
            self.refused.inc();
            if warned.is_none_or(|last| last.elapsed() >= WARN_EVERY) {
                warned = Some(Instant::now());
                tracing::warn!(limit, setting, refused = self.refused.get(), "connections are turned away");
            }
            if let Ok(permit) = Arc::clone(&refusals).try_acquire_owned() {
                let refusal = refusal.clone();
                tasks.spawn("refusal", async move {
                    let _permit = permit;
                    let _ = tokio::time::timeout(REFUSAL, refuse(stream, refusal)).await;
                });
            }
        }
    }
}

/// The place of a connection.
struct Place {
    open: Gauge,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.open.dec();
    }
}

/// Says why and waits for the other end to close: to close first, with what it sent unread, could take back what was said.
async fn refuse(mut stream: TcpStream, refusal: Bytes) -> std::io::Result<()> {
    stream.write_all(&refusal).await?;
    stream.shutdown().await?;
    let mut rest = [0; 1024];
    while stream.read(&mut rest).await? > 0 {}
    Ok(())
}

/// An answer to whatever is asked.
fn http_refusal(reason: &str) -> Bytes {
    let error =
        serde_json::json!({"error": {"code": "unavailable", "message": reason, "fields": []}}).to_string();
    Bytes::from(format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\
         retry-after: 1\r\n\r\n{error}",
        error.len()
    ))
}

/// HTTP/2's: empty SETTINGS, then GOAWAY before the first stream, ENHANCE_YOUR_CALM, with the reason (RFC 9113, 6.8).
fn grpc_refusal(reason: &str) -> Bytes {
    const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    const GOAWAY: u8 = 7;
    const ENHANCE_YOUR_CALM: u32 = 0xb;
    let len = u32::try_from(8 + reason.len()).unwrap_or(8);
    let mut frames = BytesMut::new();
    frames.put_slice(&SETTINGS);
    frames.put_uint(u64::from(len), 3);
    frames.put_u8(GOAWAY);
    frames.put_slice(&[0; 5]);
    frames.put_u32(0);
    frames.put_u32(ENHANCE_YOUR_CALM);
    frames.put_slice(reason.as_bytes());
    frames.freeze()
}

/// The services of one connection, which know what it is.
#[derive(Clone)]
struct Connection {
    routes: Routes,
    peer: TcpConnectInfo,
    hangup: Hangup,
    leave: Leave,
}

impl hyper::service::Service<http::Request<body::Incoming>> for Connection {
    type Response = <Routes as tower::Service<http::Request<body::Incoming>>>::Response;
    type Error = <Routes as tower::Service<http::Request<body::Incoming>>>::Error;
    type Future = <Routes as tower::Service<http::Request<body::Incoming>>>::Future;

    fn call(&self, mut request: http::Request<body::Incoming>) -> Self::Future {
        let extensions = request.extensions_mut();
        extensions.insert(self.peer.clone());
        extensions.insert(self.hangup.clone());
        extensions.insert(self.leave.clone());
        // Always ready.
        self.routes.clone().call(request)
    }
}

/// Serves gRPC. With `age`, a connection that is about as old takes no new streams, and those that are there and can move to
/// another connection at no cost do so when it suits them (rule K7). None is cut.
pub(super) fn grpc(door: Door, routes: Routes, age: Option<Duration>, metrics: &Metrics, tasks: &Tasks) {
    let errors =
        metrics.register("grpc_errors", "gRPC requests that were refused at once", Errors::default());
    let noting = axum::middleware::from_fn_with_state(errors, note_error);
    let routes = Routes::from(routes.into_axum_router().layer(noting)).prepare();
    let owner = tasks.clone();
    tasks.spawn("grpc-server", async move {
        let (interval, timeout) = KEEPALIVE;
        let mut http = http2::Builder::new(TokioExecutor::new());
        http.timer(TokioTimer::new())
            .keep_alive_interval(interval)
            .keep_alive_timeout(timeout)
            .max_send_buf_size(SEND_BUFFER)
            // Each service has a limit of its own.
            .max_concurrent_streams(None);
        let shutdown = owner.shutdown();
        let serve = |stream: TcpStream, place: Place| {
            let stream = Watched::new(stream, PREFACE, HEADERS_WITHIN);
            let leave = if age.is_some() { shutdown.child() } else { shutdown.clone() };
            let connection = Connection {
                routes: routes.clone(),
                peer: stream.stream().connect_info(),
                hangup: stream.hangup(),
                leave: Leave(leave.clone()),
            };
            let age = age.map(|age| age.mul_f64(1.0 - JITTER + 2.0 * JITTER * fastrand::f64()));
            let connection = http.serve_connection(TokioIo::new(stream), connection);
            owner.spawn_often_polled(async move {
                let _place = place;
                let mut connection = pin!(connection);
                let ended = tokio::select! {
                    ended = connection.as_mut() => ended,
                    () = until_old(age, &leave) => {
                        // First the connection, so that what comes anew comes over another one.
                        connection.as_mut().graceful_shutdown();
                        leave.start();
                        connection.await
                    }
                };
                if let Err(error) = ended {
                    tracing::debug!(%error, "a gRPC connection broke off");
                }
            });
        };
        door.run(&owner, grpc_refusal, serve).await;
    });
}

type Errors = Family<[(&'static str, String); 1], Counter>;

/// Counts and logs requests that are refused at once, such as those that cannot be read; streams that end later tell it themselves.
async fn note_error(State(errors): State<Errors>, request: Request, next: Next) -> Response {
    let path = request.uri().clone();
    let response = next.run(request).await;
    if let Some(status) = tonic::Status::from_header_map(response.headers())
        && status.code() != tonic::Code::Ok
    {
        errors.get_or_create(&[("code", format!("{:?}", status.code()))]).inc();
        tracing::debug!(path = path.path(), code = ?status.code(), message = status.message(), "refused");
    }
    response
}

async fn until_old(age: Option<Duration>, leave: &Shutdown) {
    match age {
        Some(age) => {
            let _ = tokio::time::timeout(age, leave.wait()).await;
        }
        None => leave.wait().await,
    }
}

pub(super) fn http(door: Door, router: axum::Router, tasks: &Tasks) {
    let owner = tasks.clone();
    tasks.spawn("http-server", async move {
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(HEADERS_WITHIN);
        let serve = |stream: TcpStream, place: Place| {
            let peer = stream.connect_info();
            let service =
                MapRequest::new(router.clone(), move |mut request: http::Request<body::Incoming>| {
                    request.extensions_mut().insert(peer.clone());
                    request
                });
            let service = TowerToHyperService::new(service);
            let connection = http.serve_connection(TokioIo::new(stream), service);
            let shutdown = owner.shutdown().clone();
            owner.spawn("http-connection", async move {
                let _place = place;
                let mut connection = pin!(connection);
                let ended = tokio::select! {
                    ended = connection.as_mut() => ended,
                    () = shutdown.wait() => {
                        connection.as_mut().graceful_shutdown();
                        connection.await
                    }
                };
                if let Err(error) = ended {
                    tracing::debug!(%error, "an HTTP connection broke off");
                }
            });
        };
        door.run(&owner, http_refusal, serve).await;
    });
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWrite;
    use tonic::transport::Endpoint;
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

    use super::{super::listen, *};

    fn listener() -> Incoming {
        listen::bind("listen", ([127, 0, 0, 1], 0).into(), true).unwrap().unwrap()
    }

    async fn finish(tasks: Tasks) {
        tasks.shutdown().start();
        assert_eq!(tasks.join(HEADERS_WITHIN).await, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_asks_nothing_is_closed() {
        #[rustfmt::skip]
        let cases = [
            ("http", ""), ("http", "GET / HTTP/1.1\r\nHost: x"), ("http", "GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
            ("grpc", ""), ("grpc", "PRI * HT"),
        ];
        for (kind, sent) in cases {
            let (listener, metrics, tasks) = (listener(), Metrics::default(), Tasks::default());
            let address = listener.address().unwrap();
            if kind == "http" {
                http(Door::http(listener, 1, &metrics), axum::Router::new(), &tasks);
            } else {
                grpc(
                    Door::grpc(listener, 1, &metrics),
                    Routes::new(listen::reflection(&[])),
                    None,
                    &metrics,
                    &tasks,
                );
            }
            let start = Instant::now();
            let mut connection = TcpStream::connect(address).await.unwrap();
            connection.write_all(sent.as_bytes()).await.unwrap();
            let mut answer = Vec::new();
            let ended = tokio::time::timeout(HEADERS_WITHIN * 3, connection.read_to_end(&mut answer)).await;
            // With a reset or without one.
            drop(ended.expect("it is closed"));
            assert!(start.elapsed() >= HEADERS_WITHIN, "{kind} {sent:?}: {:?}", start.elapsed());
            finish(tasks).await;
        }
    }

    #[tokio::test]
    async fn connections_beyond_the_limit_are_told_why_and_the_others_go_on() {
        let (metrics, tasks) = (Metrics::default(), Tasks::default());
        let over_http = listener();
        let address = over_http.address().unwrap();
        let router = axum::Router::new().route("/", axum::routing::get(|| async { "here" }));
        http(Door::http(over_http, 1, &metrics), router, &tasks);
        let ask = async |connection: &mut (dyn AsyncWrite + Unpin + Send)| {
            connection.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        };
        let mut first = TcpStream::connect(address).await.unwrap();
        let mut buffer = [0; 1024];
        ask(&mut first).await;
        assert!(first.read(&mut buffer).await.unwrap() > 0);
        let mut second = TcpStream::connect(address).await.unwrap();
        ask(&mut second).await;
        let mut refusal = String::new();
        second.read_to_string(&mut refusal).await.unwrap();
        assert!(
            refusal.starts_with("HTTP/1.1 503 ") && refusal.contains("limits.http_connections"),
            "{refusal}"
        );
        ask(&mut first).await;
        let read = first.read(&mut buffer).await.unwrap();
        assert!(String::from_utf8_lossy(&buffer[..read]).starts_with("HTTP/1.1 200 "));

        let over_grpc = listener();
        let address = over_grpc.address().unwrap();
        let (_reporter, health) = tonic_health::server::health_reporter();
        grpc(Door::grpc(over_grpc, 1, &metrics), Routes::new(health), None, &metrics, &tasks);
        let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
        let call = async |client: &mut HealthClient<_>| client.check(HealthCheckRequest::default()).await;
        let mut first = HealthClient::new(endpoint.connect().await.unwrap());
        call(&mut first).await.unwrap();
        let mut second = HealthClient::new(endpoint.connect_lazy());
        let refused = call(&mut second).await.unwrap_err();
        let reason = format!("{refused:?}");
        assert!(
            reason.contains("ENHANCE_YOUR_CALM") && reason.contains("limits.grpc_connections"),
            "{reason}"
        );
        call(&mut first).await.unwrap();
        drop(first);
        let text = metrics.text();
        for line in ["disco_http_connections 1", "disco_http_connections_refused_total 1"] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        // The place is free again, as soon as the server knows.
        tokio::time::timeout(HEADERS_WITHIN, async { while call(&mut second).await.is_err() {} })
            .await
            .unwrap();
        drop(second);
        finish(tasks).await;
    }
}
