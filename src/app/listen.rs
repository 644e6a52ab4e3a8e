use std::{io, net::SocketAddr, pin::pin, time::Duration};

use axum::middleware;
use futures_util::{Stream, stream};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    sync::{mpsc, watch},
};
use tonic::transport::{
    Server,
    server::{Connected, TcpConnectInfo},
};
use tonic_health::ServingStatus;
use tower::util::MapRequestLayer;

use super::Error;
use crate::{
    api::SYNCED,
    model::Members,
    proto,
    rt::{Hangup, Readiness, Tasks, Watched},
};

/// The condition of readiness that the other nodes know of this one.
const MEMBER: &str = "membership";

/// Connections that may wait to be accepted. After a restart every proxy connects in the same second; with the usual 128
/// most of them would wait for SYN retransmissions. The system caps it at net.core.somaxconn.
const BACKLOG: u32 = 16_384;

/// How often a silent peer is asked whether it is there, and how long it may take to answer: after both a dead proxy's
/// stream is dropped. Live clients answer within a round trip.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(15), Duration::from_secs(10));

/// How long an HTTP client may take from connecting, or from its last answer, to having sent the head of a request, and a
/// gRPC client from connecting to having sent the preface. Whoever
/// sends nothing, or a byte now and then, does not hold a descriptor for ever.
const HEADERS_WITHIN: Duration = Duration::from_secs(30);

/// Bytes of the preface that every HTTP/2 connection begins with. Keep-alive watches over it from there on.
const PREFACE: usize = 24;

/// After a failed accept, most likely for want of descriptors: time for some to become free.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Listens, if it is wanted, with a backlog fit for a reconnect storm.
pub(super) fn bind(
    field: &'static str,
    address: SocketAddr,
    wanted: bool,
) -> Result<Option<TcpListener>, Error> {
    if !wanted {
        return Ok(None);
    }
    let open = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    open().map(Some).map_err(|source| Error::Listen { field, address, source })
}

/// The next connection. A failed accept (out of descriptors, a peer that left) is no end: the next one may do.
async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            // An answer is written whole; waiting for more of it would only delay it.
            Ok((stream, _)) if stream.set_nodelay(true).is_ok() => return stream,
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// All connections, watched.
fn connections(listener: TcpListener) -> impl Stream<Item = io::Result<Watched>> {
    stream::unfold(listener, |listener| async {
        let watched = Watched::new(accept(&listener).await, PREFACE, HEADERS_WITHIN);
        Some((Ok(watched), listener))
    })
}

/// Takes as many descriptors as the system allows this process: every proxy holds one, and the usual 1,024 are too few.
pub(super) fn raise_descriptor_limit() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::warn!(%error, "the limit on open files stays as it is");
    }
}

impl Connected for Watched {
    type ConnectInfo = (TcpConnectInfo, Hangup);

    fn connect_info(&self) -> Self::ConnectInfo {
        (self.stream().connect_info(), self.hangup())
    }
}

/// Puts what is known of the connection where handlers look for it: the peer's address, and whether it hung up.
fn spread_connect_info<B>(mut request: http::Request<B>) -> http::Request<B> {
    let extensions = request.extensions_mut();
    if let Some((peer, hangup)) = extensions.remove::<<Watched as Connected>::ConnectInfo>() {
        extensions.insert(peer);
        extensions.insert(hangup);
    }
    request
}

/// Says over `grpc.health.v1` what `/readyz` says over HTTP.
pub(super) fn follow_readiness(
    health: tonic_health::server::HealthReporter,
    readiness: Readiness,
    tasks: &Tasks,
) {
    let shutdown = tasks.shutdown().clone();
    tasks.spawn("grpc-health", async move {
        let mut ready = false;
        loop {
            let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
            health.set_service_status("", status).await;
            ready = !ready;
            tokio::select! {
                () = readiness.becomes(ready) => {}
                () = shutdown.wait() => break,
            }
        }
        health.set_service_status("", ServingStatus::NotServing).await;
    });
}

/// Not ready while the other nodes count this one as dead: whoever wants to write should go to one of them.
pub(super) fn follow_membership(mut members: watch::Receiver<Members>, readiness: Readiness, tasks: &Tasks) {
    readiness.close(MEMBER);
    tasks.spawn_until_shutdown("readiness", async move {
        while members.wait_for(Members::is_member).await.is_ok() {
            readiness.open(MEMBER);
            if members.wait_for(|members| !members.is_member()).await.is_err() {
                return;
            }
            readiness.close(MEMBER);
        }
    });
}

