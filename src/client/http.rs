use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::Value;

/// How long a server may take to answer, on top of what a long poll waits.
const ANSWER: Duration = Duration::from_secs(10);
/// How long opening a connection may take.
const CONNECT: Duration = Duration::from_secs(3);
/// Largest answer that is read, in bytes.
const BODY: usize = 256 << 20;

/// A client of the HTTP/JSON API of Disco servers, of which the first is asked that can be reached and has the role for it. Cheap to
/// clone; clones share connections.
#[derive(Debug, Clone)]
pub struct Http {
    /// Never empty.
    addresses: Arc<[String]>,
    token: Option<header::HeaderValue>,
    client: Client<HttpConnector, Full<Bytes>>,
}

/// Why there is no answer. Each message says what to do next.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HttpError {
    /// The address or the token cannot be used.
    #[error("{0}")]
    Settings(String),
    /// No connection.
    #[error(
        "cannot reach a Disco server at {address} ({reason}): start one with `disco dev`, or name it with --http or \
         DISCO_HTTP"
    )]
    Unreachable {
        /// Where it was looked for.
        address: String,
        /// What the system said.
        reason: String,
    },
    /// Connected, but the answer did not come in time.
    #[error(
        "the server at {address} did not answer within {}; is it a Disco HTTP port, and is it overloaded? \
         `disco check` tells more",
        crate::model::format_duration(*limit)
    )]
    TimedOut {
        /// Where it was asked.
        address: String,
        /// How long it was waited for.
        limit: Duration,
    },
    /// The server refused.
    #[error("{}", refusal(*status, code, message, fields))]
    Refused {
        /// HTTP status.
        status: u16,
        /// The API's word for it, e.g. `not_found`; empty when the answer was not the API's.
        code: String,
        /// What is wrong.
        message: String,
        /// The fields that are wrong.
        fields: Vec<FieldError>,
    },
    /// An answer that is not JSON of the expected kind.
    #[error("{address} did not answer like a Disco server ({reason}): check --http or DISCO_HTTP")]
    NotDisco {
        /// Where it was asked.
        address: String,
        /// What came instead.
        reason: String,
    },
}

/// One wrong field of a refused request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldError {
    /// Path of the field, e.g. `locality.zone`.
    pub field: String,
    /// What is wrong and what would be right.
    pub message: String,
}

fn refusal(status: u16, code: &str, message: &str, fields: &[FieldError]) -> String {
    let mut text = if code.is_empty() {
        format!("the server answered with status {status}: {message}")
    } else {
        message.to_owned()
    };
    // A message that is only the list of the fields again would be said twice.
    for field in fields.iter().filter(|field| !message.contains(&field.message)) {
        text.push_str(&format!("\n  {}: {}", field.field, field.message));
    }
    match status {
        401 | 403 => text.push_str("\n  give a token with --token or DISCO_TOKEN"),
        421 => text.push_str("\n  name servers with the role `registry` with --http or DISCO_HTTP, several separated by commas"),
        404 if code.is_empty() => {
            text.push_str("\n  is --http the HTTP port of a Disco server of this version?")
        }
        _ => {}
    }
    text
}

