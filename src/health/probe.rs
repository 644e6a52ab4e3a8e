use std::{error::Error, fmt, net::SocketAddr, str::FromStr, time::Duration};

use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::Empty;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tonic::{Code, transport::Endpoint};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{model::excerpt, rt::root_cause};

/// One way to ask a process whether it works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Probe {
    /// It accepts a connection.
    Tcp,
    /// It answers GET of this path with a status from 200 to 399.
    Http {
        /// Begins with `/`.
        path: String,
    },
    /// `grpc.health.v1.Health/Check` answers SERVING.
    Grpc {
        /// The service asked for; empty: the server as a whole.
        service: String,
    },
}

impl Probe {
    /// Asks once, over a new connection. The error says what was seen, without naming the address.
    pub async fn check(&self, address: SocketAddr, limit: Duration) -> Result<(), String> {
        let check = async {
            match self {
                Self::Tcp => connect(address).await.map(drop),
                Self::Http { path } => check_http(address, path).await,
                Self::Grpc { service } => check_grpc(address, service).await,
            }
        };
        match tokio::time::timeout(limit, check).await {
            Ok(result) => result,
            Err(_) => Err(format!("no answer within {}", crate::model::format_duration(limit))),
        }
    }
}

/// Reads `tcp`, `http`, `http:/path`, `grpc` or `grpc:service`.
impl FromStr for Probe {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (kind, detail) = text.split_once(':').unwrap_or((text, ""));
        match (kind, detail) {
            ("tcp", "") => Ok(Self::Tcp),
            ("http", "") => Ok(Self::Http { path: "/".to_owned() }),
            ("http", path) if path.starts_with('/') && path.parse::<http::uri::PathAndQuery>().is_ok() => {
                Ok(Self::Http { path: path.to_owned() })
            }
            ("http", path) => Err(format!("{} is not a path: want one such as /healthz", excerpt(path))),
            ("grpc", service) if !service.contains(|c: char| c.is_control() || c.is_whitespace()) => {
                Ok(Self::Grpc { service: service.to_owned() })
            }
            _ => Err(format!(
                "{} is not a check: want tcp, http, http:/path, grpc or grpc:service",
                excerpt(text)
            )),
        }
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp => f.write_str("tcp"),
            Self::Http { path } => write!(f, "http {path}"),
            Self::Grpc { service } if service.is_empty() => f.write_str("grpc"),
            Self::Grpc { service } => write!(f, "grpc {service}"),
        }
    }
}

async fn connect(address: SocketAddr) -> Result<TcpStream, String> {
    TcpStream::connect(address).await.map_err(|error| root_cause(&error))
}

async fn check_http(address: SocketAddr, path: &str) -> Result<(), String> {
    let stream = TokioIo::new(connect(address).await?);
    let (mut sender, connection) =
        http1::handshake::<_, Empty<Bytes>>(stream).await.map_err(|error| root_cause(&error))?;
    let request = Request::builder()
        .method(Method::GET)
        .uri(path)
        .header(header::HOST, address.to_string())
        .header(header::USER_AGENT, "disco")
        .body(Empty::new())
        .map_err(|error| error.to_string())?;
    let answer = sender.send_request(request);
    tokio::pin!(answer, connection);
    // The connection makes progress only while it is polled. It may end before the answer is taken, which then tells
    // how it ended.
    let answer = tokio::select! {
        biased;
        answer = &mut answer => answer,
        _ = &mut connection => answer.await,
    };
    let status = answer.map_err(|error| format!("no HTTP answer: {}", root_cause(&error)))?.status();
    if status.is_success() || status.is_redirection() { Ok(()) } else { Err(saw(path, status)) }
}

fn saw(path: &str, status: StatusCode) -> String {
    format!("GET {path} answered {status}")
}

async fn check_grpc(address: SocketAddr, service: &str) -> Result<(), String> {
    let channel = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|error| root_cause(&error))?
        .connect()
        .await
        .map_err(|error| root_cause(&error))?;
    let request = HealthCheckRequest { service: service.to_owned() };
    match HealthClient::new(channel).check(request).await {
        Ok(answer) => match answer.into_inner().status() {
            ServingStatus::Serving => Ok(()),
            other => Err(format!("grpc.health.v1 answered {}", other.as_str_name())),
        },
        Err(status) => Err(match status.code() {
            Code::Unimplemented => {
                "the server has no grpc.health.v1 service: add it, or check with tcp".to_owned()
            }
            Code::NotFound => format!("grpc.health.v1 does not know the service {}", excerpt(service)),
            code => match status.source() {
                Some(source) => format!("no gRPC answer: {}", root_cause(source)),
                None => format!("grpc.health.v1 answered {code:?}: {}", status.message()),
            },
        }),
    }
}

#[cfg(test)]
mod tests {
    use axum::{Router, response::Redirect, routing::get};
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
        let got = probe.parse::<Probe>().unwrap().check(address, Duration::from_secs(10)).await;
        match (&got, wanted) {
            (Ok(()), Ok(())) => {}
            (Err(got), Err(wanted)) if got.contains(wanted) => {}
            _ => panic!("{probe}: want {wanted:?}, got {got:?}"),
        }
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
            let probe: Probe = probe.parse().unwrap();
            let got = probe.check(address, Duration::from_millis(50)).await;
            assert_eq!(got, Err("no answer within 50ms".to_owned()), "{probe}");
        }
    }

    #[test]
    fn as_text() {
        for (text, shown) in [
            ("tcp", "tcp"),
            ("http", "http /"),
            ("http:/healthz?x=1", "http /healthz?x=1"),
            ("grpc", "grpc"),
            ("grpc:a.B", "grpc a.B"),
        ] {
            assert_eq!(text.parse::<Probe>().unwrap().to_string(), shown);
        }
        for bad in ["", "tls", "tcp:1", "http:healthz", "http:/a b", "grpc:a b", "http:/\u{7}"] {
            let message = bad.parse::<Probe>().unwrap_err();
            assert!(message.contains("want"), "{message}");
        }
    }
}
