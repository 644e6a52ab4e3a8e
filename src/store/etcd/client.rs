//! Calls to etcd: which endpoint, with which token, how long, and what an error means.

use std::{
    fs,
    future::Future,
    io,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};
use tonic::{
    Code, Request, Response,
    metadata::{AsciiMetadataValue, MetadataValue},
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};

use super::{EtcdConfig, EtcdError};
use crate::{
    proto::etcd::{AuthenticateRequest, auth_client::AuthClient},
    rt::Backoff,
};

/// Longest message that is read: a page of a listing.
pub(super) const MESSAGE: usize = 512 << 20;

/// etcd closes connections on which pings come more often than every 5 s (its `--grpc-keepalive-min-time`).
const PING: Duration = Duration::from_secs(6);
const PONG: Duration = Duration::from_secs(3);

/// Bytes on their way to us on one stream: a page of a listing. Fixed, because measuring it takes more pings.
const STREAM_WINDOW: u32 = 2 << 20;

/// Waits after every endpoint has failed once.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(500));

/// How often a call gets itself a new token before the refusal counts.
const LOGINS: usize = 2;

/// Speaks to the endpoints of one cluster, to one at a time. Whoever finds that it does not answer moves everybody on.
#[derive(Debug)]
pub(super) struct Client {
    endpoints: Vec<(String, Channel)>,
    /// Which endpoint is spoken to.
    current: watch::Sender<usize>,
    login: Option<Login>,
    /// What one call may take in all.
    timeout: Duration,
}

#[derive(Debug)]
struct Login {
    name: String,
    password_file: PathBuf,
    token: Mutex<Token>,
    /// One login at a time: etcd spends a tenth of a second on each.
    turn: tokio::sync::Semaphore,
}

#[derive(Debug, Clone, Default)]
struct Token {
    value: Option<AsciiMetadataValue>,
    /// How many there have been.
    count: u64,
}

/// Why a call did not succeed.
#[derive(Debug)]
pub(super) enum Failure {
    /// No answer in time, or none that says what became of it: it may have been done.
    Unanswered(String),
    /// etcd says that it does not do it.
    Refused(tonic::Status),
}

/// What a method of etcd's services returns.
pub(super) trait Answer<R>: Future<Output = Result<Response<R>, tonic::Status>> {}

impl<R, F: Future<Output = Result<Response<R>, tonic::Status>>> Answer<R> for F {}

impl Client {
    pub(super) fn new(config: &EtcdConfig) -> Result<Self, EtcdError> {
        let tls = config.tls.as_ref().map(tls).transpose()?;
        let endpoint = |address: &String| {
            let wrong = |error: tonic::transport::Error| EtcdError::Endpoint {
                endpoint: address.clone(),
                reason: crate::rt::root_cause(&error),
            };
            let mut endpoint = Endpoint::from_shared(address.clone())
                .map_err(wrong)?
                .connect_timeout(config.timeout / 3)
                .tcp_nodelay(true)
                .http2_keep_alive_interval(PING)
                .keep_alive_timeout(PONG)
                .initial_stream_window_size(STREAM_WINDOW)
                .initial_connection_window_size(4 * STREAM_WINDOW);
            if let Some(tls) = tls.clone().filter(|_| address.starts_with("https:")) {
                endpoint = endpoint.tls_config(tls).map_err(wrong)?;
            }
            Ok((address.clone(), endpoint.connect_lazy()))
        };
        let endpoints: Vec<_> = config.endpoints.iter().map(endpoint).collect::<Result<_, EtcdError>>()?;
        if endpoints.is_empty() {
            return Err(EtcdError::NoEndpoint);
        }
        // Spread over the nodes: not every process speaks to the first.
        let first = fastrand::usize(..endpoints.len());
        let login = config.user.as_ref().map(|user| Login {
            name: user.name.clone(),
            password_file: user.password_file.clone(),
            token: Mutex::default(),
            turn: tokio::sync::Semaphore::new(1),
        });
        Ok(Self { endpoints, current: watch::Sender::new(first), login, timeout: config.timeout })
    }

    /// When a call that begins now has to be over.
    pub(super) fn deadline(&self) -> Instant {
        Instant::now() + self.timeout
    }

    /// How long one endpoint is waited for: two may be silent, one by itself and one because it waits for the other.
    pub(super) fn patience(&self) -> Duration {
        self.timeout / 3
    }

    /// Which endpoint is spoken to; changes when it does not answer.
    pub(super) fn current(&self) -> watch::Receiver<usize> {
        self.current.subscribe()
    }

    /// The endpoint at the index.
    pub(super) fn channel(&self, index: usize) -> Option<Channel> {
        self.endpoints.get(index).map(|(_, channel)| channel.clone())
    }