impl Http {
    /// A client of the servers at `addresses`: `HOST:PORT`, with or without `http://`, several separated by commas. `token` is sent
    /// as a bearer token.
    ///
    /// # Errors
    /// [`HttpError::Settings`] when an address or the token cannot be used. Nothing is connected yet.
    pub fn new(addresses: &str, token: Option<&str>) -> Result<Self, HttpError> {
        let addresses = addresses.split(',').map(|part| authority(part.trim())).collect::<Result<_, _>>()?;
        let token = token
            .map(|token| {
                let mut value = header::HeaderValue::from_str(&format!("Bearer {token}")).map_err(|_| {
                    HttpError::Settings("the token has characters that HTTP cannot carry".into())
                })?;
                value.set_sensitive(true);
                Ok(value)
            })
            .transpose()?;
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(CONNECT));
        connector.set_nodelay(true);
        let client = Client::builder(TokioExecutor::new()).build(connector);
        Ok(Self { addresses, token, client })
    }

    /// Where the servers are, as `HOST:PORT`, with commas between them.
    pub fn address(&self) -> String {
        self.addresses.join(",")
    }

    /// A client for each server by itself.
    pub fn each(&self) -> Vec<Self> {
        self.addresses
            .iter()
            .map(|address| Self { addresses: [address.clone()].into(), ..self.clone() })
            .collect()
    }

    /// `GET path`. `wait` is how long the server may hold the answer (0 unless it is a long poll).
    ///
    /// # Errors
    /// As [`Http::send`].
    pub async fn get(&self, path: &str, wait: Duration) -> Result<Value, HttpError> {
        self.send(Method::GET, path, None, wait).await
    }

    /// Sends one request and reads its JSON answer. `path` starts with a slash and is already encoded. An empty answer is
    /// `null`.
    ///
    /// # Errors
    /// Every [`HttpError`] but [`HttpError::Settings`].
    pub async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        wait: Duration,
    ) -> Result<Value, HttpError> {
        let (status, bytes) = self.raw(method, path, body, wait).await?;
        if !status.is_success() {
            return Err(refused(status, &bytes));
        }
        if bytes.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&bytes).map_err(|error| self.not_disco(format!("no JSON: {error}")))
    }

    /// As [`Http::send`], but hands back whatever status and body came: for endpoints whose status is the answer.
    ///
    /// # Errors
    /// [`HttpError::Unreachable`], [`HttpError::TimedOut`], [`HttpError::NotDisco`].
    pub async fn raw(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        wait: Duration,
    ) -> Result<(StatusCode, Bytes), HttpError> {
        let (head, body) = self.answer(method, path, body, wait).await?.into_parts();
        Ok((head.status, body))
    }

    /// Fetches the text at `path` with its headers.
    ///
    /// # Errors
    /// As [`Http::send`].
    pub async fn page(&self, path: &str, wait: Duration) -> Result<Response<Bytes>, HttpError> {
        let answer = self.answer(Method::GET, path, None, wait).await?;
        if answer.status().is_success() { Ok(answer) } else { Err(refused(answer.status(), answer.body())) }
    }

    async fn answer(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        wait: Duration,
    ) -> Result<Response<Bytes>, HttpError> {
        let limit = wait.saturating_add(ANSWER);
        let json = body.map(|body| Bytes::from(body.to_string()));
        match tokio::time::timeout(limit, self.exchange(method, path, json, "application/json")).await {
            Ok(answer) => answer,
            Err(_) => Err(HttpError::TimedOut { address: self.address(), limit }),
        }
    }

    /// Fetches the file at `path`.
    ///
    /// # Errors
    /// As [`Http::send`].
    pub async fn download(&self, path: &str, wait: Duration) -> Result<Bytes, HttpError> {
        Ok(self.page(path, wait).await?.into_body())
    }

    /// Sends a file to `path` and reads the JSON answer.
    ///
    /// # Errors
    /// As [`Http::send`].
    pub async fn upload(&self, path: &str, file: Bytes, wait: Duration) -> Result<Value, HttpError> {
        let limit = wait.saturating_add(ANSWER);
        let exchange = self.exchange(Method::POST, path, Some(file), "application/octet-stream");
        let timed_out = |_| HttpError::TimedOut { address: self.address(), limit };
        let answer = tokio::time::timeout(limit, exchange).await.map_err(timed_out)??;
        let (status, bytes) = (answer.status(), answer.into_body());
        if !status.is_success() {
            return Err(refused(status, &bytes));
        }
        serde_json::from_slice(&bytes).map_err(|error| self.not_disco(format!("no JSON: {error}")))
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Option<Bytes>,
        kind: &'static str,
    ) -> Result<Response<Bytes>, HttpError> {
        // What is said when no server does it.
        let mut last = Err(HttpError::Settings("no server is named".to_owned()));
        for address in self.addresses.iter() {
            let request = self.request(address, method.clone(), path, body.clone(), kind)?;
            let answer = match self.client.request(request).await {
                Ok(answer) => answer,
                // Nothing was sent, so the next one may be asked.
                Err(error) if error.is_connect() => {
                    if last.is_err() {
                        let reason = plain_cause(&error);
                        last = Err(HttpError::Unreachable { address: self.address(), reason });
                    }
                    continue;
                }
                Err(error) => return Err(self.not_disco(plain_cause(&error))),
            };
            let (head, body) = answer.into_parts();
            let body = Limited::new(body, BODY).collect().await;
            let body = body.map_err(|error| self.not_disco(format!("the answer broke off: {error}")))?;
            let is_elsewhere = head.status == StatusCode::MISDIRECTED_REQUEST;
            last = Ok(Response::from_parts(head, body.to_bytes()));
            if !is_elsewhere {
                break;
            }
        }
        last
    }

    fn request(
        &self,
        address: &str,
        method: Method,
        path: &str,
        body: Option<Bytes>,
        kind: &'static str,
    ) -> Result<Request<Full<Bytes>>, HttpError> {
        let uri: Uri = format!("http://{address}{path}")
            .parse()
            .map_err(|error| HttpError::Settings(format!("{path} is not a path: {error}")))?;
        let mut request =
            Request::builder().method(method).uri(uri).header(header::ACCEPT, "application/json");
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, token.clone());
        }
        let body = match body {
            Some(body) => {
                request = request.header(header::CONTENT_TYPE, kind);
                body
            }
            None => Bytes::new(),
        };
        request.body(Full::new(body)).map_err(|error| HttpError::Settings(error.to_string()))
    }

    fn not_disco(&self, reason: String) -> HttpError {
        HttpError::NotDisco { address: self.address(), reason }
    }
}

