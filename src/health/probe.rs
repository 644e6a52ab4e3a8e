use std::{error::Error, io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{Method, Request, Response, header};
use http_body_util::{BodyExt as _, Empty};
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
};
use hyper_util::rt::TokioIo;
use rustix::io::Errno;
use tokio::{
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tonic::Code;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{
    model::{Probe, Statuses, Verdict, excerpt, format_duration},
    rt::{Tasks, root_cause},
};

/// What one check saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It works.
    Passed,
    /// It works, but says that others are better.
    Degraded(String),
    /// It does not work: what was refused, reset or answered.
    Failed(String),
    /// Nothing came back from its machine.
    Silent(String),
    /// This process could not ask, which says nothing of the target.
    NotAsked(String),
}

impl Outcome {
    /// What the result says of the target, if anything.
    pub fn verdict(&self) -> Option<Verdict> {
        match self {
            Self::Passed => Some(Verdict::Healthy),
            Self::Degraded(_) => Some(Verdict::Degraded),
            Self::Failed(_) | Self::Silent(_) => Some(Verdict::Unhealthy),
            Self::NotAsked(_) => None,
        }
    }

    /// What was seen; nothing when all was as expected.
    pub fn seen(self) -> String {
        match self {
            Self::Passed => String::new(),
            Self::Degraded(seen) | Self::Failed(seen) | Self::Silent(seen) | Self::NotAsked(seen) => seen,
        }
    }

    /// The result in two words. The error says what was seen, without naming the address.
    pub fn passed(self) -> Result<(), String> {
        match self {
            Self::Passed | Self::Degraded(_) => Ok(()),
            Self::Failed(seen) | Self::Silent(seen) | Self::NotAsked(seen) => Err(seen),
        }
    }
}

/// Asks one target, as often as it is told to.
pub trait Ask: Send {
    /// Asks once. When dropped half-way, the next time starts anew.
    fn ask(&mut self) -> BoxFuture<'_, Outcome>;
}

/// How [`Prober`]s ask. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Network {
    tasks: Tasks,
    /// Connections that may be kept from one check to the next.
    kept: Arc<Semaphore>,
}

impl Network {
    /// Keeps at most so many connections; beyond that each check makes its own. `tasks` owns what drives them.
    pub fn new(tasks: Tasks, kept: usize) -> Self {
        Self { tasks, kept: Arc::new(Semaphore::new(kept.min(Semaphore::MAX_PERMITS))) }
    }
}

/// Asks a target over the network. A connection is kept for the next time, as long as there is room ([`Network`]). One that was closed
/// meanwhile says nothing; then a new one is made.
#[derive(Debug)]
pub struct Prober {
    probe: Probe,
    address: SocketAddr,
    limit: Duration,
    network: Network,
    link: Option<Link>,
}

#[derive(Debug)]
struct Link {
    sender: Sender,
    _permit: OwnedSemaphorePermit,
}

#[derive(Debug)]
enum Sender {
    Http1(http1::SendRequest<Empty<Bytes>>),
    Http2(http2::SendRequest<tonic::body::Body>),
}

/// The request was not answered, or not by what it should have been.
struct Unanswered(String);

impl Prober {
    /// Asks `address` and waits at most `limit` for an answer.
    pub fn new(network: Network, probe: Probe, address: SocketAddr, limit: Duration) -> Self {
        Self { probe, address, limit, network, link: None }
    }

    async fn attempt(&mut self, reached: &mut bool) -> Outcome {
        if let Some(mut link) = self.link.take()
            && let Ok((outcome, reusable)) = link.sender.ask(&self.probe, self.address).await
        {
            if reusable {
                self.link = Some(link);
            }
            return outcome;
        }
        let stream = match TcpStream::connect(self.address).await {
            Ok(stream) => stream,
            Err(error) => return not_connected(&error),
        };
        *reached = true;
        let mut sender = match &self.probe {
            Probe::Tcp => return Outcome::Passed,
            Probe::Http { .. } => self.http1(stream).await,
            Probe::Grpc { .. } => self.http2(stream).await,
        };
        let asked = match &mut sender {
            Ok(sender) => sender.ask(&self.probe, self.address).await,
            Err(error) => Err(Unanswered(std::mem::take(error))),
        };
        match asked {
            Ok((outcome, reusable)) => {
                if let Ok(sender) = sender
                    && reusable
                    && let Ok(permit) = Arc::clone(&self.network.kept).try_acquire_owned()
                {
                    self.link = Some(Link { sender, _permit: permit });
                }
                outcome
            }
            Err(Unanswered(seen)) => Outcome::Failed(seen),
        }
    }

