use std::collections::HashMap;

use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryResponse, DiscoveryResponse,
    aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Streaming, transport::Channel};

use super::*;
use crate::{
    model::Revision,
    xds::{
        Change, Protocol, ResourceType, StreamPolicy,
        testing::{CDS, EDS, delta, node, put, resource},
    },
};

/// Lets everybody in but `nobody`.
#[derive(Debug)]
struct AllOf(watch::Receiver<Option<Arc<ResourceSet>>>);

impl Admit for AllOf {
    fn admit(&self, node: &Node) -> Result<Admitted, Refusal> {
        if node.id == "nobody" {
            return Err(Refusal { code: Code::PermissionDenied, message: "nobody may not".into() });
        }
        Ok(Admitted { set: self.0.clone(), policy: StreamPolicy::of(node) })
    }
}

#[derive(Debug, Default)]
struct Counts(Mutex<HashMap<&'static str, usize>>);

impl Counts {
    fn add(&self, what: &'static str) {
        *self.0.lock().unwrap().entry(what).or_default() += 1;
    }

    fn get(&self, what: &str) -> usize {
        self.0.lock().unwrap().get(what).copied().unwrap_or_default()
    }
}

impl Observer for Counts {
    fn connected(&self, _: Protocol) {
        self.add("connected");
    }
    fn disconnected(&self, _: Protocol) {
        self.add("disconnected");
    }
    fn sent(&self, _: Protocol, _: &Response) {
        self.add("sent");
    }
    fn acknowledged(&self, _: Protocol, _: ResourceType, _: Duration) {
        self.add("acknowledged");
    }
    fn rejected(&self, _: Protocol, _: ResourceType, _: &str) {
        self.add("rejected");
    }
}

struct Server {
    address: SocketAddr,
    sets: watch::Sender<Option<Arc<ResourceSet>>>,
    proxies: Proxies,
    counts: Arc<Counts>,
    tasks: Tasks,
}

async fn start(set: Option<ResourceSet>) -> Server {
    let (sets, receiver) = watch::channel(set.map(Arc::new));
    let proxies = Proxies::default();
    let counts = Arc::new(Counts::default());
    let tasks = Tasks::new(Shutdown::default());
    let server = AdsServer::observed(
        Arc::new(AllOf(receiver)),
        proxies.clone(),
        Config::default(),
        tasks.clone(),
        Arc::clone(&counts) as Arc<dyn Observer>,
    );
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tasks.spawn_until_shutdown("test server", async move {
        let incoming = TcpListenerStream::new(listener);
        tonic::transport::Server::builder().add_service(server).serve_with_incoming(incoming).await.unwrap();
    });
    Server { address, sets, proxies, counts, tasks }
}

impl Server {
    fn publish(&self, revision: u64, changes: impl IntoIterator<Item = Change>) {
        let set = self.sets.borrow().as_deref().cloned().unwrap_or_default();
        self.sets.send_replace(Some(Arc::new(set.apply(Revision(revision), changes))));
    }

    async fn client(&self) -> AggregatedDiscoveryServiceClient<Channel> {
        AggregatedDiscoveryServiceClient::connect(format!("http://{}", self.address)).await.unwrap()
    }

    async fn delta(&self, id: &str) -> DeltaClient {
        let (requests, outbound) = mpsc::channel(16);
        let mut client = self.client().await;
        let responses = client.delta_aggregated_resources(ReceiverStream::new(outbound)).await.unwrap();
        DeltaClient { id: id.into(), requests, responses: responses.into_inner() }
    }

    async fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        for _ in 0..1000 {
            if holds(self) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("not within 5 s: {what}");
    }
}

struct DeltaClient {
    id: String,
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
}

impl DeltaClient {
    async fn ask(&self, request: DeltaDiscoveryRequest) {
        let request = DeltaDiscoveryRequest { node: Some(node(&self.id)), ..request };
        self.requests.send(request).await.unwrap();
    }

    async fn next(&mut self) -> Result<Option<DeltaDiscoveryResponse>, Status> {
        tokio::time::timeout(Duration::from_secs(5), self.responses.message()).await.expect("a response")
    }

    async fn take(&mut self) -> Vec<String> {
        let response = self.next().await.unwrap().unwrap();
        self.ask(DeltaDiscoveryRequest {
            type_url: response.type_url,
            response_nonce: response.nonce,
            ..Default::default()
        })
        .await;
        response.resources.into_iter().map(|resource| resource.name).collect()
    }
}

#[tokio::test]
async fn delta_end_to_end_with_progress() {
    let server = start(None).await;
    let mut client = server.delta("e1").await;
    client.ask(delta(CDS, &[], &[])).await;
    client.ask(delta(EDS, &["a"], &[])).await;
    server.until("in the table", |server| server.proxies.len() == 1).await;
    assert!(!server.proxies.progress(Revision(1), None).complete);
    server.publish(1, [put(CDS, "a", "1"), put(EDS, "a", "1")]);
    assert_eq!(client.take().await, ["a"]);
    assert_eq!(client.take().await, ["a"]);
    let wait =
        |revision, name| server.proxies.wait_acknowledged(Revision(revision), name, Duration::from_secs(5));
    assert!(wait(1, None).await.complete);

    server.publish(2, [put(EDS, "a", "2")]);
    let before = server.proxies.wait_acknowledged(Revision(2), Some("a"), Duration::from_millis(20)).await;
    assert_eq!((before.complete, before.pending), (false, vec!["e1".to_owned()]));
    let (taken, progress) = tokio::join!(client.take(), wait(2, Some("a")));
    assert_eq!(taken, ["a"]);
    assert_eq!((progress.complete, progress.acknowledged), (true, 1));
    assert!(wait(2, None).await.complete);
    assert_eq!(server.proxies.progress(Revision(2), Some("other")).acknowledged, 0);

    let [proxy] = server.proxies.list().try_into().unwrap();
    assert_eq!((proxy.node.id.as_str(), proxy.protocol, proxy.synced()), ("e1", Protocol::Delta, true));
    assert!(proxy.peer().is_some());
    drop(client);
    server.until("left the table", |server| server.proxies.is_empty()).await;
    assert_eq!(["connected", "sent", "acknowledged"].map(|what| server.counts.get(what)), [1, 3, 3]);
    server.until("told", |server| server.counts.get("disconnected") == 1).await;
}

#[tokio::test]
async fn sotw_end_to_end() {
    let server = start(Some(ResourceSet::default())).await;
    server.publish(1, [put(CDS, "a", "1")]);
    let (requests, outbound) = mpsc::channel(16);
    let mut client = server.client().await;
    let mut responses =
        client.stream_aggregated_resources(ReceiverStream::new(outbound)).await.unwrap().into_inner();
    let request = DiscoveryRequest {
        node: Some(node("s1")),
        type_url: CDS.url().into(),
        ..DiscoveryRequest::default()
    };
    requests.send(request.clone()).await.unwrap();
    let response: DiscoveryResponse = responses.message().await.unwrap().unwrap();
    assert_eq!(response.resources.len(), 1);
    let ack = DiscoveryRequest {
        node: None,
        version_info: response.version_info,
        response_nonce: response.nonce,
        ..request
    };
    requests.send(ack).await.unwrap();
    let progress = server.proxies.wait_acknowledged(Revision(1), None, Duration::from_secs(5)).await;
    assert_eq!((progress.complete, progress.acknowledged), (true, 1));
}

#[tokio::test]
async fn g6_k2_errors_reach_the_client_and_hurt_nobody_else() {
    let server = start(Some(ResourceSet::default())).await;
    let mut good = server.delta("good").await;
    good.ask(delta(CDS, &[], &[])).await;
    assert_eq!(good.take().await, [""; 0]);

    let mut nameless = server.delta("").await;
    nameless.ask(delta(CDS, &[], &[])).await;
    let error = nameless.next().await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::InvalidArgument);
    assert!(error.message().contains("node"), "{error}");

    let mut odd = server.delta("a\nb").await;
    odd.ask(delta(CDS, &[], &[])).await;
    assert!(odd.next().await.unwrap_err().message().contains("node.id"));

    let mut refused = server.delta("nobody").await;
    refused.ask(delta(CDS, &[], &[])).await;
    let error = refused.next().await.unwrap_err();
    assert_eq!((error.code(), error.message()), (tonic::Code::PermissionDenied, "nobody may not"));

    let mut typeless = server.delta("typeless").await;
    typeless.ask(DeltaDiscoveryRequest::default()).await;
    assert_eq!(typeless.next().await.unwrap_err().code(), tonic::Code::InvalidArgument);

    let mut garbage = TcpStream::connect(server.address).await.unwrap();
    let bytes: Vec<u8> = (0..4096_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let _ = garbage.write_all(&bytes).await;
    let _ = garbage.read_to_end(&mut Vec::new()).await;

    server.publish(1, [put(CDS, "a", "1")]);
    assert_eq!(good.take().await, ["a"]);
    server.until("only the good one", |server| server.proxies.len() == 1).await;
}

#[tokio::test]
async fn k8_a_reader_that_is_stuck_delays_nobody() {
    let server = start(Some(ResourceSet::default())).await;
    let big = "x".repeat(1 << 20);
    server.publish(1, [Change::Put(resource(CDS, "a", &big))]);
    let stuck = server.delta("stuck").await;
    stuck.ask(delta(CDS, &[], &[])).await;
    stuck.ask(delta(EDS, &["e"], &[])).await;
    let mut good = server.delta("good").await;
    good.ask(delta(CDS, &[], &[])).await;
    assert_eq!(good.take().await, ["a"]);
    for revision in 2..20 {
        server.publish(revision, [Change::Put(resource(CDS, "a", &format!("{big}{revision}")))]);
        assert_eq!(good.take().await, ["a"]);
    }
    let sent = |server: &Server| {
        let proxies = server.proxies.list();
        let stuck = proxies.into_iter().find(|proxy| proxy.node.id == "stuck").unwrap();
        stuck.types.iter().map(|kind| kind.responses).collect::<Vec<_>>()
    };
    assert!(sent(&server).iter().all(|&responses| responses <= 1), "{:?}", sent(&server));
}

#[tokio::test]
async fn k1_streams_end_well_on_shutdown() {
    let server = start(Some(ResourceSet::default())).await;
    let mut served = server.delta("served").await;
    served.ask(delta(CDS, &[], &[])).await;
    served.take().await;
    let mut waiting = server.delta("waiting").await;
    waiting.ask(delta(ResourceType::Route, &[], &[])).await;
    server.until("both there", |server| server.proxies.len() == 2).await;
    server.tasks.shutdown().start();
    // Streams end by themselves; what their clients hear depends on when the connection goes, which here is at once.
    server.until("both gone", |server| server.proxies.is_empty()).await;
    let _ = (served.next().await, waiting.next().await);
}