/// `HOST:PORT` of an address as people write it.
fn authority(address: &str) -> Result<String, HttpError> {
    let bare = address.strip_prefix("http://").unwrap_or(address).trim_end_matches('/');
    let wrong = |why: &str| {
        HttpError::Settings(format!(
            "{} is not a server address{why}: want IP:PORT, e.g. 127.0.0.1:18080",
            crate::model::excerpt(address)
        ))
    };
    if bare.starts_with("https://") {
        return Err(wrong(" (https is not available in this version)"));
    }
    let authority: http::uri::Authority = bare.parse().map_err(|_| wrong(""))?;
    if authority.port_u16().is_none() || authority.as_str().contains('@') {
        return Err(wrong(""));
    }
    Ok(authority.to_string())
}

/// The innermost error, without the system's number for it.
fn plain_cause(error: &hyper_util::client::legacy::Error) -> String {
    let text = crate::rt::root_cause(error);
    text.split(" (os error").next().unwrap_or(&text).to_lowercase()
}

fn refused(status: StatusCode, body: &[u8]) -> HttpError {
    let parsed: Value = serde_json::from_slice(body).unwrap_or_default();
    let text = |value: &Value, name: &str| {
        value.get(name).and_then(Value::as_str).map(str::to_owned).unwrap_or_default()
    };
    let Some(error) = parsed.get("error") else {
        let shown = String::from_utf8_lossy(body.get(..200).unwrap_or(body));
        let reason = status.canonical_reason().unwrap_or("no reason given");
        let message =
            if shown.trim().is_empty() { reason.to_owned() } else { crate::model::excerpt(shown.trim()) };
        return HttpError::Refused {
            status: status.as_u16(),
            code: String::new(),
            message,
            fields: Vec::new(),
        };
    };
    let fields = error.get("fields").and_then(Value::as_array).into_iter().flatten();
    HttpError::Refused {
        status: status.as_u16(),
        code: text(error, "code"),
        message: text(error, "message"),
        fields: fields.map(|f| FieldError { field: text(f, "field"), message: text(f, "message") }).collect(),
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;
    use crate::rt::Tasks;

    /// A server that answers the first bytes of every connection with `answer`, or never when there is none.
    async fn server(answer: Option<&'static str>) -> (Http, Tasks) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let http = Http::new(&format!("http://{}/", listener.local_addr().unwrap()), Some("t0ken")).unwrap();
        let tasks = Tasks::default();
        tasks.spawn("server", async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = [0; 4096];
                let read = stream.read(&mut request).await.unwrap();
                assert!(
                    String::from_utf8_lossy(&request[..read]).contains("authorization: Bearer t0ken\r\n")
                );
                match answer {
                    Some(answer) => stream.write_all(answer.as_bytes()).await.unwrap(),
                    None => std::future::pending().await,
                }
            }
        });
        (http, tasks)
    }

    fn response(status: &str, body: &str) -> &'static str {
        let head =
            format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
        (head + body).leak()
    }

    #[tokio::test]
    async fn answers() {
        let fields = r#"{"error":{"code":"invalid","message":"the request is wrong","fields":
            [{"field":"port","message":"70000 is out of range"},{"field":"ttl","message":"0s is out of range"}]}}"#;
        let cases = [
            (response("200 OK", r#"{"revision":1}"#), r#"{"revision":1}"#),
            (response("204 No Content", ""), "null"),
            (
                response("400 Bad Request", fields),
                "the request is wrong\n  port: 70000 is out of range\n  ttl: 0s is out of range",
            ),
            (
                response("401 Unauthorized", r#"{"error":{"code":"denied","message":"no"}}"#),
                "no\n  give a token with --token or DISCO_TOKEN",
            ),
            (
                response("404 Not Found", "<h1>\u{1b}nginx</h1>"),
                "the server answered with status 404: \"<h1>\\u{1b}nginx</h1>\"\n  is --http the HTTP port of a Disco \
                 server of this version?",
            ),
            (response("500 Internal Server Error", "[]"), "the server answered with status 500: \"[]\""),
            (response("200 OK", "hello"), "did not answer like a Disco server (no JSON: "),
            ("SSH-2.0-OpenSSH\r\n", "did not answer like a Disco server ("),
            (
                "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{",
                "did not answer like a Disco server (the answer broke off",
            ),
            ("", "did not answer like a Disco server ("),
        ];
        for (sent, want) in cases {
            let (http, _tasks) = server(Some(sent)).await;
            let got = match http.get("/", Duration::ZERO).await {
                Ok(value) => value.to_string(),
                Err(error) => error.to_string(),
            };
            assert!(got.contains(want), "want {want:?}\ngot  {got:?}");
        }
    }

    #[tokio::test]
    async fn a_server_without_the_role_is_passed_by() {
        let other = r#"{"error":{"code":"misdirected","message":"this node takes no writes"}}"#;
        let (first, _tasks) = server(Some(response("421 Misdirected Request", other))).await;
        let (second, _more) = server(Some(response("200 OK", r#"{"revision":7}"#))).await;
        let away = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let ask = async |addresses: &[String]| {
            let http = Http::new(&addresses.join(","), Some("t0ken")).unwrap();
            let answer = http.send(Method::POST, "/", None, Duration::ZERO).await;
            answer.map_or_else(|error| error.to_string(), |value| value.to_string())
        };
        assert_eq!(ask(&[first.address(), away.to_string(), second.address()]).await, r#"{"revision":7}"#);
        let said = ask(&[first.address(), away.to_string()]).await;
        assert!(
            said.starts_with("this node takes no writes\n  name servers with the role `registry`"),
            "{said}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_hangs_is_given_up() {
        let (http, _tasks) = server(None).await;
        let error = http.get("/", Duration::from_secs(30)).await.unwrap_err();
        assert_eq!(
            error,
            HttpError::TimedOut { address: http.address().to_owned(), limit: Duration::from_secs(40) }
        );
    }

    #[test]
    fn addresses() {
        for good in ["127.0.0.1:18080", "http://127.0.0.1:1/", "[::1]:80", "localhost:1"] {
            assert!(Http::new(good, None).is_ok(), "{good}");
        }
        for bad in [
            "",
            "127.0.0.1",
            "http://",
            "https://127.0.0.1:1",
            "a:b@c:1",
            "1.2.3.4:99999",
            "a b:1",
            "x:1/path",
        ] {
            let message = Http::new(bad, None).unwrap_err().to_string();
            assert!(message.contains("want IP:PORT, e.g. 127.0.0.1:18080"), "{bad}: {message}");
        }
        assert!(
            Http::new("127.0.0.1:1", Some("a\nb"))
                .unwrap_err()
                .to_string()
                .contains("the token has characters")
        );
    }
}