    async fn http1(&self, stream: TcpStream) -> Result<Sender, String> {
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(BUFFER)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|error| root_cause(&error))?;
        self.network.tasks.spawn_until_shutdown("health-connection", async {
            // How it ended, who waits for an answer is told.
            let _ = connection.await;
        });
        Ok(Sender::Http1(sender))
    }

    async fn http2(&self, stream: TcpStream) -> Result<Sender, String> {
        let (sender, connection) = http2::Builder::new(Spawn(self.network.tasks.clone()))
            .max_send_buf_size(BUFFER)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|error| format!("no gRPC answer: {}", root_cause(&error)))?;
        self.network.tasks.spawn_until_shutdown("health-connection", async {
            let _ = connection.await;
        });
        Ok(Sender::Http2(sender))
    }
}

impl Ask for Prober {
    fn ask(&mut self) -> BoxFuture<'_, Outcome> {
        Box::pin(async {
            let (limit, mut reached) = (self.limit, false);
            match tokio::time::timeout(limit, self.attempt(&mut reached)).await {
                Ok(outcome) => outcome,
                Err(_) => {
                    let seen = format!("no answer within {}", format_duration(limit));
                    if reached { Outcome::Failed(seen) } else { Outcome::Silent(seen) }
                }
            }
        })
    }
}

/// Least buffer that hyper takes.
const BUFFER: usize = 8192;

/// Longest answer that is read to its end to keep the connection.
const BODY: usize = 64 << 10;

/// Longest gRPC answer. A health response has two bytes.
const MESSAGE: usize = 1 << 10;

#[derive(Clone)]
struct Spawn(Tasks);

impl<F: Future<Output: Send> + Send + 'static> hyper::rt::Executor<F> for Spawn {
    fn execute(&self, task: F) {
        self.0.spawn_until_shutdown("health-connection", async {
            task.await;
        });
    }
}

/// A machine that refuses or resets is there. What is lacking here says nothing of it.
fn not_connected(error: &io::Error) -> Outcome {
    let seen = root_cause(error);
    match Errno::from_io_error(error) {
        Some(Errno::CONNREFUSED | Errno::CONNRESET | Errno::CONNABORTED) => Outcome::Failed(seen),
        Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM | Errno::ADDRNOTAVAIL) => {
            Outcome::NotAsked(seen)
        }
        _ => Outcome::Silent(seen),
    }
}

impl Sender {
    /// What was answered, and whether the connection may be used again.
    async fn ask(&mut self, probe: &Probe, address: SocketAddr) -> Result<(Outcome, bool), Unanswered> {
        match (self, probe) {
            (Self::Http1(sender), Probe::Http { path, expect, degraded }) => {
                ask_http(sender, address, path, expect, degraded).await
            }
            (Self::Http2(sender), Probe::Grpc { service }) => ask_grpc(sender, address, service).await,
            _ => Err(Unanswered("a connection of another kind".to_owned())),
        }
    }
}

async fn ask_http(
    sender: &mut http1::SendRequest<Empty<Bytes>>,
    address: SocketAddr,
    path: &str,
    expect: &Statuses,
    degraded: &Statuses,
) -> Result<(Outcome, bool), Unanswered> {
    let request = Request::builder()
        .method(Method::GET)
        .uri(path)
        .header(header::HOST, address.to_string())
        .header(header::USER_AGENT, "disco")
        .body(Empty::new())
        .map_err(|error| Unanswered(error.to_string()))?;
    let no_answer = |error: hyper::Error| Unanswered(format!("no HTTP answer: {}", root_cause(&error)));
    sender.ready().await.map_err(no_answer)?;
    let answer = sender.send_request(request).await.map_err(no_answer)?;
    let status = answer.status();
    let seen = || format!("GET {path} answered {status}");
    let outcome = match status.as_u16() {
        code if expect.contains(code) => Outcome::Passed,
        code if degraded.contains(code) => Outcome::Degraded(seen()),
        _ => Outcome::Failed(seen()),
    };
    Ok((outcome, read_to_end(answer).await))
}