pub(super) fn reflection()
-> tonic_reflection::server::v1::ServerReflectionServer<impl tonic_reflection::server::v1::ServerReflection> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
        .build_v1()
        .unwrap_or_else(|error| unreachable!("our own descriptors were compiled by the build: {error}"))
}

/// Turns away who asks for what is registered before that has been read back: nothing would be a wrong answer (never 2).
/// Health and reflection answer at any time.
pub(super) fn when_synced(routes: tonic::service::Routes, readiness: Readiness) -> tonic::service::Routes {
    let check = move |request: axum::extract::Request, next: middleware::Next| {
        let readiness = readiness.clone();
        async move {
            let about_us = request.uri().path().starts_with("/grpc.");
            if !about_us && readiness.waits_for(SYNCED) {
                let message =
                    "what is registered has not been read back from the store yet: try another node or again";
                return tonic::Status::unavailable(message).into_http();
            }
            next.run(request).await
        }
    };
    routes.into_axum_router().layer(middleware::from_fn(check)).into()
}

pub(super) fn serve_grpc(
    listener: TcpListener,
    routes: tonic::service::Routes,
    tasks: &Tasks,
    failed: mpsc::Sender<Error>,
) {
    let shutdown = tasks.shutdown().clone();
    tasks.spawn("grpc-server", async move {
        let (interval, timeout) = KEEPALIVE;
        let server = Server::builder()
            .http2_keepalive_interval(Some(interval))
            .http2_keepalive_timeout(Some(timeout))
            .layer(MapRequestLayer::new(spread_connect_info))
            .add_routes(routes)
            .serve_with_incoming_shutdown(connections(listener), shutdown.wait());
        report("grpc", server.await, &failed);
    });
}

pub(super) fn serve_http(listener: TcpListener, router: axum::Router, tasks: &Tasks) {
    let owner = tasks.clone();
    tasks.spawn("http-server", async move {
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(HEADERS_WITHIN);
        let shutdown = owner.shutdown().clone();
        loop {
            let stream = tokio::select! {
                stream = accept(&listener) => TokioIo::new(stream),
                () = shutdown.wait() => return,
            };
            let connection = http.serve_connection(stream, TowerToHyperService::new(router.clone()));
            let shutdown = shutdown.clone();
            owner.spawn("http-connection", async move {
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
        }
    });
}

fn report(name: &'static str, result: Result<(), impl std::error::Error>, failed: &mpsc::Sender<Error>) {
    if let Err(error) = result {
        // One report is enough to end the process.
        let _ = failed.try_send(Error::Server { name, reason: error.to_string() });
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpStream,
        time::Instant,
    };

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_asks_nothing_is_closed() {
        #[rustfmt::skip]
        let cases = [
            ("http", ""), ("http", "GET / HTTP/1.1\r\nHost: x"), ("http", "GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
            ("grpc", ""), ("grpc", "PRI * HT"),
        ];
        for (kind, sent) in cases {
            let listener = bind("listen", ([127, 0, 0, 1], 0).into(), true).unwrap().unwrap();
            let address = listener.local_addr().unwrap();
            let tasks = Tasks::default();
            if kind == "http" {
                serve_http(listener, axum::Router::new(), &tasks);
            } else {
                let routes = tonic::service::Routes::new(reflection());
                serve_grpc(listener, routes, &tasks, mpsc::channel(1).0);
            }
            let start = Instant::now();
            let mut connection = TcpStream::connect(address).await.unwrap();
            connection.write_all(sent.as_bytes()).await.unwrap();
            let mut answer = Vec::new();
            let ended = tokio::time::timeout(HEADERS_WITHIN * 3, connection.read_to_end(&mut answer)).await;
            // With a reset or without one.
            drop(ended.expect("it is closed"));
            assert!(start.elapsed() >= HEADERS_WITHIN, "{kind} {sent:?}: {:?}", start.elapsed());
            tasks.shutdown().start();
            assert_eq!(tasks.join(HEADERS_WITHIN).await, 0);
        }
    }
}