    /// Moves everybody on from an endpoint that does not answer.
    pub(super) fn leave(&self, index: usize) {
        let endpoints = self.endpoints.len();
        self.current.send_if_modified(|current| {
            let leaves = *current == index && endpoints > 1;
            if leaves {
                *current = (index + 1) % endpoints;
            }
            leaves
        });
    }

    /// Calls endpoint after endpoint until one answers, at most until `deadline`. What is called may be done twice.
    pub(super) async fn call<M: Clone, R, F: Answer<R>>(
        &self,
        deadline: Instant,
        message: M,
        call: impl Fn(Channel, Request<M>) -> F,
    ) -> Result<R, Failure> {
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        for tried in 1_usize.. {
            match self.call_once(deadline, message.clone(), &call).await {
                Err(Failure::Unanswered(reason)) => {
                    if tried.is_multiple_of(self.endpoints.len()) {
                        tokio::time::sleep_until((Instant::now() + backoff.next_wait()).min(deadline)).await;
                    }
                    if Instant::now() >= deadline {
                        return Err(Failure::Unanswered(reason));
                    }
                }
                answer => return answer,
            }
        }
        Err(Failure::Unanswered("no endpoint was tried".to_owned()))
    }

    /// Calls the endpoint that is spoken to. With a token that etcd does not take (any more) it calls again with a new one:
    /// a refusal is an answer.
    pub(super) async fn call_once<M: Clone, R, F: Answer<R>>(
        &self,
        deadline: Instant,
        message: M,
        call: impl Fn(Channel, Request<M>) -> F,
    ) -> Result<R, Failure> {
        let index = *self.current.borrow();
        let Some((address, channel)) = self.endpoints.get(index) else {
            return Err(Failure::Unanswered("there is no endpoint".to_owned()));
        };
        let deadline = deadline.min(Instant::now() + self.patience());
        let mut logins = 0;
        loop {
            let token = self.token(deadline, channel).await;
            let used = match &token {
                Ok(token) => token.count,
                Err(Failure::Unanswered(reason)) => {
                    self.leave(index);
                    return Err(Failure::Unanswered(format!("{address}: {reason}")));
                }
                Err(Failure::Refused(_)) => 0,
            };
            let request = self.request(message.clone(), token?);
            let answer = timeout_at(deadline, call(channel.clone(), request)).await;
            let status = match answer {
                Ok(Ok(response)) => return Ok(response.into_inner()),
                Ok(Err(status)) => status,
                Err(_) => {
                    self.leave(index);
                    let waited = self.patience();
                    return Err(Failure::Unanswered(format!("{address} gave no answer within {waited:?}")));
                }
            };
            if wants_login(&status) && self.login.is_some() && logins < LOGINS {
                logins += 1;
                self.forget_token(used);
            } else if is_passing(&status) {
                self.leave(index);
                return Err(Failure::Unanswered(format!("{address}: {}", text(&status))));
            } else {
                return Err(Failure::Refused(status));
            }
        }
    }

