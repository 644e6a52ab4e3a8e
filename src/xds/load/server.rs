use std::{net::SocketAddr, sync::Arc, time::Duration};

use envoy_types::pb::{
    envoy::service::load_stats::v3::{
        LoadStatsRequest, LoadStatsResponse,
        load_reporting_service_server::{LoadReportingService, LoadReportingServiceServer},
    },
    google::protobuf,
};
use tokio::{
    sync::{Semaphore, mpsc},
    time::{Instant, MissedTickBehavior},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{
    Loads,
    report::{Report, Reportable},
};
use crate::{
    rt::{Leave, Shutdown, Tasks},
    xds::{
        Config, Node, ProtocolError,
        server::{leaving, status, unreadable},
    },
};

/// The feature of clients that need not be told which clusters to report.
const ALL: &str = "envoy.lrs.supports_send_all_clusters";

/// The load reporting service.
#[derive(Debug, Clone)]
pub struct LoadReports {
    loads: Loads,
    known: Arc<dyn Reportable>,
    config: Arc<Config>,
    tasks: Tasks,
    /// A place for each stream.
    streams: Arc<Semaphore>,
}

impl LoadReports {
    /// Fills `loads`. Streams end when `tasks` are to end; of them there may be as many as of the discovery services.
    pub fn new(loads: Loads, known: Arc<dyn Reportable>, config: Config, tasks: Tasks) -> Self {
        let streams = Arc::new(Semaphore::new(config.streams.min(Semaphore::MAX_PERMITS)));
        Self { loads, known, config: Arc::new(config), tasks, streams }
    }

    /// As a tonic service.
    pub fn service(self) -> LoadReportingServiceServer<Self> {
        let limit = self.config.request_bytes;
        LoadReportingServiceServer::new(self).max_decoding_message_size(limit)
    }

    /// Takes a client's reports until it leaves (Ok) or must end with a status.
    async fn serve(
        &self,
        mut requests: Streaming<LoadStatsRequest>,
        out: &mpsc::Sender<Result<LoadStatsResponse, Status>>,
        (peer, leave): (Option<SocketAddr>, Shutdown),
    ) -> Result<(), Status> {
        let shutdown = self.tasks.shutdown();
        let patience = self.config.first_request_timeout;
        let first = tokio::select! {
            first = tokio::time::timeout(patience, requests.message()) => {
                first.map(|first| first.map_err(unreadable))
            }
            () = shutdown.wait() => return Err(leaving()),
        };
        let Ok(first) = first else {
            return Err(Status::deadline_exceeded(format!("no request within {} s", patience.as_secs_f32())));
        };
        let Some(mut first) = first? else { return Ok(()) };
        let node = Node::of(first.node.take(), peer, &self.config).map_err(status)?;
        let all = node.client_features.iter().any(|feature| feature == ALL);
        let seat = Seat { loads: &self.loads, id: self.loads.join(&node.id) };
        tracing::debug!(node = node.id, agent = node.user_agent(), all, "reports its load");

        // Rule C2.
        let mut wanted = if all { Vec::new() } else { self.known.wanted(&node) };
        let answer = |clusters: &[String]| self.answer(all, clusters.to_vec());
        if out.try_send(Ok(answer(&wanted))).is_err() {
            return Ok(());
        }
        if !first.cluster_stats.is_empty() {
            self.take(&seat, &first);
        }
        let mut tick = tokio::time::interval(self.loads.interval());
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                request = requests.message() => {
                    let Some(request) = request.map_err(unreadable)? else { return Ok(()) };
                    if let Some(now) = &request.node && !now.id.is_empty() && now.id != node.id {
                        let (was, now) = (node.id.clone(), now.id.clone());
                        return Err(status(ProtocolError::NodeChanged { was, now }));
                    }
                    self.take(&seat, &request);
                    // Rule K7: right after a report, so that hardly a call goes unreported.
                    if leave.started() {
                        return Ok(());
                    }
                }
                _ = tick.tick(), if !all => {
                    // While the client does not read, it gets nothing newer.
                    let Ok(place) = out.try_reserve() else { continue };
                    let now = self.known.wanted(&node);
                    if now != wanted {
                        wanted = now;
                        place.send(Ok(answer(&wanted)));
                    }
                }
                () = out.closed() => return Ok(()),
                () = shutdown.wait() => return Err(leaving()),
            }
        }
    }

    fn answer(&self, all: bool, clusters: Vec<String>) -> LoadStatsResponse {
        let interval = self.loads.interval();
        LoadStatsResponse {
            clusters,
            send_all_clusters: all,
            load_reporting_interval: Some(protobuf::Duration {
                seconds: i64::try_from(interval.as_secs()).unwrap_or(i64::MAX),
                nanos: i32::try_from(interval.subsec_nanos()).unwrap_or(0),
            }),
            // Rule C4: sums by locality are all that is shown.
            report_endpoint_granularity: false,
        }
    }

    fn take(&self, seat: &Seat<'_>, request: &LoadStatsRequest) {
        let before = self.loads.last(seat.id);
        let report =
            Report::read(&request.cluster_stats, self.loads.interval(), self.known.as_ref(), &before);
        self.loads.report(seat.id, report, Instant::now());
    }
}

