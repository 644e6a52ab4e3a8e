//! One program that is asked again and again.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use http::{Method, StatusCode};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until, timeout},
};
use tonic::{Code, transport::Channel};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use super::{
    adapter::{Adapter, FAST},
    etcd, generic, link,
    link::{HttpLink, RespLink},
    nats, patroni, redis,
    said::{Fault, Said, Whom},
    sight::{Heard, Target},
};
use crate::{
    model::{Role, format_duration},
    peers::{Peer, SeenMember},
    rt::{Tasks, root_cause},
};

/// How often etcd's list of members is asked for.
const MEMBERS_EVERY: Duration = Duration::from_secs(1);

/// Longest gRPC answer. A health response has two bytes.
const MESSAGE: usize = 1 << 10;

/// What came of a question.
#[derive(Debug)]
pub(super) struct Note {
    pub(super) target: Target,
    /// Which of the askers of this target it was.
    pub(super) serial: u64,
    /// When it came.
    pub(super) at: Instant,
    pub(super) outcome: Result<Heard, Fault>,
}

/// Asks one program.
#[derive(Debug)]
pub(super) struct Asker {
    speak: Speak,
    limit: Duration,
}

#[derive(Debug)]
enum Speak {
    Etcd { link: HttpLink, own: Arc<Peer>, members: Option<(Instant, BTreeSet<SeenMember>)> },
    Patroni { link: HttpLink, own: Arc<Peer> },
    Nats { link: HttpLink, own: Arc<Peer> },
    OpenRaft { link: HttpLink, own: Arc<Peer>, path: String },
    Http { link: HttpLink, path: String },
    Grpc { channel: Channel, service: String },
    Redis(RespLink),
    Sentinel { link: RespLink, master: String },
}

impl Asker {
    /// One for a replica, at the address that is to be asked.
    pub(super) fn replica(
        adapter: &Adapter,
        own: Arc<Peer>,
        address: std::net::SocketAddr,
        limit: Duration,
        tasks: &Tasks,
    ) -> Self {
        let link = || HttpLink::new(tasks.clone(), address);
        let speak = match adapter {
            Adapter::Etcd => Speak::Etcd { link: link(), own, members: None },
            Adapter::Patroni => Speak::Patroni { link: link(), own },
            Adapter::Nats => Speak::Nats { link: link(), own },
            Adapter::OpenRaft { path } => Speak::OpenRaft { link: link(), own, path: path.clone() },
            Adapter::Http { path } => Speak::Http { link: link(), path: path.clone() },
            Adapter::Redis { .. } => Speak::Redis(RespLink::new(address)),
            Adapter::Grpc { service } => {
                // An IP address and a port are always an address.
                let endpoint = Channel::builder(format!("http://{address}").parse().unwrap_or_default());
                let channel = endpoint.connect_timeout(limit).timeout(limit).connect_lazy();
                Speak::Grpc { channel, service: service.clone() }
            }
        };
        Self { speak, limit }
    }

    /// One for a sentinel.
    pub(super) fn sentinel(master: &str, address: std::net::SocketAddr, limit: Duration) -> Self {
        Self { speak: Speak::Sentinel { link: RespLink::new(address), master: master.to_owned() }, limit }
    }

    /// Asks until nobody listens any more, or the sender of the period is gone. A connection that breaks is tried again at once.
    pub(super) async fn run(
        mut self,
        target: Target,
        serial: u64,
        mut every: watch::Receiver<Duration>,
        notes: mpsc::Sender<Note>,
    ) {
        loop {
            let began = Instant::now();
            let outcome = tokio::select! {
                outcome = self.ask() => outcome,
                // A change of the period has its effect after the answer; the end has it now.
                () = ended(&mut every) => return,
            };
            if notes.send(Note { target, serial, at: Instant::now(), outcome }).await.is_err() {
                return;
            }
            let mut whole = true;
            loop {
                let period = *every.borrow_and_update();
                tokio::select! {
                    () = sleep_until(began + if whole { period } else { FAST }) => break,
                    () = self.broken(), if whole => whole = false,
                    changed = every.changed() => if changed.is_err() { return },
                }
            }
        }
    }

    /// Asks once, within the limit.
    pub(super) async fn ask(&mut self) -> Result<Heard, Fault> {
        let limit = self.limit;
        timeout(limit, self.speak.ask())
            .await
            .unwrap_or_else(|_| Err(Fault::Silent(format!("no answer within {}", format_duration(limit)))))
    }