/// Whether the body came to its end within the bound.
async fn read_to_end(answer: Response<Incoming>) -> bool {
    let (mut body, mut read) = (answer.into_body(), 0);
    loop {
        match body.frame().await {
            None => return true,
            Some(Err(_)) => return false,
            Some(Ok(frame)) => read += frame.data_ref().map_or(0, Bytes::len),
        }
        if read > BODY {
            return false;
        }
    }
}

async fn ask_grpc(
    sender: &http2::SendRequest<tonic::body::Body>,
    address: SocketAddr,
    service: &str,
) -> Result<(Outcome, bool), Unanswered> {
    let connection = tower::service_fn(|request| {
        let mut sender = sender.clone();
        async move { sender.send_request(request).await }
    });
    let origin = format!("http://{address}").parse().map_err(|_| Unanswered("no such address".to_owned()))?;
    let mut client = HealthClient::with_origin(connection, origin).max_decoding_message_size(MESSAGE);
    let outcome = match client.check(HealthCheckRequest { service: service.to_owned() }).await {
        Ok(answer) => match answer.into_inner().status() {
            ServingStatus::Serving => Outcome::Passed,
            other => Outcome::Failed(format!("grpc.health.v1 answered {}", other.as_str_name())),
        },
        Err(status) => match (status.code(), status.source()) {
            (Code::Unimplemented, _) => Outcome::Failed(
                "the server has no grpc.health.v1 service: add it, or check with tcp".to_owned(),
            ),
            (Code::NotFound, _) => {
                Outcome::Failed(format!("grpc.health.v1 does not know the service {}", excerpt(service)))
            }
            (_, Some(source)) => return Err(Unanswered(format!("no gRPC answer: {}", root_cause(source)))),
            (code, None) => {
                Outcome::Failed(format!("grpc.health.v1 answered {code:?}: {}", excerpt(status.message())))
            }
        },
    };
    Ok((outcome, true))
}

#[cfg(test)]
mod tests {
    use axum::{Router, http::StatusCode, response::Redirect, routing::get};
    use tokio::{io::AsyncWriteExt as _, net::TcpListener};
    use tokio_stream::wrappers::TcpListenerStream;
    use tonic::{service::Routes, transport::Server};

    use super::*;
    use crate::rt::Tasks;