#[tonic::async_trait]
impl LoadReportingService for LoadReports {
    type StreamLoadStatsStream = ReceiverStream<Result<LoadStatsResponse, Status>>;

    async fn stream_load_stats(
        &self,
        request: Request<Streaming<LoadStatsRequest>>,
    ) -> Result<Response<Self::StreamLoadStatsStream>, Status> {
        let Ok(place) = Arc::clone(&self.streams).try_acquire_owned() else {
            let limit = self.config.streams;
            return Err(Status::resource_exhausted(format!(
                "{limit} clients report to this server, as many as may (xds.streams); connect to another one"
            )));
        };
        let peer = request.remote_addr();
        let shutdown = self.tasks.shutdown();
        let leave = request.extensions().get().map_or_else(|| shutdown.clone(), |Leave(it)| it.clone());
        let requests = request.into_inner();
        let (out, responses) = mpsc::channel(1);
        let reports = self.clone();
        self.tasks.spawn("load reports", async move {
            let _place = place;
            if let Err(status) = reports.serve(requests, &out, (peer, leave)).await {
                tracing::debug!(code = ?status.code(), message = status.message(), "load reports ended");
                let _ = out.send_timeout(Err(status), LAST_WORD).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(responses)))
    }
}

/// How long the last word to a client that does not read is kept.
const LAST_WORD: Duration = Duration::from_secs(1);

/// A stream's place among those who report.
struct Seat<'a> {
    loads: &'a Loads,
    id: u64,
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        self.loads.leave(self.id, Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use envoy_types::pb::envoy::{
        config::{
            core::v3 as core,
            endpoint::v3::{ClusterStats, UpstreamLocalityStats},
        },
        service::load_stats::v3::load_reporting_service_client::LoadReportingServiceClient,
    };

    use super::*;
    use crate::{model::Locality, xds::Traffic};

    /// Services that come as they like, in no place.
    #[derive(Debug, Default)]
    struct Services(Mutex<Vec<String>>);

    impl Reportable for Services {
        fn service(&self, name: &str) -> Option<Arc<str>> {
            self.0.lock().unwrap().iter().find(|known| *known == name).map(|name| name.as_str().into())
        }

        fn localities(&self, _: &str) -> std::collections::HashSet<Locality> {
            [Locality::default()].into()
        }

        fn wanted(&self, _: &Node) -> Vec<String> {
            self.0.lock().unwrap().clone()
        }
    }

    struct Bench {
        services: Arc<Services>,
        loads: Loads,
        tasks: Tasks,
        requests: mpsc::Sender<LoadStatsRequest>,
        answers: Streaming<LoadStatsResponse>,
    }

    fn server(streams: usize) -> (LoadReports, Arc<Services>) {
        let services = Arc::new(Services(Mutex::new(vec!["a".into()])));
        let known: Arc<dyn Reportable> = services.clone();
        let config = Config { streams, ..Config::default() };
        (LoadReports::new(Loads::new(Duration::from_secs(10)), known, config, Tasks::default()), services)
    }

    async fn open(first: LoadStatsRequest) -> Bench {
        let (server, services) = server(1);
        let (loads, tasks) = (server.loads.clone(), server.tasks.clone());
        let (requests, incoming) = mpsc::channel(1);
        requests.send(first).await.unwrap();
        let mut client = LoadReportingServiceClient::new(server.service());
        let answers = client.stream_load_stats(ReceiverStream::new(incoming)).await.unwrap().into_inner();
        Bench { services, loads, tasks, requests, answers }
    }

    fn node(id: &str, features: &[&str]) -> LoadStatsRequest {
        let client_features = features.iter().map(|feature| (*feature).to_owned()).collect();
        let node = core::Node { id: id.into(), client_features, ..core::Node::default() };
        LoadStatsRequest { node: Some(node), cluster_stats: vec![] }
    }

    fn calls(issued: u64) -> LoadStatsRequest {
        let stats = UpstreamLocalityStats { total_issued_requests: issued, ..Default::default() };
        let cluster = ClusterStats {
            cluster_name: "a".into(),
            upstream_locality_stats: vec![stats],
            ..ClusterStats::default()
        };
        LoadStatsRequest { node: None, cluster_stats: vec![cluster] }
    }

    impl Bench {
        async fn answer(&mut self) -> Result<(bool, Vec<String>, i64), tonic::Code> {
            let answer = self.answers.message().await.map_err(|status| status.code())?.unwrap();
            let interval = answer.load_reporting_interval.unwrap();
            Ok((answer.send_all_clusters, answer.clusters, interval.seconds))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn c2_a_client_that_can_is_asked_for_all_clusters() {
        let mut bench = open(node("n", &[ALL])).await;
        assert_eq!(bench.answer().await, Ok((true, vec![], 10)));
        bench.requests.send(calls(20)).await.unwrap();
        let traffic = || bench.loads.of("a", Instant::now()).localities.get(&Locality::default()).copied();
        while traffic().is_none() {
            tokio::task::yield_now().await;
        }
        assert_eq!(traffic(), Some(Traffic { reporters: 1, calls: 2.0, errors: 0.0, in_progress: 0 }));
    }

    #[tokio::test(start_paused = true)]
    async fn c2_another_is_told_the_services_and_told_again_when_they_change() {
        let mut bench = open(node("n", &[])).await;
        assert_eq!(bench.answer().await, Ok((false, vec!["a".into()], 10)));
        bench.services.0.lock().unwrap().push("b".into());
        let asked = Instant::now();
        assert_eq!(bench.answer().await, Ok((false, vec!["a".into(), "b".into()], 10)));
        assert!(asked.elapsed() <= Duration::from_secs(10));
    }

    #[tokio::test(start_paused = true)]
    async fn g6_the_first_request_says_who_it_is_and_the_others_do_not_deny_it() {
        for first in [LoadStatsRequest::default(), node("", &[])] {
            assert_eq!(open(first).await.answer().await, Err(tonic::Code::InvalidArgument));
        }
        let mut bench = open(node("n", &[])).await;
        bench.answer().await.unwrap();
        bench.requests.send(node("n", &[])).await.unwrap();
        bench.requests.send(node("m", &[])).await.unwrap();
        assert_eq!(bench.answer().await, Err(tonic::Code::InvalidArgument));
    }

    #[tokio::test(start_paused = true)]
    async fn streams_end_with_the_server() {
        let mut bench = open(node("n", &[ALL])).await;
        bench.answer().await.unwrap();
        bench.tasks.shutdown().start();
        assert_eq!(bench.answer().await, Err(tonic::Code::Unavailable));
        assert_eq!(bench.tasks.join(Duration::from_secs(1)).await, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn k7_a_stream_on_an_old_connection_ends_well_after_a_report() {
        let (server, _) = server(1);
        let leave = Shutdown::default();
        let (requests, incoming) = mpsc::channel(1);
        requests.send(node("n", &[ALL])).await.unwrap();
        let mut client = LoadReportingServiceClient::new(server.clone().service());
        let mut request = Request::new(ReceiverStream::new(incoming));
        request.extensions_mut().insert(Leave(leave.clone()));
        let mut answers = client.stream_load_stats(request).await.unwrap().into_inner();
        answers.message().await.unwrap().unwrap();
        leave.start();
        assert!(futures_util::poll!(std::pin::pin!(answers.message())).is_pending(), "not before a report");
        requests.send(calls(20)).await.unwrap();
        assert_eq!(answers.message().await.unwrap(), None);
        let traffic = server.loads.of("a", Instant::now()).localities.get(&Locality::default()).copied();
        assert!(traffic.is_some_and(|traffic| traffic.calls >= 2.0), "{traffic:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn there_are_no_more_streams_than_allowed() {
        let (server, _) = server(1);
        let mut client = LoadReportingServiceClient::new(server.clone().service());
        let mut keep = Vec::new();
        let mut open = async || {
            let (requests, incoming) = mpsc::channel(1);
            let answers = client.stream_load_stats(ReceiverStream::new(incoming)).await;
            answers.map(|answers| keep.push((requests, answers.into_inner()))).map_err(|status| status.code())
        };
        assert_eq!(open().await, Ok(()));
        assert_eq!(open().await, Err(tonic::Code::ResourceExhausted));
        keep.clear();
        while server.streams.available_permits() == 0 {
            tokio::task::yield_now().await;
        }
    }
}
