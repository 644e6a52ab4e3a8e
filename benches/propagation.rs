//! How long a change takes to reach proxies, with 1, 100 and 1,000 delta ADS streams of one connection each: from a write to
//! its answer, from the answer until the ledger says that every proxy has acknowledged it, from the write until each proxy
//! has it; and what a connected proxy costs in CPU and memory.
//!
//! `cargo bench --profile fast --bench propagation`
#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::large_futures,
    clippy::print_stdout,
    reason = "a benchmark: it runs in real time, prints, and ends where something is wrong"
)]

#[path = "common/mod.rs"]
mod common;

use std::time::{Duration, Instant};

use disco::proto::v1::{
    RegisterRequest, WaitAcknowledgedRequest, proxies_client::ProxiesClient, registry_client::RegistryClient,
};
use envoy_types::pb::envoy::{
    config::core::v3::Node,
    service::discovery::v3::{
        DeltaDiscoveryRequest, aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
    },
};
use hdrhistogram::Histogram;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

const CHANGES: u16 = 300;
const INSTANCES: u16 = 20;
const CLUSTER: &str = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
const ENDPOINTS: &str = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment";
const LISTENER: &str = "type.googleapis.com/envoy.config.listener.v3.Listener";
const ROUTE: &str = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration";

fn main() {
    common::guard::start(Duration::from_secs(120));
    println!("{CHANGES} endpoint changes of a service of {INSTANCES} instances; milliseconds");
    println!(
        "{:>8} {:>12} {:>8} {:>14} {:>8} {:>16} {:>8} {:>12} {:>11}",
        "proxies",
        "answer p50",
        "p99",
        "then ACKs p50",
        "p99",
        "write to it p50",
        "p99",
        "CPU us/resp",
        "KiB a proxy"
    );
    for proxies in [1, 100, 1000] {
        measure(proxies);
    }
}

fn measure(proxies: usize) {
    let data = tempfile::tempdir().expect("a directory");
    let disco = common::Disco::start(Some(data.path()));
    // Who writes has a thread of its own: it must see its answers when they come, not when a thousand proxies are done.
    let runtime = |threads| {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(threads).enable_all().build().expect("a runtime")
    };
    let (writer, fleet) = (runtime(1), runtime(1));
    let (received, mut arrivals) = mpsc::channel::<Instant>(4096);

    let (mut registry, mut ledger) = writer.block_on(async {
        let channel = common::connect(&disco.grpc).await;
        let mut registry = RegistryClient::new(channel.clone());
        for n in 0..INSTANCES {
            register(&mut registry, n, 1).await;
        }
        (registry, ProxiesClient::new(channel))
    });
    let idle = disco.memory();
    for n in 0..proxies {
        fleet.spawn(proxy(disco.grpc.clone(), n, received.clone()));
    }

    let mut answers = histogram();
    let mut acks = histogram();
    let mut each = histogram();
    let (cpu, connected) = writer.block_on(async {
        for _ in 0..proxies {
            arrivals.recv().await.expect("every proxy is sent the endpoints");
        }
        let revision = register(&mut registry, 0, 1).await;
        wait(&mut ledger, revision).await;
        let connected = disco.memory();
        let cpu = disco.cpu();
        for change in 0..CHANGES {
            let sent = Instant::now();
            let revision = register(&mut registry, change % INSTANCES, 2 + u32::from(change)).await;
            let answered = Instant::now();
            wait(&mut ledger, revision).await;
            acks.saturating_record(micros(answered.elapsed()));
            answers.saturating_record(micros(answered - sent));
            for _ in 0..proxies {
                let at = arrivals.recv().await.expect("every proxy is sent the change");
                each.saturating_record(micros(at.saturating_duration_since(sent)));
            }
        }
        (disco.cpu() - cpu, connected)
    });
    let ms = |histogram: &Histogram<u64>, at: f64| histogram.value_at_quantile(at) as f64 / 1000.0;
    println!(
        "{proxies:>8} {:>12.2} {:>8.2} {:>14.2} {:>8.2} {:>16.2} {:>8.2} {:>12.1} {:>11.1}",
        ms(&answers, 0.5),
        ms(&answers, 0.99),
        ms(&acks, 0.5),
        ms(&acks, 0.99),
        ms(&each, 0.5),
        ms(&each, 0.99),
        cpu * 1e6 / (f64::from(CHANGES) * proxies as f64),
        connected.saturating_sub(idle) as f64 / proxies as f64,
    );
    if proxies == 1 {
        println!(
            "         (an idle disco dev with {INSTANCES} instances holds {:.1} MiB)",
            idle as f64 / 1024.0
        );
    }
    fleet.shutdown_background();
}

fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000, 3).expect("a histogram")
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

async fn register(registry: &mut RegistryClient<Channel>, n: u16, weight: u32) -> u64 {
    let request = RegisterRequest {
        service: "greeter".into(),
        id: format!("greeter-{n}"),
        address: "127.0.0.1".into(),
        port: u32::from(20_000 + n),
        weight,
        ttl: Some(prost_types::Duration { seconds: 3600, nanos: 0 }),
        ..RegisterRequest::default()
    };
    registry.register(request).await.expect("a registration").into_inner().revision
}

async fn wait(ledger: &mut ProxiesClient<Channel>, revision: u64) {
    let request = WaitAcknowledgedRequest {
        revision,
        service: "greeter".into(),
        timeout: Some(prost_types::Duration { seconds: 30, nanos: 0 }),
    };
    let answer = ledger.wait_acknowledged(request).await.expect("an answer").into_inner();
    assert!(answer.complete, "not acknowledged in 30 s by {:?}", answer.pending);
}

/// A proxy as Envoy behaves: asks for clusters, endpoints, the listener and the routes, and acknowledges what it is sent. Says
/// when endpoints arrive.
async fn proxy(address: String, n: usize, received: mpsc::Sender<Instant>) {
    let (requests, stream) = mpsc::channel(16);
    let first = |type_url: &str, names: &[&str], node: Option<Node>| DeltaDiscoveryRequest {
        node,
        type_url: type_url.into(),
        resource_names_subscribe: names.iter().map(|name| (*name).into()).collect(),
        ..DeltaDiscoveryRequest::default()
    };
    let node = Node { id: format!("bench-{n}"), user_agent_name: "envoy".into(), ..Node::default() };
    requests.send(first(CLUSTER, &[], Some(node))).await.expect("room");
    requests.send(first(ENDPOINTS, &["greeter"], None)).await.expect("room");
    requests.send(first(LISTENER, &[], None)).await.expect("room");
    requests.send(first(ROUTE, &["outbound"], None)).await.expect("room");
    let mut client = AggregatedDiscoveryServiceClient::new(common::connect(&address).await);
    let mut responses =
        client.delta_aggregated_resources(ReceiverStream::new(stream)).await.expect("a stream").into_inner();
    while let Ok(Some(response)) = responses.message().await {
        let at = Instant::now();
        let ack = DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce,
            ..DeltaDiscoveryRequest::default()
        };
        requests.send(ack).await.expect("the stream is open");
        if response.type_url == ENDPOINTS {
            received.send(at).await.expect("the benchmark runs");
        }
    }
}