    async fn listener() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        (listener, address)
    }

    /// Checks that the probe passes, or fails with a text that holds `wanted`.
    async fn check(probe: &str, address: SocketAddr, wanted: Result<(), &str>) {
        let mut prober = prober(probe, address, Duration::from_secs(10));
        let got = prober.ask().await.passed();
        match (&got, wanted) {
            (Ok(()), Ok(())) => {}
            (Err(got), Err(wanted)) if got.contains(wanted) => {}
            _ => panic!("{probe}: want {wanted:?}, got {got:?}"),
        }
    }

    fn prober(probe: &str, address: SocketAddr, limit: Duration) -> Prober {
        Prober::new(Network::new(Tasks::default(), 1), probe.parse().unwrap(), address, limit)
    }

    async fn nobody() -> SocketAddr {
        listener().await.1
    }

    #[tokio::test]
    async fn tcp() {
        let (_listening, address) = listener().await;
        check("tcp", address, Ok(())).await;
        check("tcp", nobody().await, Err("Connection refused")).await;
    }

    #[tokio::test]
    async fn http() {
        let tasks = Tasks::default();
        let (listening, address) = listener().await;
        let app = Router::new()
            .route("/ok", get(async || "fine"))
            .route("/moved", get(async || Redirect::temporary("/ok")))
            .route("/broken", get(async || StatusCode::SERVICE_UNAVAILABLE));
        tasks.spawn("http", async move { axum::serve(listening, app).await.unwrap() });
        check("http:/ok", address, Ok(())).await;
        check("http:/ok?deep=1", address, Ok(())).await;
        check("http:/moved", address, Ok(())).await;
        check("http:/broken", address, Err("GET /broken answered 503")).await;
        check("http", address, Err("GET / answered 404")).await;
        check("http", nobody().await, Err("Connection refused")).await;
    }

    #[tokio::test]
    async fn grpc() {
        let tasks = Tasks::default();
        let (reporter, health) = tonic_health::server::health_reporter();
        reporter.set_service_status("stopped", tonic_health::ServingStatus::NotServing).await;
        let (listening, address) = listener().await;
        tasks.spawn("grpc", async move {
            let incoming = TcpListenerStream::new(listening);
            Server::builder().add_service(health).serve_with_incoming(incoming).await.unwrap();
        });
        check("grpc", address, Ok(())).await;
        check("grpc:stopped", address, Err("answered NOT_SERVING")).await;
        check("grpc:else", address, Err("does not know the service \"else\"")).await;
        check("grpc", nobody().await, Err("Connection refused")).await;

        let (listening, address) = listener().await;
        tasks.spawn("grpc without health", async move {
            let incoming = TcpListenerStream::new(listening);
            Server::builder().add_routes(Routes::default()).serve_with_incoming(incoming).await.unwrap();
        });
        check("grpc", address, Err("no grpc.health.v1 service")).await;
    }

    #[tokio::test]
    async fn a_server_that_speaks_something_else_or_nothing() {
        let tasks = Tasks::default();
        let (listening, address) = listener().await;
        tasks.spawn("garbage", async move {
            while let Ok((mut stream, _)) = listening.accept().await {
                let _ = stream.write_all(b"HELO\r\n\r\n").await;
            }
        });
        check("http", address, Err("no HTTP answer")).await;
        check("grpc", address, Err("no gRPC answer")).await;

        let (_silent, address) = listener().await;
        for probe in ["http", "grpc"] {
            let got = prober(probe, address, Duration::from_millis(50)).ask().await;
            assert_eq!(got, Outcome::Failed("no answer within 50ms".to_owned()), "{probe}");
        }
    }

    #[tokio::test]
    async fn a_connection_is_kept_and_made_anew_when_it_was_closed() {
        let tasks = Tasks::default();
        let (listening, address) = listener().await;
        let accepted = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let count = Arc::clone(&accepted);
        let restart = Arc::new(tokio::sync::Notify::new());
        let restarted = Arc::clone(&restart);
        tasks.spawn("http", async move {
            loop {
                let (stream, _) = listening.accept().await.unwrap();
                count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                let service = hyper::service::service_fn(async |_| {
                    Ok::<_, io::Error>(Response::new(Empty::<Bytes>::new()))
                });
                let serve = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service);
                tokio::select! {
                    _ = serve => {}
                    () = restarted.notified() => {}
                }
            }
        });
        let mut prober = prober("http", address, Duration::from_secs(10));
        let accepted = || accepted.load(std::sync::atomic::Ordering::Relaxed);
        for _ in 0..3 {
            assert_eq!(prober.ask().await, Outcome::Passed);
        }
        assert_eq!(accepted(), 1);
        restart.notify_one();
        assert_eq!(prober.ask().await, Outcome::Passed);
        assert!(accepted() <= 2, "{}", accepted());
        prober.network.kept.close();
        prober.link = None;
        for n in 1..3 {
            let before = accepted();
            assert_eq!(prober.ask().await, Outcome::Passed);
            assert_eq!(accepted(), before + 1, "{n}");
        }
    }

    #[tokio::test]
    async fn what_statuses_mean_is_the_owners_choice() {
        let tasks = Tasks::default();
        let (listening, address) = listener().await;
        let app = Router::new().route("/busy", get(async || StatusCode::TOO_MANY_REQUESTS));
        tasks.spawn("http", async move { axum::serve(listening, app).await.unwrap() });
        let statuses = |status| Statuses::check(&[(status, status)]).unwrap();
        for (expect, degraded, want) in [
            (429, 500, Outcome::Passed),
            (200, 429, Outcome::Degraded("GET /busy answered 429 Too Many Requests".to_owned())),
            (200, 500, Outcome::Failed("GET /busy answered 429 Too Many Requests".to_owned())),
        ] {
            let probe =
                Probe::Http { path: "/busy".into(), expect: statuses(expect), degraded: statuses(degraded) };
            let network = Network::new(tasks.clone(), 0);
            assert_eq!(Prober::new(network, probe, address, Duration::from_secs(10)).ask().await, want);
        }
    }

    #[test]
    fn only_silence_is_in_doubt() {
        let outcome = |errno: Errno| not_connected(&errno.into());
        for (errno, want) in [
            (Errno::CONNREFUSED, "failed"),
            (Errno::HOSTUNREACH, "silent"),
            (Errno::NETUNREACH, "silent"),
            (Errno::TIMEDOUT, "silent"),
            (Errno::MFILE, "not asked"),
        ] {
            let got = match outcome(errno) {
                Outcome::Failed(_) => "failed",
                Outcome::Silent(_) => "silent",
                Outcome::NotAsked(_) => "not asked",
                other => panic!("{other:?}"),
            };
            assert_eq!(got, want, "{errno:?}");
        }
    }
}