    /// With what every call carries. A member that has no leader answers so at once, and ends streams.
    fn request<M>(&self, message: M, token: Token) -> Request<M> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("hasleader", MetadataValue::from_static("true"));
        if let Some(value) = token.value {
            request.metadata_mut().insert("token", value);
        }
        request
    }

    /// A request that starts a stream at the endpoint.
    pub(super) async fn stream_request<M>(
        &self,
        deadline: Instant,
        index: usize,
        message: M,
    ) -> Result<(Channel, Request<M>), Failure> {
        let channel =
            self.channel(index).ok_or_else(|| Failure::Unanswered("there is no endpoint".into()))?;
        let token = self.token(deadline, &channel).await?;
        Ok((channel, self.request(message, token)))
    }

    /// The token of the user, from a login if there is none. Empty without a user.
    async fn token(&self, deadline: Instant, channel: &Channel) -> Result<Token, Failure> {
        let Some(login) = &self.login else { return Ok(Token::default()) };
        let known = |login: &Login| login.token.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let token = known(login);
        if token.value.is_some() {
            return Ok(token);
        }
        let _turn = login.turn.acquire().await;
        let token = known(login);
        if token.value.is_some() {
            return Ok(token);
        }
        let password = tokio::fs::read_to_string(&login.password_file).await.map_err(|error| {
            let file = login.password_file.display();
            Failure::Refused(tonic::Status::failed_precondition(format!(
                "the password file {file} cannot be read: {error}"
            )))
        })?;
        let request = AuthenticateRequest {
            name: login.name.clone(),
            password: password.trim_end_matches(['\r', '\n']).to_owned(),
        };
        let mut auth = AuthClient::new(channel.clone());
        let status = match timeout_at(deadline, auth.authenticate(request)).await {
            Err(_) => return Err(Failure::Unanswered("no answer to the login in time".to_owned())),
            Ok(Ok(response)) => {
                let value = AsciiMetadataValue::try_from(response.into_inner().token).map_err(|_| {
                    Failure::Refused(tonic::Status::internal("etcd gave a token that is no text"))
                })?;
                let mut token = login.token.lock().unwrap_or_else(PoisonError::into_inner);
                *token = Token { value: Some(value), count: token.count + 1 };
                return Ok(token.clone());
            }
            Ok(Err(status)) => status,
        };
        if status.message().contains("authentication is not enabled") {
            tracing::debug!(user = login.name, "etcd asks nobody for a password");
            return Ok(token);
        }
        Err(if is_passing(&status) { Failure::Unanswered(text(&status)) } else { Failure::Refused(status) })
    }

    /// The token is not taken any more; unless somebody has a newer one already.
    fn forget_token(&self, count: u64) {
        let Some(login) = &self.login else { return };
        let mut token = login.token.lock().unwrap_or_else(PoisonError::into_inner);
        if token.count == count {
            token.value = None;
        }
    }

    /// The refusal in words, with what to do.
    pub(super) fn explain(&self, status: &tonic::Status, prefix: &str) -> String {
        let said = text(status);
        let user = self.login.as_ref().map_or("nobody", |login| login.name.as_str());
        if said.contains("database space exceeded") {
            return format!(
                "etcd is full and takes no changes ({said}): compact and defragment it, run `etcdctl alarm disarm`, and \
                 start it with --auto-compaction-retention"
            );
        }
        if said.contains("permission denied") {
            return format!(
                "etcd does not let user {user} read and write {prefix} ({said}): `etcdctl role grant-permission ROLE \
                 --prefix=true readwrite {prefix}`"
            );
        }
        if said.contains("user name is empty") {
            return format!("etcd wants a user ({said}): set store.etcd.user and store.etcd.password_file");
        }
        if said.contains("authentication failed") {
            return format!(
                "etcd refuses the name or the password of user {user} ({said}): store.etcd.user and what is in \
                 store.etcd.password_file must be those of `etcdctl user list`"
            );
        }
        if said.contains("too many operations") {
            return format!(
                "the change has too many keys for one transaction of etcd ({said}): its --max-txn-ops is the most, less 2"
            );
        }
        if said.contains("request is too large") || said.contains("larger than max") {
            return format!("the change is too large for etcd ({said}): its --max-request-bytes is the most");
        }
        format!("etcd refuses it: {said}")
    }

    /// That nobody answered, in words, with what to do.
    pub(super) fn unanswered(&self, reason: &str) -> String {
        let endpoints: Vec<&str> = self.endpoints.iter().map(|(address, _)| address.as_str()).collect();
        format!(
            "etcd did not answer within {:?} ({reason}): look whether most of its members run and reach each other, \
             e.g. `etcdctl --endpoints={} endpoint health`",
            self.timeout,
            endpoints.join(",")
        )
    }
}

fn tls(tls: &super::EtcdTls) -> Result<ClientTlsConfig, EtcdError> {
    let mut config = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(&tls.ca)?));
    if let Some((certificate, key)) = &tls.identity {
        config = config.identity(Identity::from_pem(read(certificate)?, read(key)?));
    }
    Ok(config)
}

fn read(path: &Path) -> Result<Vec<u8>, EtcdError> {
    fs::read(path).map_err(|source: io::Error| EtcdError::File { path: path.to_owned(), source })
}

/// What a status says, down to its cause.
fn text(status: &tonic::Status) -> String {
    match std::error::Error::source(status) {
        Some(source) => format!("{}: {}", status.message(), crate::rt::root_cause(source)),
        None => status.message().to_owned(),
    }
}

/// Whether another endpoint or another moment may bring an answer. It may have been done all the same.
fn is_passing(status: &tonic::Status) -> bool {
    match status.code() {
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown | Code::Internal => true,
        Code::ResourceExhausted => status.message().contains("too many requests"),
        _ => false,
    }
}

/// Whether the token is missing or is not taken any more. It was not done.
fn wants_login(status: &tonic::Status) -> bool {
    ["invalid auth token", "user name is empty", "revision of auth store is old"]
        .iter()
        .any(|message| status.message().contains(message))
}

/// Whether the lease of the session is gone. It was not done.
pub(super) fn is_lease_gone(status: &tonic::Status) -> bool {
    status.message().contains("requested lease not found")
}

/// The end of the range of keys that start with `prefix`.
pub(super) fn range_end(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    while let Some(last) = end.pop() {
        if let Some(next) = last.checked_add(1) {
            end.push(next);
            return end;
        }
    }
    // Every key.
    vec![0]
}

/// Whether a refusal is of this process as such, and not of what it asked for.
pub(super) fn concerns_all(status: &tonic::Status) -> bool {
    matches!(status.code(), Code::Unauthenticated | Code::PermissionDenied | Code::FailedPrecondition)
        || ["user name is empty", "authentication failed", "database space exceeded"]
            .iter()
            .any(|message| status.message().contains(message))
}
