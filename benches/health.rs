//! What health checks cost: 10,000 instances every 5 s, by kind of check.
//!
//! `cargo bench --profile fast --bench health`. A real `disco dev` checks; the servers that answer are in this process. The row
//! `none` is the same registry without checks: what is above it is theirs.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a benchmark prints, and stops when anything fails"
)]

use std::{io, net::SocketAddr, time::Duration};

#[path = "common/mod.rs"]
mod common;

use bytes::Bytes;
use disco::proto::v1::{
    GrpcCheck, HealthCheck, HttpCheck, RegisterRequest, TcpCheck, health_check::Kind,
    registry_client::RegistryClient,
};
use http_body_util::Empty;
use hyper_util::rt::TokioIo;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::{net::TcpListener, runtime::Runtime, task::JoinSet, time::Instant};
use tokio_stream::wrappers::TcpListenerStream;

const INSTANCES: usize = 10_000;
const INTERVAL: Duration = Duration::from_secs(5);
const CLIENTS: usize = 64;
/// Four times each instance.
const MEASURE: Duration = Duration::from_secs(20);

fn main() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    let runtime = Runtime::new().unwrap();
    runtime.block_on(async {
        let (http, grpc) = (serve_http().await, serve_grpc().await);
        println!("{INSTANCES} instances, each checked every {INTERVAL:?}\n");
        println!("check   share of a core  us CPU a check  checks/s  late    MiB");
        for (name, kind, server) in [
            ("none", None, http),
            ("tcp", Some(Kind::Tcp(TcpCheck {})), http),
            ("http", Some(Kind::Http(HttpCheck::default())), http),
            ("grpc", Some(Kind::Grpc(GrpcCheck::default())), grpc),
        ] {
            row(name, kind, server).await;
        }
    });
}

async fn row(name: &str, kind: Option<Kind>, server: SocketAddr) {
    let disco = common::Disco::start(None);
    let mut tasks = JoinSet::new();
    for client in 0..CLIENTS {
        let mut registry = RegistryClient::new(common::connect(&disco.grpc).await);
        let kind = kind.clone();
        tasks.spawn(async move {
            for n in (client..INSTANCES).step_by(CLIENTS) {
                let check = kind.clone().map(|kind| HealthCheck {
                    kind: Some(kind),
                    interval: INTERVAL.try_into().ok(),
                    jitter: Some(0),
                    ..HealthCheck::default()
                });
                let request = RegisterRequest {
                    service: format!("service-{:04}", n / 20),
                    id: format!("instance-{n:05}"),
                    address: server.ip().to_string(),
                    port: server.port().into(),
                    ttl: Duration::from_secs(3600).try_into().ok(),
                    check,
                    ..RegisterRequest::default()
                };
                registry.register(request).await.unwrap();
            }
        });
    }
    tasks.join_all().await;
    // Past the first results.
    tokio::time::sleep(INTERVAL * 2).await;

    let checks =
        async || disco.metrics().await.get("disco_health_check_seconds_count").copied().unwrap_or(0.0);
    let (cpu, before, start) = (disco.cpu(), checks().await, Instant::now());
    tokio::time::sleep(MEASURE).await;
    let (cpu, done, took) = (disco.cpu() - cpu, checks().await - before, start.elapsed().as_secs_f64());
    let due = took / INTERVAL.as_secs_f64() * INSTANCES as f64;
    println!(
        "{name:<6} {:>15.1} % {:>15.1} {:>9.0} {:>4.1} % {:>6.1}",
        100.0 * cpu / took,
        if done > 0.0 { cpu * 1e6 / done } else { 0.0 },
        done / took,
        if done > 0.0 { 100.0 * (1.0 - done / due) } else { 0.0 },
        disco.memory() as f64 / 1024.0,
    );
}

async fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

#[allow(clippy::disallowed_methods, reason = "it lasts as long as the benchmark")]
async fn serve_http() -> SocketAddr {
    let (listener, address) = listen().await;
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let answer = hyper::service::service_fn(async |_| {
                    Ok::<_, io::Error>(http::Response::new(Empty::<Bytes>::new()))
                });
                let server = hyper::server::conn::http1::Builder::new();
                let _ = server.serve_connection(TokioIo::new(stream), answer).await;
            });
        }
    });
    address
}

#[allow(clippy::disallowed_methods, reason = "it lasts as long as the benchmark")]
async fn serve_grpc() -> SocketAddr {
    let (_, health) = tonic_health::server::health_reporter();
    let (listener, address) = listen().await;
    let server = tonic::transport::Server::builder().add_service(health);
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    address
}
