//! The servers under test as processes, each with a way to make one change.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::Path,
    process::{Command, Stdio},
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
use serde_json::Value;
use tokio_stream::StreamExt as _;

use crate::{
    common::{self, guard::Server as Guarded},
    limit::{CHANGE, OPENING},
    load::{ENDPOINTS, PATIENCE},
    measure::service,
};

/// What a server that is no registry serves.
#[derive(Debug, Clone, Default)]
pub(crate) struct Content {
    /// Responses, as they open a stream.
    pub(crate) opening: Vec<Vec<u8>>,
    /// Responses, each with a change to the one before. They are made in turns.
    pub(crate) changes: Vec<Vec<u8>>,
}

/// Caches of go-control-plane.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Cache {
    Linear,
    Snapshot,
}

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
        Self::filled(common::Disco::start(None), services, instances)
    }

    /// Likewise, with settings of `xds`.
    pub(crate) fn start_with(xds: &str, services: usize, instances: usize) -> Self {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let text = format!("roles: [registry, xds, admin]\nstore: memory\nxds: {{{xds}}}\n");
        std::fs::write(file.path(), text).expect("room for a file");
        Self::filled(common::Disco::serve(file.path()), services, instances)
    }

    fn filled(process: common::Disco, services: usize, instances: usize) -> Self {
        std::thread::scope(|scope| {
            for registrar in 0..REGISTRARS.min(services) {
                let http = &process.http;
                scope.spawn(move || {
                    let mut writer = Writer::connect(http);
                    for n in (registrar..services).step_by(REGISTRARS) {
                        (0..instances).for_each(|instance| _ = writer.put(&service(n), instance, 1));
                    }
                });
            }
        });
        let writer = Writer::connect(&process.http);
        Self { process, writer, changes: 0, instances }
    }

    /// Makes a change and waits until all proxies have acknowledged it; how long both took.
    pub(crate) fn change_everywhere(&mut self) -> Duration {
        self.changes += 1;
        let start = Instant::now();
        let name = service(0);
        let answer = self.writer.put(&name, self.changes % self.instances, 2 + self.changes);
        let revision = &answer["revision"];
        let progress = self.writer.get(&format!("/v1/revisions/{revision}?service={name}&wait=10s"));
        let took = start.elapsed();
        assert_eq!(progress["complete"], true, "{progress}");
        took
    }

    /// Whether somebody is connected, and all have acknowledged everything.
    pub(crate) fn is_synced(&mut self) -> bool {
        let list = self.writer.get("/v1/proxies");
        let proxies = list["proxies"].as_array().expect("a list");
        // An Envoy asks for its routes last.
        let asked = |proxy: &Value| proxy["types"].as_array().is_some_and(|types| types.len() >= 4);
        !proxies.is_empty() && proxies.iter().all(|proxy| proxy["synced"] == true && asked(proxy))
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
        stream.set_read_timeout(Some(PATIENCE)).expect("an option");
        Self(BufReader::new(stream))
    }

    fn put(&mut self, service: &str, instance: usize, weight: usize) -> Value {
        let port = 20_000 + instance;
        let body = format!(r#"{{"address":"127.0.0.1","port":{port},"weight":{weight},"ttl":"1h"}}"#);
        self.call("PUT", &format!("/v1/services/{service}/instances/{service}-{instance}"), &body)
    }

    fn get(&mut self, path: &str) -> Value {
        self.call("GET", path, "")
    }

    fn call(&mut self, method: &str, path: &str, body: &str) -> Value {
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: disco\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n{body}",
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
        serde_json::from_slice(&body).expect("JSON")
    }
}

/// A server that is told over a connection what to send: the limit, or a peer.
pub(crate) struct Steered {
    process: Guarded,
    address: SocketAddr,
    control: TcpStream,
    changes: Vec<Vec<u8>>,
    made: usize,
}

impl Steered {
    /// The limit: answers streams with the opening when they have sent so many requests, and sends the first change again
    /// and again.
    pub(crate) fn limit(content: &Content, requests: u8) -> Self {
        let this = std::env::current_exe().expect("this program");
        let mut command = Command::new(this);
        command.arg("limit");
        Self::start(&mut command, content, requests)
    }

    /// A peer, with what the opening has as its resources. The content is that of delta responses, which have names.
    pub(crate) fn peer(program: &Path, cache: Cache, content: &Content) -> Self {
        let mut command = Command::new(program);
        command.args([
            "-cache",
            match cache {
                Cache::Linear => "linear",
                Cache::Snapshot => "snapshot",
            },
        ]);
        Self::start(&mut command, content, 0)
    }

    fn start(command: &mut Command, content: &Content, requests: u8) -> Self {
        let process = command.stdout(Stdio::piped()).spawn().expect("the server starts");
        let mut process = Guarded::new(process);
        let mut line = String::new();
        let stdout = process.0.stdout.take().expect("stdout is piped");
        BufReader::new(stdout).read_line(&mut line).expect("the server says where it listens");
        let (address, control) = line.trim().split_once(' ').expect("two addresses");
        let control = TcpStream::connect(control).expect("the server listens");
        control.set_nodelay(true).expect("an option");
        control.set_read_timeout(Some(PATIENCE)).expect("an option");
        let address = address.parse().expect("an address");
        let mut server = Self { process, address, control, changes: content.changes.clone(), made: 0 };
        content.opening.iter().for_each(|response| server.tell(OPENING, requests, response));
        server
    }

    fn tell(&mut self, operation: u8, requests: u8, body: &[u8]) {
        let len = u32::try_from(body.len()).expect("small").to_be_bytes();
        let message = [&[operation, requests], &len[..], body].concat();
        self.control.write_all(&message).expect("the server reads");
        self.control.read_exact(&mut [0]).expect("the server answers");
    }
}

impl Server for Steered {
    fn address(&self) -> SocketAddr {
        self.address
    }

    fn change(&mut self) -> Instant {
        let changes = std::mem::take(&mut self.changes);
        let sent = Instant::now();
        self.tell(CHANGE, 0, &changes[self.made % changes.len()]);
        self.made += 1;
        self.changes = changes;
        sent
    }

    fn cpu(&self) -> f64 {
        common::cpu(&self.process.0)
    }

    fn memory(&self) -> u64 {
        common::memory(&self.process.0)
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
