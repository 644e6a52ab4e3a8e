//! One connection to one program, kept from one question to the next.

use std::{io, net::SocketAddr};

use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::oneshot,
};

use super::{
    resp::{self, LONGEST, Value},
    said::Fault,
};
use crate::rt::{Tasks, root_cause};

/// Longest body of an answer, in bytes.
const BODY: usize = 256 << 10;

/// Least buffer that hyper takes, for headers.
const BUFFER: usize = 8192;

async fn connect(address: SocketAddr) -> Result<TcpStream, Fault> {
    let stream = TcpStream::connect(address).await.map_err(|error| not_connected(&error))?;
    // Questions are small, and each waits for its answer.
    let _ = stream.set_nodelay(true);
    Ok(stream)
}

pub(super) fn not_connected(error: &io::Error) -> Fault {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => Fault::Refused,
        // It is there, whatever it does.
        io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionAborted => Fault::Wrong(error.to_string()),
        // What is lacking here, and networks without a way, say nothing of it.
        _ => Fault::Silent(error.to_string()),
    }
}

/// HTTP/1.1.
#[derive(Debug)]
pub(super) struct HttpLink {
    address: SocketAddr,
    tasks: Tasks,
    open: Option<Open>,
}

#[derive(Debug)]
struct Open {
    sender: http1::SendRequest<Full<Bytes>>,
    /// Ends when the connection does.
    alive: oneshot::Receiver<()>,
}

impl HttpLink {
    /// `tasks` owns what drives the connection.
    pub(super) fn new(tasks: Tasks, address: SocketAddr) -> Self {
        Self { address, tasks, open: None }
    }

    /// Asks once. A connection that was closed meanwhile says nothing; then a new one is made. When dropped half-way, the
    /// connection is dropped too.
    pub(super) async fn ask(
        &mut self,
        method: Method,
        path: &str,
        body: &'static [u8],
    ) -> Result<(StatusCode, Bytes), Fault> {
        let request = || {
            Request::builder()
                .method(method.clone())
                .uri(path)
                .header(header::HOST, self.address.to_string())
                .header(header::USER_AGENT, "disco")
                .header(header::CONTENT_TYPE, "application/json")
                .body(Full::new(Bytes::from_static(body)))
                .map_err(|error| Fault::Wrong(error.to_string()))
        };
        if let Some(mut open) = self.open.take()
            && let Ok(answer) = exchange(&mut open, request()?).await
        {
            self.open = Some(open);
            return Ok(answer);
        }
        let mut open = self.connect().await?;
        let answer = exchange(&mut open, request()?).await.map_err(Fault::Wrong)?;
        self.open = Some(open);
        Ok(answer)
    }

    async fn connect(&self) -> Result<Open, Fault> {
        let stream = connect(self.address).await?;
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(BUFFER)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|error| Fault::Wrong(root_cause(&error)))?;
        let (ended, alive) = oneshot::channel();
        self.tasks.spawn_until_shutdown("observe-connection", async move {
            // How it ended, who waits for an answer is told.
            let _ = connection.await;
            drop(ended);
        });
        Ok(Open { sender, alive })
    }

    /// Returns once the kept connection has ended; never without one. Cancel-safe.
    pub(super) async fn broken(&mut self) {
        match &mut self.open {
            Some(open) => {
                let _ = (&mut open.alive).await;
                self.open = None;
            }
            None => std::future::pending().await,
        }
    }
}

async fn exchange(open: &mut Open, request: Request<Full<Bytes>>) -> Result<(StatusCode, Bytes), String> {
    let unanswered = |error: hyper::Error| format!("no HTTP answer: {}", root_cause(&error));
    open.sender.ready().await.map_err(unanswered)?;
    let answer = open.sender.send_request(request).await.map_err(unanswered)?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), BODY).collect().await;
    let body = body.map_err(|error| format!("an answer that cannot be read: {error}"))?;
    Ok((status, body.to_bytes()))
}

/// Redis' protocol.
#[derive(Debug)]
pub(super) struct RespLink {
    address: SocketAddr,
    open: Option<TcpStream>,
}

impl RespLink {
    pub(super) fn new(address: SocketAddr) -> Self {
        Self { address, open: None }
    }

    /// Sends the commands at once and returns an answer to each. As with [`HttpLink::ask`].
    pub(super) async fn ask<const N: usize>(&mut self, commands: [&[&str]; N]) -> Result<[Value; N], Fault> {
        let bytes = commands.map(resp::command).concat();
        if let Some(mut stream) = self.open.take()
            && let Ok(answers) = talk(&mut stream, &bytes).await
        {
            self.open = Some(stream);
            return Ok(answers);
        }
        let mut stream = connect(self.address).await?;
        let answers = talk(&mut stream, &bytes).await.map_err(Fault::Wrong)?;
        self.open = Some(stream);
        Ok(answers)
    }

    /// As with [`HttpLink::broken`].
    pub(super) async fn broken(&mut self) {
        match &mut self.open {
            Some(stream) => {
                // Nothing comes unasked; whatever does is the end.
                let _ = stream.readable().await;
                self.open = None;
            }
            None => std::future::pending().await,
        }
    }
}

async fn talk<const N: usize>(stream: &mut TcpStream, commands: &[u8]) -> Result<[Value; N], String> {
    stream.write_all(commands).await.map_err(|error| error.to_string())?;
    let (mut read, mut answers) = (Vec::new(), Vec::new());
    loop {
        let before = read.len();
        let more = stream.read_buf(&mut read).await.map_err(|error| error.to_string())?;
        if more == 0 {
            return Err("the connection was closed before the answer".to_owned());
        }
        if before + more > LONGEST {
            return Err(format!("an answer of more than {LONGEST} bytes"));
        }
        let mut rest = read.as_slice();
        answers.clear();
        while let Some(answer) = resp::take(&mut rest)? {
            answers.push(answer);
        }
        if answers.len() >= N {
            let count = answers.len();
            let exact: Result<[Value; N], _> = std::mem::take(&mut answers).try_into();
            return match exact {
                Ok(answers) if rest.is_empty() => Ok(answers),
                _ => Err(format!("{count} answers to {N} questions")),
            };
        }
    }
}
