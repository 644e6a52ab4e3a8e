//! The servers under test as processes, each with a way to make one change.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use envoy_types::pb::envoy::{
    config::core::v3::Node,
    service::discovery::v3::{
        DeltaDiscoveryRequest, aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
    },
};
use tokio_stream::StreamExt as _;

use crate::{
    common,
    limit::{CHANGE, OPENING},
    load::ENDPOINTS,
    service,
};

pub(crate) trait Server {
    /// Where streams connect.
    fn address(&self) -> SocketAddr;
    /// Makes a change that every stream is sent, and waits for the answer; when it was asked for.
    fn change(&mut self) -> Instant;
    /// CPU seconds used so far.
    fn cpu(&self) -> f64;
    /// Resident memory in KiB.
    fn memory(&self) -> u64;
}

/// A Disco with services; changes go to the first.
pub(crate) struct Disco {
    process: common::Disco,
    writer: Writer,
    changes: usize,
    instances: usize,
}

/// Connections that register what is there from the start.
const REGISTRARS: usize = 16;

impl Disco {
    /// With so many services of so many instances.
    pub(crate) fn start(services: usize, instances: usize) -> Self {
        let process = common::Disco::start(None);
        std::thread::scope(|scope| {
            for registrar in 0..REGISTRARS.min(services) {
                let http = &process.http;
                scope.spawn(move || {
                    let mut writer = Writer::connect(http);
                    for n in (registrar..services).step_by(REGISTRARS) {
                        (0..instances).for_each(|instance| writer.put(&service(n), instance, 1));
                    }
                });
            }
        });
        let writer = Writer::connect(&process.http);
        Self { process, writer, changes: 0, instances }
    }
}

impl Server for Disco {
    fn address(&self) -> SocketAddr {
        self.process.grpc.parse().expect("an address")
    }

    fn change(&mut self) -> Instant {
        self.changes += 1;
        let sent = Instant::now();
        self.writer.put(&service(0), self.changes % self.instances, 2 + self.changes);
        sent
    }

    fn cpu(&self) -> f64 {
        self.process.cpu()
    }

    fn memory(&self) -> u64 {
        self.process.memory()
    }
}

/// A blocking connection to the HTTP API: its thread is woken by nothing but the answer.
struct Writer(BufReader<TcpStream>);

impl Writer {
    fn connect(address: &str) -> Self {
        let stream = TcpStream::connect(address).expect("disco listens");
        stream.set_nodelay(true).expect("an option");
        Self(BufReader::new(stream))
    }

    fn put(&mut self, service: &str, instance: usize, weight: usize) {
        let port = 20_000 + instance;
        let body = format!(r#"{{"address":"127.0.0.1","port":{port},"weight":{weight},"ttl":"1h"}}"#);
        let request = format!(
            "PUT /v1/services/{service}/instances/{service}-{instance} HTTP/1.1\r\nhost: disco\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        self.0.get_mut().write_all(request.as_bytes()).expect("disco reads");
        let (mut line, mut status, mut length) = (String::new(), String::new(), 0);
        while line != "\r\n" {
            line.clear();
            assert!(self.0.read_line(&mut line).expect("disco answers") > 0, "disco hung up");
            if status.is_empty() {
                status.clone_from(&line);
            }
            if let Some(value) = line.strip_prefix("content-length:") {
                length = value.trim().parse().expect("a length");
            }
        }
        let mut body = vec![0; length];
        self.0.read_exact(&mut body).expect("disco answers");
        assert!(status.contains(" 200 "), "{status}{}", String::from_utf8_lossy(&body));
    }
}

/// The limit server.
pub(crate) struct Limit {
    process: Child,
    address: SocketAddr,
    control: TcpStream,
    change: Vec<u8>,
}

impl Limit {
    /// Answers streams with `opening` when they have sent so many requests, and each change with `change`.
    pub(crate) fn start(opening: &[Vec<u8>], requests: u8, change: &[u8]) -> Self {
        let this = std::env::current_exe().expect("this program");
        let mut process =
            Command::new(this).arg("limit").stdout(Stdio::piped()).spawn().expect("the limit starts");
        let mut line = String::new();
        let stdout = process.stdout.take().expect("stdout is piped");
        BufReader::new(stdout).read_line(&mut line).expect("the limit says where it listens");
        let (address, control) = line.trim().split_once(' ').expect("two addresses");
        let control = TcpStream::connect(control).expect("the limit listens");
        control.set_nodelay(true).expect("an option");
        let address = address.parse().expect("an address");
        let mut limit = Self { process, address, control, change: change.to_vec() };
        opening.iter().for_each(|response| limit.tell(OPENING, requests, response));
        limit
    }

    fn tell(&mut self, operation: u8, requests: u8, body: &[u8]) {
        let len = u32::try_from(body.len()).expect("small").to_be_bytes();
        let message = [&[operation, requests], &len[..], body].concat();
        self.control.write_all(&message).expect("the limit reads");
        self.control.read_exact(&mut [0]).expect("the limit answers");
    }
}

impl Server for Limit {
    fn address(&self) -> SocketAddr {
        self.address
    }

    fn change(&mut self) -> Instant {
        let change = std::mem::take(&mut self.change);
        let sent = Instant::now();
        self.tell(CHANGE, 0, &change);
        self.change = change;
        sent
    }

    fn cpu(&self) -> f64 {
        common::cpu(&self.process)
    }

    fn memory(&self) -> u64 {
        common::memory(&self.process)
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Clients that subscribe to more names than anybody may, again and again.
pub(crate) struct Greedy {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Greedy {
    pub(crate) fn start(address: SocketAddr, clients: usize, names: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let request = DeltaDiscoveryRequest {
            node: Some(Node { id: "greedy".into(), user_agent_name: "envoy".into(), ..Node::default() }),
            type_url: ENDPOINTS.into(),
            resource_names_subscribe: (0..names).map(|n| format!("name-{n}")).collect(),
            ..DeltaDiscoveryRequest::default()
        };
        let thread = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            while !stopped.load(Ordering::Relaxed) {
                runtime.block_on(async {
                    let channel = common::connect(&address.to_string()).await;
                    let mut client = AggregatedDiscoveryServiceClient::new(channel);
                    let requests = tokio_stream::iter([request.clone()]).chain(tokio_stream::pending());
                    if let Ok(responses) = client.delta_aggregated_resources(requests).await {
                        let mut responses = responses.into_inner();
                        let end = tokio::time::timeout(Duration::from_secs(5), responses.message()).await;
                        assert!(matches!(end, Ok(Err(_))), "a million names are refused: {end:?}");
                    }
                });
                // Each of them once in 10 s, one after the other.
                std::thread::sleep(Duration::from_secs(10) / u32::try_from(clients).expect("few"));
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Greedy {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