    async fn broken(&mut self) {
        match &mut self.speak {
            Speak::Etcd { link, .. }
            | Speak::Patroni { link, .. }
            | Speak::Nats { link, .. }
            | Speak::OpenRaft { link, .. }
            | Speak::Http { link, .. } => link.broken().await,
            Speak::Redis(link) | Speak::Sentinel { link, .. } => link.broken().await,
            Speak::Grpc { .. } => std::future::pending().await,
        }
    }
}

async fn ended(every: &mut watch::Receiver<Duration>) {
    let mut every = every.clone();
    while every.changed().await.is_ok() {}
}

impl Speak {
    async fn ask(&mut self) -> Result<Heard, Fault> {
        let wrong = Fault::Wrong;
        let said = match self {
            Self::Etcd { link, own, members } => ask_etcd(link, own, members).await?,
            Self::Patroni { link, own } => {
                let body = get(link, patroni::CLUSTER).await?;
                patroni::read(&body, own).map_err(wrong)?
            }
            Self::Nats { link, own } => {
                let body = get(link, nats::RAFT).await?;
                nats::read(&body, own.key.as_str()).map_err(wrong)?
            }
            Self::OpenRaft { link, own, path } => {
                let body = get(link, path).await?;
                generic::openraft(&body, own.node).map_err(wrong)?
            }
            Self::Http { link, path } => {
                let (status, body) = link.ask(Method::GET, path, b"").await?;
                generic::probe(status.as_u16(), &body).map_err(wrong)?
            }
            Self::Grpc { channel, service } => ask_grpc(channel.clone(), service.clone()).await?,
            Self::Redis(link) => {
                let [answer] = link.ask([&["ROLE"]]).await?;
                redis::role(&answer).map_err(wrong)?
            }
            Self::Sentinel { link, master } => {
                let address: &[&str] = &["SENTINEL", "GET-MASTER-ADDR-BY-NAME", master];
                let [address, details] = link.ask([address, &["SENTINEL", "MASTER", master]]).await?;
                return redis::word(&address, &details).map(Heard::Word).map_err(wrong);
            }
        };
        Ok(Heard::Said(said))
    }
}

/// The body of an answer with status 200.
async fn get(link: &mut HttpLink, path: &str) -> Result<bytes::Bytes, Fault> {
    good(link.ask(Method::GET, path, b"").await?, path)
}

fn good((status, body): (StatusCode, bytes::Bytes), path: &str) -> Result<bytes::Bytes, Fault> {
    match status {
        StatusCode::OK => Ok(body),
        _ => Err(Fault::Wrong(format!("{path} was answered with {status}"))),
    }
}

async fn ask_etcd(
    link: &mut HttpLink,
    own: &Peer,
    known: &mut Option<(Instant, BTreeSet<SeenMember>)>,
) -> Result<Said, Fault> {
    let post = |path| (Method::POST, path, b"{}");
    let (method, path, body) = post(etcd::STATUS);
    let status = etcd::status(&good(link.ask(method, path, body).await?, path)?).map_err(Fault::Wrong)?;
    if let Some(said) = status.alone() {
        return Ok(said);
    }
    let members = match known.take() {
        Some((at, members)) if at.elapsed() < MEMBERS_EVERY && status.is_explained_by(&members) => {
            (at, members)
        }
        _ => {
            let (method, path, body) = post(etcd::MEMBERS);
            let body = good(link.ask(method, path, body).await?, path)?;
            (Instant::now(), etcd::members(&body).map_err(Fault::Wrong)?)
        }
    };
    let (_, members) = known.insert(members);
    status.said(members, own.at.raft).map_err(Fault::Wrong)
}

async fn ask_grpc(channel: Channel, service: String) -> Result<Said, Fault> {
    let mut client = HealthClient::new(channel).max_decoding_message_size(MESSAGE);
    let serving = match client.check(HealthCheckRequest { service }).await {
        Ok(answer) => answer.into_inner().status() == ServingStatus::Serving,
        // Who does not have the service does not lead.
        Err(status) if status.code() == Code::NotFound => false,
        Err(status) => return Err(unanswered(&status)),
    };
    let role = if serving { Role::Leader } else { Role::Follower };
    Ok(Said { role, leader: serving.then_some(Whom::Own), ..Said::default() })
}

fn unanswered(status: &tonic::Status) -> Fault {
    let mut cause: Option<&dyn std::error::Error> = Some(status);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<std::io::Error>()
            && error.kind() == std::io::ErrorKind::ConnectionRefused
        {
            return link::not_connected(error);
        }
        cause = error.source();
    }
    match status.code() {
        Code::DeadlineExceeded | Code::Cancelled => Fault::Silent(root_cause(status)),
        code => Fault::Wrong(format!("grpc.health.v1 answered {code:?}: {}", root_cause(status))),
    }
}
