use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpSocket},
    sync::mpsc,
};
use tonic::transport::{
    Server,
    server::{Connected, TcpConnectInfo},
};
use tower::util::MapRequestLayer;

use super::Error;
use crate::{
    proto,
    rt::{Hangup, Tasks, Watched},
};

/// Connections that may wait to be accepted. After a restart every proxy connects in the same second; with the usual 128
/// most of them would wait for SYN retransmissions. The system caps it at net.core.somaxconn.
const BACKLOG: u32 = 16_384;

/// How often a silent peer is asked whether it is there, and how long it may take to answer: after both a dead proxy's
/// stream is dropped. Live clients answer within a round trip.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(15), Duration::from_secs(10));

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

/// Accepted connections. A failed accept (out of descriptors, a peer that left) is no end: the next one may do.
struct Connections(TcpListener);

impl futures_util::Stream for Connections {
    type Item = io::Result<Watched>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_accept(cx).map(|accepted| {
            Some(accepted.and_then(|(stream, _)| {
                stream.set_nodelay(true)?;
                Ok(Watched::new(stream))
            }))
        })
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

pub(super) fn reflection()
-> tonic_reflection::server::v1::ServerReflectionServer<impl tonic_reflection::server::v1::ServerReflection> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
        .build_v1()
        .unwrap_or_else(|error| unreachable!("our own descriptors were compiled by the build: {error}"))
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
            .serve_with_incoming_shutdown(Connections(listener), shutdown.wait());
        report("grpc", server.await, &failed);
    });
}

pub(super) fn serve_http(
    listener: TcpListener,
    router: axum::Router,
    tasks: &Tasks,
    failed: mpsc::Sender<Error>,
) {
    let shutdown = tasks.shutdown().clone();
    tasks.spawn("http-server", async move {
        let server =
            axum::serve(listener, router).with_graceful_shutdown(async move { shutdown.wait().await });
        report("http", server.await, &failed);
    });
}

fn report(name: &'static str, result: Result<(), impl std::error::Error>, failed: &mpsc::Sender<Error>) {
    if let Err(error) = result {
        // One report is enough to end the process.
        let _ = failed.try_send(Error::Server { name, reason: error.to_string() });
    }
}
